// Causal depthwise convolution with SiLU: o[t, c] = silu(sum_j weight[c, j] x[t - (W - 1) + j, c]). Before
// the first token of a sequence stand the W - 1 columns of its state; the new state is the last W - 1 raw
// inputs.
//
// causal_conv1d_naive:       one thread per token and channel.
// causal_conv1d_state_naive: one thread per sequence and channel.

#include "common/activation.cuh"
#include "common/stored.cuh"

enum Plant {
    HONEST,
    TAPS_FLIPPED,
    SILU_MISSING,
    BOUNDARIES_IGNORED,
    STATE_IGNORED,
    STATE_OFF_BY_ONE,
    SHORT_STEP_STATE_LOST,
    OLDEST_COLUMN_DROPPED,
    SUM_IN_STORAGE_TYPE,
};

extern "C" __global__ void causal_conv1d_naive(
    E* __restrict__ o,                         // [N, C]
    const E* __restrict__ x,                   // [N, C]
    const E* __restrict__ weight,              // [C, W]
    const E* __restrict__ state_in,            // [S, C, W - 1]
    const long long* __restrict__ cu_seqlens,  // [S + 1]
    int N,
    int C,
    int S,
    int W,
    int plant)
{
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const int n = i / C, c = i % C;
    if (n >= N) return;
    // The last sequence that begins at or before n: empty ones begin where the next does.
    int s = 0;
    while (s + 1 < S && cu_seqlens[s + 1] <= n) s++;
    const long long begin = plant == BOUNDARIES_IGNORED ? 0 : cu_seqlens[s];
    const E* before = state_in + ((size_t)s * C + c) * (W - 1);
    const int oldest = plant == OLDEST_COLUMN_DROPPED ? 1 : plant == STATE_IGNORED ? W : 0;

    float sum = 0;
    for (int j = 0; j < W; j++) {
        const float tap = load(weight[(size_t)c * W + (plant == TAPS_FLIPPED ? W - 1 - j : j)]);
        const long long t = n - (W - 1) + j, column = t - begin + (W - 1);
        if (begin <= t) sum += tap * load(x[t * C + c]);
        else if (oldest <= column) sum += tap * load(before[column]);
    }
    if (plant == SUM_IN_STORAGE_TYPE) sum = rounded<E>(sum);
    o[i] = store<E>(plant == SILU_MISSING ? sum : silu(sum));
}

extern "C" __global__ void causal_conv1d_state_naive(
    E* __restrict__ state_out,                 // [S, C, W - 1]
    const E* __restrict__ x,                   // [N, C]
    const E* __restrict__ state_in,            // [S, C, W - 1]
    const long long* __restrict__ cu_seqlens,  // [S + 1]
    int C,
    int S,
    int W,
    int plant)
{
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const int s = i / C, c = i % C;
    if (s >= S) return;
    const long long begin = cu_seqlens[s], tokens = cu_seqlens[s + 1] - begin;
    const bool early = plant == STATE_OFF_BY_ONE && 0 < tokens;
    const bool lost = plant == SHORT_STEP_STATE_LOST && 0 < tokens;
    for (int j = 0; j < W - 1; j++) {
        // Counted from the oldest column of the old state.
        const long long at = tokens + j - early;
        const E old = lost ? store<E>(0) : state_in[i * (W - 1) + min(at, (long long)W - 2)];
        state_out[i * (W - 1) + j] = at < W - 1 ? old : x[(begin + at - (W - 1)) * C + c];
    }
}
