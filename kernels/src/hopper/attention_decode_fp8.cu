// attention_decode.cu over a cache in FP8: keys and values are codes of float8_e4m3fn under one scale for each of the
// two, which is 1, so that half the bytes are read.
//
// attention_decode_fp8_keep:     codes of keys and values, to the nearest, ties to even, what is beyond 448 saturated;
//                                one thread per number.
// attention_decode_fp8_1:        as attention_decode_1.
// attention_decode_fp8_8:        as attention_decode_8.
// attention_decode_fp8_pairs_1:  as attention_decode_pairs_1.
//
//   Grids, threads and workspace are as there. Dynamic shared memory, for T = 1 or 8 queries: DECODE_SHARED(T, 1),
//   99,520 or 173,568 bytes.
//
// A code's value is exact in f16 as in bf16. Several queries meet it in bf16; one in f16, where it is brought by a
// power of two, which its scores lose again (common/codes.cuh). Scores, sums and answers are f32; probabilities are
// rounded to f16 before they meet values, and added up as they were before. Best is about two blocks of one query to a
// multiprocessor; of clusters of eight 30 have room at once.

#include "common/attention_decode.cuh"
#include "common/keep.cuh"

extern "C" __global__ void attention_decode_fp8_keep(
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

extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(128, 2) attention_decode_fp8_1(
    E* __restrict__ o,                           // [N, HQ, H]
    const E* __restrict__ q,                     // [N, HQ, H]
    const unsigned char* __restrict__ keys,      // [M, HKV, H]
    const unsigned char* __restrict__ values,    // [M, HKV, H]
    const E* __restrict__ gate,                  // [N, HQ, H], or none
    const long long* __restrict__ cu_seqlens_q,  // [S + 1]
    const long long* __restrict__ cu_seqlens_k,  // [S + 1]
    float* __restrict__ parts,                   // workspace
    int* __restrict__ tickets,                   // workspace, zero
    int S,
    int HKV,
    int plant)
{
    const Code *k = (const Code*)keys, *v = (const Code*)values;
    decode<Code, 1, 1, 8>(o, q, k, v, gate, cu_seqlens_q, cu_seqlens_k, parts, tickets, S, HKV, plant);
}

extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(256, 1) attention_decode_fp8_8(
    E* __restrict__ o,                           // [N, HQ, H]
    const E* __restrict__ q,                     // [N, HQ, H]
    const unsigned char* __restrict__ keys,      // [M, HKV, H]
    const unsigned char* __restrict__ values,    // [M, HKV, H]
    const E* __restrict__ gate,                  // [N, HQ, H], or none
    const long long* __restrict__ cu_seqlens_q,  // [S + 1]
    const long long* __restrict__ cu_seqlens_k,  // [S + 1]
    float* __restrict__ parts,                   // workspace
    int* __restrict__ tickets,                   // workspace, zero
    int S,
    int HKV,
    int plant)
{
    const Code *k = (const Code*)keys, *v = (const Code*)values;
    decode<Code, 8, 2, 8>(o, q, k, v, gate, cu_seqlens_q, cu_seqlens_k, parts, tickets, S, HKV, plant);
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(128, 2) attention_decode_fp8_pairs_1(
    E* __restrict__ o,                           // [N, HQ, H]
    const E* __restrict__ q,                     // [N, HQ, H]
    const unsigned char* __restrict__ keys,      // [M, HKV, H]
    const unsigned char* __restrict__ values,    // [M, HKV, H]
    const E* __restrict__ gate,                  // [N, HQ, H], or none
    const long long* __restrict__ cu_seqlens_q,  // [S + 1]
    const long long* __restrict__ cu_seqlens_k,  // [S + 1]
    float* __restrict__ parts,                   // workspace
    int* __restrict__ tickets,                   // workspace, zero
    int S,
    int HKV,
    int plant)
{
    const Code *k = (const Code*)keys, *v = (const Code*)values;
    decode<Code, 1, 1, 2>(o, q, k, v, gate, cu_seqlens_q, cu_seqlens_k, parts, tickets, S, HKV, plant);
}
