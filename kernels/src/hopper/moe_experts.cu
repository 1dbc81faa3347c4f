// Routed experts: o = sum_a weights[a] down_e( silu(gate_e x) * (up_e x) ), e = ids[a]. The weight
// multiplies what comes out of an expert, and sums are in the order of the slots.
//
// E is bf16 or f32, W is bf16 or Fp8. Tensors start at multiples of 16 bytes; D and F are multiples of 8, of
// 16 with Fp8. P = 1 with E bf16, 3 with f32. Workspaces are in order of launch; a pair is a slot of a token.
//
// Few tokens (each expert of each token is read):
//
// moe_experts_gemv_up:   grid [ceil(F / 8), N A]; a block's warps share the columns: 128 threads, 16384 bytes of
//                        dynamic shared memory. Workspace: hidden, 6 N A F bytes.
// moe_experts_gemv_down: grid [ceil(D / 16), N]; warps take half an expert each, in turn: T = 64 A threads for one
//                        token, 32 A for more, 704 at most; 128 (T + A) bytes of dynamic shared memory.
//
// Many tokens (pairs in the order of their experts, those of an expert in rising order; tiles of gemm.cuh):
//
// moe_experts_count:     grid [ceil(N A / 1024)] = [C], 512 threads, 4 EXPERTS bytes of dynamic shared memory.
//                        Workspace: counts, 4 C EXPERTS bytes.
// moe_experts_offsets:   grid [1], 1024 threads; at most 1024 experts. Workspace: offsets, 4 (EXPERTS + 1)
//                        bytes; tiles, 8 (ceil(N A / 128) + EXPERTS) bytes; n_tiles, 4 bytes.
// moe_experts_place:     grid [C], 512 threads. Workspace: order, 4 N A bytes.
// moe_experts_split:     pieces of x, where E is f32. Grid [ceil(N D / 256)], 256 threads. Workspace: pieces,
//                        6 N D bytes.
// moe_experts_gemm_up:   grid: one block a multiprocessor, 384 threads (512 with Fp8), 231424 bytes of dynamic
//                        shared memory. Workspace: passed, 2 P N A F bytes.
// moe_experts_gemm_down: launched alike. Workspace: parts, N A D numbers of E.
// moe_experts_combine:   grid [N], 256 threads.
//
// W8A8, where W is Fp8: activations in codes as well (gemm_w8a8.cuh), between _place and _combine:
// moe_experts_w8a8_quantise: grid [ceil(N ceil(D / 128) / 16)], 256 threads. Workspace: x_codes, N D bytes;
//                            x_scales, 4 N ceil(D / 128) bytes.
// moe_experts_w8a8_up:       grid: one block a multiprocessor, 384 threads, 231424 bytes of dynamic shared memory.
//                            Workspace: hidden_codes, N A F bytes; hidden_scales, 4 N A ceil(F / 128) bytes.
// moe_experts_w8a8_down:     launched alike. Workspace: parts, as above.
//
// An id below 0 is of an expert that another GPU has: nothing is read of its slot and nothing comes of it. Its weight
// is -0, which no other has.
//
// In bf16 the gemm rounds what passes between the products, and each expert's output; the gemv does not. The gemv
// may be launched to start before the kernel before has ended, _down only right after _up; the others not.

#include "common/activation.cuh"
#include "common/gemm_w8a8.cuh"

enum Plant {
    HONEST,
    WEIGHTS_NOT_APPLIED,
    LAST_BLOCK_DROPPED,
    ROWS_OF_EXPERT_SHIFTED,
    SCALE_OF_NEIGHBOUR,
    GATE_UP_SWAPPED,
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

constexpr int CHUNK = 1024;  // Pairs that are sorted together.

// Columns that are summed.
__device__ inline int summed(int D, int plant)
{
    return plant == LAST_BLOCK_DROPPED && 64 < D ? (D - 1) / 64 * 64 : D;
}

// Where a row of an expert's matrix starts, and its scales.
__device__ inline const W* row_of(const W* proj, int e, int row, int M, int D)
{
    return proj + ((size_t)e * M + row) * D;
}

__device__ inline const float* scales_of(const float* scales, int e, int row, int M, int D, int plant)
{
    int block = row / 128;
    if (plant == SCALE_OF_NEIGHBOUR && 128 < M) block += block + 1 < ceil_div(M, 128) ? 1 : -1;
    return scales + ((size_t)e * ceil_div(M, 128) + block) * ceil_div(D, 128);
}

__device__ inline float passed_on(float gate, float up, int plant)
{
    return plant == GATE_UP_SWAPPED ? silu(up) * gate : silu(gate) * up;
}

// A row of x of whose columns the first P are the pieces.
template <class X> __device__ Column<X> pieces_of(const X* x)
{
    const int column = threadIdx.x % 32 / 4;
    return {column < PIECES<X> ? x : nullptr, column};
}

extern "C" __global__ void __launch_bounds__(256) moe_experts_gemv_up(
    bf16* __restrict__ hidden,                  // [3, N, A, F] the three pieces of f32
    const E* __restrict__ x,                    // [N, D]
    const long long* __restrict__ ids,          // [N, A]
    const W* __restrict__ gate_proj,            // [EXPERTS, F, D]
    const float* __restrict__ gate_proj_scales,  // of codes
    const W* __restrict__ up_proj,              // [EXPERTS, F, D]
    const float* __restrict__ up_proj_scales,    // of codes
    int D,
    int A,
    int F,
    int plant)
{
    extern __shared__ __align__(16) char shared[];  // [warps, DEEP_BYTES]
    __shared__ float parts[8][2][8];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const size_t pair = blockIdx.y;
    wait_for_previous();  // For ids.
    const int e = ids[pair], f0 = 8 * blockIdx.x;
    if (e < 0) return;
    int f = min(f0 + lane / 4, F - 1);
    if (plant == ROWS_OF_EXPERT_SHIFTED && e % 4 == 1) f = f == 0 ? F - 1 : f - 1;
    const Rows<W> rows = {row_of(gate_proj, e, f, F, D), row_of(up_proj, e, f, F, D),
                          scales_of(gate_proj_scales, e, f, F, D, plant),
                          scales_of(up_proj_scales, e, f, F, D, plant)};
    const Column<E> columns[1] = {pieces_of(x + pair / A * D)};
    float sums[1][4], gate, up;
    gather(sums, rows, columns, warp, warps, summed(D, plant), shared_address(shared) + warp * DEEP_BYTES);
    join<PIECES<E>>(sums[0], gate, up);
    if (lane % 4 == 0) parts[warp][0][lane / 4] = gate, parts[warp][1][lane / 4] = up;
    __syncthreads();

    if (threadIdx.x < 8 && f0 + threadIdx.x < F) {
        gate = up = 0;
        for (int w = 0; w < warps; w++) gate += parts[w][0][threadIdx.x], up += parts[w][1][threadIdx.x];
        float rest = passed_on(gate, up, plant);
        for (int p = 0; p < 3; p++) {
            const bf16 own = store<bf16>(rest);
            hidden[(p * (size_t)gridDim.y + pair) * F + f0 + threadIdx.x] = own;
            rest -= load(own);
        }
    }
}

extern "C" __global__ void __launch_bounds__(704, 1) moe_experts_gemv_down(
    E* __restrict__ o,                          // [N, D]
    const bf16* __restrict__ hidden,            // [3, N, A, F] the three pieces of f32
    const long long* __restrict__ ids,          // [N, A]
    const float* __restrict__ weights,          // [N, A]
    const W* __restrict__ down_proj,            // [EXPERTS, D, F]
    const float* __restrict__ down_proj_scales,  // of codes
    int D,
    int A,
    int F,
    int plant)
{
    extern __shared__ __align__(16) char shared[];
    float* outputs = (float*)(shared + blockDim.x / 32 * DEEP_BYTES);  // [A, 2, 16]
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const size_t n = blockIdx.y, column = lane / 4, pairs = (size_t)gridDim.y * A;
    // ids are read early: moe_experts_gemv_up lets this start when it has them.
    const int d0 = 16 * blockIdx.x, upper = min(d0 + lane / 4, D - 1), lower = min(d0 + lane / 4 + 8, D - 1);
    for (int part = warp; part < 2 * A; part += blockDim.x / 32) {
        const int a = part / 2, e = ids[n * A + a];
        if (e < 0) {
            wait_for_previous();
            if (lane % 4 == 0) outputs[part * 16 + lane / 4] = outputs[part * 16 + lane / 4 + 8] = 0;
            continue;
        }
        const Rows<W> rows = {row_of(down_proj, e, upper, D, F), row_of(down_proj, e, lower, D, F),
                              scales_of(down_proj_scales, e, upper, D, F, plant),
                              scales_of(down_proj_scales, e, lower, D, F, plant)};
        const Column<bf16> columns[1] = {{column < 3 ? hidden + (column * pairs + n * A + a) * F : nullptr, 0}};
        float sums[1][4], above, below;
        gather(sums, rows, columns, part % 2, 2, F, shared_address(shared) + warp * DEEP_BYTES);
        join<3>(sums[0], above, below);
        if (lane % 4 == 0) outputs[part * 16 + lane / 4] = above, outputs[part * 16 + lane / 4 + 8] = below;
    }
    __syncthreads();

    if (threadIdx.x < 16 && d0 + threadIdx.x < D) {
        float all = 0;
        for (int a = 0; a < A; a++) {
            const float out = outputs[a * 32 + threadIdx.x] + outputs[a * 32 + 16 + threadIdx.x];
            all += (plant == WEIGHTS_NOT_APPLIED ? 1 : weights[n * A + a]) * out;
        }
        o[n * D + d0 + threadIdx.x] = store<E>(all);
    }
}

extern "C" __global__ void moe_experts_count(
    int* __restrict__ counts,           // [C, EXPERTS]
    const long long* __restrict__ ids,  // [N, A]
    int N,
    int A,
    int EXPERTS)
{
    extern __shared__ int own[];  // [EXPERTS]
    const int from = blockIdx.x * CHUNK, to = min(from + CHUNK, N * A);
    for (int e = threadIdx.x; e < EXPERTS; e += blockDim.x) own[e] = 0;
    __syncthreads();
    for (int i = from + threadIdx.x; i < to; i += blockDim.x)
        if (0 <= ids[i]) atomicAdd(&own[ids[i]], 1);
    __syncthreads();
    for (int e = threadIdx.x; e < EXPERTS; e += blockDim.x) counts[(size_t)blockIdx.x * EXPERTS + e] = own[e];
}

struct Tile { int expert, first; };  // Its first pair in the order.

// What is before each chunk of an expert, and before each expert; the tiles of every expert.
extern "C" __global__ void __launch_bounds__(1024) moe_experts_offsets(
    int* __restrict__ offsets,  // [EXPERTS + 1]
    Tile* __restrict__ tiles,   // [ceil(N A / 128) + EXPERTS]
    int* __restrict__ n_tiles,  // [1]
    int* __restrict__ counts,   // [C, EXPERTS], is replaced
    int N,
    int A,
    int EXPERTS)
{
    __shared__ int before[2][1024], tiles_before[2][1024];
    const int e = threadIdx.x, chunks = ceil_div(N * A, CHUNK);
    int all = 0;
    if (e < EXPERTS) {
#pragma unroll 16
        for (int c = 0; c < chunks; c++) {
            const int own = counts[(size_t)c * EXPERTS + e];
            counts[(size_t)c * EXPERTS + e] = all;
            all += own;
        }
    }
    const int of_tiles = ceil_div(all, TOKEN_TILE);
    int at = 0;
    before[0][e] = all, tiles_before[0][e] = of_tiles;
    for (int by = 1; by < 1024; by *= 2, at ^= 1) {
        __syncthreads();
        before[at ^ 1][e] = before[at][e] + (by <= e ? before[at][e - by] : 0);
        tiles_before[at ^ 1][e] = tiles_before[at][e] + (by <= e ? tiles_before[at][e - by] : 0);
    }
    const int first = before[at][e] - all, first_tile = tiles_before[at][e] - of_tiles;
    if (e < EXPERTS) {
        offsets[e] = first;
        for (int i = 0; i < of_tiles; i++) tiles[first_tile + i] = {e, first + i * TOKEN_TILE};
    }
    if (e == EXPERTS - 1) offsets[EXPERTS] = first + all, *n_tiles = first_tile + of_tiles;
}

extern "C" __global__ void moe_experts_place(
    int* __restrict__ order,            // [N A] pairs
    const int* __restrict__ offsets,    // [EXPERTS + 1]
    const int* __restrict__ counts,     // [C, EXPERTS] what is before each chunk
    const long long* __restrict__ ids,  // [N, A]
    int N,
    int A,
    int EXPERTS)
{
    __shared__ __align__(16) int own[CHUNK];
    const int from = blockIdx.x * CHUNK;
    for (int i = threadIdx.x; i < CHUNK; i += blockDim.x) own[i] = from + i < N * A ? (int)ids[from + i] : -1;
    __syncthreads();
    for (int e = threadIdx.x; e < EXPERTS; e += blockDim.x) {
        int at = offsets[e] + counts[(size_t)blockIdx.x * EXPERTS + e];
        for (int i = 0; i < CHUNK; i += 4) {
            const Words four = *(const Words*)(own + i);
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (four.at[j] == e) order[at++] = from + i + j;
        }
    }
}

extern "C" __global__ void moe_experts_split(
    bf16* __restrict__ pieces,  // [3, N, D]
    const f32* __restrict__ x,  // [N, D]
    int N,
    int D)
{
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, n = (size_t)N * D;
    if (i < n) split(pieces, x, n, i);
}

extern "C" __global__ void __launch_bounds__(GEMM_THREADS<W>, 1) moe_experts_gemm_up(
    bf16* __restrict__ passed,                  // [P, N A, F], in order
    const E* __restrict__ x,                    // [N, D]
    const bf16* __restrict__ pieces,            // [3, N, D] where E is f32
    const int* __restrict__ order,              // [N A] pairs
    const int* __restrict__ offsets,            // [EXPERTS + 1]
    const Tile* __restrict__ tiles,             // [ceil(N A / 128) + EXPERTS]
    const int* __restrict__ n_tiles,            // [1]
    const W* __restrict__ gate_proj,            // [EXPERTS, F, D]
    const float* __restrict__ gate_proj_scales,  // of codes
    const W* __restrict__ up_proj,              // [EXPERTS, F, D]
    const float* __restrict__ up_proj_scales,    // of codes
    int N,
    int D,
    int A,
    int F,
    int plant)
{
    extern __shared__ char shared[];
    constexpr int P = PIECES<E>, HIGH = ROW_TILE<W, P> / 2;  // Channels of a tile, each a row of gate and of up.
    Ring<W, P> ring(shared_address(shared));
    ring.init();
    const bf16* rows = P == 1 ? (const bf16*)x : pieces;
    const int group = threadIdx.x / 128, own = threadIdx.x % 128;
    const int across = ceil_div(F, HIGH), all_tiles = *n_tiles * across, steps = ceil_div(summed(D, plant), 64);

    if (2 <= group) {
        give_registers<W, P>();
        for (int tile = blockIdx.x; tile < all_tiles; tile += gridDim.x) {
            const Tile at = tiles[tile / across];
            const int f0 = tile % across * HIGH, e = at.expert, end = offsets[e + 1];
            Brought<W, P> all;
#pragma unroll
            for (int i = 0; i < 2 * BLOCKS<W, P>; i++) {
                const int f = f0 + i / 2 * 64;
                all.there[i] = min(max(F - f, 0), 64);
                all.rows[i] = row_of(i % 2 ? up_proj : gate_proj, e, all.there[i] ? f : 0, F, D);
                if (plant == ROWS_OF_EXPERT_SHIFTED && e % 4 == 1 && 0 < f) all.rows[i] -= D;
            }
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int n = at.first + 16 * i + own / 8;
                all.x_at[i] = n < end ? (unsigned)((size_t)(order[n] / A) * D / 8) : NO_ROW;
            }
            all.x = rows, all.pieces_apart = (size_t)N * D, all.D = D, all.steps = steps;
            bring(all, ring);
        }
        return;
    }

    take_registers<W, P>();
    for (int tile = blockIdx.x; tile < all_tiles; tile += gridDim.x) {
        const Tile at = tiles[tile / across];
        const int f0 = tile % across * HIGH, e = at.expert, end = offsets[e + 1];
        float sums[BLOCKS<W, P>][64];
        const float* scales = group == 0 ? gate_proj_scales : up_proj_scales;
        consume(sums, ring, steps, scales_of(scales, e, f0, F, D, plant));
        int from = 0, to = 64;  // Which of its sums a thread goes on with.
        if constexpr (BLOCKS<W, P> == 2) {
#pragma unroll
            for (int i = 0; i < 64; i++) sums[0][i] = passed_on(sums[0][i], sums[1][i], plant);
        } else {
            // Gate is with one group, up with the other: each gives half of the tokens to the other.
            static_assert(64 * 128 * 4 == 2 * STAGING_BYTES, "one half of each");
            const unsigned give = ring.staging(0) + group * STAGING_BYTES + 4 * own;
            const unsigned take = ring.staging(0) + (group ^ 1) * STAGING_BYTES + 4 * own;
#pragma unroll
            for (int i = 0; i < 32; i++) {
                const float other = group == 0 ? sums[0][32 + i] : sums[0][i];
                asm volatile("st.shared.f32 [%0], %1;" ::"r"(give + 512 * i), "f"(other) : "memory");
            }
            asm volatile("bar.sync 3, 256;" ::: "memory");
#pragma unroll
            for (int i = 0; i < 32; i++) {
                float other;
                asm volatile("ld.shared.f32 %0, [%1];" : "=f"(other) : "r"(take + 512 * i) : "memory");
                const float value = group == 0 ? passed_on(sums[0][i], other, plant)
                                               : passed_on(other, sums[0][32 + i], plant);
                sums[0][i] = sums[0][32 + i] = value;
            }
            asm volatile("bar.sync 3, 256;" ::: "memory");
            from = 64 * group, to = from + 64;
        }
        const int m0 = f0 + (BLOCKS<W, P> == 2 ? 64 * group : 0);
        for (int p = 0; p < P; p++) {
            const auto out = [&](int n) {
                const bool is_own = BLOCKS<W, P> == 2 || (from <= n && n < to);
                bf16* of_piece = passed + (size_t)p * N * A * F;
                return is_own && at.first + n < end ? of_piece + (size_t)(at.first + n) * F : nullptr;
            };
            write_bf16(ring.staging(group), m0, F, [&](int i) { return sums[0][i]; }, out);
            if (1 < P) {
#pragma unroll
                for (int i = 0; i < 64; i++) sums[0][i] -= rounded<bf16>(sums[0][i]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(GEMM_THREADS<W>, 1) moe_experts_gemm_down(
    E* __restrict__ parts,                      // [N A, D]
    const bf16* __restrict__ passed,            // [P, N A, F], in order
    const int* __restrict__ order,              // [N A] pairs
    const int* __restrict__ offsets,            // [EXPERTS + 1]
    const Tile* __restrict__ tiles,             // [ceil(N A / 128) + EXPERTS]
    const int* __restrict__ n_tiles,            // [1]
    const W* __restrict__ down_proj,            // [EXPERTS, D, F]
    const float* __restrict__ down_proj_scales,  // of codes
    int N,
    int D,
    int A,
    int F,
    int plant)
{
    extern __shared__ char shared[];
    constexpr int P = PIECES<E>;
    Ring<W, P> ring(shared_address(shared));
    ring.init();
    const int group = threadIdx.x / 128, own = threadIdx.x % 128;
    const int across = ceil_div(D, ROW_TILE<W, P>), all_tiles = *n_tiles * across, steps = ceil_div(F, 64);

    if (2 <= group) {
        give_registers<W, P>();
        for (int tile = blockIdx.x; tile < all_tiles; tile += gridDim.x) {
            const Tile at = tiles[tile / across];
            const int m0 = tile % across * ROW_TILE<W, P>, end = offsets[at.expert + 1];
            Brought<W, P> all;
#pragma unroll
            for (int i = 0; i < 2 * BLOCKS<W, P>; i++) {
                all.there[i] = min(max(D - m0 - 64 * i, 0), 64);
                all.rows[i] = row_of(down_proj, at.expert, all.there[i] ? m0 + 64 * i : 0, D, F);
            }
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int n = at.first + 16 * i + own / 8;
                all.x_at[i] = n < end ? (unsigned)((size_t)n * F / 8) : NO_ROW;
            }
            all.x = passed, all.pieces_apart = (size_t)N * A * F, all.D = F, all.steps = steps;
            bring(all, ring);
        }
        return;
    }

    take_registers<W, P>();
    for (int tile = blockIdx.x; tile < all_tiles; tile += gridDim.x) {
        const Tile at = tiles[tile / across];
        const int m0 = tile % across * ROW_TILE<W, P>, e = at.expert, end = offsets[e + 1];
        float sums[BLOCKS<W, P>][64];
        consume(sums, ring, steps, scales_of(down_proj_scales, e, m0, D, F, plant));
        const auto out = [&](int n) {
            return at.first + n < end ? parts + (size_t)order[at.first + n] * D : nullptr;
        };
#pragma unroll
        for (int block = 0; block < BLOCKS<W, P>; block++) {
            const int m = m0 + 64 * (BLOCKS<W, P> * group + block);
            write(E(), ring.staging(group), m, D, [&](int i) { return sums[block][i]; }, out);
        }
    }
}

extern "C" __global__ void moe_experts_combine(
    E* __restrict__ o,                  // [N, D]
    const E* __restrict__ parts,        // [N A, D]
    const float* __restrict__ weights,  // [N, A]
    int D,
    int A,
    int plant)
{
    constexpr int N = PER<E>;
    const size_t n = blockIdx.x;
    for (int d = threadIdx.x * N; d < D; d += blockDim.x * N) {
        float all[N] = {};
#pragma unroll 10
        for (int a = 0; a < A; a++) {
            const Words read = read_words(parts + (n * A + a) * D + d);
            const float weight = plant == WEIGHTS_NOT_APPLIED ? 1 : weights[n * A + a];
            const bool elsewhere = __float_as_uint(weight) == 0x80000000;
#pragma unroll
            for (int i = 0; i < N; i++) {
                const unsigned bits = read.at[i * 4 / N];
                const float x = __uint_as_float(N == 4 ? bits : i % 2 ? bits & 0xffff0000 : bits << 16);
                const float more = __fmaf_rn(weight, x, all[i]);
                all[i] = elsewhere ? all[i] : more;
            }
        }
        E own[N];
        for (int i = 0; i < N; i++) own[i] = store<E>(all[i]);
        for (int i = 0; i < N; i++) o[n * D + d + i] = own[i];
    }
}

extern "C" __global__ void moe_experts_w8a8_quantise(
    unsigned char* __restrict__ x_codes,  // [N, D]
    float* __restrict__ x_scales,         // [N, ceil(D / 128)]
    const E* __restrict__ x,              // [N, D]
    int N,
    int D,
    int plant)
{
    quantise(x_codes, x_scales, x, N, D, plant == LARGEST_OF_A_QUARTER ? 32 : GROUP);
}

// A tile is a group of hidden channels: 64 of them, gate beside up, and then the other 64.
extern "C" __global__ void __launch_bounds__(W8A8_THREADS, 1) moe_experts_w8a8_up(
    unsigned char* __restrict__ hidden_codes,   // [N A, F], in order
    float* __restrict__ hidden_scales,          // [N A, ceil(F / 128)]
    const unsigned char* __restrict__ x_codes,  // [N, D]
    const float* __restrict__ x_scales,         // [N, ceil(D / 128)]
    const int* __restrict__ order,              // [N A] pairs
    const int* __restrict__ offsets,            // [EXPERTS + 1]
    const Tile* __restrict__ tiles,             // [ceil(N A / 128) + EXPERTS]
    const int* __restrict__ n_tiles,            // [1]
    const W* __restrict__ gate_proj,            // [EXPERTS, F, D]
    const float* __restrict__ gate_proj_scales,  // of codes
    const W* __restrict__ up_proj,              // [EXPERTS, F, D]
    const float* __restrict__ up_proj_scales,    // of codes
    int D,
    int A,
    int F,
    int plant)
{
    if constexpr (sizeof(W) == 1) {
        extern __shared__ char shared[];
        CodeRing ring(shared_address(shared));
        ring.init();
        const int group = threadIdx.x / 128, own = threadIdx.x % 128, lane = own % 32;
        const int across = ceil_div(F, GROUP), all_tiles = *n_tiles * across, columns = summed(D, plant);

        if (group == 2) {
            give_registers();
            for (int tile = blockIdx.x; tile < all_tiles; tile += gridDim.x) {
                const Tile at = tiles[tile / across];
                const int f0 = tile % across * GROUP, e = at.expert, end = offsets[e + 1];
                BroughtCodes all;
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const int n = at.first + 16 * i + own / 8;
                    all.x_at[i] = n < end ? (unsigned)((size_t)(order[n] / A) * D / 16) : NO_ROW;
                }
                all.x = x_codes, all.D = D, all.summed = columns;
                for (int f = f0; f < min(f0 + GROUP, F); f += 64) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        all.there[i] = min(F - f, 64);
                        all.rows[i] = (const unsigned char*)row_of(i ? up_proj : gate_proj, e, f, F, D);
                        if (plant == ROWS_OF_EXPERT_SHIFTED && e % 4 == 1 && 0 < f) all.rows[i] -= D;
                    }
                    bring(all, ring);
                }
            }
            return;
        }

        take_registers();
        // Values of the first 64 channels wait for the others.
        const unsigned kept = ring.own(threadIdx.x / 32) + 4 * lane;
        static_assert(32 * 4 <= OWN_BYTES, "they fit");
        for (int tile = blockIdx.x; tile < all_tiles; tile += gridDim.x) {
            const Tile at = tiles[tile / across];
            const int f0 = tile % across * GROUP, e = at.expert, end = offsets[e + 1];
            const int n0 = at.first + 64 * group + own / 32 * 16 + lane / 4;
            GroupScales scales;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int n = order[min(n0 + 8 * i, end - 1)] / A;
                scales.tokens[i] = x_scales + (size_t)n * ceil_div(D, GROUP);
                scales.weights[i] = scales_of(i ? up_proj_scales : gate_proj_scales, e, f0, F, D, plant);
            }
            float sums[64], largest[2] = {};
            const bool both = f0 + 64 < F;
            for (int half = 0; half <= both; half++) {
                consume(sums, ring, ceil_div(columns, GROUP), scales, scaling(plant));
#pragma unroll
                for (int i = 0; i < 32; i++) {
                    const float gate = sums[i], up = sums[32 + i];
                    sums[i] = plant == GATE_UP_SWAPPED ? silu_fast(up) * gate : silu_fast(gate) * up;
                    if (plant != LARGEST_OF_A_QUARTER || (half == 0 && i < 16))
                        largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], fabsf(sums[i]));
                    if (half < both)
                        asm volatile("st.shared.f32 [%0], %1;" ::"r"(kept + 128 * i), "f"(sums[i]) : "memory");
                }
            }
            float scale[2], steps[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                largest[i] = fmaxf(largest[i], __shfl_xor_sync(~0u, largest[i], 1));
                largest[i] = fmaxf(largest[i], __shfl_xor_sync(~0u, largest[i], 2));
                scale[i] = scale_of(largest[i]);
                steps[i] = in_steps(1, scale[i]);
                if (lane % 4 == 0 && n0 + 8 * i < end)
                    hidden_scales[(size_t)(n0 + 8 * i) * across + f0 / GROUP] = scale[i];
            }
            for (int half = both; 0 <= half; half--) {
#pragma unroll
                for (int row = 0; row < 2; row++) {
                    unsigned words[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int first = 8 * i + 2 * row, second = first + 4;
                        words[i] = codes_of(sums[first] * steps[row], sums[first + 1] * steps[row])
                                   | codes_of(sums[second] * steps[row], sums[second + 1] * steps[row]) << 16;
                    }
                    turn(words);
                    const int f = f0 + 64 * half + 16 * (lane % 4), n = n0 + 8 * row;
                    if (n < end && f < F)
                        asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(hidden_codes + (size_t)n * F + f),
                                     "r"(__byte_perm(words[0], words[1], 0x5410)),
                                     "r"(__byte_perm(words[2], words[3], 0x5410)),
                                     "r"(__byte_perm(words[0], words[1], 0x7632)),
                                     "r"(__byte_perm(words[2], words[3], 0x7632)) : "memory");
                }
                if (0 < half)
#pragma unroll
                    for (int i = 0; i < 32; i++)
                        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(sums[i]) : "r"(kept + 128 * i) : "memory");
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(W8A8_THREADS, 1) moe_experts_w8a8_down(
    E* __restrict__ parts,                           // [N A, D]
    const unsigned char* __restrict__ hidden_codes,  // [N A, F], in order
    const float* __restrict__ hidden_scales,         // [N A, ceil(F / 128)]
    const int* __restrict__ order,                   // [N A] pairs
    const int* __restrict__ offsets,                 // [EXPERTS + 1]
    const Tile* __restrict__ tiles,                  // [ceil(N A / 128) + EXPERTS]
    const int* __restrict__ n_tiles,                 // [1]
    const W* __restrict__ down_proj,                 // [EXPERTS, D, F]
    const float* __restrict__ down_proj_scales,       // of codes
    int D,
    int F,
    int plant)
{
    if constexpr (sizeof(W) == 1) {
        extern __shared__ char shared[];
        CodeRing ring(shared_address(shared));
        ring.init();
        const int group = threadIdx.x / 128, own = threadIdx.x % 128, lane = own % 32;
        const int across = ceil_div(D, W8A8_TILE), all_tiles = *n_tiles * across;

        if (group == 2) {
            give_registers();
            for (int tile = blockIdx.x; tile < all_tiles; tile += gridDim.x) {
                const Tile at = tiles[tile / across];
                const int m0 = tile % across * W8A8_TILE, e = at.expert, end = offsets[e + 1];
                BroughtCodes all;
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    all.there[i] = min(max(D - m0 - 64 * i, 0), 64);
                    all.rows[i] =
                        (const unsigned char*)row_of(down_proj, e, all.there[i] ? m0 + 64 * i : 0, D, F);
                }
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const int n = at.first + 16 * i + own / 8;
                    all.x_at[i] = n < end ? (unsigned)((size_t)n * F / 16) : NO_ROW;
                }
                all.x = hidden_codes, all.D = F, all.summed = F;
                bring(all, ring);
            }
            return;
        }

        take_registers();
        for (int tile = blockIdx.x; tile < all_tiles; tile += gridDim.x) {
            const Tile at = tiles[tile / across];
            const int m0 = tile % across * W8A8_TILE, e = at.expert, end = offsets[e + 1];
            const int n0 = at.first + 64 * group + own / 32 * 16;
            const int pair = order[min(n0 + lane % 16, end - 1)];
            float sums[64];
            GroupScales scales;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                scales.tokens[i] = hidden_scales + (size_t)min(n0 + lane / 4 + 8 * i, end - 1) * ceil_div(F, GROUP);
                scales.weights[i] = scales_of(down_proj_scales, e, m0, D, F, plant);
            }
            consume(sums, ring, ceil_div(F, GROUP), scales, scaling(plant));
            const auto out = [&](int n) {
                const int to = __shfl_sync(~0u, pair, n);
                return n0 + n < end ? parts + (size_t)to * D : nullptr;
            };
            write_tokens(E(), ring.own(threadIdx.x / 32), m0, D, [&](int i) { return sums[i]; }, out);
        }
    }
}
