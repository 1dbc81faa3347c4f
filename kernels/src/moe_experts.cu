// Routed experts: o = sum_a weights[a] down_e( silu(gate_e x) * (up_e x) ), e = ids[a]. The weight
// multiplies what comes out of an expert.
//
// moe_experts_naive: one block per token, which walks through its experts: one thread per hidden channel,
//                    then one per output channel (and every 256th after it).

#include "common/activation.cuh"
#include "common/weight.cuh"

enum Plant {
    HONEST,
    WEIGHT_ON_INPUT,
    WEIGHTS_NOT_APPLIED,
    WEIGHT_OF_FIRST_SLOT,
    RENORMALISED_AGAIN,
    WEIGHTS_IN_BF16,
    SUM_IN_BF16,
    GATE_UP_SWAPPED,
    SILU_ON_PRODUCT,
    HIDDEN_IN_BF16,
    HIDDEN_IN_F16,
};

extern "C" __global__ void moe_experts_naive(
    E* __restrict__ o,                          // [N, D]
    const E* __restrict__ x,                    // [N, D]
    const long long* __restrict__ ids,          // [N, A]
    const float* __restrict__ weights,          // [N, A]
    const W* __restrict__ gate_proj,            // [EXPERTS, F, D]
    const bf16* __restrict__ gate_proj_scales,  // of weights of few bits
    const W* __restrict__ up_proj,              // [EXPERTS, F, D]
    const bf16* __restrict__ up_proj_scales,    // of weights of few bits
    const W* __restrict__ down_proj,            // [EXPERTS, D, F]
    const bf16* __restrict__ down_proj_scales,  // of weights of few bits
    int D,
    int A,
    int F,
    int plant)
{
    extern __shared__ float shared[];
    float *hidden = shared, *sum = shared + F;  // [F], [D]
    const size_t n = blockIdx.x;
    float all = 0;
    for (int a = 0; a < A; a++) all += weights[n * A + a];
    for (int d = threadIdx.x; d < D; d += blockDim.x) sum[d] = 0;

    for (int a = 0; a < A; a++) {
        const int e = ids[n * A + a];
        const Matrix<W> gate(gate_proj, gate_proj_scales, F, D, e), up(up_proj, up_proj_scales, F, D, e);
        const Matrix<W> down(down_proj, down_proj_scales, D, F, e);
        float weight = weights[n * A + (plant == WEIGHT_OF_FIRST_SLOT ? 0 : a)];
        if (plant == WEIGHTS_NOT_APPLIED) weight = 1;
        if (plant == RENORMALISED_AGAIN) weight /= all;
        if (plant == WEIGHTS_IN_BF16) weight = rounded<bf16>(weight);
        const float on_input = plant == WEIGHT_ON_INPUT ? weight : 1;
        const float on_output = plant == WEIGHT_ON_INPUT ? 1 : weight;

        __syncthreads();  // The expert before has been added.
        for (int f = threadIdx.x; f < F; f += blockDim.x) {
            float opens = 0, passes = 0;
            for (int d = 0; d < D; d++) {
                const float value = on_input * load(x[n * D + d]);
                opens += value * gate.at(f, d);
                passes += value * up.at(f, d);
            }
            hidden[f] = plant == GATE_UP_SWAPPED ? silu(passes) * opens : silu(opens) * passes;
            if (plant == SILU_ON_PRODUCT) hidden[f] = silu(opens * passes);
            if (plant == HIDDEN_IN_BF16) hidden[f] = rounded<bf16>(hidden[f]);
            if (plant == HIDDEN_IN_F16) hidden[f] = rounded<f16>(hidden[f]);
        }
        __syncthreads();
        for (int d = threadIdx.x; d < D; d += blockDim.x) {
            float out = 0;
            for (int f = 0; f < F; f++) out += hidden[f] * down.at(d, f);
            sum[d] += on_output * out;
            if (plant == SUM_IN_BF16) sum[d] = rounded<bf16>(sum[d]);
        }
    }
    for (int d = threadIdx.x; d < D; d += blockDim.x) o[n * D + d] = store<E>(sum[d]);
}
