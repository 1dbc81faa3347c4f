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
