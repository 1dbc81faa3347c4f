// FP8 weights: weight[m, d] = value(codes[m, d]) scales[m / block_rows, d / block_cols]. The scale
// multiplies, though checkpoints call it weight_scale_inv.
//
// fp8_dequant_naive: one thread per weight.

#include "common/fp8.cuh"

enum Plant {
    HONEST,
    DIVIDES_BY_THE_SCALE,
    SCALES_TRANSPOSED,
    EDGE_TAKES_ITS_NEIGHBOUR,
    SUBNORMALS_FLUSHED,
    FNUZ_BIAS,
    SCALE_IN_BF16,
};

extern "C" __global__ void fp8_dequant_naive(
    E* __restrict__ weight,                   // [M, D]
    const unsigned char* __restrict__ codes,  // [M, D]
    const float* __restrict__ scales,         // [ceil(M / block_rows), ceil(D / block_cols)]
    int block_rows,
    int block_cols,
    int M,
    int D,
    int plant)
{
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (long long)M * D) return;
    const int down = (M + block_rows - 1) / block_rows, across = (D + block_cols - 1) / block_cols;
    int m = i / D / block_rows, d = i % D / block_cols;
    if (plant == EDGE_TAKES_ITS_NEIGHBOUR) {
        m = min(m, max(M / block_rows, 1) - 1);
        d = min(d, max(D / block_cols, 1) - 1);
    }
    float scale = scales[plant == SCALES_TRANSPOSED ? (size_t)d * down + m : (size_t)m * across + d];
    if (plant == DIVIDES_BY_THE_SCALE) scale = 1 / scale;
    if (plant == SCALE_IN_BF16) scale = rounded<bf16>(scale);

    float value = fp8_value(codes[i]);
    if (plant == SUBNORMALS_FLUSHED && (codes[i] & 0x7f) < 8) value = 0;
    if (plant == FNUZ_BIAS) value /= 2;
    weight[i] = store<E>(value * scale);
}
