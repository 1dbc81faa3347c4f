// Zero-centred RMS norm, with the residual addition before it:
//
//   h = x + residual,   o = h rsqrt(mean(h^2) + eps) (1 + weight)
//
// rms_norm_naive: one block per row.

#include "common/block.cuh"
#include "common/stored.cuh"

enum Plant { HONEST, MISSING_PLUS_ONE, EPS_OUTSIDE_ROOT, ONE_PLUS_WEIGHT_IN_BF16, RESIDUAL_NOT_RETURNED };

// What is normed: the sum as it is stored.
__device__ E summed(const E* x, const E* residual, size_t i)
{
    return residual ? store<E>(load(x[i]) + load(residual[i])) : x[i];
}

extern "C" __global__ void rms_norm_naive(
    E* __restrict__ o,               // [N, D]
    E* __restrict__ h,               // [N, D], none without a residual
    const E* __restrict__ x,         // [N, D]
    const E* __restrict__ residual,  // [N, D], or none
    const E* __restrict__ weight,    // [D]
    float eps,
    int D,
    int plant)
{
    const size_t row = (size_t)blockIdx.x * D;
    float squares = 0;
    for (int d = threadIdx.x; d < D; d += blockDim.x) {
        const E value = summed(x, residual, row + d);
        if (residual) h[row + d] = plant == RESIDUAL_NOT_RETURNED ? x[row + d] : value;
        squares += load(value) * load(value);
    }
    const float mean = block_sum(squares) / D;
    float scale = rsqrtf(mean + eps);
    if (plant == EPS_OUTSIDE_ROOT) scale = 1 / (sqrtf(mean) + eps);

    const float one = plant == MISSING_PLUS_ONE ? 0 : 1;
    for (int d = threadIdx.x; d < D; d += blockDim.x) {
        float gain = one + load(weight[d]);
        if (plant == ONE_PLUS_WEIGHT_IN_BF16) gain = rounded<bf16>(gain);
        o[row + d] = store<E>(load(summed(x, residual, row + d)) * scale * gain);
    }
}
