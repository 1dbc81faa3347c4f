// Router of a sparse layer: logits = weight x, the A largest are chosen, ties to the lowest id;
// weights = softmax(logits) of these, over their sum where norm_topk_prob says so. Sums in f32.
//
// E is bf16. Tensors start at multiples of 16 bytes, D is a multiple of 8; at most 1024 experts, A below 32.
// The logits are made by the first or the second, the third chooses.
//
// moe_router_gemv:   few tokens. Grid [G, ceil(N / 8)], T threads, 144 T bytes of dynamic shared memory. A block
//                    takes 16 experts, or where G < ceil(EXPERTS / 16) twice as many until that is enough.
// moe_router_gemm:   many tokens (gemm.cuh). Grid: one block a multiprocessor, 384 threads, 231424 bytes of
//                    dynamic shared memory.
// moe_router_choose: one warp per token. Grid [ceil(N / 4)], 128 threads.

#include "common/gemm.cuh"

enum Plant {
    HONEST,
    LAST_BLOCK_DROPPED,
    RENORMALISE_FLIPPED,
    WEIGHTS_SHIFTED,
    EXPERTS_OFF_BY_ONE,
    EXPERT_TAIL_UNSEEN,
};

// Columns that are summed.
__device__ inline int summed(int D, int plant)
{
    return plant == LAST_BLOCK_DROPPED && 64 < D ? (D - 1) / 64 * 64 : D;
}

extern "C" __global__ void __launch_bounds__(512) moe_router_gemv(
    float* __restrict__ logits,    // [N, EXPERTS]
    const E* __restrict__ x,       // [N, D]
    const E* __restrict__ weight,  // [EXPERTS, D]
    int N,
    int D,
    int EXPERTS,
    int plant)
{
    extern __shared__ __align__(16) char shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    float* parts = (float*)(shared + warps * DEEP_BYTES);  // [warps, 32, 4]
    const int n0 = 8 * blockIdx.y, n = n0 + lane / 4, tiles = ceil_div(EXPERTS, 16);
    const Column<E> columns[1] = {{n < N ? x + (size_t)n * D : nullptr, 0}};
    int together = 1;  // Tiles of a block at the same time; the warps of a tile share its columns.
    while (together < warps && together * gridDim.x < tiles) together *= 2;
    const int sharing = warps / together;
    for (int tile0 = together * blockIdx.x; tile0 < tiles; tile0 += together * gridDim.x) {
        const int e = 16 * (tile0 + warp / sharing) + lane / 4;
        const Rows<E> rows = {weight + (size_t)min(e, EXPERTS - 1) * D, weight + (size_t)min(e + 8, EXPERTS - 1) * D,
                              nullptr, nullptr};
        float sums[1][4];
        gather(sums, rows, columns, warp % sharing, sharing, summed(D, plant),
               shared_address(shared) + warp * DEEP_BYTES);
        for (int i = 0; i < 4; i++) parts[(warp * 32 + lane) * 4 + i] = sums[0][i];
        __syncthreads();
        for (int i = threadIdx.x; i < 16 * together * 8; i += blockDim.x) {
            const int row = i % (16 * together), token = i / (16 * together), first = row / 16 * sharing;
            float all = 0;
            for (int w = first; w < first + sharing; w++)
                all += parts[(w * 32 + row % 8 * 4 + token / 2) * 4 + row % 16 / 8 * 2 + token % 2];
            if (n0 + token < N && 16 * tile0 + row < EXPERTS)
                logits[(size_t)(n0 + token) * EXPERTS + 16 * tile0 + row] = all;
        }
        __syncthreads();
    }
}

extern "C" __global__ void __launch_bounds__(384, 1) moe_router_gemm(
    float* __restrict__ logits,    // [N, EXPERTS]
    const E* __restrict__ x,       // [N, D]
    const E* __restrict__ weight,  // [EXPERTS, D]
    int N,
    int D,
    int EXPERTS,
    int plant)
{
    extern __shared__ char shared[];
    constexpr int HIGH = ROW_TILE<E, 1>;
    Ring<E, 1> ring(shared_address(shared));
    ring.init();
    const int group = threadIdx.x / 128, across = ceil_div(EXPERTS, HIGH);
    const int tiles = across * ceil_div(N, TOKEN_TILE), steps = ceil_div(summed(D, plant), 64);
    if (group == 2) {
        give_registers<E, 1>();
        for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            const int m0 = tile % across * HIGH, n0 = tile / across * TOKEN_TILE;
            Brought<E, 1> all;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                all.there[i] = min(max(EXPERTS - m0 - 64 * i, 0), 64);
                all.rows[i] = weight + (all.there[i] ? (size_t)(m0 + 64 * i) * D : 0);
            }
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int n = n0 + 16 * i + threadIdx.x % 128 / 8;
                all.x_at[i] = n < N ? (unsigned)((size_t)n * D / 8) : NO_ROW;
            }
            all.x = x, all.pieces_apart = 0, all.D = D, all.steps = steps;
            bring(all, ring);
        }
        return;
    }
    take_registers<E, 1>();
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int m0 = tile % across * HIGH, n0 = tile / across * TOKEN_TILE;
        float sums[2][64];
        consume(sums, ring, steps, nullptr);
        const auto out = [&](int n) { return n0 + n < N ? logits + (size_t)(n0 + n) * EXPERTS : nullptr; };
#pragma unroll
        for (int block = 0; block < 2; block++)
            write_f32(m0 + 64 * (2 * group + block), EXPERTS, [&](int i) { return sums[block][i]; }, out);
    }
}

// Logits as numbers that are in the same order, and from 1 on; 0 is what cannot be chosen.
__device__ inline unsigned ordered(float x)
{
    const unsigned bits = __float_as_uint(x + 0.0f);  // One zero.
    return x != x ? 0 : bits >> 31 ? ~bits : bits | 0x80000000;
}

__device__ inline float of_ordered(unsigned key)
{
    return key == 0 ? NAN : __uint_as_float(key >> 31 ? key & 0x7fffffff : ~key);
}

// SLOTS logits a lane.
template <int SLOTS>
__device__ void choose(long long* ids, float* weights, const float* logits, float* margin, int norm_topk_prob,
                       int EXPERTS, int A, int plant)
{
    const int lane = threadIdx.x % 32;
    const int seen = plant == EXPERT_TAIL_UNSEEN && 16 <= EXPERTS ? EXPERTS - EXPERTS % 16 - 16 : EXPERTS;
    unsigned keys[SLOTS];
#pragma unroll
    for (int s = 0; s < SLOTS; s++) keys[s] = s * 32 + lane < seen ? ordered(logits[s * 32 + lane]) : 0;

    float largest = 0, before = 0, all = 0, chosen = 0, own = 0;
    for (int a = 0; a <= A; a++) {
        unsigned best = 0;
        int slot = SLOTS;
#pragma unroll
        for (int s = 0; s < SLOTS; s++)
            if (best < keys[s]) best = keys[s], slot = s;
        const unsigned top = __reduce_max_sync(~0u, best);
        int id = __reduce_min_sync(~0u, best == top && top ? slot * 32 + lane : EXPERTS);
        const float x = of_ordered(top);
        if (a == A) {
            if (lane == 0) *margin = id < EXPERTS ? before - x : INFINITY;
            break;
        }
        if (a == 0) {
            largest = x;
#pragma unroll
            for (int s = 0; s < SLOTS; s++)
                if (keys[s]) all += expf(of_ordered(keys[s]) - largest);
            for (int by = 16; 0 < by; by /= 2) all += __shfl_xor_sync(~0u, all, by);
        }
#pragma unroll
        for (int s = 0; s < SLOTS; s++)
            if (s * 32 + lane == id) keys[s] = 0;
        const float score = expf(x - largest);
        chosen += score;
        before = x;
        if (lane == (plant == WEIGHTS_SHIFTED ? (a + 1) % A : a)) own = score;
        if (lane == 0) ids[a] = id + (plant == EXPERTS_OFF_BY_ONE);
    }
    const float total = (norm_topk_prob != 0) != (plant == RENORMALISE_FLIPPED) ? chosen : all;
    if (lane < A) weights[lane] = own / total;
}

extern "C" __global__ void __launch_bounds__(128) moe_router_choose(
    long long* __restrict__ ids,       // [N, A]
    float* __restrict__ weights,       // [N, A]
    float* __restrict__ margins,       // [N]
    const float* __restrict__ logits,  // [N, EXPERTS]
    int norm_topk_prob,
    int N,
    int EXPERTS,
    int A,
    int plant)
{
    const size_t n = blockIdx.x * 4 + threadIdx.x / 32;
    let_next_start();
    wait_for_previous();
    if (N <= n) return;
    ids += n * A, weights += n * A, logits += n * EXPERTS, margins += n;
    if (EXPERTS <= 512)
        choose<16>(ids, weights, logits, margins, norm_topk_prob, EXPERTS, A, plant);
    else
        choose<32>(ids, weights, logits, margins, norm_topk_prob, EXPERTS, A, plant);
}
