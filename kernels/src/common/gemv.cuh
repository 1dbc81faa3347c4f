#include "common/early.cuh"
#include "common/weight.cuh"

// Products of a matrix with few rows, at the speed at which the matrix can be read. A lane asks for those
// weights that tensor cores take from it (16 rows, 8 columns of x at most), so that a weight costs few
// instructions, and no lane waits for another; shared memory holds what was asked for ahead. A product of two
// bf16 is exact, sums are f32. Codes of FP8 are exact in bf16; the scale of a block multiplies the sum over
// its columns.
//
// An f32 is the sum of three bf16, so that activations in f32 take three columns for one, and lose nothing.
// sm_90a (but for FP8 and early starts, sm_80).

// Columns that one 16-byte load of weights covers. A row has to be a multiple of it, and its address of 16.
template <class T> constexpr int PER = 16 / sizeof(T);

// In how many bf16 an activation is.
template <class T> constexpr int PIECES = 1;
template <> constexpr int PIECES<f32> = 3;

struct Words { unsigned at[4]; };

__device__ inline unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// 16 bytes to shared memory past the L1 cache, or as many zeros.
__device__ inline void copy16(unsigned to, const void* from, bool there)
{
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0)
                 : "memory");
}

__device__ inline Words read_shared(unsigned from)
{
    Words read;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(read.at[0]), "=r"(read.at[1]), "=r"(read.at[2]), "=r"(read.at[3])
                 : "r"(from) : "memory");
    return read;
}

__device__ inline Words read_words(const void* p)
{
    Words read;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(read.at[0]), "=r"(read.at[1]), "=r"(read.at[2]), "=r"(read.at[3])
                 : "l"(p));
    return read;
}

// Two numbers to a word, the first in the lower half.
__device__ inline unsigned bf16_pair(float first, float second)
{
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
}

// Two codes of FP8, in the lower half, as bf16. Every value is exact on the way, through f16 and f32.
__device__ inline unsigned bf16_of_codes(unsigned two)
{
    unsigned both;
    asm("{\n"
        ".reg .b32 halves;\n"
        ".reg .b16 first, second;\n"
        ".reg .f32 one, two;\n"
        "cvt.rn.f16x2.e4m3x2 halves, %1;\n"
        "mov.b32 {first, second}, halves;\n"
        "cvt.f32.f16 one, first;\n"
        "cvt.f32.f16 two, second;\n"
        "cvt.rn.bf16x2.f32 %0, two, one;\n"
        "}"
        : "=r"(both)
        : "h"((unsigned short)two));
    return both;
}

// d += a b of 16 rows, 8 columns and 16 terms.
__device__ inline void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// What a lane has of a row of x: PER<W> columns in bf16, two to a word.
template <int N> struct Columns { unsigned at[N / 2]; };

template <int N> __device__ Columns<N> columns(const bf16* x, int)
{
    Columns<N> all;
    for (int i = 0; i < N / 8; i++) {
        const Words read = read_words(x + 8 * i);
        for (int j = 0; j < 4; j++) all.at[4 * i + j] = read.at[j];
    }
    return all;
}

// The pieces of an f32 are its first 8 bits, the next 8 and the rest.
template <int N> __device__ Columns<N> columns(const f32* x, int which)
{
    const unsigned first = which == 0 ? 0 : 0xffff0000, second = which == 2 ? 0xffff0000 : 0;
    Columns<N> all;
    for (int i = 0; i < N / 4; i++) {
        const Words read = read_words(x + 4 * i);
        unsigned own[4];
        for (int j = 0; j < 4; j++) {
            float value = __uint_as_float(read.at[j]);
            value -= __uint_as_float(__float_as_uint(value) & first);
            value -= __uint_as_float(__float_as_uint(value) & second);
            own[j] = __float_as_uint(value);
        }
        for (int j = 0; j < 2; j++) all.at[2 * i + j] = __byte_perm(own[2 * j], own[2 * j + 1], 0x7632);
    }
    return all;
}

// A lane's part of 16 rows: its two rows, and of FP8 the scales of their blocks.
template <class T> struct Rows {
    const T* upper;
    const T* lower;
    const float* upper_scales;
    const float* lower_scales;
};

// Which row of x a lane reads for each set of 8 columns; none where p is 0.
template <class X> struct Column { const X* p; int piece; };

// Of 16 rows, columns that a warp takes at once; it goes by two such steps, 128 bytes of a row.
template <class T> constexpr int STEP = 4 * PER<T>;

// Steps that are asked for ahead, and the bytes of shared memory that they take of a warp.
constexpr int DEEP = 4;
constexpr int DEEP_BYTES = DEEP * 1024;

// Sums of this warp over the which-th, which + shares-th, … two steps; deep is its shared memory.
//
// sums[set]: row lane / 4 with columns 2 (lane % 4) and the next, then row lane / 4 + 8 with the same.
template <int SETS, class T, class X>
__device__ void gather(
    float (&sums)[SETS][4], Rows<T> rows, const Column<X> (&x)[SETS], int which, int shares, int D, unsigned deep)
{
    constexpr int N = PER<T>, TWO = 2 * STEP<T>, X_AHEAD = SETS == 1 ? 2 : 1;
    deep += threadIdx.x % 32 * 16;
    int d = which * TWO + threadIdx.x % 4 * N, asked = d, at = 0;
    const T *upper = rows.upper + asked, *lower = rows.lower + asked;
    const auto ask = [&](int i) {
        const bool there = asked + i * STEP<T> < D;
        const unsigned to = deep + at + i * 1024;
        copy16(to, upper + i * STEP<T>, there);
        copy16(to + 512, lower + i * STEP<T>, there);
        asm volatile("cp.async.commit_group;" ::: "memory");
        if (i == 1) {
            at ^= 2048;
            asked += shares * TWO, upper += shares * TWO, lower += shares * TWO;
        }
    };
    Columns<N> b[X_AHEAD][SETS];
    float scale[2] = {};  // Of the next two steps.
    const auto ask_x = [&](int i, int from) {
#pragma unroll
        for (int set = 0; set < SETS; set++) {
            b[i][set] = {};
            if (from < D && x[set].p) b[i][set] = columns<N>(x[set].p + from, x[set].piece);
        }
    };
    const auto ask_scale = [&](int from) {
        if (sizeof(T) == 1 && from / TWO * TWO < D) {
            scale[0] = rows.upper_scales[from / TWO];
            scale[1] = rows.lower_scales[from / TWO];
        }
    };
    static_assert(sizeof(T) != 1 || TWO == 128, "two steps have one scale");
#pragma unroll
    for (int i = 0; i < DEEP; i++) ask(i % 2);
    wait_for_previous();  // Weights are asked for before x is there.
    let_next_start();
#pragma unroll
    for (int i = 0; i < X_AHEAD; i++) ask_x(i, d + i * STEP<T>);
    ask_scale(d);

#pragma unroll
    for (int set = 0; set < SETS; set++)
        for (int r = 0; r < 4; r++) sums[set][r] = 0;
    for (; d / TWO * TWO < D; d += shares * TWO) {
        float block[SETS][4] = {};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            asm volatile("cp.async.wait_group %0;" ::"n"(DEEP - 1) : "memory");
            const Words above = read_shared(deep + at + i * 1024), below = read_shared(deep + at + i * 1024 + 512);
#pragma unroll
            for (int j = 0; j < N / 4; j++) {
                unsigned a[4];
                if constexpr (sizeof(T) == 1) {
                    a[0] = bf16_of_codes(above.at[j]), a[1] = bf16_of_codes(below.at[j]);
                    a[2] = bf16_of_codes(above.at[j] >> 16), a[3] = bf16_of_codes(below.at[j] >> 16);
                } else {
                    a[0] = above.at[2 * j], a[1] = below.at[2 * j];
                    a[2] = above.at[2 * j + 1], a[3] = below.at[2 * j + 1];
                }
#pragma unroll
                for (int set = 0; set < SETS; set++)
                    mma(sizeof(T) == 1 ? block[set] : sums[set], a, b[i % X_AHEAD][set].at[2 * j],
                        b[i % X_AHEAD][set].at[2 * j + 1]);
            }
            ask(i);
            ask_x(i % X_AHEAD, X_AHEAD == 2 ? d + shares * TWO + i * STEP<T>
                               : i == 0     ? d + STEP<T>
                                            : d + shares * TWO);
        }
        if constexpr (sizeof(T) == 1) {
            const float of_upper = scale[0], of_lower = scale[1];
            ask_scale(d + shares * TWO);
#pragma unroll
            for (int set = 0; set < SETS; set++) {
                sums[set][0] += of_upper * block[set][0], sums[set][1] += of_upper * block[set][1];
                sums[set][2] += of_lower * block[set][2], sums[set][3] += of_lower * block[set][3];
            }
        }
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
}

// Of columns that are the pieces of one number the sum, in the lanes that are a multiple of 4: row
// lane / 4 in upper, the row 8 further in lower.
template <int N> __device__ void join(const float (&sums)[4], float& upper, float& lower)
{
    upper = sums[0], lower = sums[2];
    if constexpr (N == 1) return;
    const float more = __shfl_down_sync(~0u, sums[0], 1), below = __shfl_down_sync(~0u, sums[2], 1);
    upper += sums[1] + more;
    lower += sums[3] + below;
}
