// 1 / (1 + e^-x), written so that neither sign overflows.
__device__ inline float sigmoid(float x)
{
    const float e = expf(-fabsf(x));
    return (x < 0 ? e : 1.0f) / (1.0f + e);
}

__device__ inline float silu(float x) { return x * sigmoid(x); }

// Within 2 + 1.2 |x| units in the last place, where it is not far below what anybody adds it to.
__device__ inline float silu_fast(float x) { return __fdividef(x, 1 + __expf(-x)); }

// e^x / (1 + e^x): the sigmoid of some kernels, NaN above 88. Only planted.
__device__ inline float overflowing_sigmoid(float x) { return expf(x) / (1.0f + expf(x)); }
