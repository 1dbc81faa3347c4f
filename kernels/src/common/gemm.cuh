#include "common/gemv.cuh"

// Products of a matrix with many rows, on the tensor cores of Hopper (sm_90a): tiles of ROW_TILE rows of
// weights and TOKEN_TILE rows of x, 64 columns at a time. Two groups of 128 threads multiply (wgmma), a
// third brings what they need into a ring of STAGES stages. Weights stand where the product has its rows,
// so that a thread holds outputs of one token that lie 8 rows apart.
//
// FP8: a third and a fourth group write codes out in bf16, which is exact, in turn; the scale of a block
// multiplies the sum over its columns.
//
// Activations in f32 come as P = 3 bf16 (see gemv.cuh), one after another for each 64 columns. What a tensor
// core adds to is cut off, not rounded: so sums of many columns are of sums over 128.
//
// What they ask for: addresses that are multiples of 16 bytes, rows of x and of weights too (D a multiple of
// 8, of 16 with FP8). One block of GEMM_THREADS threads (384, 512 with FP8) per multiprocessor, GEMM_SHARED
// bytes of dynamic shared memory; blocks walk through the tiles, however many there are of either.
template <class T> constexpr int GEMM_THREADS = sizeof(T) == 1 ? 512 : 384;
constexpr int TOKEN_TILE = 128;
constexpr int GEMM_SHARED = 231424;

// Blocks of 64 rows of a thread group: half as many where there are sums over 128 columns and over all.
template <class T, int P> constexpr int BLOCKS = sizeof(T) == 1 || P == 3 ? 1 : 2;
template <class T, int P> constexpr int ROW_TILE = 128 * BLOCKS<T, P>;
constexpr int STAGES = 4;
constexpr int CODES = 4;  // Of a group that brings codes: 64 columns that wait, and are asked for ahead.
template <class T, int P> constexpr int STAGE_BYTES = 128 * (ROW_TILE<T, P> + TOKEN_TILE);
constexpr int STAGING_BYTES = 64 * TOKEN_TILE * 2;  // Of a group: 64 rows in bf16.

__device__ inline void barrier_init(unsigned barrier, int arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ inline void barrier_arrive(unsigned barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives as soon as this thread's copies have.
__device__ inline void barrier_arrive_with_copies(unsigned barrier)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ inline void barrier_wait(unsigned barrier, unsigned parity)
{
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}" ::"r"(barrier), "r"(parity) : "memory");
}

// Of the 128 threads of a group.
__device__ inline void group_sync(int group)
{
    asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}

// What shared memory holds where rows of 128 bytes stand one after another, their 16-byte pieces in the
// order of the 128-byte swizzle, as the tensor core is told of it.
__device__ inline unsigned long long described(unsigned address)
{
    return 1ull << 62 | 64ull << 32 | 1ull << 16 | (address & 0x3ffff) >> 4;
}

// Writes of others to shared memory are seen by the tensor core. (Without, it was seen to miss some.)
__device__ inline void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ inline void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until no more than so many batches are under way.
template <int PENDING> __device__ inline void wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

#define KEEP_8(d, i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])

// d = a b, or d += a b, of 64 rows, 128 columns and 16 terms.
__device__ inline void wgmma(float (&d)[64], unsigned long long a, unsigned long long b, int add)
{
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        "setp.ne.b32 add, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, add, 1, 1, 0, 0;\n"
        "}"
        : KEEP_8(d, 0), KEEP_8(d, 8), KEEP_8(d, 16), KEEP_8(d, 24), KEEP_8(d, 32), KEEP_8(d, 40), KEEP_8(d, 48),
          KEEP_8(d, 56)
        : "l"(a), "l"(b), "r"(add));
}

// Where the parts of shared memory are, and how far a group is along the ring.
template <class T, int P> struct Ring {
    unsigned stages, barriers;
    unsigned step = 0;

    __device__ explicit Ring(unsigned base)
        : stages((base + 1023) & ~1023u), barriers(stages + STAGES * STAGE_BYTES<T, P> + 2 * STAGING_BYTES) {}

    __device__ unsigned slot() const { return step % STAGES; }
    __device__ unsigned weights() const { return stages + slot() * STAGE_BYTES<T, P>; }
    __device__ unsigned tokens() const { return weights() + 128 * ROW_TILE<T, P>; }
    __device__ unsigned staging(int group) const
    {
        return stages + STAGES * STAGE_BYTES<T, P> + group * STAGING_BYTES;
    }
    __device__ unsigned codes() const { return barriers + 128 + threadIdx.x / 128 % 2 * CODES * 8192; }
    __device__ unsigned full() const { return barriers + 8 * slot(); }
    __device__ unsigned empty() const { return barriers + 8 * (STAGES + slot()); }
    __device__ unsigned round() const { return step / STAGES & 1; }

    // All threads of the block, before anything else.
    __device__ void init() const
    {
        if (threadIdx.x == 0) {
            for (int i = 0; i < STAGES; i++) {
                barrier_init(barriers + 8 * i, sizeof(T) == 1 ? 256 : 128);
                barrier_init(barriers + 8 * (STAGES + i), 8);
            }
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        }
        __syncthreads();
    }
};

constexpr unsigned NO_ROW = ~0u;

// A tile, as the group that brings it sees it.
template <class T, int P> struct Brought {
    const T* rows[2 * BLOCKS<T, P>];  // First rows of each block of 64.
    int there[2 * BLOCKS<T, P>];      // How many of them there are.
    const bf16* x;
    unsigned x_at[8];              // Rows of this thread (threadIdx.x % 128 / 8, each 16th after it), in 16 bytes.
    size_t pieces_apart;           // From a piece of x to the next, in numbers.
    int D;
    int steps;                     // Of 64 columns.
};

template <class T, int P>
__device__ void bring_x(const Brought<T, P>& tile, const Ring<T, P>& ring, int k, int part)
{
    const int own = threadIdx.x % 128, row = own / 8, d = 64 * k + own % 8 * 8;
    const unsigned to = ring.tokens() + row * 128 + ((own ^ row) % 8 << 4);
    const bf16* from = tile.x + (d < tile.D ? d : 0) + (P == 1 ? 0 : part * tile.pieces_apart);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const bool there = d < tile.D && tile.x_at[i] != NO_ROW;
        copy16(to + i * 2048, from + (there ? 8 * (size_t)tile.x_at[i] : 0), there);
    }
}

// Brings a tile of weights in bf16.
template <int P> __device__ void bring(const Brought<bf16, P>& tile, Ring<bf16, P>& ring)
{
    const int own = threadIdx.x % 128, row = own / 8;
    for (int k = 0; k < tile.steps; k++) {
        const int d = 64 * k + own % 8 * 8;
        const bool in = d < tile.D;
#pragma unroll 1
        for (int part = 0; part < P; part++, ring.step++) {
            barrier_wait(ring.empty(), ring.round() ^ 1);
            const unsigned to = ring.weights() + row * 128 + ((own ^ row) % 8 << 4);
#pragma unroll
            for (int i = 0; i < 4 * 2 * BLOCKS<bf16, P>; i++) {
                const int at = i % 4 * 16 + row;
                const bool there = in && at < tile.there[i / 4];
                copy16(to + i * 2048, tile.rows[i / 4] + (there ? (size_t)at * tile.D + d : 0), there);
            }
            bring_x(tile, ring, k, part);
            barrier_arrive_with_copies(ring.full());
        }
    }
}

// Brings a tile of codes, and writes them out; two groups, each every other 64 columns. Codes wait in shared
// memory, where a thread finds its own.
template <int P> __device__ void bring(const Brought<Fp8, P>& tile, Ring<Fp8, P>& ring)
{
    const int own = threadIdx.x % 128, row = own / 4;
    const unsigned begin = ring.step, codes = ring.codes() + 16 * own;
    const int first = (begin / P + threadIdx.x / 128) % 2;
    const auto ask = [&](int k) {
        const int d = 64 * k + own % 4 * 16;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int at = i % 2 * 32 + row;
            const bool there = d < tile.D && at < tile.there[i / 2];
            const Fp8* from = tile.rows[i / 2] + (there ? (size_t)at * tile.D + d : 0);
            copy16(codes + k / 2 % CODES * 8192 + i * 2048, from, there);
        }
    };
#pragma unroll
    for (int i = 0; i < CODES - 1; i++) {
        ask(first + 2 * i);
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    for (int k = first; k < tile.steps; k += 2) {
        ask(k + 2 * (CODES - 1));
#pragma unroll 1
        for (int part = 0; part < P; part++) {
            ring.step = begin + k * P + part;
            barrier_wait(ring.empty(), ring.round() ^ 1);
            bring_x(tile, ring, k, part);
            barrier_arrive_with_copies(ring.full());
            if (part == 0) asm volatile("cp.async.commit_group;" ::: "memory");
            asm volatile("cp.async.wait_group %0;" ::"n"(CODES - 1) : "memory");
            const unsigned to = ring.weights() + row * 128;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const Words four = read_shared(codes + k / 2 % CODES * 8192 + i * 2048);
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const unsigned one = four.at[2 * half], two = four.at[2 * half + 1];
                    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(
                                     to + i * 4096 + (((own % 4 * 2 + half) ^ row % 8) << 4)),
                                 "r"(bf16_of_codes(one)), "r"(bf16_of_codes(one >> 16)), "r"(bf16_of_codes(two)),
                                 "r"(bf16_of_codes(two >> 16))
                                 : "memory");
                }
            }
            barrier_arrive(ring.full());  // Who multiplies fences: here it would wait for all copies.
        }
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    ring.step = begin + tile.steps * P;
}

// The products of one stage.
template <class T, int P> __device__ void multiply(float (&d)[BLOCKS<T, P>][64], const Ring<T, P>& ring, bool add)
{
    const int group = threadIdx.x / 128;
    barrier_wait(ring.full(), ring.round());
    fence_shared();
    wgmma_begin();
    const unsigned long long a = described(ring.weights() + group * BLOCKS<T, P> * 8192);
    const unsigned long long b = described(ring.tokens());
#pragma unroll
    for (int k = 0; k < 4; k++)
#pragma unroll
        for (int block = 0; block < BLOCKS<T, P>; block++)
            wgmma(d[block], a + block * 512 + 2 * k, b + 2 * k, add || 0 < k);
    wgmma_end();
}

// The stage so many before is read: once by each warp.
template <class T, int P> __device__ void release(const Ring<T, P>& ring, int before)
{
    const unsigned slot = (ring.step - before) % STAGES;
    if (threadIdx.x % 32 == 0) barrier_arrive(ring.barriers + 8 * (STAGES + slot));
}

// Sums of a tile.
template <class T>
__device__ void consume(float (&sums)[2][64], Ring<T, 1>& ring, int steps, const float*)
{
    for (int k = 0; k < steps; k++) {
        multiply(sums, ring, 0 < k);
        wgmma_wait<1>();
        if (0 < k) release(ring, 1);
        ring.step++;
    }
    wgmma_wait<0>();
    release(ring, 1);
}

// The same of sums over 128 columns; scales of FP8 are those of the rows of this group.
template <class T, int P>
__device__ void consume(float (&sums)[1][64], Ring<T, P>& ring, int steps, const float* scales)
{
#pragma unroll
    for (int i = 0; i < 64; i++) sums[0][i] = 0;
    for (int k = 0; k < steps; k += 2) {
        const int of_block = min(2, steps - k) * P;
        float block[1][64];
        float scale = 1;
        for (int i = 0; i < of_block; i++) {
            multiply(block, ring, 0 < i);
            if (sizeof(T) == 1 && i == 0)  // It comes while the tensor core is at work.
                asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(scale) : "l"(scales + k / 2));
            wgmma_wait<1>();
            if (0 < i) release(ring, 1);
            ring.step++;
        }
        wgmma_wait<0>();
        release(ring, 1);
#pragma unroll
        for (int i = 0; i < 64; i++) sums[0][i] += scale * block[0][i];
    }
}

// 64 rows of 128 tokens in bf16 to memory: row m0 + r of token n to out(n)[m0 + r], where out(n) is not 0 and
// the row is below M. value(i) is what the thread has: of row 16 warp + lane / 4 (and 8 further where i & 2)
// and token 8 (i / 4) + 2 (lane % 4) + (i & 1).
template <class Value, class Out>
__device__ void write_bf16(unsigned staging, int m0, int M, Value value, Out out)
{
    const int own = threadIdx.x % 128, warp = own / 32, lane = own % 32, group = threadIdx.x / 128;
    bf16* rows[8];
#pragma unroll
    for (int i = 0; i < 8; i++) rows[i] = out(16 * i + own / 8);
#pragma unroll
    for (int q = 0; q < 16; q += 2) {
        const int n = 8 * (q + lane / 16) + lane % 8, piece = 2 * warp + lane / 8 % 2;
        const unsigned to = staging + n * 128 + ((piece ^ n % 8) << 4);
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                     "r"(bf16_pair(value(4 * q), value(4 * q + 1))),
                     "r"(bf16_pair(value(4 * q + 2), value(4 * q + 3))),
                     "r"(bf16_pair(value(4 * q + 4), value(4 * q + 5))),
                     "r"(bf16_pair(value(4 * q + 6), value(4 * q + 7)))
                     : "memory");
    }
    group_sync(group);
    const int piece = own % 8, m = m0 + 8 * piece;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int n = 16 * i + own / 8;
        const Words read = read_shared(staging + n * 128 + ((piece ^ n % 8) << 4));
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
    group_sync(group);
}

// The same in f32, as it is.
template <class Value, class Out> __device__ void write_f32(int m0, int M, Value value, Out out)
{
    const int own = threadIdx.x % 128, m = m0 + own / 32 * 16 + own % 32 / 4;
#pragma unroll
    for (int i = 0; i < 64; i += 4) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            f32* to = out(2 * i + own % 4 * 2 + j);
            if (!to) continue;
            if (m < M) to[m] = value(i + j);
            if (m + 8 < M) to[m + 8] = value(i + j + 2);
        }
    }
}

template <class Value, class Out>
__device__ void write(bf16, unsigned staging, int m0, int M, Value value, Out out)
{
    write_bf16(staging, m0, M, value, out);
}

template <class Value, class Out>
__device__ void write(f32, unsigned, int m0, int M, Value value, Out out)
{
    write_f32(m0, M, value, out);
}

// Registers go from the groups that bring to those that multiply.
template <class T, int P> __device__ void take_registers()
{
    if constexpr (sizeof(T) == 1) asm volatile("setmaxnreg.inc.sync.aligned.u32 168;");
    else if constexpr (P == 1) asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
}

template <class T, int P> __device__ void give_registers()
{
    if constexpr (sizeof(T) == 1) asm volatile("setmaxnreg.dec.sync.aligned.u32 88;");
    else if constexpr (P == 1) asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
}

// An f32 in its three pieces: pieces[p][i] of x[i], i < n.
__device__ inline void split(bf16* pieces, const f32* x, size_t n, size_t i)
{
    float rest = x[i];
    for (int p = 0; p < 3; p++) {
        pieces[p * n + i] = store<bf16>(rest);
        rest -= load(pieces[p * n + i]);
    }
}
