// How fast tensor cores are with everything at hand.
//
// peak_wgmma: products of four warps, of 64 rows and 256 columns; the left factor in registers, the right one in
//             shared memory, both always the same.

#include "common/wgmma.cuh"

#define COLUMNS 256
#define DEPTH 16
#define TOGETHER 8

// Two numbers between 0.5 and 2 of either sign: zeros would cost less power than what anybody multiplies.
__device__ inline unsigned drawn(unsigned i)
{
    i = (i ^ i >> 16) * 0x7feb352d;
    i = (i ^ i >> 15) * 0x846ca68b;
    return ((i ^ i >> 16) & 0x80ff80ff) | 0x3f003f00;
}

extern "C" __global__ void __launch_bounds__(256, 1) peak_wgmma(
    float* __restrict__ o,  // [1]
    int ROUNDS)
{
    extern __shared__ unsigned char shared[];
    const unsigned at = (shared_address(shared) + 1023) & ~1023u;
    for (int i = threadIdx.x; i < COLUMNS * DEPTH / 2; i += blockDim.x) write_word(at + 4 * i, drawn(i));
    fence_for_wgmma();
    __syncthreads();
    float d[128] = {};
    unsigned a[4];
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = drawn(threadIdx.x * 4 + i);
    // 64 columns after another.
    const unsigned long long b = matrix(uniform(matrix_at(at, DEPTH * 128)));
    hold(d);
    for (int round = 0; round < ROUNDS; round++) {
        wgmma_begin();
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) wgmma_n256(d, a, b);
        wgmma_close();
        wgmma_wait<0>();
    }
    hold(d);
    float all = 0;
#pragma unroll
    for (int i = 0; i < 128; i++) all += d[i];
    if (all == 0.1234567f) *o = all;  // So that it is multiplied.
}
