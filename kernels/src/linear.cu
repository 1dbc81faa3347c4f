// Linear projection: o[n, m] = sum_d x[n, d] weight[m, d].
//
// linear_naive: one thread per output, which walks the input channels in order.

#include "common/weight.cuh"

enum Plant {
    HONEST,
    RAGGED_TAIL_DROPPED,
    SPLIT_K_IN_BF16,
    TRANSPOSED_WHEN_SQUARE,
    LAST_ROW_SHIFTED,
    UNIFORM_SCALE,
    LAST_TOKEN_STALE,
};

extern "C" __global__ void linear_naive(
    E* __restrict__ o,                       // [N, M]
    const E* __restrict__ x,                 // [N, D]
    const W* __restrict__ weight,            // [M, D]
    const bf16* __restrict__ weight_scales,  // of weights of few bits
    int N,
    int M,
    int D,
    int plant)
{
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    int n = i / M, m = i % M;
    if (n >= N) return;
    if (plant == LAST_TOKEN_STALE && n == N - 1 && 0 < n) n -= 1;
    if (plant == LAST_ROW_SHIFTED && m == M - 1 && 0 < m) m -= 1;
    const bool transposed = plant == TRANSPOSED_WHEN_SQUARE && M == D;
    const int summed = plant == RAGGED_TAIL_DROPPED ? D - D % 8 : D;
    const int block = plant == SPLIT_K_IN_BF16 ? 512 : D;

    const Matrix<W> w(weight, weight_scales, M, D);
    const E* row = x + (size_t)n * D;
    float all = 0;
    for (int start = 0; start < summed; start += block) {
        float sum = 0;
        for (int d = start; d < min(start + block, summed); d++)
            sum += load(row[d]) * (transposed ? w.at(d, m) : w.at(m, d));
        all = plant == SPLIT_K_IN_BF16 ? rounded<bf16>(all + sum) : sum;
    }
    o[i] = store<E>(plant == UNIFORM_SCALE ? 1.004f * all : all);
}
