// Linear projection: o[n, m] = sum_d x[n, d] weight[m, d].
//
// E is bf16 or f32, W is bf16 or Fp8. Tensors start at multiples of 16 bytes; D is a multiple of 8, of 16
// with Fp8. P = 1 with E bf16, 3 with f32.
//
// linear_gemv:    weights are read once for 8 rows of x. Grid [G, ceil(N / 8)], T threads (a power of two), and
//                 T (128 + 16 P) bytes of dynamic shared memory. A block takes 16 rows of weights, or where
//                 G < ceil(M / 16) twice as many until that is enough, and its warps share their columns. T = 128
//                 from M = 6400 on, else 512; G = ceil(M / 16), with Fp8 half of it from M = 12288 on.
// linear_gemv_32: the same for 32 rows of x. Grid [ceil(M / 16), ceil(N / 32)], 256 threads, 256 (128 + 64 P)
//                 bytes of dynamic shared memory.
// linear_split:   pieces of x for linear_gemm, where E is f32. Grid [ceil(N D / 256)], 256 threads.
// linear_gemm:    tiles for many rows of x (gemm.cuh). Grid: one block a multiprocessor, 384 threads (512 with
//                 Fp8), 231424 bytes of dynamic shared memory. Workspace with E f32: pieces, 6 N D bytes.
//
// W8A8, where W is Fp8: activations in codes as well (gemm_w8a8.cuh), in order of launch.
//
// linear_w8a8_quantise: grid [ceil(N ceil(D / 128) / 16)], 256 threads. Workspace: x_codes, N D bytes; x_scales,
//                       4 N ceil(D / 128) bytes.
// linear_w8a8_gemm:     grid: one block a multiprocessor, 384 threads, 231424 bytes of dynamic shared memory.
//
// The first two may be launched to start before the kernel before has ended; the others not.

#include "common/gemm_w8a8.cuh"

enum Plant {
    HONEST,
    LAST_BLOCK_DROPPED,
    LAST_ROW_SHIFTED,
    UNIFORM_SCALE,
    SCALE_OF_NEIGHBOUR,
    LAST_TOKEN_STALE,
    SCALE_OF_NEXT_GROUP,
    ACTIVATION_SCALE_FORGOTTEN,
    SCALED_AT_THE_END,
    LARGEST_OF_A_QUARTER,
};

__device__ inline Scaling scaling(int plant)
{
    return plant == SCALE_OF_NEXT_GROUP          ? Scaling::OF_NEXT_GROUP
           : plant == ACTIVATION_SCALE_FORGOTTEN ? Scaling::FORGOTTEN
           : plant == SCALED_AT_THE_END          ? Scaling::AT_THE_END
                                                 : Scaling::HONEST;
}

// Columns that are summed.
__device__ inline int summed(int D, int plant)
{
    return plant == LAST_BLOCK_DROPPED && 64 < D ? (D - 1) / 64 * 64 : D;
}

// Where the scales of a row start.
__device__ inline const float* scales_of(const float* scales, int row, int M, int D, int plant)
{
    int block = row / 128;
    if (plant == SCALE_OF_NEIGHBOUR && 128 < M) block += block + 1 < ceil_div(M, 128) ? 1 : -1;
    return scales + (size_t)block * ceil_div(D, 128);
}

// Rows of x from n0 on: sets of 8, or where SIDE_BY_SIDE at most 2 whose pieces are columns of one set.
template <int SETS, bool SIDE_BY_SIDE>
__device__ void gemv(
    E* o, const E* x, const W* weight, const float* scales, int n0, int N, int M, int D, int plant)
{
    extern __shared__ __align__(16) char shared[];
    constexpr int P = PIECES<E>, TOKENS = SIDE_BY_SIDE ? 8 / P : SETS / P * 8;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    float* parts = (float*)(shared + warps * DEEP_BYTES);  // [warps, SETS, 32, 4]
    Column<E> columns[SETS];
    for (int set = 0; set < SETS; set++) {
        const int of = SIDE_BY_SIDE ? lane / 4 / P : set / P * 8 + lane / 4;
        const int n = n0 + of - (plant == LAST_TOKEN_STALE && 0 < n0 + of && n0 + of == N - 1);
        columns[set].p = of < TOKENS && n0 + of < N ? x + (size_t)n * D : nullptr;
        columns[set].piece = SIDE_BY_SIDE ? lane / 4 % P : set % P;
    }

    const int tiles = ceil_div(M, 16);
    int together = 1;  // Tiles of a block at the same time; the warps of a tile share its columns.
    while (together < warps && together * gridDim.x < tiles) together *= 2;
    const int sharing = warps / together;
    for (int tile0 = together * blockIdx.x; tile0 < tiles; tile0 += together * gridDim.x) {
        const int m = 16 * (tile0 + warp / sharing) + lane / 4;
        int upper = min(m, M - 1), lower = min(m + 8, M - 1);
        if (plant == LAST_ROW_SHIFTED && 1 < M) upper -= upper == M - 1, lower -= lower == M - 1;
        const Rows<W> rows = {weight + (size_t)upper * D, weight + (size_t)lower * D,
                              scales_of(scales, upper, M, D, plant), scales_of(scales, lower, M, D, plant)};
        float sums[SETS][4];
        gather(sums, rows, columns, warp % sharing, sharing, summed(D, plant),
               shared_address(shared) + warp * DEEP_BYTES);
        for (int set = 0; set < SETS; set++)
            for (int i = 0; i < 4; i++) parts[((warp * SETS + set) * 32 + lane) * 4 + i] = sums[set][i];
        __syncthreads();

        for (int i = threadIdx.x; i < 16 * together * TOKENS; i += blockDim.x) {
            const int row = i % (16 * together), n = i / (16 * together), first = row / 16 * sharing;
            float all = 0;
            for (int w = first; w < first + sharing; w++) {
                for (int p = 0; p < P; p++) {
                    const int set = SIDE_BY_SIDE ? 0 : n / 8 * P + p, column = SIDE_BY_SIDE ? n * P + p : n % 8;
                    const int of = row % 8 * 4 + column / 2;
                    all += parts[((w * SETS + set) * 32 + of) * 4 + row % 16 / 8 * 2 + column % 2];
                }
            }
            if (n0 + n < N && 16 * tile0 + row < M)
                o[(size_t)(n0 + n) * M + 16 * tile0 + row] =
                    store<E>(plant == UNIFORM_SCALE ? 1.004f * all : all);
        }
        __syncthreads();
    }
}

extern "C" __global__ void __launch_bounds__(512) linear_gemv(
    E* __restrict__ o,                       // [N, M]
    const E* __restrict__ x,                 // [N, D]
    const W* __restrict__ weight,            // [M, D]
    const float* __restrict__ weight_scales,  // of codes
    int N,
    int M,
    int D,
    int plant)
{
    const int n0 = 8 * blockIdx.y;
    if (1 < PIECES<E> && N <= 2)
        gemv<1, true>(o, x, weight, weight_scales, n0, N, M, D, plant);
    else
        gemv<PIECES<E>, false>(o, x, weight, weight_scales, n0, N, M, D, plant);
}

extern "C" __global__ void __launch_bounds__(256) linear_gemv_32(
    E* __restrict__ o,                       // [N, M]
    const E* __restrict__ x,                 // [N, D]
    const W* __restrict__ weight,            // [M, D]
    const float* __restrict__ weight_scales,  // of codes
    int N,
    int M,
    int D,
    int plant)
{
    gemv<4 * PIECES<E>, false>(o, x, weight, weight_scales, 32 * blockIdx.y, N, M, D, plant);
}

extern "C" __global__ void linear_split(
    bf16* __restrict__ pieces,  // [3, N, D]
    const f32* __restrict__ x,  // [N, D]
    int N,
    int D)
{
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, n = (size_t)N * D;
    if (i < n) split(pieces, x, n, i);
}

// A tile's first row of weights and first token. Tiles that are computed at the same time share both: 16
// tiles of tokens, then on to other rows.
struct Where { int m0, n0; };

template <int ROWS = ROW_TILE<W, PIECES<E>>> __device__ Where where(int tile, int M, int N)
{
    constexpr int TOGETHER = 16;
    const int across = ceil_div(M, ROWS), down = ceil_div(N, TOKEN_TILE);
    const int group = tile / (TOGETHER * across), first = group * TOGETHER, high = min(TOGETHER, down - first);
    const int within = tile - group * TOGETHER * across;
    return {within / high * ROWS, (first + within % high) * TOKEN_TILE};
}

extern "C" __global__ void __launch_bounds__(GEMM_THREADS<W>, 1) linear_gemm(
    E* __restrict__ o,                       // [N, M]
    const E* __restrict__ x,                 // [N, D]
    const bf16* __restrict__ pieces,         // [3, N, D] where E is f32
    const W* __restrict__ weight,            // [M, D]
    const float* __restrict__ weight_scales,  // of codes
    int N,
    int M,
    int D,
    int plant)
{
    extern __shared__ char shared[];
    constexpr int P = PIECES<E>;
    Ring<W, P> ring(shared_address(shared));
    ring.init();
    const bf16* rows = P == 1 ? (const bf16*)x : pieces;
    const int group = threadIdx.x / 128, tiles = ceil_div(M, ROW_TILE<W, P>) * ceil_div(N, TOKEN_TILE);
    const int steps = ceil_div(summed(D, plant), 64);

    if (2 <= group) {
        give_registers<W, P>();
        for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            const Where at = where<>(tile, M, N);
            Brought<W, P> all;
#pragma unroll
            for (int i = 0; i < 2 * BLOCKS<W, P>; i++) {
                all.there[i] = min(max(M - at.m0 - 64 * i, 0), 64);
                all.rows[i] = weight + (all.there[i] ? (size_t)(at.m0 + 64 * i) * D : 0);
            }
#pragma unroll
            for (int i = 0; i < 8; i++) {
                int n = at.n0 + 16 * i + threadIdx.x % 128 / 8;
                if (plant == LAST_TOKEN_STALE && n == N - 1 && 0 < n) n -= 1;
                all.x_at[i] = n < N ? (unsigned)((size_t)n * D / 8) : NO_ROW;
            }
            all.x = rows, all.pieces_apart = (size_t)N * D, all.D = D, all.steps = steps;
            bring(all, ring);
        }
        return;
    }

    take_registers<W, P>();
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const Where at = where<>(tile, M, N);
        float sums[BLOCKS<W, P>][64];
        consume(sums, ring, steps, scales_of(weight_scales, at.m0, M, D, plant));
        const auto out = [&](int n) { return at.n0 + n < N ? o + (size_t)(at.n0 + n) * M : nullptr; };
#pragma unroll
        for (int block = 0; block < BLOCKS<W, P>; block++) {
            const auto value = [&](int i) {
                return plant == UNIFORM_SCALE ? 1.004f * sums[block][i] : sums[block][i];
            };
            const int m0 = at.m0 + 64 * (BLOCKS<W, P> * group + block);
            write(E(), ring.staging(group), m0, M, value, out);
        }
    }
}

extern "C" __global__ void linear_w8a8_quantise(
    unsigned char* __restrict__ x_codes,  // [N, D]
    float* __restrict__ x_scales,         // [N, ceil(D / 128)]
    const E* __restrict__ x,              // [N, D]
    int N,
    int D,
    int plant)
{
    quantise(x_codes, x_scales, x, N, D, plant == LARGEST_OF_A_QUARTER ? 32 : GROUP);
}

extern "C" __global__ void __launch_bounds__(W8A8_THREADS, 1) linear_w8a8_gemm(
    E* __restrict__ o,                          // [N, M]
    const unsigned char* __restrict__ x_codes,  // [N, D]
    const float* __restrict__ x_scales,         // [N, ceil(D / 128)]
    const W* __restrict__ weight,               // [M, D]
    const float* __restrict__ weight_scales,    // of codes
    int N,
    int M,
    int D,
    int plant)
{
    if constexpr (sizeof(W) == 1) {
        extern __shared__ char shared[];
        CodeRing ring(shared_address(shared));
        ring.init();
        const int group = threadIdx.x / 128, own = threadIdx.x % 128, lane = own % 32;
        const int tiles = ceil_div(M, W8A8_TILE) * ceil_div(N, W8A8_TILE), columns = summed(D, plant);

        if (group == 2) {
            give_registers();
            for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
                const Where at = where<W8A8_TILE>(tile, M, N);
                BroughtCodes all;
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    all.there[i] = min(max(M - at.m0 - 64 * i, 0), 64);
                    all.rows[i] = (const unsigned char*)weight + (all.there[i] ? (size_t)(at.m0 + 64 * i) * D : 0);
                }
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    int n = at.n0 + 16 * i + own / 8;
                    if (plant == LAST_TOKEN_STALE && n == N - 1 && 0 < n) n -= 1;
                    all.x_at[i] = n < N ? (unsigned)((size_t)n * D / 16) : NO_ROW;
                }
                all.x = x_codes, all.D = D, all.summed = columns;
                bring(all, ring);
            }
            return;
        }

        take_registers();
        for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            const Where at = where<W8A8_TILE>(tile, M, N);
            const int n0 = at.n0 + own / 32 * 16 + 64 * group;
            float sums[64];
            GroupScales scales;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int n = min(n0 + lane / 4 + 8 * i, N - 1);
                if (plant == LAST_TOKEN_STALE && n == N - 1 && 0 < n) n -= 1;
                scales.tokens[i] = x_scales + (size_t)n * ceil_div(D, GROUP);
                scales.weights[i] = scales_of(weight_scales, at.m0, M, D, plant);
            }
            consume(sums, ring, ceil_div(columns, GROUP), scales, scaling(plant));
            const auto out = [&](int n) { return n0 + n < N ? o + (size_t)(n0 + n) * M : nullptr; };
            const auto value = [&](int i) { return plant == UNIFORM_SCALE ? 1.004f * sums[i] : sums[i]; };
            write_tokens(E(), ring.own(threadIdx.x / 32), at.m0, M, value, out);
        }
    }
}
