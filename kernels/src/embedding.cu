// Token embedding: o[n] = table[ids[n]].
//
// embedding_naive: one thread per element.

#include "common/stored.cuh"

enum Plant { HONEST, ROW_OFF_BY_ONE, FIRST_ROW_IS_PADDING, LAST_ROW_UNWRITTEN, SCALED };

extern "C" __global__ void embedding_naive(
    E* __restrict__ o,                  // [N, D]
    const long long* __restrict__ ids,  // [N]
    const E* __restrict__ table,        // [M, D]
    int N,
    int D,
    int plant)
{
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const int n = i / D, d = i % D;
    if (n >= N - (plant == LAST_ROW_UNWRITTEN)) return;

    long long row = ids[n];
    if (plant == ROW_OFF_BY_ONE && 0 < row) row -= 1;
    E x = table[row * D + d];
    if (plant == FIRST_ROW_IS_PADDING && row == 0) x = store<E>(0);
    if (plant == SCALED) x = store<E>(load(x) * sqrtf(D));
    o[i] = x;
}
