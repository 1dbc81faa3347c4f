// Gated causal attention over a cache, of many queries (attention.cu says which keys a query sees), of heads
// of 256 channels in bf16, eight query heads to a key/value head, on the tensor cores of Hopper.
//
// attention_prefill: a block takes 16 consecutive queries of a sequence, with their eight heads 128 rows of
//                    a product; one warpgroup loads, two multiply, and weigh the next scores meanwhile.
//
//   Grid (N / 16 + S, HKV), 384 threads. Dynamic shared memory: PREFILL_SHARED, 229,504 bytes. No workspace.
//
// Scores, sums and answers are f32; probabilities are rounded to bf16 before they meet values, and added up
// as they were before. A key that a query does not see has no share in its answer, whatever it holds: its
// score is set, not added to; values that only some queries of a block see, and that are no numbers, are
// left out of the product and added to the answers of those.

#include "common/grouped_attention.cuh"
#include "common/wgmma.cuh"

#define BLOCK 16                 // Queries of a block; row r of its product is query r / 8, head r % 8.
#define SPAN 80                  // Keys of a tile.
#define SLOTS 4                  // Tiles of keys, and of values, that are on their way or in use.
#define SLOT (SPAN * ROW)
#define QUERIES (BLOCK * GROUP * ROW)
#define PREFILL_SHARED (QUERIES + SLOTS * SLOT + 128)
#define LOADERS 128

// A row of 16-byte chunks as wgmma wants it: 64 columns after another, eight rows put a chunk in eight places.
__device__ inline unsigned spread(int row, int c, int rows)
{
    return (c / 8 * rows + row) * 128 + (c ^ row & 7) % 8 * 16;
}

// Of two values those that are numbers; zero for the others.
__device__ inline unsigned finite(unsigned both)
{
    const unsigned low = (both & 0x7f80u) == 0x7f80u ? 0 : both & 0xffffu;
    return (both & 0x7f800000u) == 0x7f800000u ? low : low | both & 0xffff0000u;
}

struct Barriers {
    unsigned queries, full, empty;  // One, SLOTS and SLOTS of eight bytes.

    __device__ Barriers(unsigned at) : queries(at), full(at + 8), empty(full + 8 * SLOTS) {}
    __device__ void wait_full(int unit) const { barrier_wait(full + unit % SLOTS * 8, unit / SLOTS & 1); }
    __device__ void wait_empty(int unit) const { barrier_wait(empty + unit % SLOTS * 8, unit / SLOTS & 1 ^ 1); }
};

// Loads queries, then keys and values from the last tile down: keys of a tile before values of the one
// before. Values that not every query sees, and that are no numbers, are put to zero, and the block is told
// that there are some: add_strange() brings them back to those who see them.
__device__ inline void load_tiles(const bf16* q, const bf16* k, const bf16* v, const Seen& seen, int kv, int HKV,
                                  unsigned queries, unsigned ring, Barriers barriers, int* strange, int plant)
{
    const int warp = threadIdx.x / 32, c = threadIdx.x % 32;
    for (int i = 0; i < BLOCK * GROUP / 4; i++) {
        const int row = warp + 4 * i, j = row / GROUP;
        const bool there = j < seen.queries;
        const int head = head_of(row % GROUP, kv, HKV, plant);
        const size_t at = ((seen.query + (there ? j : 0)) * HKV * GROUP + head) * H + c * 8;
        copy_16(queries + spread(row, c, BLOCK * GROUP), q + at, there ? 16 : 0);
    }
    barrier_arrive_after_copies(barriers.queries);

    const int tiles = (int)((seen.most + SPAN - 1) / SPAN);
    const size_t stride = (size_t)HKV * H, corner = (seen.first * HKV + kv) * H + c * 8;
    const unsigned place[2] = {spread(warp, c, SPAN), spread(warp + 4, c, SPAN) - 4 * 128};
    for (int unit = 0; unit < 2 * tiles; unit++) {
        // Units are keys t - 1, keys t - 2, values t - 1, keys t - 3, values t - 2, ..., values 0.
        const bool is_value = unit % 2 == 0 ? unit != 0 : unit == 2 * tiles - 1;
        const int tile = tiles - 1 - (is_value ? (unit - 1) / 2 : (unit + 1) / 2);
        const unsigned to = ring + unit % SLOTS * SLOT;
        const bf16* at = (is_value ? v : k) + corner + ((long long)tile * SPAN + warp) * stride;
        barriers.wait_empty(unit);
        const int rows = (int)min((long long)SPAN, seen.most - (long long)tile * SPAN);
        if (rows == SPAN) {
#pragma unroll
            for (int i = 0; i < SPAN / 4; i++) copy_16(to + place[i % 2] + i * 4 * 128, at + i * 4 * stride);
        } else {
            for (int i = 0; i < SPAN / 4; i++) {
                const bool there = warp + 4 * i < rows;
                copy_16(to + place[i % 2] + i * 4 * 128, there ? at + i * 4 * stride : v, there ? 16 : 0);
            }
        }
        if (is_value && seen.by(0) < ((long long)tile + 1) * SPAN) {
            close_group();
            wait_for_groups<0>();
            const int least = (int)max(seen.by(0) - (long long)tile * SPAN, 0LL);
            for (int i = 0; i < SPAN / 4; i++) {
                if (warp + 4 * i < least || rows <= warp + 4 * i) continue;
                const unsigned here = to + place[i % 2] + i * 4 * 128;
                for (int e = 0; e < 4; e++) {
                    unsigned both;
                    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(both) : "r"(here + 4 * e) : "memory");
                    if (finite(both) == both) continue;
                    *(volatile int*)strange = 1;
                    asm volatile("st.shared.b32 [%0], %1;" :: "r"(here + 4 * e), "r"(finite(both)) : "memory");
                }
            }
            barrier_arrive(barriers.full + unit % SLOTS * 8);
            continue;
        }
        barrier_arrive_after_copies(barriers.full + unit % SLOTS * 8);
    }
    wait_for_groups<0>();
}

// Two values of a key are added, as far as they were left out; an infinite one stays so whatever it weighs.
__device__ inline void add_strange(float& low, float& high, unsigned both)
{
    if ((both & 0x7f80u) == 0x7f80u) low += low_of(both);
    if ((both & 0x7f800000u) == 0x7f800000u) high += high_of(both);
}

extern "C" __global__ void __launch_bounds__(384, 1) attention_prefill(
    E* __restrict__ o,                           // [N, HQ, H]
    const E* __restrict__ q,                     // [N, HQ, H]
    const E* __restrict__ k,                     // [M, HKV, H]
    const E* __restrict__ v,                     // [M, HKV, H]
    const E* __restrict__ gate,                  // [N, HQ, H], or none
    const long long* __restrict__ cu_seqlens_q,  // [S + 1]
    const long long* __restrict__ cu_seqlens_k,  // [S + 1]
    int S,
    int HKV,
    int plant)
{
    extern __shared__ __align__(1024) unsigned char shared[];
    const unsigned queries = shared_address(shared), ring = queries + QUERIES;
    const Barriers barriers(ring + SLOTS * SLOT);
    int* strange = (int*)(shared + QUERIES + SLOTS * SLOT + 8 + 16 * SLOTS);
    const int kv = blockIdx.y;

    // The blocks of the last sequence come first, and of a sequence the last, which have the most to do.
    int s = S - 1, block = blockIdx.x;
    for (; 0 <= s; s--) {
        const int blocks = (int)((cu_seqlens_q[s + 1] - cu_seqlens_q[s] + BLOCK - 1) / BLOCK);
        if (block < blocks) {
            block = blocks - 1 - block;
            break;
        }
        block -= blocks;
    }
    if (s < 0) return;
    const Seen seen(cu_seqlens_q, cu_seqlens_k, s, block * BLOCK, BLOCK, plant);

    if (threadIdx.x == 0) {
        *strange = 0;
        barrier_start(barriers.queries, LOADERS);
        for (int i = 0; i < SLOTS; i++) {
            barrier_start(barriers.full + 8 * i, LOADERS);
            barrier_start(barriers.empty + 8 * i, 8);  // Warps that multiply.
        }
    }
    __syncthreads();
    if (threadIdx.x < LOADERS) {
        give_registers_back<40>();
        load_tiles(q, k, v, seen, kv, HKV, queries, ring, barriers, strange, plant);
        return;
    }
    take_registers<232>();
    const int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int g = lane / 4, t = lane % 4, mine = group * 8 + warp * 2;  // Queries mine and mine + 1, head g.
    const int tiles = (int)((seen.most + SPAN - 1) / SPAN);
    const float scale = scale_of(plant);

    // Scores of rows g and g + 8 of the warp, columns 8 i + 2 t and the next: s[4 i], s[4 i + 1], and s[4 i + 2],
    // s[4 i + 3]. Answers in the same order.
    float score[SPAN / 2], out[H / 2], top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, kept[2];
    unsigned p[SPAN / 4];
#pragma unroll
    for (int i = 0; i < H / 2; i++) out[i] = 0;

    const auto multiply_keys = [&](int unit) {
        const unsigned a = queries + group * 64 * 128, b = ring + unit % SLOTS * SLOT;
#pragma unroll
        for (int c = 0; c < H / 16; c++)
            wgmma_n80(score, matrix_at(a + c / 4 * BLOCK * GROUP * 128 + c % 4 * 32, 16, 1024),
                      matrix_at(b + c / 4 * SPAN * 128 + c % 4 * 32, 16, 1024), c != 0);
        wgmma_close();
    };
    const auto multiply_values = [&](int unit) {
        const unsigned b = ring + unit % SLOTS * SLOT;
#pragma unroll
        for (int c = 0; c < SPAN / 16; c++)
            wgmma_n256(out, p + 4 * c, matrix_at(b + c * 16 * 128, SPAN * 128, 1024));
        wgmma_close();
    };
    const auto release = [&](int unit) {
        if (lane == 0) barrier_arrive(barriers.empty + unit % SLOTS * 8);
    };
    // Scores of a tile become what they weigh; what was added before weighs `kept` of it.
    const auto weigh = [&](int tile) {
        const long long start = (long long)tile * SPAN;
        if (seen.by(mine) < start + SPAN) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int left = (int)min(seen.by(mine + half) - start, (long long)SPAN) - 2 * t;
#pragma unroll
                for (int i = 0; i < SPAN / 8; i++)
#pragma unroll
                    for (int e = 0; e < 2; e++)
                        if (left <= 8 * i + e) score[4 * i + 2 * half + e] = -INFINITY;
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float raised = top[half];
#pragma unroll
            for (int i = 0; i < SPAN / 8; i++)
                raised = fmaxf(raised, fmaxf(score[4 * i + 2 * half], score[4 * i + 2 * half + 1]));
            raised = fmaxf(raised, __shfl_xor_sync(~0u, raised, 1));
            raised = fmaxf(raised, __shfl_xor_sync(~0u, raised, 2));
            // Where nothing was seen yet nothing is subtracted, and nothing is kept.
            const float base = raised == -INFINITY ? 0 : raised * scale;
            kept[half] = exp2_fast(top[half] * scale - base);
            if (plant == SUM_NOT_RESCALED) kept[half] = 1;
            top[half] = raised;
            float added = 0;
#pragma unroll
            for (int i = 0; i < SPAN / 8; i++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float& x = score[4 * i + 2 * half + e];
                    x = exp2_fast(x * scale - base);
                    added += x;
                }
            sum[half] = sum[half] * kept[half] + added;
        }
    };
    const auto narrow = [&] {
#pragma unroll
        for (int i = 0; i < SPAN / 4; i++) p[i] = pack(score[2 * i], score[2 * i + 1]);
    };

    barrier_wait(barriers.queries, 0);
    barriers.wait_full(0);
    fence_for_wgmma();
    hold(score);
    wgmma_begin();
    multiply_keys(0);
    wgmma_wait<0>();
    hold(score);
    release(0);
    weigh(tiles - 1);
    narrow();
    for (int i = 1; i < tiles; i++) {
        barriers.wait_full(2 * i - 1);
        fence_for_wgmma();
        hold(score);
        hold(p);
        hold(out);
        wgmma_begin();
        multiply_keys(2 * i - 1);
        barriers.wait_full(2 * i);
        fence_for_wgmma();
        multiply_values(2 * i);
        // While values are multiplied, the next scores are weighed.
        wgmma_wait<1>();
        hold(score);
        release(2 * i - 1);
        weigh(tiles - 1 - i);
        wgmma_wait<0>();
        hold(out);
        hold(p);
        release(2 * i);
        narrow();
#pragma unroll
        for (int n = 0; n < H / 2; n++) out[n] *= kept[n / 2 % 2];
    }
    barriers.wait_full(2 * tiles - 1);
    fence_for_wgmma();
    hold(p);
    hold(out);
    wgmma_begin();
    multiply_values(2 * tiles - 1);
    wgmma_wait<0>();
    hold(out);

    if (*(volatile int*)strange) {
        for (long long key = seen.by(0); key < seen.most; key++) {
            const bf16* value = v + ((seen.first + key) * HKV + kv) * H + 2 * t;
#pragma unroll
            for (int i = 0; i < H / 8; i++) {
                const unsigned both = word(value + 8 * i);
                if (finite(both) == both) continue;
                if (key < seen.by(mine)) add_strange(out[4 * i], out[4 * i + 1], both);
                if (key < seen.by(mine + 1)) add_strange(out[4 * i + 2], out[4 * i + 3], both);
            }
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float all = sum[half];
        all += __shfl_xor_sync(~0u, all, 1);
        all += __shfl_xor_sync(~0u, all, 2);
        if (seen.queries <= mine + half) continue;
        const int head = head_of(g, kv, HKV, plant);
        const size_t at = ((seen.query + mine + half) * HKV * GROUP + head) * H + 2 * t;
        const float share = 1 / all;
#pragma unroll
        for (int i = 0; i < H / 8; i++)
            answer(o, plant == GATE_MISSING ? nullptr : gate, at + 8 * i, out[4 * i + 2 * half] * share,
                   out[4 * i + 2 * half + 1] * share);
    }
}
