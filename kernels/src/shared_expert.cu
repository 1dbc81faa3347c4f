// Shared expert: o = sigmoid(gate x) down( silu(gate_proj x) * (up_proj x) ), with one gate per token.
//
// shared_expert_naive: one block per token; one thread per hidden channel, then one per output channel (and
//                      every 256th after it).

#include "common/activation.cuh"
#include "common/block.cuh"
#include "common/stored.cuh"

enum Plant {
    HONEST,
    GATE_MISSING,
    GATE_ON_INPUT,
    GATE_WITHOUT_SIGMOID,
    GATE_SILU,
    GATE_OF_FIRST_TOKEN,
    GATE_OVERFLOWS,
    GATE_UP_SWAPPED,
    SIGMOID_FOR_SILU,
    HIDDEN_IN_BF16,
};

__device__ float opened(float gate, int plant)
{
    if (plant == GATE_MISSING) return 1;
    if (plant == GATE_WITHOUT_SIGMOID) return gate;
    if (plant == GATE_SILU) return silu(gate);
    if (plant == GATE_OVERFLOWS) return overflowing_sigmoid(gate);
    return sigmoid(gate);
}

extern "C" __global__ void shared_expert_naive(
    E* __restrict__ o,                // [N, D]
    const E* __restrict__ x,          // [N, D]
    const E* __restrict__ gate_proj,  // [F, D]
    const E* __restrict__ up_proj,    // [F, D]
    const E* __restrict__ down_proj,  // [D, F]
    const E* __restrict__ gate,       // [1, D]
    int D,
    int F,
    int plant)
{
    extern __shared__ float hidden[];  // [F]
    const size_t n = blockIdx.x, gated = plant == GATE_OF_FIRST_TOKEN ? 0 : n;
    float part = 0;
    for (int d = threadIdx.x; d < D; d += blockDim.x) part += load(x[gated * D + d]) * load(gate[d]);
    const float open = opened(block_sum(part), plant);
    const float on_input = plant == GATE_ON_INPUT ? open : 1;
    const float on_output = plant == GATE_ON_INPUT ? 1 : open;

    for (int f = threadIdx.x; f < F; f += blockDim.x) {
        float opens = 0, passes = 0;
        for (int d = 0; d < D; d++) {
            const float value = on_input * load(x[n * D + d]);
            opens += value * load(gate_proj[(size_t)f * D + d]);
            passes += value * load(up_proj[(size_t)f * D + d]);
        }
        hidden[f] = plant == GATE_UP_SWAPPED ? silu(passes) * opens : silu(opens) * passes;
        if (plant == SIGMOID_FOR_SILU) hidden[f] = sigmoid(opens) * passes;
        if (plant == HIDDEN_IN_BF16) hidden[f] = rounded<bf16>(hidden[f]);
    }
    __syncthreads();
    for (int d = threadIdx.x; d < D; d += blockDim.x) {
        float out = 0;
        for (int f = 0; f < F; f++) out += hidden[f] * load(down_proj[(size_t)d * F + f]);
        o[n * D + d] = store<E>(on_output * out);
    }
}
