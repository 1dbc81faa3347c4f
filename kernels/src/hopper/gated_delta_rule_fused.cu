// Gated delta rule on sm_90a, K = V = 128: in chunks of 64 tokens on tensor cores, at once. What is computed is told
// in ../gated_delta_rule.cu, how in ../common/delta_chunk.cuh.
//
// gated_delta_rule_fused: a block has a head of a sequence. Of its warpgroups one loads, one makes T, P and factors
//     of a chunk, and two, which have half of the columns each, walk the chunk before. Grid S x HV, 512 threads,
//     208896 bytes of dynamic shared memory; no memory between. For so many sequences that most multiprocessors have
//     a block; of fewer, gated_delta_rule.cu is faster. state_out may be state_in. Bits are those of that file.

#include "common/delta_walk.cuh"

const int STAGES = 3, STAGE = 6 * TILE, RECORDS = 2;

extern "C" __global__ __launch_bounds__(512, 1) void gated_delta_rule_fused(
    bf16* __restrict__ o,                      // [N, HV, V]
    float* state_out,                          // [S, HV, K, V]
    const bf16* __restrict__ q,                // [N, HK, K]
    const bf16* __restrict__ k,                // [N, HK, K]
    const bf16* __restrict__ v,                // [N, HV, V]
    const float* __restrict__ g,               // [N, HV]
    const bf16* __restrict__ beta,             // [N, HV]
    const float* state_in,                     // [S, HV, K, V]
    const long long* __restrict__ cu_seqlens,  // [S + 1]
    float eps,
    int HK,
    int HV,
    int plant)
{
    extern __shared__ unsigned char shared[];
    __shared__ unsigned long long barriers[2 * STAGES + 2 * RECORDS];
    const unsigned space = (1024 - shared_address(shared) % 1024) % 1024;
    unsigned char* const tiles = shared + space;
    const unsigned base = shared_address(tiles), records = base + STAGES * STAGE;
    const unsigned answers = records + RECORDS * 2 * TILE;
    unsigned char* const after = tiles + STAGES * STAGE + RECORDS * 2 * TILE + 2 * TILE;
    Tokens* const tokens = (Tokens*)(after + RECORDS * sizeof(Factors) + BLOCKS);
    float* const pasts = (float*)(tokens + STAGES);
    const unsigned full = shared_address(barriers), empty = full + 8 * STAGES;
    const unsigned ready = empty + 8 * STAGES, read = ready + 8 * RECORDS;
    const int s = blockIdx.x / HV, h = blockIdx.x % HV, head = h / (HV / HK);
    const long long begins = cu_seqlens[s], length = cu_seqlens[s + 1] - begins;
    const int all = (int)((length + CHUNK - 1) / CHUNK);

    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(full + 8 * i, 128);
            barrier_init(empty + 8 * i, 12);
        }
        for (int i = 0; i < RECORDS; i++) {
            barrier_init(ready + 8 * i, 4);
            barrier_init(read + 8 * i, 8);
        }
        barriers_are_there();
    }
    __syncthreads();

    const int role = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    if (role == 0) {
        registers_down<40>();
        const int thread = threadIdx.x, row = thread / 16, piece = thread % 16;
        size_t stride = (size_t)HK * DIM, stride_v = (size_t)HV * DIM;
        const size_t at = ((begins + row) * HK + head) * DIM + piece * 8;
        const bf16 *key = k + at, *query = q + at, *value = v + ((begins + row) * HV + h) * DIM + piece * 8;
        const unsigned swizzle = swizzled(row, piece % 8);
        const unsigned to_key = base + piece / 8 * HALF + swizzle, to_value = base + (4 + piece / 8) * TILE + swizzle;
        int stage = 0, parity = 1;
        for (int i = 0; i < all; i++) {
            const long long left = length - (long long)i * CHUNK;
            const int rows = left < CHUNK ? (int)left : CHUNK, offset = stage * STAGE;
            barrier_wait(empty + 8 * stage, parity);
            asm volatile("" : "+l"(stride), "+l"(stride_v));  // Multiples of them are made anew, rather than kept.
            copy_pieces<8>(to_key + offset, key, stride, row, rows);
            copy_pieces<8>(to_key + offset + TILE, query, stride, row, rows);
            copy_pieces<8>(to_value + offset, value, stride_v, row, rows);
            copies_end_group();
            key += CHUNK * stride, query += CHUNK * stride, value += CHUNK * stride_v;
            const size_t of_head = (size_t)(begins + (long long)i * CHUNK) * HV + h;
            tell(tokens[stage], g + of_head, beta + of_head, HV, i, rows, plant);
            copies_wait<0>();
            writes_to_async();
            float* const squares = tokens[stage].squares + row;
            sum_squares<8>(squares, squares, 8, to_key + offset + TILE, 8 * 128, piece);
            arrive(full + 8 * stage);
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
    } else if (role == 1) {
        registers_down<88>();
        auto rows_of = [&](int i) {
            const long long left = length - (long long)i * CHUNK;
            return left < CHUNK ? (int)left : CHUNK;
        };
        if (all == 0) return;
        float kk[32];
        barrier_wait(full, 0);
        begin_scores(kk, base, base);
        int stage = 0, parity = 0, buffer = 0, turn = 0;
        for (int i = 0; i < all; i++) {
            const unsigned keys = base + stage * STAGE, record = records + buffer * 2 * TILE;
            const Place place = {keys, keys + TILE, record, record + TILE, (Factors*)after + buffer,
                                 after + RECORDS * sizeof(Factors), tokens + stage, pasts};
            barrier_wait(read + 8 * buffer, turn ^ 1);
            const int left = stage;
            if (++stage == STAGES) stage = 0, parity ^= 1;
            make_record(place, kk, rows_of(i), eps, 1, plant, [] {}, [&] {
                if (i + 1 < all) barrier_wait(full + 8 * stage, parity);
                begin_scores(kk, base + stage * STAGE, base + stage * STAGE);  // of the last for nobody
            });
            __syncwarp();
            if (lane == 0) arrive(ready + 8 * buffer), arrive(empty + 8 * left);
            if (++buffer == RECORDS) buffer = 0, turn ^= 1;
        }
        wgmma_wait<0>();
        there(kk);
    } else {
        registers_up<192>();
        const int group = role - 2;
        const size_t own = (size_t)blockIdx.x * DIM * DIM + group * 64 + 16 * warp + lane / 4;
        Walker walker;
        begin(walker, state_in + own, plant == INITIAL_STATE_IGNORED);

        // The answers of a chunk wait in shared memory until the next one is under way.
        const unsigned own_answers = answers + group * TILE;
        bf16* answers_to = o + ((begins + lane / 2) * HV + h) * DIM + group * 64 + (2 * warp + lane % 2) * 8;
        auto send = [&](int rows) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const uint4 piece = shared_4(own_answers + swizzled(16 * j + lane / 2, 2 * warp + lane % 2));
                if (16 * j + lane / 2 < rows) *(uint4*)answers_to = piece;
                answers_to += (size_t)16 * HV * DIM;
            }
        };
        const unsigned own_pieces = swizzled(lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2);
        int stage = 0, parity = 0, buffer = 0, turn = 0;
        for (int i = 0; i < all; i++) {
            const unsigned keys = base + stage * STAGE, record = records + buffer * 2 * TILE;
            const unsigned factors = shared_address(after) + buffer * sizeof(Factors);
            float answer[32];
            narrow(walker);
            barrier_wait(full + 8 * stage, parity);
            barrier_wait(ready + 8 * buffer, turn);
            step(walker, answer, keys, keys + (4 + group) * TILE + own_pieces, record, factors, plant, [&] {
                if (0 < i) send(CHUNK);
            });
            if (lane == 0) arrive(empty + 8 * stage), arrive(read + 8 * buffer);
            if (++stage == STAGES) stage = 0, parity ^= 1;
            if (++buffer == RECORDS) buffer = 0, turn ^= 1;
            put_answer(own_answers + own_pieces, 2048, answer);
            __syncwarp();
        }
        const long long last = length - (long long)(all - 1) * CHUNK;
        if (0 < all) send((int)last);
        end(walker, state_out + own);
    }
}
