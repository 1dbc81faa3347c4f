#include "common/gemm.cuh"
#include "common/w8a8.cuh"

// Products of activations in FP8 with weights in FP8, on the tensor cores of Hopper (sm_90a). A tensor core
// keeps 13 bits of a sum of products of codes, so that it adds up one group, and what is beyond that is f32.
//
// Tiles of 128 tokens and 128 rows of weights, a group of columns at a time. Two groups of 128 threads
// multiply (wgmma), 64 tokens each; a third brings codes into a ring of W8A8_STAGES stages. Tokens stand where
// the product has its rows, so that all that a thread sums has two scales of tokens.
//
// What they ask for: addresses and D that are multiples of 16. One block of W8A8_THREADS threads per
// multiprocessor, GEMM_SHARED bytes of dynamic shared memory; blocks walk through the tiles.
constexpr int W8A8_TILE = 128;
constexpr int W8A8_THREADS = 384;
constexpr int W8A8_STAGES = 6;
constexpr int CODES_BYTES = W8A8_TILE * GROUP;  // Of a stage: those of tokens, then those of weights.
constexpr int OWN_BYTES = 128;                  // Of a thread that multiplies, for itself or its warp.

static_assert(1024 + W8A8_STAGES * (2 * CODES_BYTES + 16) + 256 * OWN_BYTES <= GEMM_SHARED, "it fits");

// Two codes, the first in the lower byte; what is beyond 448 saturates.
__device__ inline unsigned codes_of(float first, float second)
{
    unsigned short both;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(second), "f"(first));
    return both;
}

// 8 neighbours in f32.
__device__ inline void read_eight(float (&to)[8], const bf16* from)
{
    const Words all = read_words(from);
#pragma unroll
    for (int i = 0; i < 8; i++) to[i] = __uint_as_float(i % 2 ? all.at[i / 2] & 0xffff0000 : all.at[i / 2] << 16);
}

__device__ inline void read_eight(float (&to)[8], const f32* from)
{
    const Words low = read_words(from), high = read_words(from + 4);
#pragma unroll
    for (int i = 0; i < 8; i++) to[i] = __uint_as_float(i < 4 ? low.at[i] : high.at[i % 4]);
}

// Activations in groups, half a warp each. `counted`: columns in which the largest is looked for.
template <class X>
__device__ void quantise(unsigned char* codes, float* scales, const X* x, int N, int D, int counted)
{
    const int across = ceil_div(D, GROUP), own = threadIdx.x % 16;
    const size_t group = (size_t)blockIdx.x * (blockDim.x / 16) + threadIdx.x / 16, n = group / across;
    const int d = group % across * GROUP + 8 * own;
    const bool there = n < (size_t)N && d < D;
    float values[8] = {}, largest = 0;
    if (there) read_eight(values, x + n * D + d);
    if (8 * own < counted)
        for (int i = 0; i < 8; i++) largest = fmaxf(largest, fabsf(values[i]));
#pragma unroll
    for (int apart = 8; 0 < apart; apart /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, apart));
    const float scale = scale_of(largest);
    unsigned words[2] = {};
    for (int i = 0; i < 8; i += 2)
        words[i / 4] |= codes_of(in_steps(values[i], scale), in_steps(values[i + 1], scale)) << 8 * (i % 4);
    if (there) *(uint2*)(codes + n * D + d) = {words[0], words[1]};
    if (own == 0 && n < (size_t)N) scales[group] = scale;
}

// d = a b, or d += a b, of 64 tokens, 128 rows of weights and 32 terms.
__device__ inline void wgmma_e4m3(float (&d)[64], unsigned long long a, unsigned long long b, int add)
{
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        "setp.ne.b32 add, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, add, 1, 1;\n"
        "}"
        : KEEP_8(d, 0), KEEP_8(d, 8), KEEP_8(d, 16), KEEP_8(d, 24), KEEP_8(d, 32), KEEP_8(d, 40), KEEP_8(d, 48),
          KEEP_8(d, 56)
        : "l"(a), "l"(b), "r"(add));
}

// Registers go from the group that brings to those that multiply.
__device__ inline void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 40;"); }
__device__ inline void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 232;"); }

// Where the parts of shared memory are, and how far a group of threads is along the ring.
struct CodeRing {
    unsigned stages;
    unsigned step = 0;

    __device__ explicit CodeRing(unsigned base) : stages((base + 1023) & ~1023u) {}

    __device__ unsigned slot() const { return step % W8A8_STAGES; }
    __device__ unsigned tokens() const { return stages + slot() * 2 * CODES_BYTES; }
    __device__ unsigned weights() const { return tokens() + CODES_BYTES; }
    // Of a warp, one after another: OWN_BYTES for each of its threads.
    __device__ unsigned own(int warp) const
    {
        return stages + W8A8_STAGES * 2 * CODES_BYTES + warp * 32 * OWN_BYTES;
    }
    __device__ unsigned barriers() const { return own(8); }
    __device__ unsigned full() const { return barriers() + 8 * slot(); }
    __device__ unsigned empty() const { return barriers() + 8 * (W8A8_STAGES + slot()); }
    __device__ unsigned round() const { return step / W8A8_STAGES & 1; }

    // All threads of the block, before anything else.
    __device__ void init() const
    {
        if (threadIdx.x == 0) {
            for (int i = 0; i < W8A8_STAGES; i++) {
                barrier_init(barriers() + 8 * i, 128);
                barrier_init(barriers() + 8 * (W8A8_STAGES + i), 8);
            }
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        }
        __syncthreads();
    }
};

// A tile, as the group that brings it sees it.
struct BroughtCodes {
    const unsigned char* rows[2];  // First rows of weights of each block of 64.
    int there[2];                  // How many of them there are.
    const unsigned char* x;
    unsigned x_at[8];              // Rows of this thread (threadIdx.x % 128 / 8, each 16th after it), in 16 bytes.
    int D;
    int summed;                    // Columns that are.
};

__device__ inline void bring(const BroughtCodes& tile, CodeRing& ring)
{
    const int own = threadIdx.x % 128, row = own / 8;
    for (int k = 0; k * GROUP < tile.summed; k++, ring.step++) {
        const int d = GROUP * k + own % 8 * 16;
        const bool in = d < tile.summed;
        const unsigned to = row * 128 + ((own ^ row) % 8 << 4);
        barrier_wait(ring.empty(), ring.round() ^ 1);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const bool there = in && tile.x_at[i] != NO_ROW;
            copy16(ring.tokens() + to + i * 2048, tile.x + (there ? 16 * (size_t)tile.x_at[i] + d : 0), there);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int at = i % 4 * 16 + row;
            const bool there = in && at < tile.there[i / 4];
            copy16(ring.weights() + to + i * 2048, tile.rows[i / 4] + (there ? (size_t)at * tile.D + d : 0), there);
        }
        barrier_arrive_with_copies(ring.full());
    }
}

// Scales of what a thread sums, a group after another: those of its two tokens (row lane / 4 of 16, and 8 further)
// and of the two blocks of 64 rows of weights.
struct GroupScales { const float *tokens[2], *weights[2]; };

// Sums of a tile: sums[i] is of token 16 warp + lane / 4 (and 8 further where i & 2) and of row
// 8 (i / 4) + 2 (lane % 4) + (i & 1) of the weights. The tensor core goes on with the next group while one is scaled.
__device__ inline void consume(
    float (&sums)[64], CodeRing& ring, int groups, const GroupScales& scales, Scaling scaling)
{
    struct Block { float sums[64], of_tokens[2], of_weights[2]; } even, odd;
    const auto begin = [&](Block& block, int k) {
        barrier_wait(ring.full(), ring.round());
        fence_shared();
        wgmma_begin();
        const unsigned long long a = described(ring.tokens() + threadIdx.x / 128 * 64 * GROUP);
        const unsigned long long b = described(ring.weights());
#pragma unroll
        for (int i = 0; i < 4; i++) wgmma_e4m3(block.sums, a + 2 * i, b + 2 * i, 0 < i);
        wgmma_end();
        int at = k;
        if (scaling == Scaling::OF_NEXT_GROUP && 1 < groups) at += k + 1 < groups ? 1 : -1;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(block.of_tokens[i]) : "l"(scales.tokens[i] + at));
            asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(block.of_weights[i]) : "l"(scales.weights[i] + k));
            if (scaling == Scaling::FORGOTTEN) block.of_tokens[i] = 1;
        }
        ring.step++;
    };
    // Of a block that is there; `after` it so many were begun.
    const auto add = [&](Block& block, int after, bool last) {
        const unsigned slot = (ring.step - 1 - after) % W8A8_STAGES;
        if (threadIdx.x % 32 == 0) barrier_arrive(ring.barriers() + 8 * (W8A8_STAGES + slot));
        float both[2][2];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float scale = block.of_weights[i / 2] * block.of_tokens[i % 2];
            both[i / 2][i % 2] = scaling == Scaling::AT_THE_END && !last ? 1 : scale;
        }
#pragma unroll
        for (int i = 0; i < 64; i++) {
            const float scale = both[i / 32][i / 2 % 2];
            sums[i] = scaling == Scaling::AT_THE_END ? scale * (sums[i] + block.sums[i])
                                                     : __fmaf_rn(scale, block.sums[i], sums[i]);
        }
    };
#pragma unroll
    for (int i = 0; i < 64; i++) sums[i] = 0;
    begin(even, 0);
    int k = 1;
    for (; k + 1 < groups; k += 2) {
        begin(odd, k);
        wgmma_wait<1>();
        add(even, 1, false);
        begin(even, k + 1);
        wgmma_wait<1>();
        add(odd, 1, false);
    }
    if (k < groups) {
        begin(odd, k);
        wgmma_wait<1>();
        add(even, 1, false);
        wgmma_wait<0>();
        add(odd, 0, true);
    } else {
        wgmma_wait<0>();
        add(even, 0, true);
    }
}

// 16 tokens of a warp: row m0 + r of the weights of token n to out(n)[m0 + r], where out(n) is not 0 and the row is
// below M. value(i) as sums of a tile.
template <class Value, class Out>
__device__ void write_tokens(bf16, unsigned own, int m0, int M, Value value, Out out)
{
    const int lane = threadIdx.x % 32;
    bf16* rows[8];
#pragma unroll
    for (int i = 0; i < 8; i++) rows[i] = out(2 * i + lane / 16);
#pragma unroll
    for (int q = 0; q < 16; q += 2) {
        const int n = lane % 16, piece = q + lane / 16;
        const unsigned to = own + n * 256 + ((piece ^ n % 8) << 4);
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                     "r"(bf16_pair(value(4 * q), value(4 * q + 1))),
                     "r"(bf16_pair(value(4 * q + 2), value(4 * q + 3))),
                     "r"(bf16_pair(value(4 * q + 4), value(4 * q + 5))),
                     "r"(bf16_pair(value(4 * q + 6), value(4 * q + 7)))
                     : "memory");
    }
    __syncwarp();
    const int piece = lane % 16, m = m0 + 8 * piece;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int n = 2 * i + lane / 16;
        const Words read = read_shared(own + n * 256 + ((piece ^ n % 8) << 4));
        bf16* to = rows[i];
        if (!to) continue;
        if (M % 8 == 0 && m < M) {
            asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to + m), "r"(read.at[0]), "r"(read.at[1]),
                         "r"(read.at[2]), "r"(read.at[3]) : "memory");
        } else {
#pragma unroll
            for (int j = 0; j < 8; j++)
                if (m + j < M) to[m + j].bits = (unsigned short)(read.at[j / 2] >> 16 * (j % 2));
        }
    }
    __syncwarp();
}

// The same in f32, as it is.
template <class Value, class Out>
__device__ void write_tokens(f32, unsigned, int m0, int M, Value value, Out out)
{
    const int lane = threadIdx.x % 32;
    f32* rows[2] = {out(lane / 4), out(lane / 4 + 8)};
#pragma unroll
    for (int i = 0; i < 64; i++) {
        f32* to = rows[i / 2 % 2];
        const int m = m0 + 8 * (i / 4) + lane % 4 * 2 + i % 2;
        if (to && m < M) to[m] = value(i);
    }
}

// Words of four threads change places: words[i] of thread t was words[t] of thread i.
__device__ inline void turn(unsigned (&words)[4])
{
#pragma unroll
    for (int apart = 1; apart < 4; apart *= 2) {
        const bool upper = threadIdx.x & apart;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & apart) continue;
            const unsigned got = __shfl_xor_sync(~0u, upper ? words[i] : words[i + apart], apart);
            (upper ? words[i] : words[i + apart]) = got;
        }
    }
}
