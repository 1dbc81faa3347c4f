#include "common/weight.cuh"

// Products of rows of a weight matrix with activations, by a warp: in one order, however many tokens there are.

#define WARP 32

// Eight elements in a row, at an address that is a multiple of their size.
__device__ inline void eight(const f32* from, float* to)
{
    const float4 low = ((const float4*)from)[0], high = ((const float4*)from)[1];
    to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
    to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
}

__device__ inline void eight(const bf16* from, float* to)
{
    const uint4 all = *(const uint4*)from;
    const unsigned words[4] = {all.x, all.y, all.z, all.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        to[2 * i] = __uint_as_float(words[i] << 16);
        to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000);
    }
}

__device__ inline void eight(const f16* from, float* to)
{
    const uint4 all = *(const uint4*)from;
    const unsigned words[4] = {all.x, all.y, all.z, all.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        to[2 * i] = load(f16{(unsigned short)words[i]});
        to[2 * i + 1] = load(f16{(unsigned short)(words[i] >> 16)});
    }
}

__device__ inline void eight(const Fp8* from, float* to)
{
    const uint2 all = *(const uint2*)from;
    const unsigned words[2] = {all.x, all.y};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const unsigned pair = words[i / 2] >> (16 * (i % 2));
#if __CUDA_ARCH__ >= 890
        unsigned halves;
        asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"((unsigned short)pair));
        to[2 * i] = load(f16{(unsigned short)halves});
        to[2 * i + 1] = load(f16{(unsigned short)(halves >> 16)});
#else
        to[2 * i] = fp8_value(pair & 0xff);
        to[2 * i + 1] = fp8_value(pair >> 8 & 0xff);
#endif
    }
}

// A weight without its scale.
__device__ inline float bare(f32 w) { return w; }
__device__ inline float bare(bf16 w) { return load(w); }
__device__ inline float bare(f16 w) { return load(w); }
__device__ inline float bare(Fp8 w) { return fp8_value(w.code); }

// A row of a weight matrix: what is stored, and of codes the scales of its blocks, whose columns are a power
// of two.
struct Row {
    const W* weights;
    const float* scales;  // none, or one of each 2^shift columns
    int shift;
};

__device__ inline Row row_of(const W* weight, const float* scales, int row, int M, int D, int block_rows,
                             int block_cols, size_t which = 0)
{
    const int across = ceil_div(D, block_cols), down = ceil_div(M, block_rows);
    const float* own = scales ? scales + (which * down + row / block_rows) * across : 0;
    return {weight + (which * M + row) * D, own, 31 - __clz(block_cols)};
}

__device__ inline float warp_sum(float x)
{
#pragma unroll
    for (int apart = WARP / 2; 0 < apart; apart /= 2) x += __shfl_xor_sync(~0u, x, apart);
    return x;
}

// The part of a lane of the products of a row with T vectors of D, `stride` apart. Every lane takes eight
// columns in turn; the order does not depend on T.
template <int T> __device__ void lane_products(float* sums, const Row& row, const E* x, size_t stride, int D)
{
    const int lane = threadIdx.x % WARP;
    const bool aligned = D % 8 == 0 && (!row.scales || 3 <= row.shift);
    if (aligned) {
#pragma unroll(T == 1 ? 4 : 1)
        for (int d = 8 * lane; d < D; d += 8 * WARP) {
            float w[8];
            eight(row.weights + d, w);
            const float scale = row.scales ? row.scales[d >> row.shift] : 1;
#pragma unroll
            for (int t = 0; t < T; t++) {
                float own[8], sum = 0;
                eight(x + t * stride + d, own);
#pragma unroll
                for (int i = 0; i < 8; i++) sum = __fmaf_rn(own[i], w[i], sum);
                sums[t] = row.scales ? __fmaf_rn(scale, sum, sums[t]) : __fadd_rn(sums[t], sum);
            }
        }
        return;
    }
    for (int d = lane; d < D; d += WARP) {
        float w = bare(row.weights[d]);
        if (row.scales) w = __fmul_rn(w, row.scales[d >> row.shift]);
#pragma unroll
        for (int t = 0; t < T; t++) sums[t] = __fmaf_rn(load(x[t * stride + d]), w, sums[t]);
    }
}
