// L2 norm of queries and keys: o = x rsqrt(sum(x^2) + eps). eps is added to the sum, inside the root.
//
// l2_norm_naive: one block per row.

#include "common/block.cuh"
#include "common/stored.cuh"

enum Plant {
    HONEST,
    EPS_ON_MEAN,
    EPS_OUTSIDE_ROOT,
    MAX_OF_NORM_AND_EPS,
    EPS_MISSING,
    MEAN_NOT_SUM,
    FACTOR_IN_STORAGE_TYPE,
};

extern "C" __global__ void l2_norm_naive(
    E* __restrict__ o,        // [N, D]
    const E* __restrict__ x,  // [N, D]
    float eps,
    int D,
    int plant)
{
    const size_t row = (size_t)blockIdx.x * D;
    float squares = 0;
    for (int d = threadIdx.x; d < D; d += blockDim.x) squares += load(x[row + d]) * load(x[row + d]);
    const float sum = block_sum(squares);

    float factor = rsqrtf(sum + eps);
    if (plant == EPS_ON_MEAN) factor = rsqrtf(sum + D * eps);
    if (plant == EPS_OUTSIDE_ROOT) factor = 1 / (sqrtf(sum) + eps);
    if (plant == MAX_OF_NORM_AND_EPS) factor = 1 / fmaxf(sqrtf(sum), eps);
    if (plant == EPS_MISSING) factor = rsqrtf(sum);
    if (plant == MEAN_NOT_SUM) factor = rsqrtf(sum / D + eps);
    if (plant == FACTOR_IN_STORAGE_TYPE) factor = rounded<E>(factor);

    for (int d = threadIdx.x; d < D; d += blockDim.x) o[row + d] = store<E>(load(x[row + d]) * factor);
}
