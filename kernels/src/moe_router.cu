// Router of a sparse layer: logits = weight x, the A largest are chosen, ties to the lowest id;
// weights = softmax(logits) of these, over their sum where norm_topk_prob says so. All in f32.
//
// moe_router_naive: one block per token, one thread per expert (and every 256th after it).

#include "common/activation.cuh"
#include "common/block.cuh"
#include "common/order.cuh"

enum Plant {
    HONEST,
    LOGITS_IN_BF16,
    SOFTMAX_TWICE,
    SOFTMAX_WITHOUT_MAXIMUM,
    SOFTMAX_OVER_CHOSEN,
    RENORMALISE_FLIPPED,
    SIGMOID_FOR_SOFTMAX,
    WEIGHTS_SHIFTED,
    EXPERTS_OFF_BY_ONE,
    EXPERT_TAIL_UNSEEN,
};

// What an expert's weight is in proportion to.
__device__ float score(float logit, float largest, int plant)
{
    if (plant == SIGMOID_FOR_SOFTMAX) return sigmoid(logit);
    return expf(plant == SOFTMAX_WITHOUT_MAXIMUM ? logit : logit - largest);
}

extern "C" __global__ void moe_router_naive(
    long long* __restrict__ ids,   // [N, A]
    float* __restrict__ weights,   // [N, A]
    float* __restrict__ logits,    // [N, EXPERTS]
    float* __restrict__ margins,   // [N]
    const E* __restrict__ x,       // [N, D]
    const E* __restrict__ weight,  // [EXPERTS, D]
    int norm_topk_prob,
    int D,
    int EXPERTS,
    int A,
    int plant)
{
    extern __shared__ float row[];  // [EXPERTS]
    const size_t token = blockIdx.x;
    for (int e = threadIdx.x; e < EXPERTS; e += blockDim.x) {
        float sum = 0;
        for (int d = 0; d < D; d++) sum += load(x[token * D + d]) * load(weight[(size_t)e * D + d]);
        row[e] = plant == LOGITS_IN_BF16 ? rounded<bf16>(sum) : sum;
        logits[token * EXPERTS + e] = row[e];
    }
    __syncthreads();

    const int seen = plant == EXPERT_TAIL_UNSEEN && 16 <= EXPERTS ? EXPERTS - EXPERTS % 16 : EXPERTS;
    const Place first = next(row, seen, start());
    float all = 0;
    for (int e = threadIdx.x; e < EXPERTS; e += blockDim.x) all += score(row[e], first.x, plant);
    all = block_sum(all);

    Place place = first;
    float chosen = 0;
    for (int a = 0; a < A; a++) {
        chosen += score(place.x, first.x, plant);
        if (threadIdx.x == 0) {
            ids[token * A + a] = place.id + (plant == EXPERTS_OFF_BY_ONE);
            weights[token * A + (plant == WEIGHTS_SHIFTED ? (a + 1) % A : a)] = score(place.x, first.x, plant);
        }
        const float before = place.x;
        place = next(row, seen, place);
        if (threadIdx.x == 0 && a == A - 1)
            margins[token] = place.id < seen ? before - place.x : INFINITY;
    }
    if (threadIdx.x != 0) return;

    const bool renormalised = (norm_topk_prob != 0) != (plant == RENORMALISE_FLIPPED);
    const float total = renormalised || plant == SOFTMAX_OVER_CHOSEN ? chosen : all;
    for (int a = 0; a < A; a++) weights[token * A + a] /= total;
    if (plant == SOFTMAX_TWICE) {
        float again = 0;
        for (int a = 0; a < A; a++) again += expf(weights[token * A + a]);
        for (int a = 0; a < A; a++) weights[token * A + a] = expf(weights[token * A + a]) / again;
    }
}
