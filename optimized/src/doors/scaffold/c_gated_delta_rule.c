/* The gated delta rule, token by token. Per sequence and value head, with a state S: [K, V]:
 *
 *   S <- exp(g) S,   d = beta (v - S' k),   S <- S + k d',   o = S' q
 *
 * q, k: [N, HK, K], normalised here; v, o: [N, HV, V]; g, beta: [N, HV]; state: [B, HV, K, V];
 * cu_seqlens: [B + 1]. Value head h reads query and key head h / (HV / HK). */
#include "karat.h"

#include <math.h>

KARAT_DEFINE_ABI

/* Room for one normalised query, one key and one correction. */
uint64_t karat_gated_delta_rule_workspace(const karat_call *call) {
    return sizeof(float) * (uint64_t)(2 * karat_size(call, "K") + karat_size(call, "V"));
}

static void normalise(float *to, const float *x, int64_t k, float eps, float scale) {
    float sum = 0;
    for (int64_t i = 0; i < k; i++) sum += x[i] * x[i];
    for (int64_t i = 0; i < k; i++) to[i] = x[i] / sqrtf(sum + eps) * scale;
}

int karat_gated_delta_rule(const karat_call *call) {
    const karat_tensor *q_in = karat_input(call, "q"), *v_in = karat_input(call, "v");
    const float *q_all = q_in->data, *v_all = v_in->data;
    const float *k_all = karat_input(call, "k")->data;
    const float *g = karat_input(call, "g")->data;
    const float *beta = karat_input(call, "beta")->data;
    const karat_tensor *state_in = karat_input(call, "state");
    const int64_t *starts = karat_input(call, "cu_seqlens")->data;
    float *o_all = karat_output(call, "o")->data;
    float *state = karat_output(call, "state")->data;
    const float eps = (float)karat_scalar(call, "eps");
    const int64_t hk = q_in->shape[1], K = q_in->shape[2];
    const int64_t hv = v_in->shape[1], V = v_in->shape[2];
    float *q = call->workspace, *k = q + K, *d = k + K;

    if (q_in->dtype != KARAT_F32) return karat_fail(call, "only f32");
    memcpy(state, state_in->data, sizeof(float) * (size_t)(state_in->shape[0] * hv * K * V));
    for (int64_t b = 0; b < state_in->shape[0]; b++)
        for (int64_t h = 0; h < hv; h++) {
            float *s = state + (b * hv + h) * K * V;
            for (int64_t t = starts[b]; t < starts[b + 1]; t++) {
                const int64_t key = (t * hk + h / (hv / hk)) * K;
                const float *v = v_all + (t * hv + h) * V;
                float *o = o_all + (t * hv + h) * V;
                const float decay = expf(g[t * hv + h]);
                normalise(q, q_all + key, K, eps, 1 / sqrtf((float)K));
                normalise(k, k_all + key, K, eps, 1);
                for (int64_t j = 0; j < V; j++) d[j] = 0;
                for (int64_t i = 0; i < K; i++)
                    for (int64_t j = 0; j < V; j++) {
                        s[i * V + j] *= decay;
                        d[j] += s[i * V + j] * k[i];
                    }
                for (int64_t j = 0; j < V; j++) {
                    d[j] = beta[t * hv + h] * (v[j] - d[j]);
                    o[j] = 0;
                }
                for (int64_t i = 0; i < K; i++)
                    for (int64_t j = 0; j < V; j++) {
                        s[i * V + j] += k[i] * d[j];
                        o[j] += s[i * V + j] * q[i];
                    }
            }
        }
    return 0;
}
