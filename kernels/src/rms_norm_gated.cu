// Gated RMS norm of the delta rule's output: o = x rsqrt(mean(x^2) + eps) weight silu(z). Its weight is
// not zero-centred.
//
// rms_norm_gated_naive: one block per row.

#include "common/activation.cuh"
#include "common/block.cuh"
#include "common/stored.cuh"

enum Plant {
    HONEST,
    ZERO_CENTRED,
    GATE_BEFORE_NORM,
    SIGMOID_GATE,
    EPS_OUTSIDE_ROOT,
    SUM_NOT_MEAN,
    SIGMOID_OVERFLOWS,
    NORM_IN_STORAGE_TYPE,
};

__device__ float gate(float z, int plant)
{
    if (plant == SIGMOID_GATE) return sigmoid(z);
    if (plant == SIGMOID_OVERFLOWS) return z * overflowing_sigmoid(z);
    return silu(z);
}

extern "C" __global__ void rms_norm_gated_naive(
    E* __restrict__ o,             // [N, V]
    const E* __restrict__ x,       // [N, V]
    const E* __restrict__ z,       // [N, V]
    const E* __restrict__ weight,  // [V]
    float eps,
    int V,
    int plant)
{
    const size_t row = (size_t)blockIdx.x * V;
    float squares = 0;
    for (int v = threadIdx.x; v < V; v += blockDim.x) {
        float value = load(x[row + v]);
        if (plant == GATE_BEFORE_NORM) value *= gate(load(z[row + v]), plant);
        squares += value * value;
    }
    const float sum = block_sum(squares);
    float scale = rsqrtf(sum / V + eps);
    if (plant == EPS_OUTSIDE_ROOT) scale = 1 / (sqrtf(sum / V) + eps);
    if (plant == SUM_NOT_MEAN) scale = sqrtf(V / (sum + eps));

    for (int v = threadIdx.x; v < V; v += blockDim.x) {
        float normed = load(x[row + v]) * scale;
        if (plant == NORM_IN_STORAGE_TYPE) normed = rounded<E>(normed);
        const float gain = load(weight[v]) + (plant == ZERO_CENTRED);
        o[row + v] = store<E>(normed * gain * gate(load(z[row + v]), plant));
    }
}
