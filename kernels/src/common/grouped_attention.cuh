#include "common/activation.cuh"
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
};

#define H 256       // Channels of a head.
#define GROUP 8     // Query heads of a key/value head.
#define ROW 512     // Bytes of a row of one head.
#define LOG2E 1.4426950408889634f

// Which keys the queries of a block see.
struct Seen {
    long long first;   // Row of key 0 of the sequence.
    long long query;   // Row of query 0 of the block.
    int queries;       // That the block has.
    long long all;     // Keys of the sequence.
    long long cached;  // Of them before query 0.
    long long most;    // Keys that the last query sees.
    int more;          // Than the cached ones query 0 sees: its own; in a fault the next too, or none.

    // Of a sequence the queries from i on.
    __device__ Seen(const long long* cu_seqlens_q, const long long* cu_seqlens_k, int s, int i, int most_queries,
                    int plant)
    {
        const long long start = cu_seqlens_q[s], tokens = cu_seqlens_q[s + 1] - start;
        first = cu_seqlens_k[s];
        all = cu_seqlens_k[s + 1] - first;
        query = start + i;
        queries = (int)min((long long)most_queries, tokens - i);
        more = plant == MASK_SEES_NEXT ? 2 : plant == MASK_HIDES_SELF ? 0 : 1;
        cached = all - tokens + i;
        most = by(queries - 1);
    }

    // How many keys query j of the block sees.
    __device__ long long by(int j) const { return max(min(cached + j + more, all), 1LL); }
};

__device__ inline float scale_of(int plant) { return plant == SCALE_MISSING ? LOG2E : LOG2E / 16; }

// The query head of a group's place.
__device__ inline int head_of(int place, int kv, int HKV, int plant)
{
    return plant == KV_HEAD_MODULO ? place * HKV + kv : kv * GROUP + place;
}

__device__ inline unsigned word(const bf16* at) { return *(const unsigned*)at; }

// Two channels of an answer behind their gate.
__device__ inline void answer(bf16* o, const bf16* gate, size_t at, float low, float high)
{
    if (gate) {
        const unsigned raw = word(gate + at);
        low *= sigmoid(low_of(raw));
        high *= sigmoid(high_of(raw));
    }
    *(unsigned*)(o + at) = pack(low, high);
}
