// Gated delta rule on sm_90a, K = V = 128: in chunks of 64 tokens on tensor cores. What is computed is told in
// ../gated_delta_rule.cu, how in ../common/delta_chunk.cuh.
//
// gated_delta_rule_chunk_prepare: T and P of every chunk, and factors of its tokens, all chunks at once. Grid
//     (HK, slots, ceil(HV / HK / 2)), 256 threads, 66560 bytes of dynamic shared memory; a slot is a chunk, and
//     there are 65535 at most. `work` takes slots * HV * 17408 bytes, aligned to 16.
// gated_delta_rule_chunk_walk: the states and answers, chunk after chunk. Grid (S x HV, 2), 256 threads and 185344
//     bytes: heads have a block for half of their columns each, as few sequences leave multiprocessors without work
//     (of many, gated_delta_rule_fused.cu is faster). state_out may be state_in.
//     Both take chunks [first, first + chunks) of every sequence; slots are then S * chunks. Every cut but the first
//     has state_out for its state_in. With chunks = 0 they take all, and slots are N / 64 + S.

#include "common/delta_chunk.cuh"

extern "C" __global__ __launch_bounds__(256, 3) void gated_delta_rule_chunk_prepare(
    unsigned char* __restrict__ work,          // [slots, HV, 17408]
    const bf16* __restrict__ q,                // [N, HK, K]
    const bf16* __restrict__ k,                // [N, HK, K]
    const float* __restrict__ g,               // [N, HV]
    const bf16* __restrict__ beta,             // [N, HV]
    const long long* __restrict__ cu_seqlens,  // [S + 1]
    float eps,
    int S,
    int HK,
    int HV,
    int first,
    int chunks,
    int plant)
{
    extern __shared__ __align__(1024) unsigned char tiles[];
    const unsigned base = shared_address(tiles);
    const int per = HV / HK, head = blockIdx.x, slot = blockIdx.y, pair = blockIdx.z;
    const int thread = threadIdx.x, group = thread / 128;

    // The sequence and the chunk of the slot.
    int s = 0, chunk = first;
    if (chunks) {
        s = S == 1 ? 0 : slot / chunks, chunk += slot - s * chunks;
    } else {
        for (int end = S; 1 < end - s;) {
            const int middle = (s + end) / 2;
            if (cu_seqlens[middle] / CHUNK + middle <= slot) s = middle;
            else end = middle;
        }
        chunk = slot - (int)(cu_seqlens[s] / CHUNK) - s;
    }
    const long long begin = cu_seqlens[s] + (long long)chunk * CHUNK, left = cu_seqlens[s + 1] - begin;
    if (left <= 0) return;
    const int rows = left < CHUNK ? (int)left : CHUNK;

    const int row = thread / 16, piece = thread % 16;
    const unsigned to = base + piece / 8 * HALF + swizzled(row, piece % 8);
    const size_t stride = (size_t)HK * DIM, from = ((begin + row) * HK + head) * DIM + piece * 8;
    copy_pieces<16>(to, k + from, stride, row, rows);
    copy_pieces<16>(to + TILE, q + from, stride, row, rows);
    copies_end_group();

    // A warpgroup has a value head; one that is left over does the last again, for nobody.
    const bool mine = pair * 2 + group < per;
    const int h = head * per + (mine ? pair * 2 + group : per - 1);
    unsigned char* const after = tiles + 4 * TILE + 2 * TILE;
    Factors* const factors = (Factors*)after + group;
    unsigned char* const blocks = after + 2 * sizeof(Factors) + group * BLOCKS;
    Tokens* const tokens = (Tokens*)(after + 2 * sizeof(Factors) + 2 * BLOCKS);
    float* const pasts = (float*)(tokens + 2) + group * CHUNK;
    // P comes where queries were.
    const unsigned t = base + 4 * TILE + group * TILE, p = base + TILE + group * HALF;
    const Place place = {base, base + TILE, t, p, factors, blocks, tokens + group, pasts};
    const size_t of_head = (size_t)begin * HV + h;
    tell(tokens[group], g + of_head, beta + of_head, HV, chunk, rows, plant);
    copies_wait<0>();
    sum_squares<4>(tokens[0].squares + row, tokens[1].squares + row, 16, to + TILE, 16 * 128, piece);
    writes_to_async();
    __syncthreads();
    float kk[32];
    begin_scores(kk, base, base);
    make_record(place, kk, rows, eps, 1 + group, plant, [] { __syncthreads(); }, [] {});
    some_wait(1 + group, 128);
    if (mine && thread % 128 == 0) {
        unsigned char* to = work + ((size_t)slot * HV + h) * RECORD;
        bulk_store(to, t, TILE);
        bulk_store(to + TILE, p, TILE);
        bulk_store(to + 2 * TILE, shared_address(factors), sizeof(Factors));
        bulk_stores_wait();
    }
}

const int STAGES = 3, STAGE = 4 * TILE + RECORD + TILE;
const int ANSWER_ROW = 144;  // a row of 128 bytes, apart in banks

extern "C" __global__ __launch_bounds__(256, 1) void gated_delta_rule_chunk_walk(
    bf16* __restrict__ o,                      // [N, HV, V]
    float* state_out,                          // [S, HV, K, V]
    const unsigned char* __restrict__ work,    // [slots, HV, 17408]
    const bf16* __restrict__ q,                // [N, HK, K]
    const bf16* __restrict__ k,                // [N, HK, K]
    const bf16* __restrict__ v,                // [N, HV, V]
    const float* state_in,                     // [S, HV, K, V]
    const long long* __restrict__ cu_seqlens,  // [S + 1]
    int HK,
    int HV,
    int first,
    int chunks,
    int plant)
{
    extern __shared__ unsigned char shared[];
    __shared__ unsigned long long barriers[2 * STAGES + 2];
    const unsigned base = (shared_address(shared) + 1023) / 1024 * 1024, answers = base + STAGES * STAGE;
    const unsigned full = shared_address(barriers), empty = full + 8 * STAGES;
    const unsigned answered = empty + 8 * STAGES, taken = answered + 8;
    const int s = blockIdx.x / HV, h = blockIdx.x % HV, head = h / (HV / HK), column = blockIdx.y * 64;
    const long long begins = cu_seqlens[s], length = cu_seqlens[s + 1] - begins;
    const int all = (int)((length + CHUNK - 1) / CHUNK);
    const int to = chunks && first + chunks < all ? first + chunks : all;

    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(full + 8 * i, 128 + 1);
            barrier_init(empty + 8 * i, 4);
        }
        barrier_init(answered, 4);
        barrier_init(taken, 128);
        barriers_are_there();
    }
    __syncthreads();

    if (threadIdx.x < 128) {
        const int thread = threadIdx.x, row = thread / 16, piece = thread % 16;
        const int row_v = thread / 8, piece_v = thread % 8;
        const size_t stride = (size_t)HK * DIM, stride_v = (size_t)HV * DIM;
        const long long token = begins + (long long)first * CHUNK;
        const size_t at = ((token + row) * HK + head) * DIM + piece * 8;
        const size_t at_v = ((token + row_v) * HV + h) * DIM + column + piece_v * 8;
        const bf16 *key = k + at, *query = q + at, *value = v + at_v;
        const long long slot = chunks ? (long long)s * chunks : begins / CHUNK + s + first;
        const unsigned char* record = work + ((size_t)slot * HV + h) * RECORD;
        const unsigned to_key = base + piece / 8 * HALF + swizzled(row, piece % 8);
        const unsigned to_value = base + 4 * TILE + RECORD + swizzled(row_v, piece_v);
        // Answers leave when their chunk is done.
        int sent = first;
        bf16* answer_to = o + at_v;
        const unsigned answer_at = answers + row_v * ANSWER_ROW + piece_v * 16;
        auto send = [&] {
            barrier_wait(answered, (sent - first) & 1);
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
        for (int i = first; i < to; i++) {
            const long long left = length - (long long)i * CHUNK;
            const int rows = left < CHUNK ? (int)left : CHUNK, offset = stage * STAGE;
            barrier_wait(empty + 8 * stage, parity);
            if (thread == 0) {
                arrive_expecting(full + 8 * stage, RECORD);
                bulk_load(base + offset + 4 * TILE, record, RECORD, full + 8 * stage);
            }
            copy_pieces<8>(to_key + offset, key, stride, row, rows);
            copy_pieces<8>(to_key + offset + TILE, query, stride, row, rows);
            copy_pieces<16>(to_value + offset, value, stride_v, row_v, rows);
            copies_end_group();
            key += CHUNK * stride, query += CHUNK * stride, value += CHUNK * stride_v, record += (size_t)HV * RECORD;
            // The chunk before is told of, when this one has been asked for.
            if (first < i) {
                copies_wait<1>();
                writes_to_async();
                arrive(full + 8 * (stage ? stage - 1 : STAGES - 1));
            }
            if (first + STAGES <= i) send();
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
        copies_wait<0>();
        writes_to_async();
        if (first < to) arrive(full + 8 * (stage ? stage - 1 : STAGES - 1));
        while (sent < to) send();
        return;
    }

    // A warpgroup has 64 columns of the state, transposed: rows of a thread are columns `row` and row + 8 of
    // the state, and in a chunk of v and o; its columns are 8 b + c and the next, channels of k or tokens.
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int c = lane % 4 * 2, row = column + 16 * warp + lane / 4;
    const size_t own = (size_t)blockIdx.x * DIM * DIM + row;
    float state[64];
#pragma unroll
    for (int i = 0; i < 64; i++) {
        const int channel = i / 4 * 8 + c + i % 2;
        state[i] = plant == INITIAL_STATE_IGNORED && first == 0 ? 0 : state_in[own + channel * DIM + i / 2 % 2 * 8];
    }

    const unsigned put_at = answers + (lane / 16 * 8 + lane % 8) * ANSWER_ROW + (2 * warp + lane / 8 % 2) * 16;
    const unsigned own_pieces = swizzled(lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2);

    unsigned s16[32];
#pragma unroll
    for (int j = 0; j < 32; j++) s16[j] = packed(state[2 * j], state[2 * j + 1]);
    int stage = 0, parity = 0;
    for (int i = first; i < to; i++) {
        // All lanes have it, which the compiler is told, for descriptors.
        const unsigned keys = __shfl_sync(~0u, base + stage * STAGE, 0), t = keys + 4 * TILE, p = t + TILE;
        const unsigned values = t + RECORD + own_pieces;
        const unsigned said_at = p + TILE + c * 4, asked_at = said_at + CHUNK * 4, kept_at = asked_at + CHUNK * 4;
        barrier_wait(full + 8 * stage, parity);

        const float decay = shared_2(p + TILE + 3 * CHUNK * 4).x;
        unsigned value[4][4];
#pragma unroll
        for (int j = 0; j < 4; j++) load_transposed(value[j], values + j * 2048);
        float2 said[8], asked[8], kept[8];
#pragma unroll
        for (int b = 0; b < 8; b++) said[b] = shared_2(said_at + b * 32);

        const unsigned long long key_tile = tile(keys), query_tile = on(key_tile, TILE);
        float x[32], answer[32];
        wgmma_begin();
#pragma unroll
        for (int j = 0; j < 8; j++) wgmma_64(x, s16 + 4 * j, on(key_tile, j / 4 * HALF + j % 4 * 32), j);
        wgmma_end_group();
        if (__any_sync(~0u, decay != 1))  // (so that their registers stay theirs)
#pragma unroll
            for (int j = 0; j < 64; j++) state[j] *= decay;

        unsigned x16[16];
        wgmma_wait<0>();
        there(x);
#pragma unroll
        for (int b = 0; b < 8; b++) {
            const unsigned low = value[b / 2][b % 2 * 2], high = value[b / 2][b % 2 * 2 + 1];
            x16[2 * b] = packed(first_of(low) - said[b].x * x[4 * b], second_of(low) - said[b].y * x[4 * b + 1]);
            x16[2 * b + 1] =
                packed(first_of(high) - said[b].x * x[4 * b + 2], second_of(high) - said[b].y * x[4 * b + 3]);
        }
#pragma unroll
        for (int b = 0; b < 8; b++) kept[b] = shared_2(kept_at + b * 32), asked[b] = shared_2(asked_at + b * 32);
        float d[32];
        wgmma_begin();
#pragma unroll
        for (int j = 0; j < 4; j++) wgmma_64(d, x16 + 4 * j, on(tile(t), j * 32), j);
        wgmma_end_group();
#pragma unroll
        for (int j = 0; j < 8; j++) wgmma_64(answer, s16 + 4 * j, on(query_tile, j / 4 * HALF + j % 4 * 32), j);
        wgmma_end_group();

        unsigned d16[16], kept16[16];
        wgmma_wait<1>();
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
        wgmma_wait<1>();
        there(answer);
#pragma unroll
        for (int b = 0; b < 8; b++)
#pragma unroll
            for (int j = 0; j < 4; j++) answer[4 * b + j] *= j % 2 ? asked[b].y : asked[b].x;
        wgmma_begin();
#pragma unroll
        for (int j = 0; j < 4; j++) wgmma_64(answer, d16 + 4 * j, on(tile(p), j * 32), 1);
        wgmma_end_group();
        wgmma_wait<1>();
        there(state);
        if (plant == STATE_IN_BF16)
#pragma unroll
            for (int j = 0; j < 64; j++) state[j] = rounded<bf16>(state[j]);
#pragma unroll
        for (int j = 0; j < 32; j++) s16[j] = packed(state[2 * j], state[2 * j + 1]);
        wgmma_wait<0>();
        there(answer);
        if (lane == 0) arrive(empty + 8 * stage);
        if (++stage == STAGES) stage = 0, parity ^= 1;

        barrier_wait(taken, (i - first - 1) & 1);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float* y = answer + 8 * j;
            store_transposed(put_at + j * 16 * ANSWER_ROW, packed(y[0], y[1]), packed(y[2], y[3]), packed(y[4], y[5]),
                             packed(y[6], y[7]));
        }
        __syncwarp();
        if (lane == 0) arrive(answered);
    }

#pragma unroll
    for (int i = 0; i < 64; i++) state_out[own + (i / 4 * 8 + c + i % 2) * DIM + i / 2 % 2 * 8] = state[i];
}
