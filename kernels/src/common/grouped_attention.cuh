#include "common/wgmma.cuh"

// What kernels of gated attention share, that take the eight query heads of a key/value head together.

enum Plant {
    HONEST,
    SCALE_MISSING,
    MASK_SEES_NEXT,
    MASK_HIDES_SELF,
    KV_HEAD_MODULO,
    GATE_MISSING,
    LAST_PART_DROPPED,
    SUM_NOT_RESCALED,
    FNUZ_BIAS,
    CODES_CUT,
    PAGE_AS_STORED,
};

#define H 256       // Channels of a head.
#define GROUP 8     // Query heads of a key/value head.
#define ROW 512     // Bytes of a row of one head.
#define LOG2E 1.4426950408889634f

// Which keys some consecutive queries of a sequence see. Rows may be more than an int counts, the keys of one
// sequence are not.
struct Seen {
    long long first;  // Row of key 0 of the sequence.
    long long query;  // Row of the first of the queries.
    int queries;      // How many there are.
    int all;          // Keys of the sequence.
    int cached;       // Of them before the first of the queries.
    int more;         // What it sees beside those: itself; in a fault the next as well, or not even that.
    int most;         // Keys that the last of the queries sees.

    Seen() = default;

    // Of a sequence the queries from i on, `at_most` so many.
    __device__ Seen(const long long* cu_seqlens_q, const long long* cu_seqlens_k, int s, int i, int at_most,
                    int plant)
    {
        const long long start = cu_seqlens_q[s];
        const int tokens = (int)(cu_seqlens_q[s + 1] - start);
        first = cu_seqlens_k[s];
        all = (int)(cu_seqlens_k[s + 1] - first);
        query = start + i;
        queries = min(at_most, tokens - i);
        cached = all - tokens + i;
        more = plant == MASK_SEES_NEXT ? 2 : plant == MASK_HIDES_SELF ? 0 : 1;
        most = by(queries - 1);
    }

    // How many keys query j of them sees.
    __device__ int by(int j) const { return max(min(cached + j + more, all), 1); }
};

__device__ inline float scale_of(int plant) { return plant == SCALE_MISSING ? LOG2E : LOG2E / 16; }

// The query head of a group's place.
__device__ inline int head_of(int place, int kv, int HKV, int plant)
{
    return plant == KV_HEAD_MODULO ? place * HKV + kv : kv * GROUP + place;
}

__device__ inline unsigned word(const bf16* at) { return *(const unsigned*)at; }

// 1 / (1 + e^-x) to some 21 bits; zero where e^-x is too large for a float.
__device__ inline float sigmoid_fast(float x)
{
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1 + exp2_fast(-LOG2E * x)));
    return y;
}

// Two channels of an answer behind their gate, as stored.
__device__ inline unsigned gated(float low, float high, unsigned gate)
{
    return pack(low * sigmoid_fast(low_of(gate)), high * sigmoid_fast(high_of(gate)));
}
