#include "common/stored.cuh"

// The value of a code of float8_e4m3fn: sign, 4 bits of exponent (bias 7), 3 of mantissa, no infinities.
//
// The bits stand in the same order in an f32, whose bias is 127: what is missing is a power of two, which
// turns subnormals into what they are as well.
__device__ inline float fp8_value(unsigned code)
{
    const unsigned magnitude = code & 0x7f;
    const float value = magnitude == 0x7f ? NAN : __uint_as_float(magnitude << 20) * 0x1p120f;
    return code & 0x80 ? -value : value;
}

// The nearest code, ties to even; what is beyond 448 saturates.
__device__ inline unsigned fp8_code(float x)
{
    const unsigned sign = __float_as_uint(x) >> 24 & 0x80;
    if (isnan(x)) return sign | 0x7f;
    const float magnitude = fminf(fabsf(x), 448);
    // Below the smallest normal number codes count steps of 2^-9; the eighth is that number.
    if (magnitude < 0x1p-6f) return sign | (unsigned)__float2int_rn(magnitude * 0x1p9f);
    const unsigned bits = __float_as_uint(magnitude);
    return sign | (((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3));
}
