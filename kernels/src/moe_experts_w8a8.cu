// Routed experts with activations and weights in FP8: o = sum_a weights[a] down_e( silu(gate_e x) * (up_e x) ),
// e = ids[a], each product one of codes in groups of 128 columns (common/w8a8.cuh), hidden activations too.
//
// moe_experts_w8a8_naive: one block per token, which walks through its experts: one thread per group that becomes
//                         codes, one per hidden channel, then one per output channel (and every 256th after it).

#include "common/activation.cuh"
#include "common/w8a8.cuh"

enum Plant {
    HONEST,
    SCALE_OF_NEXT_GROUP,
    ACTIVATION_SCALE_FORGOTTEN,
    SCALED_AT_THE_END,
    LARGEST_OF_A_QUARTER,
    WEIGHTS_NOT_APPLIED,
    WEIGHT_OF_FIRST_SLOT,
    GATE_UP_SWAPPED,
    SILU_ON_PRODUCT,
};

// The codes of a row, by all threads of the block.
template <class X> __device__ void quantise_row(unsigned char* codes, float* scales, const X* x, int D, int plant)
{
    __syncthreads();  // What was written of x.
    for (int g = threadIdx.x; g * GROUP < D; g += blockDim.x)
        quantise_group(codes + g * GROUP, scales + g, x + g * GROUP, min(GROUP, D - g * GROUP),
                       plant == LARGEST_OF_A_QUARTER ? 32 : GROUP);
    __syncthreads();
}

// A matrix of codes, one of several, of M rows of D columns.
struct Codes {
    const Fp8* codes;
    const float* scales;

    __device__ Codes(const Fp8* all, const float* all_scales, int e, int M, int D)
        : codes(all + (size_t)e * M * D),
          scales(all_scales + (size_t)e * ceil_div(M, 128) * ceil_div(D, GROUP)) {}

    __device__ float times(const unsigned char* x, const float* x_scales, int row, int D, Scaling scaling) const
    {
        return product_of_codes(x, x_scales, codes + (size_t)row * D, scales + row / 128 * ceil_div(D, GROUP), D,
                                scaling);
    }
};

extern "C" __global__ void moe_experts_w8a8_naive(
    E* __restrict__ o,                           // [N, D]
    const E* __restrict__ x,                     // [N, D]
    const long long* __restrict__ ids,           // [N, A]
    const float* __restrict__ weights,           // [N, A]
    const W* __restrict__ gate_proj,             // [EXPERTS, F, D]
    const float* __restrict__ gate_proj_scales,  // of codes
    const W* __restrict__ up_proj,               // [EXPERTS, F, D]
    const float* __restrict__ up_proj_scales,    // of codes
    const W* __restrict__ down_proj,             // [EXPERTS, D, F]
    const float* __restrict__ down_proj_scales,  // of codes
    int D,
    int A,
    int F,
    int plant)
{
    extern __shared__ float shared[];
    float *sum = shared, *hidden = sum + D;                                          // [D], [F]
    float *x_scales = hidden + F, *hidden_scales = x_scales + ceil_div(D, GROUP);    // of groups
    unsigned char* x_codes = (unsigned char*)(hidden_scales + ceil_div(F, GROUP));   // [D]
    unsigned char* hidden_codes = x_codes + D;                                       // [F]
    const size_t n = blockIdx.x;
    const Scaling scaling = plant == SCALE_OF_NEXT_GROUP          ? Scaling::OF_NEXT_GROUP
                            : plant == ACTIVATION_SCALE_FORGOTTEN ? Scaling::FORGOTTEN
                            : plant == SCALED_AT_THE_END          ? Scaling::AT_THE_END
                                                                  : Scaling::HONEST;
    for (int d = threadIdx.x; d < D; d += blockDim.x) sum[d] = 0;
    quantise_row(x_codes, x_scales, x + n * D, D, plant);

    for (int a = 0; a < A; a++) {
        const int e = ids[n * A + a];
        const Codes gate(gate_proj, gate_proj_scales, e, F, D), up(up_proj, up_proj_scales, e, F, D);
        const Codes down(down_proj, down_proj_scales, e, D, F);
        float weight = weights[n * A + (plant == WEIGHT_OF_FIRST_SLOT ? 0 : a)];
        if (plant == WEIGHTS_NOT_APPLIED) weight = 1;
        for (int f = threadIdx.x; f < F; f += blockDim.x) {
            const float opens = gate.times(x_codes, x_scales, f, D, scaling);
            const float passes = up.times(x_codes, x_scales, f, D, scaling);
            hidden[f] = plant == GATE_UP_SWAPPED   ? silu(passes) * opens
                        : plant == SILU_ON_PRODUCT ? silu(opens * passes)
                                                   : silu(opens) * passes;
        }
        quantise_row(hidden_codes, hidden_scales, hidden, F, plant);
        for (int d = threadIdx.x; d < D; d += blockDim.x)
            sum[d] += weight * down.times(hidden_codes, hidden_scales, d, F, scaling);
    }
    for (int d = threadIdx.x; d < D; d += blockDim.x) o[n * D + d] = store<E>(sum[d]);
}
