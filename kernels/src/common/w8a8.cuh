#include "common/weight.cuh"

// Activations in FP8 beside weights in FP8. 128 columns of a row of activations are a group: codes of
// float8_e4m3fn under one scale, the largest over 448. Products of codes are summed over a group; its scale and
// that of the block of weights multiply this on its way into the sum over all columns.
constexpr int GROUP = 128;

// The scale of a group, and what its codes are taken of: of zeros they are zeros.
__device__ inline float scale_of(float largest) { return __fdiv_rn(largest, 448); }
__device__ inline float in_steps(float x, float scale) { return __fdiv_rn(x, fmaxf(scale, 1e-12f)); }

// How scales may be got wrong.
enum class Scaling { HONEST, OF_NEXT_GROUP, FORGOTTEN, AT_THE_END };

// One group, of so many columns. `counted`: those in which the largest is looked for.
template <class X>
__device__ void quantise_group(unsigned char* codes, float* scale, const X* x, int columns, int counted)
{
    float largest = 0;
    for (int i = 0; i < min(columns, counted); i++) largest = fmaxf(largest, fabsf(load(x[i])));
    *scale = scale_of(largest);
    for (int i = 0; i < columns; i++) codes[i] = fp8_code(in_steps(load(x[i]), *scale));
}

// The product of two rows of codes, groups in order.
__device__ inline float product_of_codes(const unsigned char* x, const float* x_scales, const Fp8* weight,
                                         const float* weight_scales, int D, Scaling scaling)
{
    const int groups = ceil_div(D, GROUP);
    float all = 0;
    for (int g = 0; g < groups; g++) {
        float sum = 0;
        for (int d = g * GROUP; d < min((g + 1) * GROUP, D); d++)
            sum += fp8_value(x[d]) * fp8_value(weight[d].code);
        const int next = groups == 1 ? g : g + 1 < groups ? g + 1 : g - 1;
        float scale = x_scales[scaling == Scaling::OF_NEXT_GROUP ? next : g];
        if (scaling == Scaling::FORGOTTEN) scale = 1;
        all += scaling == Scaling::AT_THE_END ? sum : sum * (scale * weight_scales[g]);
    }
    return scaling == Scaling::AT_THE_END ? all * (x_scales[groups - 1] * weight_scales[groups - 1]) : all;
}
