// Gated causal attention over a cache, of many queries (attention.cu says which keys a query sees), of heads
// of 256 channels in bf16, eight query heads to a key/value head, on the tensor cores of Hopper.
//
// attention_prefill: a piece of work is 16 consecutive queries of a sequence, with their eight heads 128 rows
//                    of a product. Blocks take one piece after another, those with the most keys of a
//                    sequence first; one warpgroup loads, and is ahead by up to four tiles whatever piece they
//                    belong to; two multiply, and weigh the next scores meanwhile.
//
//   Grid: as many blocks as the device has multiprocessors, or fewer; 384 threads. Dynamic shared memory:
//   PREFILL_SHARED, 229,632 bytes. Workspace: tickets, 8 bytes that are zero before the first launch, and are
//   zero again after every one. Where pieces are few and keys many, PARTS blocks share the keys of a piece; in
//   that case parts, (N / 16 + S) * HKV * PARTS * 128 * 1040 bytes, and then
//
// attention_join:    joins the parts of a query, always in the same order. Grid (N, HKV), 256 threads.
//
// Scores, sums and answers are f32; probabilities are rounded to bf16 before they meet values, and added up
// as they were before. A key that a query does not see has no share in its answer, whatever it holds: its
// score is set, not added to; values that only some queries of a block see, and that are no numbers, are
// left out of the product and added to the answers of those.

#include "common/attention_prefill.cuh"

extern "C" __global__ void __launch_bounds__(384, 1) attention_prefill(
    E* __restrict__ o,                           // [N, HQ, H]
    const E* __restrict__ q,                     // [N, HQ, H]
    const E* __restrict__ k,                     // [M, HKV, H]
    const E* __restrict__ v,                     // [M, HKV, H]
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
    prefill(o, q, k, v, gate, cu_seqlens_q, cu_seqlens_k, parts, tickets, S, HKV, PARTS, plant);
}

extern "C" __global__ void __launch_bounds__(256) attention_join(
    E* __restrict__ o,                           // [N, HQ, H]
    const E* __restrict__ gate,                  // [N, HQ, H], or none
    const long long* __restrict__ cu_seqlens_q,  // [S + 1]
    const long long* __restrict__ cu_seqlens_k,  // [S + 1]
    float* __restrict__ parts,                   // workspace
    int S,
    int HKV,
    int PARTS,
    int plant)
{
    const int n = blockIdx.x, kv = blockIdx.y, place = threadIdx.x / 32, c = threadIdx.x % 32 * 8;
    const size_t at = ((size_t)n * HKV * GROUP + head_of(place, kv, HKV, plant)) * H + c;
    const bool is_gated = gate && plant != GATE_MISSING;
    uint4 open = {0, 0, 0, 0};
    if (is_gated) open = *(const uint4*)(gate + at);
    int s = S - 1, block = 0;
    for (; n < cu_seqlens_q[s]; s--)
        block += (int)((cu_seqlens_q[s + 1] - cu_seqlens_q[s] + BLOCK - 1) / BLOCK);
    const int i = (int)(n - cu_seqlens_q[s]), tokens = (int)(cu_seqlens_q[s + 1] - cu_seqlens_q[s]);
    block += (tokens + BLOCK - 1) / BLOCK - 1 - i / BLOCK;
    const Seen seen(cu_seqlens_q, cu_seqlens_k, s, i / BLOCK * BLOCK, BLOCK, plant);
    int used = Share(seen.most, PARTS).used;
    if (used == 1) return;
    if (plant == LAST_PART_DROPPED) used--;

    float top = -INFINITY, sum = 0, out[8] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll 4
    for (int p = 0; p < used; p++) {
        const float* part = part_of(parts, block, kv, HKV, p, PARTS, i % BLOCK * GROUP + place);
        const float2 of = *(const float2*)(part + H);
        const float4 low = *(const float4*)(part + c), high = *(const float4*)(part + c + 4);
        if (of.y == 0) continue;  // A part of which this query sees no key.
        const float raised = fmaxf(top, of.x);
        const float kept = sum == 0 ? 0 : exp2_fast(top - raised), weight = exp2_fast(of.x - raised);
        const float x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int e = 0; e < 8; e++) out[e] = out[e] * kept + x[e] * weight;
        sum = sum * kept + of.y * weight;
        top = raised;
    }
    const float share = 1 / sum;
    const unsigned gates[4] = {open.x, open.y, open.z, open.w};
    unsigned answers[4];
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const float low = out[2 * e] * share, high = out[2 * e + 1] * share;
        answers[e] = is_gated ? gated(low, high, gates[e]) : pack(low, high);
    }
    *(uint4*)(o + at) = {answers[0], answers[1], answers[2], answers[3]};
}
