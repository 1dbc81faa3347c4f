// Gated causal attention over a cache, of few queries (attention.cu says which keys a query sees), of heads
// of 256 channels in bf16, eight query heads to a key/value head. Keys and values are read once for all
// eight, and many blocks share the keys of a sequence.
//
// attention_decode_1:        one query to a group of queries.
// attention_decode_4:        up to four consecutive queries of a sequence to a group.
// attention_decode_8:        up to eight.
// attention_decode_pairs_1:  one, with clusters of two blocks, not eight.
// attention_decode_pairs_4:  up to four, likewise.
// attention_decode_pairs_8:  up to eight, likewise.
//
//   Grid (CLUSTER * C, HKV, S * groups of a sequence), C clusters to a group; 128 threads of one query, 256 of
//   more. Blocks of a sequence that has few keys stay empty. A cluster joins its parts in shared memory; where
//   more than one has keys the last to finish joins theirs, always in the same order. Best is about one block
//   to a multiprocessor: in clusters of eight, up to 16 of them of one query and 14 of more (what does not fit
//   waits for all others), where groups are few; in pairs, where there are enough groups for few pairs each.
//   Dynamic shared memory, for T = 1, 4 or 8 queries: DECODE_SHARED(T, 2), 99,520, 185,088 or 206,336 bytes.
//   Workspace: parts, S * groups * HKV * C * 8 T * 1040 bytes; tickets, S * groups * HKV * CLUSTER * 4 bytes,
//   zero before the first launch, and zero again after every one.
//
// Scores, sums and answers are f32; probabilities are rounded to bf16 before they meet values, and added up
// as they were before. A key that a query does not see has no share in its answer, whatever it holds: its
// score is set, not added to, and its values are masked out before the product.

#include "common/attention_decode.cuh"

extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(128, 2) attention_decode_1(
    E* __restrict__ o,                           // [N, HQ, H]
    const E* __restrict__ q,                     // [N, HQ, H]
    const E* __restrict__ k,                     // [M, HKV, H]
    const E* __restrict__ v,                     // [M, HKV, H]
    const E* __restrict__ gate,                  // [N, HQ, H], or none
    const long long* __restrict__ cu_seqlens_q,  // [S + 1]
    const long long* __restrict__ cu_seqlens_k,  // [S + 1]
    float* __restrict__ parts,                   // workspace
    int* __restrict__ tickets,                   // workspace, zero
    int S,
    int HKV,
    int plant)
{
    decode<bf16, 1, 1, 8>(o, q, k, v, gate, cu_seqlens_q, cu_seqlens_k, parts, tickets, S, HKV, plant);
}

extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(256, 1) attention_decode_4(
    E* __restrict__ o,                           // [N, HQ, H]
    const E* __restrict__ q,                     // [N, HQ, H]
    const E* __restrict__ k,                     // [M, HKV, H]
    const E* __restrict__ v,                     // [M, HKV, H]
    const E* __restrict__ gate,                  // [N, HQ, H], or none
    const long long* __restrict__ cu_seqlens_q,  // [S + 1]
    const long long* __restrict__ cu_seqlens_k,  // [S + 1]
    float* __restrict__ parts,                   // workspace
    int* __restrict__ tickets,                   // workspace, zero
    int S,
    int HKV,
    int plant)
{
    decode<bf16, 4, 2, 8>(o, q, k, v, gate, cu_seqlens_q, cu_seqlens_k, parts, tickets, S, HKV, plant);
}

extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(256, 1) attention_decode_8(
    E* __restrict__ o,                           // [N, HQ, H]
    const E* __restrict__ q,                     // [N, HQ, H]
    const E* __restrict__ k,                     // [M, HKV, H]
    const E* __restrict__ v,                     // [M, HKV, H]
    const E* __restrict__ gate,                  // [N, HQ, H], or none
    const long long* __restrict__ cu_seqlens_q,  // [S + 1]
    const long long* __restrict__ cu_seqlens_k,  // [S + 1]
    float* __restrict__ parts,                   // workspace
    int* __restrict__ tickets,                   // workspace, zero
    int S,
    int HKV,
    int plant)
{
    decode<bf16, 8, 2, 8>(o, q, k, v, gate, cu_seqlens_q, cu_seqlens_k, parts, tickets, S, HKV, plant);
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(128, 2) attention_decode_pairs_1(
    E* __restrict__ o,                           // [N, HQ, H]
    const E* __restrict__ q,                     // [N, HQ, H]
    const E* __restrict__ k,                     // [M, HKV, H]
    const E* __restrict__ v,                     // [M, HKV, H]
    const E* __restrict__ gate,                  // [N, HQ, H], or none
    const long long* __restrict__ cu_seqlens_q,  // [S + 1]
    const long long* __restrict__ cu_seqlens_k,  // [S + 1]
    float* __restrict__ parts,                   // workspace
    int* __restrict__ tickets,                   // workspace, zero
    int S,
    int HKV,
    int plant)
{
    decode<bf16, 1, 1, 2>(o, q, k, v, gate, cu_seqlens_q, cu_seqlens_k, parts, tickets, S, HKV, plant);
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(256, 1) attention_decode_pairs_4(
    E* __restrict__ o,                           // [N, HQ, H]
    const E* __restrict__ q,                     // [N, HQ, H]
    const E* __restrict__ k,                     // [M, HKV, H]
    const E* __restrict__ v,                     // [M, HKV, H]
    const E* __restrict__ gate,                  // [N, HQ, H], or none
    const long long* __restrict__ cu_seqlens_q,  // [S + 1]
    const long long* __restrict__ cu_seqlens_k,  // [S + 1]
    float* __restrict__ parts,                   // workspace
    int* __restrict__ tickets,                   // workspace, zero
    int S,
    int HKV,
    int plant)
{
    decode<bf16, 4, 2, 2>(o, q, k, v, gate, cu_seqlens_q, cu_seqlens_k, parts, tickets, S, HKV, plant);
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(256, 1) attention_decode_pairs_8(
    E* __restrict__ o,                           // [N, HQ, H]
    const E* __restrict__ q,                     // [N, HQ, H]
    const E* __restrict__ k,                     // [M, HKV, H]
    const E* __restrict__ v,                     // [M, HKV, H]
    const E* __restrict__ gate,                  // [N, HQ, H], or none
    const long long* __restrict__ cu_seqlens_q,  // [S + 1]
    const long long* __restrict__ cu_seqlens_k,  // [S + 1]
    float* __restrict__ parts,                   // workspace
    int* __restrict__ tickets,                   // workspace, zero
    int S,
    int HKV,
    int plant)
{
    decode<bf16, 8, 2, 2>(o, q, k, v, gate, cu_seqlens_q, cu_seqlens_k, parts, tickets, S, HKV, plant);
}
