// Gates of the delta rule, per value head: beta = sigmoid(b), g = -exp(a_log) softplus(a + dt_bias). All in
// f32, and stored in it.
//
// gdn_gates_naive: one thread per token and head.

#include "common/activation.cuh"
#include "common/stored.cuh"

enum Plant {
    HONEST,
    LOG_ONE_PLUS_EXP,
    SOFTPLUS_OVERFLOWS,
    BETA_IN_BF16,
    G_IN_BF16,
    RATE_IN_BF16,
    DT_BIAS_AFTER_SOFTPLUS,
    EXP_MISSING,
    A_B_SWAPPED,
    HEADS_ROTATED,
};

// ln(1 + e^x); x itself above 20. log1p, because 1 + e^x is 1 where a head remembers.
__device__ float softplus(float x, int plant)
{
    if (plant == SOFTPLUS_OVERFLOWS) return log1pf(expf(x));
    if (plant == LOG_ONE_PLUS_EXP) return x > 20 ? x : logf(1 + expf(x));
    return x > 20 ? x : log1pf(expf(x));
}

extern "C" __global__ void gdn_gates_naive(
    float* __restrict__ g,              // [N, HV]
    float* __restrict__ beta,           // [N, HV]
    const E* __restrict__ a,            // [N, HV]
    const E* __restrict__ b,            // [N, HV]
    const float* __restrict__ a_log,    // [HV]
    const float* __restrict__ dt_bias,  // [HV]
    int N,
    int HV,
    int plant)
{
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (long long)N * HV) return;
    const int head = i % HV;
    float decay = load(a[i]), write = load(b[i]);
    if (plant == A_B_SWAPPED) decay = load(b[i]), write = load(a[i]);

    float log_rate = a_log[plant == HEADS_ROTATED ? (head + 1) % HV : head];
    if (plant == RATE_IN_BF16) log_rate = rounded<bf16>(log_rate);
    const float rate = plant == EXP_MISSING ? log_rate : expf(log_rate);
    const float bias = dt_bias[head];
    const float time = plant == DT_BIAS_AFTER_SOFTPLUS ? softplus(decay, plant) + bias : softplus(decay + bias, plant);

    g[i] = plant == G_IN_BF16 ? rounded<bf16>(-rate * time) : -rate * time;
    beta[i] = plant == BETA_IN_BF16 ? rounded<bf16>(sigmoid(write)) : sigmoid(write);
}
