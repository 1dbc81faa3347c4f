// h = x + residual, o = h * rsqrt(mean(h^2) + eps) * (1 + weight).
//
// One block of 256 threads per row. residual and h are null where they are absent.

extern "C" __global__ void rms_norm(
    float* __restrict__ o,              // [N, D]
    float* __restrict__ h,              // [N, D]
    const float* __restrict__ x,        // [N, D]
    const float* __restrict__ residual, // [N, D]
    const float* __restrict__ weight,   // [D], stored minus one
    float eps,
    int D)
{
    __shared__ float sums[256];
    const size_t row = (size_t)blockIdx.x * D;
    float sum = 0;
    for (int j = threadIdx.x; j < D; j += blockDim.x) {
        const float value = x[row + j] + (residual ? residual[row + j] : 0.0f);
        if (h) h[row + j] = value;
        o[row + j] = value;
        sum += value * value;
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int half = blockDim.x / 2; 0 < half; half /= 2) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    const float scale = 1.0f / sqrtf(sums[0] / D + eps);
    for (int j = threadIdx.x; j < D; j += blockDim.x) o[row + j] *= scale * (1.0f + weight[j]);
}
