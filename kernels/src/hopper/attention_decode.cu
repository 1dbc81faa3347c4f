// Gated causal attention over a cache, of few queries (attention.cu says which keys a query sees), of heads
// of 256 channels in bf16, eight query heads to a key/value head. Keys and values are read once for all
// eight, and many blocks share the keys of a sequence.
//
// attention_decode_1: one query to a group of queries.
// attention_decode_8: up to eight consecutive queries of a sequence to a group.
//
//   Grid (8 C, HKV, S * groups of a sequence), C clusters of 8 blocks to a group; 128 threads. Blocks of a
//   sequence that has few keys stay empty. A cluster joins its parts in shared memory; where more than one
//   has keys the last to finish joins theirs, always in the same order.
//   Dynamic shared memory, for T = 1 or 8 queries: DECODE_SHARED(T), 99,520 or 206,336 bytes.
//   Workspace: parts, S * groups * HKV * C * 8 T * 1040 bytes; tickets, S * groups * HKV * 32 bytes, zero
//   before the first launch, and zero again after every one.
//
// Scores, sums and answers are f32; probabilities are rounded to bf16 before they meet values, and added up
// as they were before. A key that a query does not see has no share in its answer, whatever it holds: its
// score is set, not added to, and its values are masked out before the product.

#include "common/grouped_attention.cuh"
#include "common/wgmma.cuh"

#define KEYS 64                  // Keys of a tile.
#define UNIT (KEYS * ROW)        // Bytes of a tile of keys, or of values.
#ifndef LEAST
#define LEAST 128                // Keys of a part, at least.
#endif
#define CLUSTER 8
#define PART (H + 4)             // Floats of a part in the workspace: values, largest score, sum.

// Units that are on their way or in use.
#define RING(T) ((T) == 1 ? 3 : 5)
#define DECODE_SHARED(T) (RING(T) * UNIT + (T) * (KEYS * 16 + (T == 1 ? 0 : GROUP * ROW) + 6 * GROUP * 4))

// Where chunk c of 16 bytes of a row stands in a unit: eight rows put a chunk into eight places.
__device__ inline unsigned chunk(int row, int c) { return row * ROW + (c ^ row & 7) * 16; }

template <int T> struct Decode {
    static constexpr int R = RING(T), ROWS = T * GROUP;
    unsigned ring, queries, probabilities;
    float *maxima, *largest, *total;  // [4][ROWS], [ROWS], [ROWS]
    int warp, lane;

    __device__ Decode(unsigned char* shared) : warp(threadIdx.x / 32), lane(threadIdx.x % 32)
    {
        ring = shared_address(shared);
        probabilities = ring + R * UNIT;
        queries = probabilities + T * KEYS * 16;
        maxima = (float*)(shared + R * UNIT + T * (KEYS * 16 + (T == 1 ? 0 : GROUP * ROW)));
        largest = maxima + 4 * ROWS;
        total = largest + ROWS;
    }

    __device__ unsigned slot(int unit) const { return ring + unit % R * UNIT; }

    // Begins to load a unit: keys (even) or values (odd) from row `from` on, of which `rows` are there.
    __device__ void load(int unit, const bf16* from, size_t stride, int rows) const
    {
        const unsigned to = slot(unit);
#pragma unroll
        for (int i = 0; i < KEYS / 4; i++) {
            const int row = warp + 4 * i;
            const bf16* at = from + (row < rows ? row : 0) * stride + lane * 8;
            copy_16(to + chunk(row, lane), at, row < rows ? 16 : 0);
        }
    }
};

template <int T>
__device__ void decode(bf16* o, const bf16* q, const bf16* k, const bf16* v, const bf16* gate,
                       const long long* cu_seqlens_q, const long long* cu_seqlens_k, float* parts, int* tickets,
                       int S, int HKV, int plant)
{
    extern __shared__ __align__(1024) unsigned char shared[];
    constexpr int R = RING(T), ROWS = T * GROUP;
    const Decode<T> d(shared);
    const int warp = d.warp, lane = d.lane, g = lane / 4, t = lane % 4;
    const int groups = gridDim.z / S, kv = blockIdx.y, HQ = HKV * GROUP;
    const int rank = blockIdx.x % CLUSTER, clusters = gridDim.x / CLUSTER;
    const Seen seen(cu_seqlens_q, cu_seqlens_k, blockIdx.z / groups, blockIdx.z % groups * T, T, plant);
    if (seen.queries <= 0) return;

    // The part of the keys that is this block's.
    const long long share = (seen.most + gridDim.x - 1) / gridDim.x;
    const int size = max((int)((share + 15) / 16 * 16), LEAST);
    const int used = min((long long)clusters, (seen.most + (long long)size * CLUSTER - 1) / ((long long)size * CLUSTER));
    if (used <= blockIdx.x / CLUSTER) return;
    const long long begin = (long long)blockIdx.x * size;
    int keys = (int)max(min((long long)size, seen.most - begin), 0LL);
    if (plant == LAST_PART_DROPPED && seen.most <= begin + size) keys = 0;
    const int tiles = (keys + KEYS - 1) / KEYS;
    const size_t stride = (size_t)HKV * H;
    const size_t corner = ((seen.first + begin) * HKV + kv) * H;
    const auto load = [&](int unit) {
        const int tile = unit / 2;
        if (tile < tiles)
            d.load(unit, (unit % 2 ? v : k) + corner + tile * KEYS * stride, stride, keys - tile * KEYS);
        close_group();
    };
    // Keys of the part that a query sees, where that is less than all.
    const auto visible = [&](int j) { return (int)max(min((long long)keys, seen.by(j) - begin), 0LL); };

    if (T != 1) {
        for (int i = threadIdx.x; i < ROWS * 32; i += 128) {
            const int row = i / 32, c = i % 32, j = row / GROUP;
            const bool there = j < seen.queries;
            const size_t at = ((seen.query + (there ? j : 0)) * HQ + head_of(row % GROUP, kv, HKV, plant)) * H;
            copy_16(d.queries + chunk(row, c), q + at + c * 8, there ? 16 : 0);
        }
    }
#pragma unroll
    for (int unit = 0; unit < R - 1; unit++) load(unit);
    unsigned query[T == 1 ? H / 16 : 1][2];
    if (T == 1) {
        const bf16* at = q + (seen.query * HQ + head_of(g, kv, HKV, plant)) * H + 2 * t;
#pragma unroll
        for (int c = 0; c < (T == 1 ? H / 16 : 1); c++)
            query[c][0] = word(at + 16 * c), query[c][1] = word(at + 16 * c + 8);
    }

    // Of queries: largest score so far and own share of the sum, for heads 2 t and 2 t + 1; answers of this
    // warp's 64 channels, 16 to a product, for the same heads.
    float top[T][2], sum[T][2], out[T][4][4];
#pragma unroll
    for (int j = 0; j < T; j++) {
#pragma unroll
        for (int e = 0; e < 2; e++) top[j][e] = -INFINITY, sum[j][e] = 0;
#pragma unroll
        for (int m = 0; m < 4; m++)
#pragma unroll
            for (int e = 0; e < 4; e++) out[j][m][e] = 0;
    }
    const float scale = scale_of(plant);

    for (int tile = 0; tile < tiles; tile++) {
        wait_for_groups<R - 2>();
        __syncthreads();
        load(2 * tile + R - 1);

        // Scores of 16 keys to a warp: keys g and g + 8, heads 2 t and 2 t + 1.
        float score[T][4];
        {
            const unsigned keys_at = d.slot(2 * tile);
            const int row = warp * 16 + lane % 16;
            float odd[4] = {0, 0, 0, 0};
#pragma unroll
            for (int j = 0; j < T; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) score[j][e] = 0;
#pragma unroll
            for (int c = 0; c < H / 16; c += 2) {
                unsigned a[2][4];
                load_matrices(a[0], keys_at + chunk(row, 2 * c + lane / 16));
                load_matrices(a[1], keys_at + chunk(row, 2 * c + 2 + lane / 16));
                if (T == 1) {
                    mma(score[0], a[0], query[T == 1 ? c : 0][0], query[T == 1 ? c : 0][1]);
                    mma(odd, a[1], query[T == 1 ? c + 1 : 0][0], query[T == 1 ? c + 1 : 0][1]);
                } else {
#pragma unroll
                    for (int j = 0; j < T; j++) {
                        if (seen.queries <= j) break;
                        unsigned b[4];
                        load_matrices(b, d.queries + chunk(j * GROUP + lane % 8, 2 * c + lane / 8));
                        mma(score[j], a[0], b[0], b[1]);
                        mma(score[j], a[1], b[2], b[3]);
                    }
                }
            }
            if (T == 1)
#pragma unroll
                for (int e = 0; e < 4; e++) score[0][e] += odd[e];
        }
        // The last tile has rows without keys, or keys that not every query sees.
        const bool partial = visible(0) < (tile + 1) * KEYS;
#pragma unroll
        for (int j = 0; j < T; j++) {
            if (seen.queries <= j) break;
            if (partial) {
                const int left = visible(j) - tile * KEYS - warp * 16;
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (left <= g + e / 2 * 8) score[j][e] = -INFINITY;
            }
            float high[2] = {fmaxf(score[j][0], score[j][2]), fmaxf(score[j][1], score[j][3])};
#pragma unroll
            for (int e = 0; e < 2; e++) {
#pragma unroll
                for (int by = 4; by < 32; by *= 2) high[e] = fmaxf(high[e], __shfl_xor_sync(~0u, high[e], by));
            }
            if (g == 0) *(float2*)(d.maxima + warp * ROWS + j * GROUP + 2 * t) = {high[0], high[1]};
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < T; j++) {
            if (seen.queries <= j) break;
            float kept[2], base[2];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float* column = d.maxima + j * GROUP + 2 * t + e;
                const float high = fmaxf(fmaxf(column[0], column[ROWS]), fmaxf(column[2 * ROWS], column[3 * ROWS]));
                const float raised = fmaxf(top[j][e], high);
                // Where nothing was seen yet nothing is subtracted, and nothing is kept.
                base[e] = raised == -INFINITY ? 0 : raised * scale;
                kept[e] = exp2_fast(top[j][e] * scale - base[e]);
                if (plant == SUM_NOT_RESCALED) kept[e] = 1;
                top[j][e] = raised;
            }
            float p[4];
#pragma unroll
            for (int e = 0; e < 4; e++) p[e] = exp2_fast(score[j][e] * scale - base[e % 2]);
#pragma unroll
            for (int e = 0; e < 2; e++) sum[j][e] = sum[j][e] * kept[e] + (p[e] + p[e + 2]);
#pragma unroll
            for (int m = 0; m < 4; m++)
#pragma unroll
                for (int e = 0; e < 4; e++) out[j][m][e] *= kept[e % 2];
            const unsigned at = d.probabilities + (j * KEYS + warp * 16 + g) * 16 + t * 4;
            asm volatile("st.shared.b32 [%0], %1;" :: "r"(at), "r"(pack(p[0], p[1])) : "memory");
            asm volatile("st.shared.b32 [%0], %1;" :: "r"(at + 128), "r"(pack(p[2], p[3])) : "memory");
        }
        wait_for_groups<R - 2>();
        __syncthreads();
        load(2 * tile + R);

        const unsigned values_at = d.slot(2 * tile + 1);
        const bool hidden = T != 1 && partial;
#pragma unroll
        for (int step = 0; step < KEYS / 16; step += 2) {
            unsigned a[2][4][4];
#pragma unroll
            for (int m = 0; m < 4; m++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int row = (step + half) * 16 + lane / 16 * 8 + lane % 8;
                    load_transposed(a[half][m], values_at + chunk(row, warp * 8 + 2 * m + lane / 8 % 2));
                }
#pragma unroll
            for (int j = 0; j < T; j++) {
                if (seen.queries <= j) break;
                unsigned b[4];
                load_transposed(b, d.probabilities + (j * KEYS + step * 16 + lane) * 16);
                if (!hidden) {
#pragma unroll
                    for (int m = 0; m < 4; m++) {
                        mma(out[j][m], a[0][m], b[0], b[1]);
                        mma(out[j][m], a[1][m], b[2], b[3]);
                    }
                    continue;
                }
                // Values of keys that this query does not see are zero.
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    unsigned mask[2];
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const int left = visible(j) - tile * KEYS - (step + half) * 16 - e * 8 - 2 * t;
                        mask[e] = left <= 0 ? 0 : left == 1 ? 0xffffu : ~0u;
                    }
#pragma unroll
                    for (int m = 0; m < 4; m++) {
                        const unsigned(&all)[4] = a[half][m];
                        const unsigned some[4] = {all[0] & mask[0], all[1] & mask[0], all[2] & mask[1], all[3] & mask[1]};
                        mma(out[j][m], some, b[2 * half], b[2 * half + 1]);
                    }
                }
            }
        }
    }

    // What the warps have becomes rows of the block, then of the cluster.
    wait_for_groups<0>();
    __syncthreads();
    float* rows = (float*)shared;  // [ROWS, H]
#pragma unroll
    for (int j = 0; j < T; j++) {
        if (seen.queries <= j) break;
#pragma unroll
        for (int e = 0; e < 2; e++) {
#pragma unroll
            for (int by = 4; by < 32; by *= 2) sum[j][e] += __shfl_xor_sync(~0u, sum[j][e], by);
            const int row = j * GROUP + 2 * t + e;
            if (g == 0) d.maxima[warp * ROWS + row] = sum[j][e];
            if (g == 0 && warp == 0) d.largest[row] = top[j][e];
#pragma unroll
            for (int m = 0; m < 4; m++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    rows[row * H + warp * 64 + m * 16 + half * 8 + g] = out[j][m][2 * half + e];
        }
    }
    __syncthreads();
    for (int row = threadIdx.x; row < seen.queries * GROUP; row += 128) {
        const float* of = d.maxima + row;
        d.total[row] = (of[0] + of[ROWS]) + (of[2 * ROWS] + of[3 * ROWS]);
    }
    cluster_sync();

    const size_t place = (size_t)blockIdx.z * HKV + kv;
    const int column = 2 * threadIdx.x, head = head_of(rank, kv, HKV, plant);
    const unsigned rows_at = shared_address(rows), largest_at = shared_address(d.largest), total_at = shared_address(d.total);
    // The answers of a head, query after query: from this cluster, or from the parts of all.
    const auto finish = [&](int j, float sum, float low, float high) {
        const size_t at = ((seen.query + j) * HQ + head) * H + column;
        answer(o, plant == GATE_MISSING ? nullptr : gate, at, low / sum, high / sum);
    };
    for (int j = 0; j < seen.queries; j++) {
        const int row = j * GROUP + rank;
        float high[CLUSTER], of[CLUSTER], most = -INFINITY, all = 0;
        float2 x[CLUSTER], added = {0, 0};
#pragma unroll
        for (int i = 0; i < CLUSTER; i++) {
            high[i] = read_in_cluster(in_block(largest_at + row * 4, i));
            of[i] = read_in_cluster(in_block(total_at + row * 4, i));
            x[i] = read_two_in_cluster(in_block(rows_at + (row * H + column) * 4, i));
        }
#pragma unroll
        for (int i = 0; i < CLUSTER; i++) most = fmaxf(most, high[i]);
#pragma unroll
        for (int i = 0; i < CLUSTER; i++) {
            if (of[i] == 0) continue;  // A part without keys.
            const float weight = exp2_fast((high[i] - most) * scale);
            all += weight * of[i];
            added.x += weight * x[i].x;
            added.y += weight * x[i].y;
        }
        if (used == 1) {
            finish(j, all, added.x, added.y);
        } else {
            float* part = parts + ((place * clusters + blockIdx.x / CLUSTER) * ROWS + row) * PART;
            *(float2*)(part + column) = added;
            if (threadIdx.x == 0) *(float2*)(part + H) = {most, all};
        }
    }
    cluster_sync();  // Others have read what is here.
    if (used == 1) return;

    int& ticket = *(int*)d.maxima;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) ticket = atomicAdd(tickets + place * CLUSTER + rank, 1);
    __syncthreads();
    if (ticket != used - 1) return;
    if (threadIdx.x == 0) tickets[place * CLUSTER + rank] = 0;
    __threadfence();
    for (int j = 0; j < seen.queries; j++) {
        const float* part = parts + (place * clusters * ROWS + j * GROUP + rank) * PART;
        float most = -INFINITY, all = 0;
        float2 added = {0, 0};
        for (int i = 0; i < used; i++) most = fmaxf(most, __ldcg(part + (size_t)i * ROWS * PART + H));
#pragma unroll 8
        for (int i = 0; i < used; i++) {
            const float2 of = __ldcg((const float2*)(part + (size_t)i * ROWS * PART + H));
            const float2 x = __ldcg((const float2*)(part + (size_t)i * ROWS * PART + column));
            const float weight = of.y == 0 ? 0 : exp2_fast((of.x - most) * scale);
            all += weight * of.y;
            added.x += weight * x.x;
            added.y += weight * x.y;
        }
        finish(j, all, added.x, added.y);
    }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(128, 2) attention_decode_1(
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
    decode<1>(o, q, k, v, gate, cu_seqlens_q, cu_seqlens_k, parts, tickets, S, HKV, plant);
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(128, 1) attention_decode_8(
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
    decode<8>(o, q, k, v, gate, cu_seqlens_q, cu_seqlens_k, parts, tickets, S, HKV, plant);
}
