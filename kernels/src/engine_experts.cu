// What the whole model needs of sparse layers beside their ops, as engine.cu says.
//
// engine_route:         the experts of a token, and how far the shared one opens, which may be a slot behind them,
//                       of the expert after all others; two warps per token.
// engine_share:         of the experts of tokens those that this GPU has, where several have some each; one thread a slot.
// engine_experts_up:    silu(gate) * up of the experts of a token; one warp per token, expert and channel.
// engine_experts_down:  their weighted sum, in the order in which they were chosen; one block per token and four
//                       channels, one warp per expert.

#include "common/activation.cuh"
#include "common/early.cuh"
#include "common/rows.cuh"

// A number that is larger where a logit comes earlier: larger first, what is no number last; 0 is none.
__device__ inline unsigned order_of(float x)
{
    const unsigned bits = __float_as_uint(x + 0.0f);  // One zero.
    return x != x ? 1 : bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

__device__ inline float of_order(unsigned key)
{
    return key == 1 ? NAN : __uint_as_float(key & 0x80000000 ? key & 0x7fffffff : ~key);
}

// The experts of a token by one warp, whose lanes keep SLOTS logits each, or none and read them again. Ties go to
// the lower id.
template <int SLOTS>
__device__ void choose(long long* ids, float* weights, float* margin, const float* row, const long long* forced,
                       int norm_topk_prob, int A, int EXPERTS)
{
    const int lane = threadIdx.x % WARP;
    unsigned keys[SLOTS ? SLOTS : 1];
#pragma unroll
    for (int s = 0; s < SLOTS; s++) keys[s] = s * WARP + lane < EXPERTS ? order_of(row[s * WARP + lane]) : 0;
    unsigned last = ~0u;
    int last_id = -1;
    float largest = 0, before = 0, chosen = 0, all = 0, last_power = 0;
    for (int a = 0; a <= A; a++) {
        unsigned best = 0;
        int of_best = 0;
#pragma unroll
        for (int s = 0; s < SLOTS; s++)
            if (best < keys[s]) best = keys[s], of_best = s * WARP + lane;
        if (SLOTS == 0) {
            for (int e = lane; e < EXPERTS; e += WARP) {
                const unsigned key = order_of(row[e]);
                const bool left = key < last || (key == last && last_id < e);
                if (left && best < key) best = key, of_best = e;
            }
        }
        const unsigned top = __reduce_max_sync(~0u, best);
        if (a == 0) let_next_start();
        if (top == 0) {
            // All have been chosen.
            if (lane == 0) *margin = INFINITY;
            break;
        }
        const int id = __reduce_min_sync(~0u, best == top ? of_best : EXPERTS);
        const float x = of_order(top);
        if (a == 0) {
            largest = x;
            if (!norm_topk_prob) {
                for (int e = lane; e < EXPERTS; e += WARP) all += expf(row[e] - largest);
                all = warp_sum(all);
            }
        }
        if (a == A) {
            if (lane == 0) *margin = before - x;
            break;
        }
#pragma unroll
        for (int s = 0; s < SLOTS; s++)
            if (s * WARP + lane == id) keys[s] = 0;
        last = top, last_id = id, before = x;
        const int own = forced ? forced[a] : id;
        const float power = expf((forced ? row[own] : x) - largest);
        chosen += power;
        if (a % WARP == lane) ids[a] = own, weights[a] = power, last_power = power;
    }
    const float total = norm_topk_prob ? chosen : all;
    for (int a = lane; a < A; a += WARP) weights[a] = (A <= WARP ? last_power : weights[a]) / total;
}

extern "C" __global__ void engine_route(
    long long* __restrict__ ids,           // [N, SLOTS]
    float* __restrict__ weights,           // [N, SLOTS]
    float* __restrict__ margins,           // [N]
    float* __restrict__ shared,            // [N] how far the shared expert opens
    const float* __restrict__ logits,      // rows of EXPERTS, `of_row` apart; where there is more, of the gate
    const long long* __restrict__ forced,  // [N, A], or none
    const E* __restrict__ x,               // [N, D]
    const W* __restrict__ gate,            // [1, D]
    int norm_topk_prob,
    int of_row,
    int N,
    int A,
    int SLOTS,
    int EXPERTS,
    int D)
{
    const int warp = threadIdx.x / WARP, n = blockIdx.x * (blockDim.x / WARP / 2) + warp / 2;
    wait_for_previous();
    if (N <= n) return;
    ids += (size_t)n * SLOTS;
    weights += (size_t)n * SLOTS;
    const float* row = logits + (size_t)n * of_row;
    if (warp % 2) {
        float gates[1] = {};
        if (of_row == EXPERTS) lane_products<1>(gates, {gate, 0, 0}, x + (size_t)n * D, D, D);
        const float open = sigmoid(of_row == EXPERTS ? warp_sum(gates[0]) : row[EXPERTS]);
        if (threadIdx.x % WARP) return;
        shared[n] = open;
        if (A < SLOTS) ids[A] = EXPERTS, weights[A] = open;
        return;
    }
    const long long* own = forced ? forced + (size_t)n * A : 0;
    if (EXPERTS <= 512) choose<16>(ids, weights, margins + n, row, own, norm_topk_prob, A, EXPERTS);
    else if (EXPERTS <= 1024) choose<32>(ids, weights, margins + n, row, own, norm_topk_prob, A, EXPERTS);
    else choose<0>(ids, weights, margins + n, row, own, norm_topk_prob, A, EXPERTS);
}

// A slot of an expert that another GPU has gets an id below 0, and a weight that no other has: -0.
extern "C" __global__ void engine_share(
    long long* __restrict__ own_ids,    // [N, SLOTS]
    float* __restrict__ own_weights,    // [N, SLOTS]
    const long long* __restrict__ ids,  // [N, SLOTS]
    const float* __restrict__ weights,  // [N, SLOTS]
    int first,
    int count,
    int leads,  // whether the shared expert is done here, behind the own ones
    int N,
    int SLOTS,
    int EXPERTS)
{
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (N * SLOTS <= i) return;
    const long long id = ids[i];
    const bool here = id == EXPERTS ? leads : first <= id && id < first + count;
    own_ids[i] = !here ? -1 : id == EXPERTS ? count : id - first;
    own_weights[i] = here ? weights[i] : -0.0f;
}

// Slots of a token are the experts that were chosen, and one more for the shared expert, if it is done along.
extern "C" __global__ void engine_experts_up(
    E* __restrict__ hidden,                    // [N, SLOTS, F]
    const E* __restrict__ x,                   // [N, D]
    const long long* __restrict__ ids,         // [N, A]
    const W* __restrict__ gate_proj,           // [EXPERTS, F, D]
    const float* __restrict__ gate_scales,     // of codes
    const W* __restrict__ up_proj,             // [EXPERTS, F, D]
    const float* __restrict__ up_scales,       // of codes
    const W* __restrict__ shared_gate_proj,    // [F, D]
    const float* __restrict__ shared_gate_scales,  // of codes
    const W* __restrict__ shared_up_proj,      // [F, D]
    const float* __restrict__ shared_up_scales,  // of codes
    int block_rows,
    int block_cols,
    int A,
    int SLOTS,
    int F,
    int D)
{
    const int f = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, a = blockIdx.y;
    if (F <= f) return;
    const size_t n = blockIdx.z;
    const bool routed = a < A;
    if (routed && ids[n * A + a] < 0) return;
    const size_t e = routed ? ids[n * A + a] : 0;
    const Row gate = row_of(routed ? gate_proj : shared_gate_proj, routed ? gate_scales : shared_gate_scales, f, F, D,
                            block_rows, block_cols, e);
    const Row up = row_of(routed ? up_proj : shared_up_proj, routed ? up_scales : shared_up_scales, f, F, D, block_rows,
                          block_cols, e);
    float opens[1] = {}, passes[1] = {};
    lane_products<1>(opens, gate, x + n * D, D, D);
    lane_products<1>(passes, up, x + n * D, D, D);
    const float open = warp_sum(opens[0]), pass = warp_sum(passes[0]);
    if (threadIdx.x % WARP == 0) hidden[(n * SLOTS + a) * F + f] = store<E>(silu(open) * pass);
}

// Rows that a warp does at once.
#define ROWS 4

// o <- (o +) sum of weights down(hidden) over routed slots, and then the shared one as far as it opens.
extern "C" __global__ void engine_experts_down(
    float* __restrict__ o,                     // [N, D]
    const E* __restrict__ hidden,              // [N, SLOTS, F]
    const long long* __restrict__ ids,         // [N, A]
    const float* __restrict__ weights,         // [N, A]
    const float* __restrict__ shared,          // [N], or none where it opens all
    const W* __restrict__ down_proj,           // [EXPERTS, D, F]
    const float* __restrict__ down_scales,     // of codes
    const W* __restrict__ shared_down_proj,    // [D, F]
    const float* __restrict__ shared_down_scales,  // of codes
    int block_rows,
    int block_cols,
    int adds,
    int A,
    int SLOTS,
    int F,
    int D)
{
    extern __shared__ float parts[];  // [SLOTS, ROWS]
    const int first = blockIdx.x * ROWS, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const size_t n = blockIdx.z;
    for (int a = warp; a < SLOTS; a += blockDim.x / WARP) {
        const bool routed = a < A;
        if (routed && ids[n * A + a] < 0) {
            if (lane < ROWS) parts[a * ROWS + lane] = 0;
            continue;
        }
        const size_t e = routed ? ids[n * A + a] : 0;
        const E* x = hidden + (n * SLOTS + a) * F;
        Row rows[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            rows[r] = row_of(routed ? down_proj : shared_down_proj, routed ? down_scales : shared_down_scales,
                             min(first + r, D - 1), D, F, block_rows, block_cols, e);
        float sums[ROWS] = {};
        if (F % 8 == 0 && (!rows[0].scales || 3 <= rows[0].shift)) {
            for (int f = 8 * lane; f < F; f += 8 * WARP) {
                float own[8];
                eight(x + f, own);
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    float w[8], sum = 0;
                    eight(rows[r].weights + f, w);
#pragma unroll
                    for (int i = 0; i < 8; i++) sum = __fmaf_rn(own[i], w[i], sum);
                    sums[r] = rows[r].scales ? __fmaf_rn(rows[r].scales[f >> rows[r].shift], sum, sums[r])
                                             : __fadd_rn(sums[r], sum);
                }
            }
        } else {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float own[1] = {};
                lane_products<1>(own, rows[r], x, F, F);
                sums[r] = own[0];
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float sum = warp_sum(sums[r]);
            if (lane == 0) parts[a * ROWS + r] = sum;
        }
    }
    __syncthreads();
    const int d = first + threadIdx.x;
    if (ROWS <= threadIdx.x || D <= d) return;
    float all = 0;
    for (int a = 0; a < A; a++) all = __fmaf_rn(weights[n * A + a], parts[a * ROWS + threadIdx.x], all);
    if (adds) all = o[n * D + d];
    const float own = A < SLOTS ? parts[A * ROWS + threadIdx.x] : 0;
    if (A < SLOTS) all = __fadd_rn(all, shared ? rounded<E>(__fmul_rn(shared[n], own)) : own);
    o[n * D + d] = all;
}
