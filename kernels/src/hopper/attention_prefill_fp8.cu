// attention_prefill.cu over a cache in FP8: keys and values are codes of float8_e4m3fn under one scale for each of the
// two, which is 1.
//
// attention_prefill_fp8_keep: codes of keys and values, to the nearest, ties to even, what is beyond 448 saturated;
//                             one thread per number.
// attention_prefill_fp8:      as attention_prefill. Its loading warpgroup makes f16 of the codes of a tile while the
//                             next one is on its way.
//
//   Grid, threads, dynamic shared memory and workspace are as there.
//
// Products are of f16, where a code's value is exact; queries are brought there by a power of two, which their scores
// lose again (common/codes.cuh). Scores, sums and answers are f32; probabilities are rounded to f16 before they meet
// values, and added up as they were before.

#include "common/attention_prefill.cuh"
#include "common/keep.cuh"

extern "C" __global__ void attention_prefill_fp8_keep(
    unsigned char* __restrict__ keys,    // [M, HKV, H]
    unsigned char* __restrict__ values,  // [M, HKV, H]
    const E* __restrict__ k,             // [M, HKV, H]
    const E* __restrict__ v,             // [M, HKV, H]
    int M,
    int HKV,
    int plant)
{
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x, all = (long long)M * HKV * H;
    if (all <= i) return;
    keys[i] = kept(k, i, all, HKV * H, plant), values[i] = kept(v, i, all, HKV * H, plant);
}

extern "C" __global__ void __launch_bounds__(384, 1) attention_prefill_fp8(
    E* __restrict__ o,                           // [N, HQ, H]
    const E* __restrict__ q,                     // [N, HQ, H]
    const unsigned char* __restrict__ keys,      // [M, HKV, H]
    const unsigned char* __restrict__ values,    // [M, HKV, H]
    const E* __restrict__ gate,                  // [N, HQ, H], or none
    const long long* __restrict__ cu_seqlens_q,  // [S + 1]
    const long long* __restrict__ cu_seqlens_k,  // [S + 1]
    float* __restrict__ parts,                   // workspace, or none
    int* __restrict__ tickets,                   // [2] workspace, zero
    int S,
    int HKV,
    int PARTS,
    int plant)
{
    const Code *k = (const Code*)keys, *v = (const Code*)values;
    prefill(o, q, k, v, gate, cu_seqlens_q, cu_seqlens_k, parts, tickets, S, HKV, PARTS, plant);
}
