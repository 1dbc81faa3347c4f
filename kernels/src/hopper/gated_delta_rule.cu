// Gated delta rule on sm_90a, K = V = 128: in chunks of 64 tokens on tensor cores. What is computed is told in
// ../gated_delta_rule.cu, how in ../common/delta_chunk.cuh.
//
// gated_delta_rule_chunk_prepare: T and P of every chunk, and factors of its tokens, all chunks at once. Grid
//     (HK, slots, ceil(HV / HK / 2)), 256 threads, 68608 bytes of dynamic shared memory; a slot is a chunk, and
//     there are 65535 at most. `work` takes slots * HV * 17408 bytes, aligned to 16.
// gated_delta_rule_chunk_walk: the states and answers, chunk after chunk. Grid (S x HV, 2), 256 threads and 185344
//     bytes: heads have a block for half of their columns each, as few sequences leave multiprocessors without work
//     (of many, gated_delta_rule_fused.cu is faster). state_out may be state_in.
//     Both take chunks [first, first + chunks) of every sequence; slots are then S * chunks. Every cut but the first
//     has state_out for its state_in. With chunks = 0 they take all, and slots are N / 64 + S.

#include "common/delta_walk.cuh"

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
    const size_t first_of_head = (size_t)begin * HV + h;
    const Gates gates = gates_of(g + first_of_head, beta + first_of_head, HV, chunk, rows, plant);
    unsigned char* const after = tiles + 4 * TILE + 2 * TILE;
    Factors* const factors = (Factors*)after + group;
    unsigned char* const blocks = after + 2 * sizeof(Factors) + group * BLOCKS;
    float* const floats = (float*)(after + 2 * sizeof(Factors) + 2 * BLOCKS) + group * 2 * CHUNK;
    // P comes where queries were.
    const unsigned t = base + 4 * TILE + group * TILE, p = base + TILE + group * HALF;
    const Place place = {base, base + TILE, t, p, factors, blocks, floats, floats + CHUNK};
    copies_wait<0>();
    writes_to_async();
    __syncthreads();
    make_record(place, gates, rows, eps, 1 + group, plant, [] { __syncthreads(); });
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
const int ANSWER_ROW = 144, ANSWERS = CHUNK * ANSWER_ROW;  // a row of 128 bytes, apart in banks

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

    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const size_t own = (size_t)blockIdx.x * DIM * DIM + column + 16 * warp + lane / 4;
    Walker walker;
    begin(walker, state_in + own, plant == INITIAL_STATE_IGNORED && first == 0);

    const unsigned put_at = answers + (lane / 16 * 8 + lane % 8) * ANSWER_ROW + (2 * warp + lane / 8 % 2) * 16;
    const unsigned own_pieces = 4 * TILE + RECORD + swizzled(lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2);
    int stage = 0, parity = 0;
    for (int i = first; i < to; i++) {
        const unsigned keys = base + stage * STAGE;
        float answer[32];
        barrier_wait(full + 8 * stage, parity);
        step<1>(walker, answer, keys, keys + own_pieces, keys + 4 * TILE, keys + 6 * TILE, plant, [] {});
        if (lane == 0) arrive(empty + 8 * stage);
        if (++stage == STAGES) stage = 0, parity ^= 1;
        barrier_wait(taken, (i - first - 1) & 1);
        put_answer(put_at, 16 * ANSWER_ROW, answer);
        __syncwarp();
        if (lane == 0) arrive(answered);
    }
    end(walker, state_out + own);
}
