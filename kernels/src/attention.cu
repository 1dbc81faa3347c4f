// Gated causal attention over a cache, in one pass over the keys:
//
//   o = softmax(q k' / sqrt(H)) v * sigmoid(gate)
//
// Keys of a sequence are its cache and then its new tokens: of Tk in all and Tq new ones, query i sees keys
// 0 ..= Tk - Tq + i. Query head h reads key/value head h / (HQ / HKV).
//
// attention_naive: one block per query and head. It takes as many keys at a time as it has threads: one
//                  thread per key for the scores, then one per channel for the values. Where a block of
//                  keys raises the largest score, what was summed before is scaled down.
//
// Of a cache in FP8, under one scale for keys and one for values, which is 1:
//
// attention_keep_fp8:  codes of keys and values, one thread per number.
// attention_naive_fp8: attention_naive over them.

#include "common/activation.cuh"
#include "common/block.cuh"
#include "common/fp8.cuh"

enum Plant {
    HONEST,
    SCALE_MISSING,
    SCALE_ONE_OVER_H,
    MASK_SEES_NEXT,
    MASK_HIDES_SELF,
    CACHE_OFFSET_IGNORED,
    PACKED_AS_ONE,
    KV_HEAD_MODULO,
    GATE_MISSING,
    GATE_SILU,
    GATE_OVERFLOWS,
    SUM_NOT_RESCALED,
    MAXIMUM_NOT_SUBTRACTED,
    PROBABILITIES_IN_BF16,
    SCORES_IN_BF16,
    FNUZ_BIAS,
    CODES_CUT,
    PAGE_AS_STORED,
};

#include "common/keep.cuh"

// A code of a cache.
struct Kept { unsigned char code; };

__device__ inline float load(Kept x) { return fp8_value(x.code); }

// One query of one head, by a block.
template <class C>
__device__ inline void attend(E* o, const E* q, const C* k, const C* v, const E* gate, const long long* cu_seqlens_q,
                              const long long* cu_seqlens_k, int S, int HQ, int HKV, int H, int plant)
{
    extern __shared__ float shared[];
    float *query = shared, *sum = shared + H, *p = shared + 2 * H;  // [H], [H], [threads]
    const int n = blockIdx.x / HQ, h = blockIdx.x % HQ;
    const int head = plant == KV_HEAD_MODULO ? h % HKV : h / (HQ / HKV);
    const size_t row = (size_t)blockIdx.x * H;
    int s = 0;
    while (s + 1 < S && cu_seqlens_q[s + 1] <= n) s++;

    const long long first = plant == PACKED_AS_ONE ? 0 : cu_seqlens_k[s], last = cu_seqlens_k[s + 1];
    const long long i = n - cu_seqlens_q[s], tokens = cu_seqlens_q[s + 1] - cu_seqlens_q[s];
    long long seen = last - first - tokens + i + 1;
    if (plant == MASK_SEES_NEXT) seen = min(seen + 1, last - first);
    if (plant == MASK_HIDES_SELF) seen = max(seen - 1, 1LL);
    if (plant == CACHE_OFFSET_IGNORED) seen = i + 1;
    float scale = 1 / sqrtf(H);
    if (plant == SCALE_MISSING) scale = 1;
    if (plant == SCALE_ONE_OVER_H) scale = 1.0f / H;

    for (int c = threadIdx.x; c < H; c += blockDim.x) {
        query[c] = load(q[row + c]);
        sum[c] = 0;
    }
    __syncthreads();
    float largest = -INFINITY, total = 0;
    for (long long start = 0; start < seen; start += blockDim.x) {
        const long long j = first + start + threadIdx.x;
        const int keys = min((long long)blockDim.x, seen - start);
        float score = -INFINITY;
        if (threadIdx.x < keys) {
            const C* key = k + (j * HKV + head) * H;
            score = 0;
            for (int c = 0; c < H; c++) score += query[c] * load(key[c]);
            score *= scale;
            if (plant == SCORES_IN_BF16) score = rounded<bf16>(score);
        }
        float raised = fmaxf(largest, block_max(score));
        if (plant == MAXIMUM_NOT_SUBTRACTED) raised = 0;
        // Of the first block nothing is kept: exp(-inf) = 0.
        const float kept = expf(largest - raised);
        largest = raised;
        p[threadIdx.x] = expf(score - largest);
        total = total * kept + block_sum(p[threadIdx.x]);
        if (plant == PROBABILITIES_IN_BF16) p[threadIdx.x] = rounded<bf16>(p[threadIdx.x]);
        __syncthreads();
        for (int c = threadIdx.x; c < H; c += blockDim.x) {
            float more = 0;
            for (int key = 0; key < keys; key++)
                more += p[key] * load(v[((first + start + key) * HKV + head) * H + c]);
            sum[c] = (plant == SUM_NOT_RESCALED ? sum[c] : sum[c] * kept) + more;
        }
        __syncthreads();
    }
    for (int c = threadIdx.x; c < H; c += blockDim.x) {
        float open = 1;
        if (gate && plant != GATE_MISSING) {
            const float raw = load(gate[row + c]);
            open = sigmoid(raw);
            if (plant == GATE_SILU) open = silu(raw);
            if (plant == GATE_OVERFLOWS) open = overflowing_sigmoid(raw);
        }
        o[row + c] = store<E>(sum[c] / total * open);
    }
}

extern "C" __global__ void attention_naive(
    E* __restrict__ o,                           // [N, HQ, H]
    const E* __restrict__ q,                     // [N, HQ, H]
    const E* __restrict__ k,                     // [M, HKV, H]
    const E* __restrict__ v,                     // [M, HKV, H]
    const E* __restrict__ gate,                  // [N, HQ, H], or none
    const long long* __restrict__ cu_seqlens_q,  // [S + 1]
    const long long* __restrict__ cu_seqlens_k,  // [S + 1]
    int S,
    int HQ,
    int HKV,
    int H,
    int plant)
{
    attend(o, q, k, v, gate, cu_seqlens_q, cu_seqlens_k, S, HQ, HKV, H, plant);
}

extern "C" __global__ void attention_keep_fp8(
    unsigned char* __restrict__ keys,    // [M, HKV, H]
    unsigned char* __restrict__ values,  // [M, HKV, H]
    const E* __restrict__ k,             // [M, HKV, H]
    const E* __restrict__ v,             // [M, HKV, H]
    int M,
    int HKV,
    int H,
    int plant)
{
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x, all = (long long)M * HKV * H;
    if (all <= i) return;
    keys[i] = kept(k, i, all, HKV * H, plant), values[i] = kept(v, i, all, HKV * H, plant);
}

extern "C" __global__ void attention_naive_fp8(
    E* __restrict__ o,                           // [N, HQ, H]
    const E* __restrict__ q,                     // [N, HQ, H]
    const unsigned char* __restrict__ keys,      // [M, HKV, H]
    const unsigned char* __restrict__ values,    // [M, HKV, H]
    const E* __restrict__ gate,                  // [N, HQ, H], or none
    const long long* __restrict__ cu_seqlens_q,  // [S + 1]
    const long long* __restrict__ cu_seqlens_k,  // [S + 1]
    int S,
    int HQ,
    int HKV,
    int H,
    int plant)
{
    attend(o, q, (const Kept*)keys, (const Kept*)values, gate, cu_seqlens_q, cu_seqlens_k, S, HQ, HKV, H, plant);
}
