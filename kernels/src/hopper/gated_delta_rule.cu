// Gated delta rule on sm_90a, K = V = 128: in chunks of 64 tokens on tensor cores. What is computed is told in
// ../gated_delta_rule.cu, how in ../common/delta_chunk.cuh.
//
// gated_delta_rule_chunk_prepare: T and P of every chunk, and factors of its tokens, all chunks at once. Grid
//     (HK, slots, ceil(HV / HK / 2)), 256 threads, 66560 bytes of dynamic shared memory; a slot is a chunk, and
//     there are N / 64 + S, 65535 at most. `work` takes slots * HV * 17408 bytes, aligned to 16.
// gated_delta_rule_chunk_ahead: the same, first chunks of all sequences first, by blocks that stay: as many
//     as are wanted, 768 threads, 199680 bytes, so that a multiprocessor has one. `ready` is told of every record.
// gated_delta_rule_chunk_walk: the states and answers, chunk after chunk. Grid (S x HV, 2), 384 threads and 185344
//     bytes: heads have a block for half of their columns each, as few sequences leave multiprocessors without work
//     (of many, gated_delta_rule_fused.cu is faster). state_out may be state_in. It may be launched to start before
//     the kernel before has ended: `along` with the one that prepares ahead, on multiprocessors that this one leaves,
//     it takes records as they come. Blocks wait for others only if those have begun and wait for nobody: the
//     kernels may not change places.

#include "common/delta_chunk.cuh"
#include "common/early.cuh"

// Every thread arrives at a barrier for itself: a lane could for its warp, behind __syncwarp, but compute-sanitizer takes
// what the other lanes did for not told then.

// Counts of those that have yet to take what a record is: nobody before it is there, nor after all have taken it.

// What this thread has written, be it by bulk copies that it has waited for, is there for so many others.
__device__ inline void tell_others(unsigned* others, unsigned many)
{
    asm volatile("fence.proxy.async;\nred.release.gpu.global.add.u32 [%0], %1;" ::"l"(others), "r"(many) : "memory");
}

// How many records are there, from that of the first lane of a warp on: one at least, which is waited for. The warp is
// one of the others, and what it reads from here on is there, be it by bulk copies.
__device__ inline int wait_to_be_told(unsigned* others, bool wanted)
{
    unsigned without;
    do {
        unsigned many = 0;
        if (wanted) asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(many) : "l"(others) : "memory");
        without = ~__ballot_sync(~0u, many != 0);
    } while (without & 1);
    const int there = without ? __ffs(without) - 1 : 32;
    asm volatile("fence.acq_rel.gpu;\nfence.proxy.async;" ::: "memory");
    if ((int)(threadIdx.x % 32) < there)
        asm volatile("red.relaxed.gpu.global.add.u32 [%0], -1;" ::"l"(others) : "memory");
    __syncwarp();
    return there;
}

// What records are made of.
struct Inputs {
    const bf16 *q, *k;            // [N, HK, K]
    const float* g;               // [N, HV]
    const bf16* beta;             // [N, HV]
    const long long* cu_seqlens;  // [S + 1]
    float eps;
    int S, HK, HV, plant;
};

const int PREPARE = 256, SHARE = 66560;  // Threads that make records of a chunk, and bytes of them.

// T, P and factors of a chunk for a pair of value heads of a key head; `all` is a barrier of these threads, and those
// of its warpgroups follow `own`. Of each warpgroup a thread gets to know which record it has stored: it has been read
// out of shared memory, if not written. The others get a negative number.
__device__ inline int prepare(const Inputs& x, unsigned char* work, unsigned char* tiles, unsigned head, unsigned slot,
                              unsigned pair, int me, int all, int own)
{
    // The sequence and the chunk of the slot.
    int s = 0;
    for (int end = x.S; 1 < end - s;) {
        const int middle = (s + end) / 2;
        if (x.cu_seqlens[middle] / CHUNK + middle <= slot) s = middle;
        else end = middle;
    }
    const int chunk = slot - (int)(x.cu_seqlens[s] / CHUNK) - s;
    const long long begin = x.cu_seqlens[s] + (long long)chunk * CHUNK, left = x.cu_seqlens[s + 1] - begin;
    if (left <= 0) return -1;
    const int rows = left < CHUNK ? (int)left : CHUNK, group = me / 128, row = me / 16, piece = me % 16;

    const unsigned base = shared_address(tiles), to = base + piece / 8 * HALF + swizzled(row, piece % 8);
    const size_t stride = (size_t)x.HK * DIM, from = ((begin + row) * x.HK + head) * DIM + piece * 8;
    some_wait(all, PREPARE);  // Nobody reads here what was made before.
    copy_pieces<16>(to, x.k + from, stride, row, rows);
    copy_pieces<16>(to + TILE, x.q + from, stride, row, rows);
    copies_end_group();

    // A warpgroup has a value head; one that is left over does the last again, for nobody.
    const unsigned per = x.HV / x.HK;
    const bool mine = pair * 2 + group < per;
    const int h = head * per + (mine ? pair * 2 + group : per - 1), record = slot * x.HV + h;
    unsigned char* const after = tiles + 4 * TILE + 2 * TILE;
    Factors* const factors = (Factors*)after + group;
    unsigned char* const blocks = after + 2 * sizeof(Factors) + group * BLOCKS;
    Tokens* const tokens = (Tokens*)(after + 2 * sizeof(Factors) + 2 * BLOCKS);
    float* const pasts = (float*)(tokens + 2) + group * CHUNK;
    // P comes where queries were.
    const unsigned t = base + 4 * TILE + group * TILE, p = base + TILE + group * HALF;
    const Place place = {base, base + TILE, t, p, factors, blocks, tokens + group, pasts};
    const size_t of_head = (size_t)begin * x.HV + h;
    tell(tokens[group], x.g + of_head, x.beta + of_head, x.HV, chunk, rows, x.plant);
    copies_wait<0>();
    sum_squares<4>(tokens[0].squares + row, tokens[1].squares + row, 16, to + TILE, 16 * 128, piece);
    writes_to_async();
    some_wait(all, PREPARE);
    float kk[32];
    begin_scores(kk, base, base);
    make_record(place, kk, rows, x.eps, own + group, x.plant, [&] { some_wait(all, PREPARE); });
    some_wait(own + group, 128);
    // By a warp that has no gates to load for the next one.
    if (!mine || me % 128 != 96) return -1;
    unsigned char* const stored = work + (size_t)record * RECORD;
    bulk_store(stored, t, TILE);
    bulk_store(stored + TILE, p, TILE);
    bulk_store(stored + 2 * TILE, shared_address(factors), sizeof(Factors));
    bulk_stores_wait();
    return record;
}

extern "C" __global__ __launch_bounds__(PREPARE, 3) void gated_delta_rule_chunk_prepare(
    unsigned char* work,                       // [slots, HV, 17408]
    const bf16* __restrict__ q,                // [N, HK, K]
    const bf16* __restrict__ k,                // [N, HK, K]
    const float* __restrict__ g,               // [N, HV]
    const bf16* __restrict__ beta,             // [N, HV]
    const long long* __restrict__ cu_seqlens,  // [S + 1]
    float eps,
    int S,
    int HK,
    int HV,
    int plant)
{
    extern __shared__ __align__(1024) unsigned char shared[];
    const Inputs x = {q, k, g, beta, cu_seqlens, eps, S, HK, HV, plant};
    prepare(x, work, shared, blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, 1, 2);
}

extern "C" __global__ __launch_bounds__(3 * PREPARE, 1) void gated_delta_rule_chunk_ahead(
    unsigned char* work,                       // [slots, HV, 17408]
    unsigned* ready,                           // [slots, HV]
    const bf16* __restrict__ q,                // [N, HK, K]
    const bf16* __restrict__ k,                // [N, HK, K]
    const float* __restrict__ g,               // [N, HV]
    const bf16* __restrict__ beta,             // [N, HV]
    const long long* __restrict__ cu_seqlens,  // [S + 1]
    float eps,
    int S,
    int HK,
    int HV,
    int plant)
{
    extern __shared__ __align__(1024) unsigned char shared[];
    let_next_start();
    const Inputs x = {q, k, g, beta, cu_seqlens, eps, S, HK, HV, plant};
    const unsigned pairs = (HV / HK + 1) / 2;
    // So many slots has a sequence, if all are as long.
    const unsigned slots = cu_seqlens[S] / CHUNK + S, each = (slots + S - 1) / S, jobs = each * S * HK * pairs;
    for (unsigned job = blockIdx.x * 3 + threadIdx.x / PREPARE; job < jobs; job += gridDim.x * 3) {
        const unsigned turn = job / (HK * pairs), slot = turn % S * each + turn / S;
        if (slots <= slot) continue;
        int me = threadIdx.x;
        asm volatile("" : "+r"(me));  // What follows from it is made anew for every chunk, rather than kept.
        const int third = me / PREPARE;
        const int stored = prepare(x, work, shared + third * SHARE, job % HK, slot, job / HK % pairs, me % PREPARE,
                                   1 + 3 * third, 2 + 3 * third);
        if (0 <= stored) bulk_stores_are_there(), tell_others(ready + stored, 2);
    }
}

const int STAGES = 3, STAGE = 4 * TILE + RECORD + TILE;
const int ANSWER_ROW = 144;  // a row of 128 bytes, apart in banks

extern "C" __global__ __launch_bounds__(384, 1) void gated_delta_rule_chunk_walk(
    bf16* __restrict__ o,                      // [N, HV, V]
    float* state_out,                          // [S, HV, K, V]
    const unsigned char* work,                 // [slots, HV, 17408]
    unsigned* ready,                           // [slots, HV]; counts that are zero before and after
    const bf16* __restrict__ q,                // [N, HK, K]
    const bf16* __restrict__ k,                // [N, HK, K]
    const bf16* __restrict__ v,                // [N, HV, V]
    const float* state_in,                     // [S, HV, K, V]
    const long long* __restrict__ cu_seqlens,  // [S + 1]
    int HK,
    int HV,
    int along,
    int plant)
{
    if (!along) wait_for_previous();
    extern __shared__ unsigned char shared[];
    __shared__ unsigned long long barriers[2 * STAGES + 2];
    const unsigned base = (shared_address(shared) + 1023) / 1024 * 1024, answers = base + STAGES * STAGE;
    const unsigned full = shared_address(barriers), empty = full + 8 * STAGES;
    const unsigned answered = empty + 8 * STAGES, taken = answered + 8;
    const int s = blockIdx.x / HV, h = blockIdx.x % HV, head = h / (HV / HK), column = blockIdx.y * 64;
    const long long begins = cu_seqlens[s], length = cu_seqlens[s + 1] - begins;
    const int all = (int)((length + CHUNK - 1) / CHUNK);

    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(full + 8 * i, 128 + 1);
            barrier_init(empty + 8 * i, 128);
        }
        barrier_init(answered, 128);
        barrier_init(taken, 128);
        barriers_are_there();
    }
    __syncthreads();

    if (threadIdx.x < 128) {
        registers_down<72>();
        const int thread = threadIdx.x, row = thread / 16, piece = thread % 16;
        const int row_v = thread / 8, piece_v = thread % 8;
        const size_t stride = (size_t)HK * DIM, stride_v = (size_t)HV * DIM;
        const size_t at = ((begins + row) * HK + head) * DIM + piece * 8;
        const size_t at_v = ((begins + row_v) * HV + h) * DIM + column + piece_v * 8;
        const bf16 *key = k + at, *query = q + at, *value = v + at_v;
        const unsigned to_key = base + piece / 8 * HALF + swizzled(row, piece % 8);
        const unsigned to_value = base + 4 * TILE + RECORD + swizzled(row_v, piece_v);
        // Answers leave when their chunk is done.
        int sent = 0;
        bf16* answer_to = o + at_v;
        const unsigned answer_at = answers + row_v * ANSWER_ROW + piece_v * 16;
        auto send = [&] {
            barrier_wait(answered, sent & 1);
            const long long left = length - (long long)sent * CHUNK;
            uint4 pieces[4];
#pragma unroll
            for (int j = 0; j < 4; j++) pieces[j] = shared_4(answer_at + j * 16 * ANSWER_ROW);
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (row_v + 16 * j < left) *(uint4*)(answer_to + j * 16 * stride_v) = pieces[j];
            arrive(taken);
            answer_to += CHUNK * stride_v, sent++;
        };
        int stage = 0, parity = 1;
        for (int i = 0; i < all; i++) {
            const long long left = length - (long long)i * CHUNK;
            const int rows = left < CHUNK ? (int)left : CHUNK, offset = stage * STAGE;
            barrier_wait(empty + 8 * stage, parity);
            copy_pieces<8>(to_key + offset, key, stride, row, rows);
            copy_pieces<8>(to_key + offset + TILE, query, stride, row, rows);
            copy_pieces<16>(to_value + offset, value, stride_v, row_v, rows);
            copies_end_group();
            key += CHUNK * stride, query += CHUNK * stride, value += CHUNK * stride_v;
            // The chunk before is told of, when this one has been asked for.
            if (0 < i) {
                copies_wait<1>();
                writes_to_async();
                arrive(full + 8 * (stage ? stage - 1 : STAGES - 1));
            }
            if (STAGES <= i) send();
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
        copies_wait<0>();
        writes_to_async();
        if (0 < all) arrive(full + 8 * (stage ? stage - 1 : STAGES - 1));
        while (sent < all) send();
        return;
    }

    // Records come as they are made.
    if (256 <= threadIdx.x) {
        registers_down<24>();
        if (288 <= threadIdx.x) return;
        const int lane = threadIdx.x % 32;
        const size_t first = (size_t)(begins / CHUNK + s) * HV + h;
        int stage = 0, parity = 1;
        for (int i = 0; i < all;) {
            const size_t own = first + (size_t)(i + lane) * HV;
            const int end = along ? i + wait_to_be_told(ready + own, i + lane < all) : all;
            for (; i < end; i++) {
                barrier_wait(empty + 8 * stage, parity);
                if (lane == 0) {
                    arrive_expecting(full + 8 * stage, RECORD);
                    const unsigned char* record = work + (first + (size_t)i * HV) * RECORD;
                    bulk_load(base + stage * STAGE + 4 * TILE, record, RECORD, full + 8 * stage);
                }
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
        }
        wait_for_previous();  // Who comes after this one comes after the one before, too.
        return;
    }

    registers_up<256>();
    // A warpgroup has 64 columns of the state, transposed: rows of a thread are columns `row` and row + 8 of
    // the state, and in a chunk of v and o; its columns are 8 b + c and the next, channels of k or tokens.
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int c = lane % 4 * 2, row = column + 16 * warp + lane / 4;
    const size_t own = (size_t)blockIdx.x * DIM * DIM + row;
    float state[64];
#pragma unroll
    for (int i = 0; i < 64; i++) {
        const int channel = i / 4 * 8 + c + i % 2;
        state[i] = plant == INITIAL_STATE_IGNORED ? 0 : state_in[own + channel * DIM + i / 2 % 2 * 8];
    }

    const unsigned put_at = answers + (lane / 16 * 8 + lane % 8) * ANSWER_ROW + (2 * warp + lane / 8 % 2) * 16;
    const unsigned own_pieces = swizzled(lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2);

    unsigned s16[32];
#pragma unroll
    for (int j = 0; j < 32; j++) s16[j] = packed(state[2 * j], state[2 * j + 1]);
    // All lanes have it, which the compiler is told, for descriptors.
    auto keys_of = [&](int stage) { return __shfl_sync(~0u, base + stage * STAGE, 0); };
    float x[32], answer[32];
    unsigned value[4][4];
    float2 said[8];
    // What a chunk asks of the state before it, for its keys and for its queries: begun.
    auto ask = [&](float (&y)[32], unsigned of) {
        const unsigned long long all = tile(of);
        wgmma_begin();
#pragma unroll
        for (int j = 0; j < 8; j++) wgmma_64(y, s16 + 4 * j, on(all, j / 4 * HALF + j % 4 * 32), j);
        wgmma_end_group();
    };
    // While that is under way, what its answer is taken from is fetched.
    auto meanwhile = [&](unsigned keys) {
        const unsigned factors = keys + 6 * TILE;
#pragma unroll
        for (int j = 0; j < 4; j++) load_transposed(value[j], keys + 4 * TILE + RECORD + own_pieces + j * 2048);
#pragma unroll
        for (int b = 0; b < 8; b++) said[b] = shared_2(factors + c * 4 + b * 32);
    };
    int stage = 0, parity = 0;
    if (0 < all) barrier_wait(full, 0);
    ask(x, keys_of(0)), ask(answer, keys_of(0) + TILE);
    if (0 < all) meanwhile(keys_of(0));
    wgmma_wait<0>();
    there(x), there(answer);
    for (int i = 0; i < all; i++) {
        const unsigned keys = keys_of(stage), t = keys + 4 * TILE, p = t + TILE;
        const unsigned asked_at = p + TILE + c * 4 + CHUNK * 4, kept_at = asked_at + CHUNK * 4;
        unsigned x16[16];
#pragma unroll
        for (int b = 0; b < 8; b++) {
            const unsigned low = value[b / 2][b % 2 * 2], high = value[b / 2][b % 2 * 2 + 1];
            x16[2 * b] = packed(first_of(low) - said[b].x * x[4 * b], second_of(low) - said[b].y * x[4 * b + 1]);
            x16[2 * b + 1] =
                packed(first_of(high) - said[b].x * x[4 * b + 2], second_of(high) - said[b].y * x[4 * b + 3]);
        }
        float d[32];
        wgmma_begin();
#pragma unroll
        for (int j = 0; j < 4; j++) wgmma_64(d, x16 + 4 * j, on(tile(t), j * 32), j);
        wgmma_end_group();
        float2 kept[8];
#pragma unroll
        for (int b = 0; b < 8; b++) kept[b] = shared_2(kept_at + b * 32);
#pragma unroll
        for (int b = 0; b < 8; b++) {
            const float2 asked = shared_2(asked_at + b * 32);
#pragma unroll
            for (int j = 0; j < 4; j++) answer[4 * b + j] *= j % 2 ? asked.y : asked.x;
        }

        const float decay = shared_2(p + TILE + 3 * CHUNK * 4).x;
        if (__any_sync(~0u, decay != 1))  // (so that their registers stay theirs)
#pragma unroll
            for (int j = 0; j < 64; j++) state[j] *= decay;
        unsigned d16[16], kept16[16];
        wgmma_wait<0>();
        there(d);
#pragma unroll
        for (int b = 0; b < 8; b++) {
            kept16[2 * b] = packed(kept[b].x * d[4 * b], kept[b].y * d[4 * b + 1]);
            kept16[2 * b + 1] = packed(kept[b].x * d[4 * b + 2], kept[b].y * d[4 * b + 3]);
        }
        wgmma_begin();
#pragma unroll
        for (int j = 0; j < 4; j++) wgmma_128<1>(state, kept16 + 4 * j, on(tile(keys, HALF), j * 2048), 1);
        wgmma_end_group();
#pragma unroll
        for (int j = 0; j < 16; j++) d16[j] = packed(d[2 * j], d[2 * j + 1]);
        wgmma_begin();
#pragma unroll
        for (int j = 0; j < 4; j++) wgmma_64(answer, d16 + 4 * j, on(tile(p), j * 32), 1);
        wgmma_end_group();
        const int before = stage;
        if (++stage == STAGES) stage = 0, parity ^= 1;
        const bool more = i + 1 < all;
        if (more) barrier_wait(full + 8 * stage, parity);
        wgmma_wait<1>();
        there(state);
        if (plant == STATE_IN_BF16)
#pragma unroll
            for (int j = 0; j < 64; j++) state[j] = rounded<bf16>(state[j]);
#pragma unroll
        for (int j = 0; j < 32; j++) s16[j] = packed(state[2 * j], state[2 * j + 1]);
        const unsigned next = keys_of(stage);
        ask(x, next);  // (behind the last one for nobody)

        // The answer leaves.
        wgmma_wait<1>();
        there(answer);
        arrive(empty + 8 * before);
        barrier_wait(taken, (i - 1) & 1);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float* y = answer + 8 * j;
            store_transposed(put_at + j * 16 * ANSWER_ROW, packed(y[0], y[1]), packed(y[2], y[3]), packed(y[4], y[5]),
                             packed(y[6], y[7]));
        }
        ask(answer, next + TILE);
        arrive(answered);
        if (more) meanwhile(next);
        wgmma_wait<0>();
        there(x), there(answer);
    }

#pragma unroll
    for (int i = 0; i < 64; i++) state_out[own + (i / 4 * 8 + c + i % 2) * DIM + i / 2 % 2 * 8] = state[i];
}
