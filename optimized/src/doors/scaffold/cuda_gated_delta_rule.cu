// The gated delta rule, token by token. Per sequence and value head, with a state S: [K, V]:
//
//   S <- exp(g) S,   d = beta (v - S' k),   S <- S + k d',   o = S' q
//
// One block per sequence and value head, one thread per column of S. Value head h reads query and key
// head h / (HV / HK).

__device__ float norm(const float* x, int K, float eps)
{
    float sum = 0;
    for (int i = 0; i < K; i++) sum += x[i] * x[i];
    return sqrtf(sum + eps);
}

extern "C" __global__ void gated_delta_rule(
    float* __restrict__ o,                  // [N, HV, V]
    float* __restrict__ state_out,          // [B, HV, K, V]
    const float* __restrict__ q,            // [N, HK, K]
    const float* __restrict__ k,            // [N, HK, K]
    const float* __restrict__ v,            // [N, HV, V]
    const float* __restrict__ g,            // [N, HV]
    const float* __restrict__ beta,         // [N, HV]
    const float* __restrict__ state_in,     // [B, HV, K, V]
    const long long* __restrict__ starts,   // [B + 1]
    float eps,
    int HK,
    int HV,
    int K,
    int V)
{
    const int b = blockIdx.x / HV, h = blockIdx.x % HV;
    const float root = sqrtf((float)K);
    for (int j = threadIdx.x; j < V; j += blockDim.x) {
        const size_t column = (size_t)blockIdx.x * K * V + j;
        float* s = state_out + column;
        for (int i = 0; i < K; i++) s[(size_t)i * V] = state_in[column + (size_t)i * V];
        for (long long t = starts[b]; t < starts[b + 1]; t++) {
            const float* key = k + (t * HK + h / (HV / HK)) * K;
            const float* query = q + (t * HK + h / (HV / HK)) * K;
            const float decay = expf(g[t * HV + h]);
            const float k_norm = norm(key, K, eps), q_norm = norm(query, K, eps);
            float said = 0;
            for (int i = 0; i < K; i++) {
                s[(size_t)i * V] *= decay;
                said += s[(size_t)i * V] * (key[i] / k_norm);
            }
            const float d = beta[t * HV + h] * (v[(t * HV + h) * V + j] - said);
            float answer = 0;
            for (int i = 0; i < K; i++) {
                s[(size_t)i * V] += key[i] / k_norm * d;
                answer += s[(size_t)i * V] * (query[i] / q_norm / root);
            }
            o[(t * HV + h) * V + j] = answer;
        }
    }
}
