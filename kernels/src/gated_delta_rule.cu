// Gated delta rule, token by token. Per value head, with a state S: [K, V], q = l2norm(q) / sqrt(K) and
// k = l2norm(k):
//
//   S <- exp(g) S                forget
//   d  = beta (v - S' k)         what the state does not yet say of this key
//   S <- S + k d'                write it
//   o  = S' q                    answer from the state just written
//
// Value head h reads query and key head h / (HV / HK).
//
// gated_delta_rule_naive: one block per sequence, value head and group of columns of S, one thread per
//                         column, which it keeps where it is returned.

#include "common/block.cuh"
#include "common/stored.cuh"

enum Plant {
    HONEST,
    DECAY_DROPPED_AT_EACH_CHUNK,
    GATE_OFF_BY_ONE,
    NO_DELTA_RULE,
    BETA_ON_VALUE_ONLY,
    HEADS_INTERLEAVED,
    EPS_ON_MEAN,
    EPS_OUTSIDE_ROOT,
    NOT_NORMED,
    QUERY_NOT_SCALED,
    STATE_IN_BF16,
    BETA_IN_BF16,
    INITIAL_STATE_IGNORED,
    PREDICTION_BEFORE_DECAY,
    ANSWER_BEFORE_WRITE,
};

// A vector of K channels times what makes its length one, and a factor.
__device__ void normed(float* to, const E* from, int K, float eps, float factor, int plant)
{
    float squares = 0;
    for (int i = threadIdx.x; i < K; i += blockDim.x) squares += load(from[i]) * load(from[i]);
    const float sum = block_sum(squares);
    float scale = rsqrtf(sum + eps);
    if (plant == EPS_ON_MEAN) scale = rsqrtf(sum + K * eps);
    if (plant == EPS_OUTSIDE_ROOT) scale = 1 / (sqrtf(sum) + eps);
    if (plant == NOT_NORMED) scale = 1;
    for (int i = threadIdx.x; i < K; i += blockDim.x) to[i] = load(from[i]) * scale * factor;
}

extern "C" __global__ void gated_delta_rule_naive(
    E* __restrict__ o,                         // [N, HV, V]
    float* __restrict__ state_out,             // [S, HV, K, V]
    const E* __restrict__ q,                   // [N, HK, K]
    const E* __restrict__ k,                   // [N, HK, K]
    const E* __restrict__ v,                   // [N, HV, V]
    const float* __restrict__ g,               // [N, HV]
    const E* __restrict__ beta,                // [N, HV]
    const float* __restrict__ state_in,        // [S, HV, K, V]
    const long long* __restrict__ cu_seqlens,  // [S + 1]
    float eps,
    int HK,
    int HV,
    int K,
    int V,
    int plant)
{
    extern __shared__ float shared[];
    float *query = shared, *key = shared + K;  // [K] each, of the token at hand
    const int s = blockIdx.x / HV, h = blockIdx.x % HV, group = HV / HK;
    const int head = plant == HEADS_INTERLEAVED ? h % HK : h / group;
    const int j = blockIdx.y * blockDim.x + threadIdx.x;
    const bool mine = j < V;
    const float scale = plant == QUERY_NOT_SCALED ? 1 : 1 / sqrtf(K);

    // The column of this thread: S[i] is column[i * V].
    const size_t first = (size_t)blockIdx.x * K * V + j;
    float* column = state_out + first;
    for (int i = 0; mine && i < K; i++)
        column[(size_t)i * V] = plant == INITIAL_STATE_IGNORED ? 0 : state_in[first + (size_t)i * V];

    const long long begin = cu_seqlens[s], end = cu_seqlens[s + 1];
    for (long long t = begin; t < end; t++) {
        __syncthreads();  // The token before has been answered.
        normed(query, q + (t * HK + head) * K, K, eps, scale, plant);
        normed(key, k + (t * HK + head) * K, K, eps, 1, plant);
        __syncthreads();
        if (!mine) continue;

        float gate = g[t * HV + h], write = load(beta[t * HV + h]);
        if (plant == GATE_OFF_BY_ONE) gate = t == begin ? 0 : g[(t - 1) * HV + h];
        if (plant == DECAY_DROPPED_AT_EACH_CHUNK && (t - begin) % 64 == 0) gate = 0;
        if (plant == BETA_IN_BF16) write = rounded<bf16>(write);
        const float decay = expf(gate);

        float said = 0;
        for (int i = 0; i < K; i++) {
            column[(size_t)i * V] *= decay;
            said += column[(size_t)i * V] * key[i];
        }
        float on_said = write;
        if (plant == NO_DELTA_RULE) on_said = 0;
        if (plant == BETA_ON_VALUE_ONLY) on_said = 1;
        if (plant == PREDICTION_BEFORE_DECAY) on_said = write / decay;
        const float d = write * load(v[(t * HV + h) * V + j]) - on_said * said;

        float answer = 0, early = 0;
        for (int i = 0; i < K; i++) {
            early += column[(size_t)i * V] * query[i];
            column[(size_t)i * V] += key[i] * d;
            answer += column[(size_t)i * V] * query[i];
        }
        o[(t * HV + h) * V + j] = store<E>(plant == ANSWER_BEFORE_WRITE ? early : answer);
        for (int i = 0; plant == STATE_IN_BF16 && i < K; i++)
            column[(size_t)i * V] = rounded<bf16>(column[(size_t)i * V]);
    }
}
