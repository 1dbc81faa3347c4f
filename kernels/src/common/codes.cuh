#include "common/fp8.cuh"
#include "common/grouped_attention.cuh"

// What kernels of attention over a cache in FP8 share: a code of the cache stands for its value, without a scale.

struct Code { unsigned char bits; };

// The values of two codes, in the lower half, in f16. All of them are exact, no number stays none.
__device__ inline unsigned f16_of(unsigned codes)
{
    unsigned both;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(both) : "h"((unsigned short)codes));
    return both;
}

// The same in bf16.
__device__ inline unsigned bf16_of(unsigned codes)
{
    float low, high;
    asm("{ .reg .b16 low, high;\n"
        "mov.b32 {low, high}, %2;\n"
        "cvt.f32.f16 %0, low;\n"
        "cvt.f32.f16 %1, high; }"
        : "=f"(low), "=f"(high)
        : "r"(f16_of(codes)));
    return pack(low, high);
}

// Two numbers in f16, the first in the lower half.
__device__ inline unsigned pack_f16(float low, float high)
{
    unsigned both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// d += a b, of 16 rows and 8 columns, factors in f16.
__device__ inline void mma_f16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Queries in bf16 become f16 times the power of two that brings the largest channel to 2^14: those are exact that are
// no smaller than 2^-31 of it, and of the others less is lost than 2^-39 of it.

// The larger of a biased exponent and those of two numbers; 15 at the least.
__device__ inline int largest_exponent(int exponent, unsigned both)
{
    return max(exponent, max((int)(both >> 7 & 0xff), (int)(both >> 23 & 0xff)));
}

// Two numbers times that power.
__device__ inline unsigned lifted(unsigned both, int exponent)
{
    const float by = __int_as_float((268 - exponent) << 23);
    return pack_f16(low_of(both) * by, high_of(both) * by);
}

// What undoes it.
__device__ inline float undone(int exponent) { return __int_as_float((exponent - 14) << 23); }
