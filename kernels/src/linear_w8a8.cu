// Linear projection with activations and weights in FP8:
// o[n, m] = sum_g x_scales[n, g] weight_scales[m, g] sum_(d in g) x_codes[n, d] weight[m, d], groups of 128 columns.
//
// linear_w8a8_groups: codes of activations; one thread per group.
// linear_w8a8_naive:  one thread per output, which walks the groups in order.

#include "common/w8a8.cuh"

enum Plant {
    HONEST,
    SCALE_OF_NEXT_GROUP,
    ACTIVATION_SCALE_FORGOTTEN,
    SCALED_AT_THE_END,
    LARGEST_OF_A_QUARTER,
    SCALE_OF_NEIGHBOUR,
    LAST_ROW_SHIFTED,
    LAST_TOKEN_STALE,
};

extern "C" __global__ void linear_w8a8_groups(
    unsigned char* __restrict__ x_codes,  // [N, D]
    float* __restrict__ x_scales,         // [N, ceil(D / 128)]
    const E* __restrict__ x,              // [N, D]
    int N,
    int D,
    int plant)
{
    const int across = ceil_div(D, GROUP);
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if ((long long)N * across <= i) return;
    const size_t n = i / across, at = n * D + i % across * GROUP;
    const int columns = min(GROUP, D - (int)(i % across) * GROUP);
    quantise_group(x_codes + at, x_scales + i, x + at, columns, plant == LARGEST_OF_A_QUARTER ? 32 : GROUP);
}

extern "C" __global__ void linear_w8a8_naive(
    E* __restrict__ o,                          // [N, M]
    const unsigned char* __restrict__ x_codes,  // [N, D]
    const float* __restrict__ x_scales,         // [N, ceil(D / 128)]
    const W* __restrict__ weight,               // [M, D]
    const float* __restrict__ weight_scales,    // of codes
    int N,
    int M,
    int D,
    int plant)
{
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    int n = i / M, m = i % M;
    if (N <= n) return;
    if (plant == LAST_TOKEN_STALE && n == N - 1 && 0 < n) n -= 1;
    if (plant == LAST_ROW_SHIFTED && m == M - 1 && 0 < m) m -= 1;
    int block = m / 128;
    if (plant == SCALE_OF_NEIGHBOUR && 128 < M) block += block + 1 < ceil_div(M, 128) ? 1 : -1;
    const Scaling scaling = plant == SCALE_OF_NEXT_GROUP          ? Scaling::OF_NEXT_GROUP
                            : plant == ACTIVATION_SCALE_FORGOTTEN ? Scaling::FORGOTTEN
                            : plant == SCALED_AT_THE_END          ? Scaling::AT_THE_END
                                                                  : Scaling::HONEST;
    const size_t across = ceil_div(D, GROUP);
    o[i] = store<E>(product_of_codes(x_codes + (size_t)n * D, x_scales + n * across, weight + (size_t)m * D,
                                     weight_scales + block * across, D, scaling));
}
