#include "common/fp8.cuh"

// How a cache in FP8 is written; after the enum of faults, of which some are of this.

// What a cache keeps of number i of so many, in rows of `of_row`.
__device__ inline unsigned char kept(const E* x, long long i, long long all, int of_row, int plant)
{
    const float number = load(x[i]);
    const unsigned code = fp8_code(number);
    // As a code under a bias of one more it is half of what it was.
    if (plant == FNUZ_BIAS) return fp8_code(fp8_value(code) / 2);
    if (plant == CODES_CUT) return fp8_code(__uint_as_float(__float_as_uint(number) & 0xfff00000u));
    // The last page of 64 rows begins with the bytes that its numbers had.
    const long long page = (all / of_row - 1) / 64 * 64 * of_row;
    if (plant == PAGE_AS_STORED && page <= i) return ((const unsigned char*)(x + page))[i - page];
    return code;
}
