// What the threads of a block find out together, in one order; each of them gets the answer. A block has
// a power of two of threads, 256 at most, and all of them call.

// The sum of every thread's x.
__device__ inline float block_sum(float x)
{
    __shared__ float sums[256];
    __syncthreads();  // An earlier sum has been read.
    sums[threadIdx.x] = x;
    for (int half = blockDim.x / 2; 0 < half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    __syncthreads();
    return sums[0];
}

// The largest x.
__device__ inline float block_max(float x)
{
    __shared__ float largest[256];
    __syncthreads();
    largest[threadIdx.x] = x;
    for (int half = blockDim.x / 2; 0 < half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half)
            largest[threadIdx.x] = fmaxf(largest[threadIdx.x], largest[threadIdx.x + half]);
    }
    __syncthreads();
    return largest[0];
}
