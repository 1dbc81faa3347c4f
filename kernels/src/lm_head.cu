// Logits: logits[n, m] = sum_d x[n, d] weight[m, d], kept in f32 whatever is multiplied.
//
// lm_head_naive: one thread per token and row of the vocabulary.

#include "common/stored.cuh"

enum Plant {
    HONEST,
    LOGITS_IN_BF16,
    RAGGED_TAIL_DROPPED,
    VOCABULARY_TAIL_ZERO,
    SHARD_SHIFTED,
    LAST_TOKEN_STALE,
    ACTIVATIONS_IN_BF16,
};

extern "C" __global__ void lm_head_naive(
    float* __restrict__ logits,    // [N, M]
    const E* __restrict__ x,       // [N, D]
    const E* __restrict__ weight,  // [M, D]
    int N,
    int M,
    int D,
    int plant)
{
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    int n = i / M, m = i % M;
    if (n >= N) return;
    const bool zero = plant == VOCABULARY_TAIL_ZERO && M - M % 32 <= m;
    if (plant == LAST_TOKEN_STALE && n == N - 1 && 0 < n) n -= 1;
    if (plant == SHARD_SHIFTED && 1 < M && M / 2 <= m) m -= 1;
    const int summed = plant == RAGGED_TAIL_DROPPED ? D - D % 8 : D;
    const bool narrow = plant == ACTIVATIONS_IN_BF16;

    float sum = 0;
    for (int d = 0; d < summed; d++) {
        const float value = load(x[(size_t)n * D + d]);
        sum += (narrow ? rounded<bf16>(value) : value) * load(weight[(size_t)m * D + d]);
    }
    logits[i] = zero ? 0 : plant == LOGITS_IN_BF16 ? rounded<bf16>(sum) : sum;
}
