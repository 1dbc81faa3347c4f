#include "common/early.cuh"
#include "common/codes.cuh"


// Attention of few queries over a cache, whose kernels are in hopper/attention_decode.cu, of a cache in bf16, and in
// hopper/attention_decode_fp8.cu. Codes of FP8 come to shared memory as they are. A thread takes four neighbours of
// them where it would take two and two others eight further on, of keys as of queries: a sum over channels has no
// order. Values turn two channels at a time, so that rows 8 .. 15 of a product are the odd ones of 16.

#define KEYS 64                  // Keys of a tile.
#define LEAST 128                // Keys of a part, at least.
#define PART (H + 4)             // Floats of a part in the workspace: values, largest score, sum.

// Units that are on their way or in use, of numbers of so many bytes; a unit is a tile of keys, or of values.
#define RING(T, BYTES) ((T) == 1 ? 6 / (BYTES) : (BYTES) == 1 ? 8 : 5)
#define DECODE_SHARED(T, BYTES) \
    (RING(T, BYTES) * KEYS * H * (BYTES) + (T) * (KEYS * 16 + ((T) == 1 ? 0 : GROUP * ROW) + 6 * GROUP * 4))

// Where chunk c of 16 bytes of a row stands in a unit: eight rows put a chunk into eight places.
__device__ inline unsigned chunk(int row, int c) { return row * ROW + (c ^ row & 7) * 16; }

// The same of codes; of two neighbours four chunks stand in eight places.
__device__ inline unsigned chunk_of_codes(int row, int c) { return row * H + (c ^ (row & 1) * 4 ^ row / 2 % 4) * 16; }

// A query's channels from bf16 to f16, of head g in the lanes 4 g to 4 g + 3. What undoes it of heads 2 t and 2 t + 1
// comes back.
template <int STEPS> __device__ void narrowed(unsigned (&query)[STEPS][2], float (&back)[2])
{
    int exponent = 15;
#pragma unroll
    for (int c = 0; c < STEPS; c++)
#pragma unroll
        for (int i = 0; i < 2; i++) exponent = largest_exponent(exponent, query[c][i]);
    exponent = max(exponent, __shfl_xor_sync(~0u, exponent, 1));
    exponent = max(exponent, __shfl_xor_sync(~0u, exponent, 2));
#pragma unroll
    for (int c = 0; c < STEPS; c++)
#pragma unroll
        for (int i = 0; i < 2; i++) query[c][i] = lifted(query[c][i], exponent);
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int e = 0; e < 2; e++) back[e] = undone(__shfl_sync(~0u, exponent, 8 * t + 4 * e));
}

// Of T queries, with 4 W warps: of every four, each takes 16 keys of a tile for the scores and 64 channels for
// the answers of T / W queries. A cache is of C.
template <class C, int T, int W, int CLUSTER>
__device__ void decode(bf16* o, const bf16* q, const C* k, const C* v, const bf16* gate,
                       const long long* cu_seqlens_q, const long long* cu_seqlens_k, float* parts, int* tickets,
                       int S, int HKV, int plant)
{
    extern __shared__ __align__(1024) unsigned char shared[];
    constexpr bool CODES = sizeof(C) == 1;
    constexpr int R = RING(T, sizeof(C)), ROWS = T * GROUP, OWN = T / W, THREADS = 128 * W;
    constexpr int UNIT = KEYS * H * sizeof(C), CHUNKS = H * sizeof(C) / 16, ONCE = 32 / CHUNKS;
    constexpr int STEPS = T == 1 ? H / 16 : 1;  // Whose queries stay in registers.
    const unsigned ring = shared_address(shared), probabilities = ring + R * UNIT;
    const unsigned queries = probabilities + T * KEYS * 16;
    float* maxima = (float*)(shared + R * UNIT + T * (KEYS * 16 + (T == 1 ? 0 : GROUP * ROW)));  // [4][ROWS]
    float *largest = maxima + 4 * ROWS, *total = largest + ROWS;                                   // [ROWS]
    const int warp = threadIdx.x / 32 % 4, four = threadIdx.x / 128, mine = four * OWN;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int groups = gridDim.z / S, kv = blockIdx.y, HQ = HKV * GROUP;
    const int rank = blockIdx.x % CLUSTER, clusters = gridDim.x / CLUSTER;
    wait_for_previous();
    const Seen seen(cu_seqlens_q, cu_seqlens_k, blockIdx.z / groups, blockIdx.z % groups * T, T, plant);
    if (seen.queries <= 0) return;

    // The part of the keys that is this block's.
    const int blocks = gridDim.x, share = (seen.most + blocks - 1) / blocks;
    const int size = max((share + 15) / 16 * 16, LEAST);
    const int used = (seen.most + size * CLUSTER - 1) / (size * CLUSTER);
    if (used <= blockIdx.x / CLUSTER) return;
    const int begin = blockIdx.x * size;
    int keys = max(min(size, seen.most - begin), 0);
    if (plant == LAST_PART_DROPPED && seen.most <= begin + size) keys = 0;
    const int tiles = (keys + KEYS - 1) / KEYS;
    const size_t stride = (size_t)HKV * H;
    const size_t corner = ((seen.first + begin) * HKV + kv) * H + lane % CHUNKS * 16 / sizeof(C);

    // Begins to load a unit: keys of tile unit / 2 if it is even, else its values.
    const auto load = [&](int unit) {
        const int tile = unit / 2, rows = keys - tile * KEYS;
        const C* from = (unit % 2 ? v : k) + corner + tile * KEYS * stride;
        const unsigned to = ring + unit % R * UNIT;
        if (tile < tiles) {
#pragma unroll
            for (int i = 0; i < KEYS / 4 / W / ONCE; i++) {
                const int row = (four * 4 + warp + 4 * W * i) * ONCE + lane / CHUNKS;
                const unsigned at = CODES ? chunk_of_codes(row, lane % CHUNKS) : chunk(row, lane);
                copy_16(to + at, from + (row < rows ? row : 0) * stride, row < rows ? 16 : 0);
            }
        }
        close_group();
    };
    // Keys of the part that a query sees.
    const auto visible = [&](int j) { return max(min(keys, seen.by(mine + j) - begin), 0); };

    if (T != 1) {
        for (int i = threadIdx.x; i < ROWS * 32; i += THREADS) {
            const int row = i / 32, c = i % 32, j = row / GROUP;
            const bool there = j < seen.queries;
            const size_t at = ((seen.query + (there ? j : 0)) * HQ + head_of(row % GROUP, kv, HKV, plant)) * H;
            copy_16(queries + chunk(row, c), q + at + c * 8, there ? 16 : 0);
        }
    }
#pragma unroll
    for (int unit = 0; unit < R - 1; unit++) load(unit);
    unsigned query[STEPS][2];
    float back[2] = {1, 1};  // What scores of heads 2 t and 2 t + 1 are multiplied by.
    if (T == 1) {
        const bf16* at = q + (seen.query * HQ + head_of(g, kv, HKV, plant)) * H + (CODES ? 16 : 2) * t;
#pragma unroll
        for (int c = 0; c < STEPS; c++) {
            const int first = CODES ? c / 4 * 64 + c % 4 * 4 : 16 * c;
            query[c][0] = word(at + first), query[c][1] = word(at + first + (CODES ? 2 : 8));
        }
        if (CODES) narrowed(query, back);
    }

    // Each block of a cluster gives the answers of some heads, each four warps those of queries four, four + W
    // and so on, each thread two channels. Answer i is one of a query and a head.
    constexpr int HEADS = GROUP / CLUSTER, ANSWERS = OWN * HEADS;
    const int column = threadIdx.x % 128 * 2;
    const auto query_of = [&](int i) { return four + i / HEADS * W; };
    const auto row_of = [&](int i) { return query_of(i) * GROUP + rank * HEADS + i % HEADS; };
    const auto place_of = [&](int i) {
        return ((seen.query + query_of(i)) * HQ + head_of(row_of(i) % GROUP, kv, HKV, plant)) * H + column;
    };
    unsigned open[ANSWERS];
    const bool is_gated = gate && plant != GATE_MISSING;
#pragma unroll
    for (int i = 0; i < ANSWERS; i++)
        open[i] = is_gated && query_of(i) < seen.queries ? word(gate + place_of(i)) : 0;
    const auto finish = [&](int i, float sum, float2 added) {
        const float low = added.x / sum, high = added.y / sum;
        *(unsigned*)(o + place_of(i)) = is_gated ? gated(low, high, open[i]) : pack(low, high);
    };

    // Of queries: largest score so far and own share of the sum, for heads 2 t and 2 t + 1; answers of this
    // warp's 64 channels, 16 to a product, for the same heads.
    float top[OWN][2], sum[OWN][2], out[OWN][4][4];
#pragma unroll
    for (int j = 0; j < OWN; j++) {
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
        float score[OWN][4], odd[OWN][4];
        const unsigned keys_at = ring + 2 * tile % R * UNIT;
#pragma unroll
        for (int j = 0; j < OWN; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) score[j][e] = odd[j][e] = 0;
        uint4 of_rows[2];  // Codes of four steps.
#pragma unroll
        for (int c = 0; c < H / 16; c += 2) {
            unsigned even_keys[4], odd_keys[4];
            if (CODES) {
                const int of_four = c / 4 * 4 + t;
                if (c % 4 == 0) {
                    of_rows[0] = read_chunk(keys_at + chunk_of_codes(warp * 16 + g, of_four));
                    of_rows[1] = read_chunk(keys_at + chunk_of_codes(warp * 16 + g + 8, of_four));
                }
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const uint4 of = of_rows[half];
                    const unsigned even = c % 4 == 0 ? of.x : of.z, other = c % 4 == 0 ? of.y : of.w;
                    even_keys[half] = T == 1 ? f16_of(even) : bf16_of(even);
                    even_keys[half + 2] = T == 1 ? f16_of(even >> 16) : bf16_of(even >> 16);
                    odd_keys[half] = T == 1 ? f16_of(other) : bf16_of(other);
                    odd_keys[half + 2] = T == 1 ? f16_of(other >> 16) : bf16_of(other >> 16);
                }
            } else {
                load_matrices(even_keys, keys_at + chunk(warp * 16 + lane % 16, 2 * c + lane / 16));
                load_matrices(odd_keys, keys_at + chunk(warp * 16 + lane % 16, 2 * c + 2 + lane / 16));
            }
#pragma unroll
            for (int j = 0; j < OWN; j++) {
                unsigned b[4];
                if (T == 1) {
                    const int at = STEPS == 1 ? 0 : c;
                    b[0] = query[at][0], b[1] = query[at][1];
                    b[2] = query[STEPS == 1 ? 0 : c + 1][0], b[3] = query[STEPS == 1 ? 0 : c + 1][1];
                } else if (CODES) {
                    const int of_eight = c / 4 * 8 + 2 * t + c % 4 / 2;
                    const uint4 of = read_chunk(queries + chunk((mine + j) * GROUP + g, of_eight));
                    b[0] = of.x, b[1] = of.y, b[2] = of.z, b[3] = of.w;
                } else {
                    load_matrices(b, queries + chunk((mine + j) * GROUP + lane % 8, 2 * c + lane / 8));
                }
                if (CODES && T == 1) {
                    mma_f16(score[j], even_keys, b[0], b[1]);
                    mma_f16(odd[j], odd_keys, b[2], b[3]);
                    continue;
                }
                mma(score[j], even_keys, b[0], b[1]);
                mma(odd[j], odd_keys, b[2], b[3]);
            }
        }
        // The last tile has rows without keys, or keys that not every query sees.
        const bool partial = visible(0) < (tile + 1) * KEYS;
#pragma unroll
        for (int j = 0; j < OWN; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) score[j][e] = (score[j][e] + odd[j][e]) * back[e % 2];
            if (partial) {
                const int left = visible(j) - tile * KEYS - warp * 16;
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (left <= g + e / 2 * 8) score[j][e] = -INFINITY;
            }
            float high[2] = {fmaxf(score[j][0], score[j][2]), fmaxf(score[j][1], score[j][3])};
#pragma unroll
            for (int by = 4; by < 32; by *= 2) {
                high[0] = fmaxf(high[0], __shfl_xor_sync(~0u, high[0], by));
                high[1] = fmaxf(high[1], __shfl_xor_sync(~0u, high[1], by));
            }
            if (g == 0) *(float2*)(maxima + warp * ROWS + (mine + j) * GROUP + 2 * t) = {high[0], high[1]};
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < OWN; j++) {
            float kept[2], base[2], p[4];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float* column = maxima + (mine + j) * GROUP + 2 * t + e;
                const float high = fmaxf(fmaxf(column[0], column[ROWS]), fmaxf(column[2 * ROWS], column[3 * ROWS]));
                const float raised = fmaxf(top[j][e], high);
                // Where nothing was seen yet nothing is subtracted, and nothing is kept.
                base[e] = raised == -INFINITY ? 0 : raised * scale;
                kept[e] = exp2_fast(top[j][e] * scale - base[e]);
                if (plant == SUM_NOT_RESCALED) kept[e] = 1;
                top[j][e] = raised;
            }
#pragma unroll
            for (int e = 0; e < 4; e++) p[e] = exp2_fast(score[j][e] * scale - base[e % 2]);
#pragma unroll
            for (int e = 0; e < 2; e++) sum[j][e] = sum[j][e] * kept[e] + (p[e] + p[e + 2]);
#pragma unroll
            for (int m = 0; m < 4; m++)
#pragma unroll
                for (int e = 0; e < 4; e++) out[j][m][e] *= kept[e % 2];
            const unsigned at = probabilities + ((mine + j) * KEYS + warp * 16 + g) * 16 + t * 4;
            write_word(at, CODES ? pack_f16(p[0], p[1]) : pack(p[0], p[1]));
            write_word(at + 128, CODES ? pack_f16(p[2], p[3]) : pack(p[2], p[3]));
        }
        wait_for_groups<R - 2>();
        __syncthreads();
        load(2 * tile + R);

        const unsigned values_at = ring + (2 * tile + 1) % R * UNIT;
        // Values of keys that a query does not see are zero, where there are any.
        const auto multiply_values = [&](bool hidden) {
#pragma unroll
            for (int step = 0; step < KEYS / 16; step += 2) {
                unsigned a[2][4][4];
#pragma unroll
                for (int m = 0; m < 4; m++) {
                    if (CODES) {
                        // Of 32 keys: two keys, of each two channels.
                        unsigned two[4];
                        load_transposed(two, values_at + chunk_of_codes(step * 16 + lane, warp * 4 + m));
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            const unsigned by_channel = __byte_perm(two[i], 0, 0x3120);
                            a[i / 2][m][i % 2 * 2] = f16_of(by_channel);
                            a[i / 2][m][i % 2 * 2 + 1] = f16_of(by_channel >> 16);
                        }
                        continue;
                    }
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int row = (step + half) * 16 + lane / 16 * 8 + lane % 8;
                        load_transposed(a[half][m], values_at + chunk(row, warp * 8 + 2 * m + lane / 8 % 2));
                    }
                }
#pragma unroll
                for (int j = 0; j < OWN; j++) {
                    unsigned b[4];
                    load_transposed(b, probabilities + ((mine + j) * KEYS + step * 16 + lane) * 16);
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        unsigned mask[2] = {~0u, ~0u};
#pragma unroll
                        for (int e = 0; e < 2; e++) {
                            const int left = visible(j) - tile * KEYS - (step + half) * 16 - e * 8 - 2 * t;
                            if (hidden) mask[e] = left <= 0 ? 0 : left == 1 ? 0xffffu : ~0u;
                        }
#pragma unroll
                        for (int m = 0; m < 4; m++) {
                            const unsigned(&all)[4] = a[half][m];
                            const unsigned some[4] = {
                                all[0] & mask[0], all[1] & mask[0], all[2] & mask[1], all[3] & mask[1]};
                            if (CODES) mma_f16(out[j][m], some, b[2 * half], b[2 * half + 1]);
                            else mma(out[j][m], some, b[2 * half], b[2 * half + 1]);
                        }
                    }
                }
            }
        };
        if (T != 1 && partial) multiply_values(true);
        else multiply_values(false);
    }

    // What the warps have becomes rows of the block, then of the cluster.
    wait_for_groups<0>();
    let_next_start();
    __syncthreads();
    float* rows = (float*)shared;  // [ROWS, H]
#pragma unroll
    for (int j = 0; j < OWN; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
#pragma unroll
            for (int by = 4; by < 32; by *= 2) sum[j][e] += __shfl_xor_sync(~0u, sum[j][e], by);
            const int row = (mine + j) * GROUP + 2 * t + e;
            if (g == 0) maxima[warp * ROWS + row] = sum[j][e];
            if (g == 0 && warp == 0) largest[row] = top[j][e];
#pragma unroll
            for (int m = 0; m < 4; m++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int of_sixteen = CODES ? 2 * g + half : half * 8 + g;
                    rows[row * H + warp * 64 + m * 16 + of_sixteen] = out[j][m][2 * half + e];
                }
        }
    __syncthreads();
    if (threadIdx.x < ROWS) {
        const float* of = maxima + threadIdx.x;
        total[threadIdx.x] = (of[0] + of[ROWS]) + (of[2 * ROWS] + of[3 * ROWS]);
    }
    cluster_arrive();
    cluster_wait();

    const size_t place = (size_t)blockIdx.z * HKV + kv;
    const unsigned largest_at = shared_address(largest), total_at = shared_address(total);
#pragma unroll
    for (int i = 0; i < ANSWERS; i++) {
        const int row = row_of(i);
        float high[CLUSTER], of[CLUSTER], most = -INFINITY, all = 0;
        float2 x[CLUSTER], added = {0, 0};
#pragma unroll
        for (int b = 0; b < CLUSTER; b++) {
            high[b] = read_in_cluster(in_block(largest_at + row * 4, b));
            of[b] = read_in_cluster(in_block(total_at + row * 4, b));
            x[b] = read_two_in_cluster(in_block(ring + (row * H + column) * 4, b));
        }
#pragma unroll
        for (int b = 0; b < CLUSTER; b++) most = fmaxf(most, high[b]);
#pragma unroll
        for (int b = 0; b < CLUSTER; b++) {
            if (of[b] == 0) continue;  // A part without keys.
            const float weight = exp2_fast((high[b] - most) * scale);
            all += weight * of[b];
            added.x += weight * x[b].x;
            added.y += weight * x[b].y;
        }
        if (seen.queries <= query_of(i)) break;
        if (used == 1) {
            finish(i, all, added);
        } else {
            float* part = parts + ((place * clusters + blockIdx.x / CLUSTER) * ROWS + row) * PART;
            *(float2*)(part + column) = added;
            if (column == 0) *(float2*)(part + H) = {most, all};
        }
    }
    cluster_arrive();  // What is here has been read.
    if (used == 1) {
        cluster_wait();
        return;
    }

    int& ticket = *(int*)maxima;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) ticket = atomicAdd(tickets + place * CLUSTER + rank, 1);
    __syncthreads();
    cluster_wait();
    if (ticket != used - 1) return;
    if (threadIdx.x == 0) tickets[place * CLUSTER + rank] = 0;
    __threadfence();
#pragma unroll
    for (int i = 0; i < ANSWERS; i++) {
        if (seen.queries <= query_of(i)) break;
        const float* part = parts + (place * clusters * ROWS + row_of(i)) * PART;
        float most = -INFINITY, all = 0;
        float2 added = {0, 0};
#pragma unroll 4
        for (int c = 0; c < used; c++) {
            const float2 of = __ldcg((const float2*)(part + (size_t)c * ROWS * PART + H));
            const float2 x = __ldcg((const float2*)(part + (size_t)c * ROWS * PART + column));
            const float raised = fmaxf(most, of.x);
            const float kept = most == -INFINITY ? 0 : exp2_fast((most - raised) * scale);
            const float weight = of.y == 0 ? 0 : exp2_fast((of.x - raised) * scale);
            if (raised == -INFINITY && of.y == 0) continue;
            all = all * kept + weight * of.y;
            added.x = added.x * kept + weight * x.x;
            added.y = added.y * kept + weight * x.y;
            most = raised;
        }
        finish(i, all, added);
    }
}
