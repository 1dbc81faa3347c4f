// 1 / (1 + e^-x), written so that neither sign overflows.
__device__ inline float sigmoid(float x)
{
    const float e = expf(-fabsf(x));
    return (x < 0 ? e : 1.0f) / (1.0f + e);
}

__device__ inline float silu(float x) { return x * sigmoid(x); }

// e^x / (1 + e^x): the sigmoid of some kernels, NaN above 88. Only planted.
__device__ inline float overflowing_sigmoid(float x) { return expf(x) / (1.0f + expf(x)); }
