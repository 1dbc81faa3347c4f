// Gated delta rule on sm_90a, K = V = 128: in chunks of 64 tokens on tensor cores, at once. What is computed is told
// in ../gated_delta_rule.cu, how in ../common/delta_chunk.cuh.
//
// gated_delta_rule_fused: a block has a head of a sequence. Of its warpgroups one loads, one makes T, P and factors
//     of a chunk while the two others, which have half of the columns each, walk the chunk before. Grid S x HV, 512
//     threads, 219136 bytes of dynamic shared memory; no memory between. For so many sequences that all
//     multiprocessors have a block; of fewer, gated_delta_rule.cu is faster. state_out may be state_in.

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
    float* const floats = (float*)(after + RECORDS * sizeof(Factors) + BLOCKS);  // pasts, and writes twice
    float* const squares = floats + 3 * CHUNK;                                  // of keys and queries, for each stage
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
        registers_down<32>();
        const int thread = threadIdx.x, row = thread / 16, piece = thread % 16;
        size_t stride = (size_t)HK * DIM, stride_v = (size_t)HV * DIM;
        const size_t at = ((begins + row) * HK + head) * DIM + piece * 8;
        const bf16 *key = k + at, *query = q + at, *value = v + ((begins + row) * HV + h) * DIM + piece * 8;
        const unsigned swizzle = swizzled(row, piece % 8);
        const unsigned to_key = base + piece / 8 * HALF + swizzle, to_value = base + (4 + piece / 8) * TILE + swizzle;
        // Squares of the rows of this thread, whose lanes are 16: of what they add, each keeps a half, three times.
        auto measure = [&](unsigned from, float* to) {
            float x[8];
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const uint4 y = shared_4(from + j * 1024);
                x[j] = first_of(y.x) * first_of(y.x) + second_of(y.x) * second_of(y.x);
                x[j] += first_of(y.y) * first_of(y.y) + second_of(y.y) * second_of(y.y);
                x[j] += first_of(y.z) * first_of(y.z) + second_of(y.z) * second_of(y.z);
                x[j] += first_of(y.w) * first_of(y.w) + second_of(y.w) * second_of(y.w);
            }
            int of = 0;
#pragma unroll
            for (int many = 4; 0 < many; many /= 2) {
                const bool upper = piece & 2 * many;
                of += upper ? many : 0;
#pragma unroll
                for (int j = 0; j < many; j++) {
                    const float mine = upper ? x[j + many] : x[j], other = upper ? x[j] : x[j + many];
                    x[j] = mine + __shfl_xor_sync(~0u, other, 2 * many);
                }
            }
            x[0] += __shfl_xor_sync(~0u, x[0], 1);
            if (piece % 2 == 0) to[row + 8 * of] = x[0];
        };
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
            copies_wait<0>();
            writes_to_async();
            measure(to_key + offset, squares + stage * 2 * CHUNK);
            measure(to_key + offset + TILE, squares + stage * 2 * CHUNK + CHUNK);
            arrive(full + 8 * stage);
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
    } else if (role == 1) {
        registers_down<96>();
        auto rows_of = [&](int i) {
            const long long left = length - (long long)i * CHUNK;
            return left < CHUNK ? (int)left : CHUNK;
        };
        auto gates_at = [&](int i) {
            const size_t at = (size_t)(begins + (long long)i * CHUNK) * HV + h;
            return gates_of(g + at, beta + at, HV, i, rows_of(i), plant);
        };
        if (all == 0) return;
        Gates gates = gates_at(0);
        float kk[32];
        barrier_wait(full, 0);
        begin_scores(kk, base, base);
        int stage = 0, parity = 0;
        for (int i = 0; i < all; i++) {
            const int buffer = i % RECORDS;
            const unsigned keys = base + stage * STAGE, record = records + buffer * 2 * TILE;
            const Place place = {keys, keys + TILE, record, record + TILE, (Factors*)after + buffer,
                                 after + RECORDS * sizeof(Factors), floats, floats + (1 + buffer) * CHUNK};
            float key[2], query[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const float* of_row = squares + stage * 2 * CHUNK + 16 * warp + lane / 4 + 8 * j;
                key[j] = of_row[0], query[j] = of_row[CHUNK];
            }
            barrier_wait(read + 8 * buffer, i / RECORDS % 2 ^ 1);
            make_record(place, kk, key, query, gates, rows_of(i), eps, 1, plant, [&] {
                if (lane == 0) arrive(empty + 8 * stage);
                if (i + 1 < all) gates = gates_at(i + 1);
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }, [&] {
                if (i + 1 < all) barrier_wait(full + 8 * stage, parity);
                begin_scores(kk, base + stage * STAGE, base + stage * STAGE);  // of the last for nobody
            });
            __syncwarp();
            if (lane == 0) arrive(ready + 8 * buffer);
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
        int stage = 0, parity = 0;
        for (int i = 0; i < all; i++) {
            const int buffer = i % RECORDS;
            const unsigned keys = base + stage * STAGE, record = records + buffer * 2 * TILE;
            const unsigned factors = shared_address(after) + buffer * sizeof(Factors);
            float answer[32];
            narrow(walker);
            barrier_wait(full + 8 * stage, parity);
            barrier_wait(ready + 8 * buffer, i / RECORDS % 2);
            step<0>(walker, answer, keys, keys + (4 + group) * TILE + own_pieces, record, factors, plant, [&] {
                if (0 < i) send(CHUNK);
            });
            if (lane == 0) arrive(empty + 8 * stage), arrive(read + 8 * buffer);
            if (++stage == STAGES) stage = 0, parity ^= 1;
            put_answer(own_answers + own_pieces, 2048, answer);
            __syncwarp();
        }
        const long long last = length - (long long)(all - 1) * CHUNK;
        if (0 < all) send((int)last);
        end(walker, state_out + own);
    }
}
