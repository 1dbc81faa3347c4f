// Gated delta rule on sm_90a, K = V = 128: in chunks of 64 tokens on tensor cores, at once. What is computed is told
// in ../gated_delta_rule.cu, how in ../common/delta_chunk.cuh.
//
// gated_delta_rule_fused: a block has a head of a sequence. Of its warpgroups one loads, one makes T and factors
//     of a chunk, and two, which have half of the columns each, make P and walk the chunk before. Grid S x HV, 512
//     threads, 228352 bytes of dynamic shared memory; no memory between. For so many sequences that most
//     multiprocessors have a block; of fewer, gated_delta_rule.cu is faster. state_out may be state_in. Bits are
//     those of that file.

#include "common/delta_walk.cuh"

const int STAGES = 3, STAGE = 8 * TILE;  // keys and queries, values, T, P

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
    __shared__ unsigned long long barriers[5 * STAGES];
    const unsigned space = (1024 - shared_address(shared) % 1024) % 1024;
    unsigned char* const tiles = shared + space;
    const unsigned base = shared_address(tiles), answers = base + STAGES * STAGE;
    Factors* const factors = (Factors*)(tiles + STAGES * STAGE + 2 * TILE);
    unsigned char* const blocks = (unsigned char*)(factors + STAGES);
    Tokens* const tokens = (Tokens*)(blocks + BLOCKS);
    Logs* const logs = (Logs*)(tokens + STAGES);
    const unsigned full = shared_address(barriers), empty = full + 8 * STAGES;
    const unsigned known = empty + 8 * STAGES, scored = known + 8 * STAGES, ready = scored + 8 * STAGES;
    const int s = blockIdx.x / HV, h = blockIdx.x % HV, head = h / (HV / HK);
    const long long begins = cu_seqlens[s], length = cu_seqlens[s + 1] - begins;
    const int all = (int)((length + CHUNK - 1) / CHUNK);

    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(full + 8 * i, 128);
            barrier_init(empty + 8 * i, 256);
            barrier_init(known + 8 * i, 128);
            barrier_init(scored + 8 * i, 256);
            barrier_init(ready + 8 * i, 128);
        }
        barriers_are_there();
    }
    // Zeros above the diagonals of T and P, which stay.
    for (int i = 0; i < STAGES; i++)
        for (int at = threadIdx.x * 16; at < 2 * TILE; at += 512 * 16)
            store_4(base + i * STAGE + 6 * TILE + at, 0, 0, 0, 0);
    writes_to_async();
    __syncthreads();

    const int role = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    unsigned thread = threadIdx.x;
    asm volatile("" : "+r"(thread));  // It is kept, rather than asked for again.
    auto rows_of = [&](int i) {
        const long long left = length - (long long)i * CHUNK;
        return left < CHUNK ? (int)left : CHUNK;
    };
    if (role == 0) {
        registers_down<40>();
        int stage = 0, parity = 1;
        for (int i = 0; i < all; i++) {
            const unsigned me = anew(thread);
            const int rows = rows_of(i), row = me / 16, piece = me % 16;
            const size_t token = begins + (long long)i * CHUNK, stride = (size_t)HK * DIM, stride_v = (size_t)HV * DIM;
            const size_t at = (token + row) * stride + head * DIM + piece * 8;
            const size_t at_v = (token + row) * stride_v + h * DIM + piece * 8;
            const unsigned to = base + stage * STAGE + swizzled(row, piece % 8), to_key = to + piece / 8 * HALF;
            barrier_wait(empty + 8 * stage, parity);
            copy_pieces<8, 1>(to_key, k + at, stride, row, rows);
            copy_pieces<8, 1>(to_key + TILE, q + at, stride, row, rows);
            copy_pieces<8, 1>(to + (4 + piece / 8) * TILE, v + at_v, stride_v, row, rows);
            copies_end_group();
            unsigned told[2] = {};
            fetch(told, (const unsigned*)g + token * HV + h, beta + token * HV + h, HV, i, rows,
                  plant);
            tell(tokens[stage], told);
            copies_wait<0>();
            writes_to_async();
            float* const squares = tokens[stage].squares + row;
            sum_squares<8>(squares, squares, 8, to_key + TILE, 8 * 128, piece);
            some_wait(4, 128);
            if (me < CHUNK) derive(factors[stage], logs[stage], tokens[stage], me, rows, eps, plant);
            arrive(full + 8 * stage);
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
    } else if (role == 1) {
        registers_down<88>();
        if (all == 0) return;
        auto place_of = [&](int stage) {
            const unsigned keys = base + stage * STAGE;
            return Parts{keys, keys + 6 * TILE, factors + stage, blocks, tokens + stage, logs + stage};
        };
        float kk[32];
        int stage = 0, parity = 0, behind = STAGES - 1;
        for (int i = 0;; i++) {
            // The end of the chunk before, and the beginning of this one.
            const Parts before = place_of(behind), place = place_of(stage);
            const unsigned keys = __shfl_sync(~0u, place.keys, 0);  // Descriptors need no registers then.
            if (i < all) barrier_wait(full + 8 * stage, parity);
            begin_scores(kk, keys, keys);  // of the last for nobody
            if (0 < i) invert_32(before, thread);
            some_wait(1, 128);
            invert_64(before, thread, 0 < i, [&] {
                wgmma_wait<0>();
                there(kk);
                if (i < all) find_lengths(place, kk, thread, rows_of(i), eps, plant);
            });
            writes_to_async();
            if (i < all) arrive(known + 8 * stage);
            if (0 < i) arrive(ready + 8 * behind);
            if (i == all) break;
            behind = stage;
            if (++stage == STAGES) stage = 0, parity ^= 1;
            some_wait(1, 128);
            make_blocks(place, kk, thread);
            invert_diagonal(place, thread);
            some_wait(1, 128);
        }
    } else {
        registers_up<192>();
        const int group = role - 2;
        const size_t own = (size_t)blockIdx.x * DIM * DIM + group * 64 + 16 * warp + lane / 4;
        Walker walker;
        begin(walker, state_in + own, plant == INITIAL_STATE_IGNORED);

        // The answers of a chunk wait in shared memory until the next one is under way.
        const unsigned own_answers = answers + group * TILE;
        bf16* answers_to = o + ((begins + 16 * warp + lane / 8) * HV + h) * DIM + group * 64 + lane % 8 * 8;
        auto send = [&](int rows) {
            some_wait(2 + group, 128);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int row = 16 * warp + 4 * j + lane / 8;
                const uint4 piece = shared_4(own_answers + swizzled(row, lane % 8));
                if (row < rows) *(uint4*)(answers_to + (size_t)j * 4 * HV * DIM) = piece;
            }
            answers_to += (size_t)CHUNK * HV * DIM;
        };
        const unsigned own_pieces = swizzled(lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2);
        int stage = 0, parity = 0;
        for (int i = 0; i < all; i++) {
            const unsigned keys = base + stage * STAGE;
            {
                float qk[16];
                barrier_wait(full + 8 * stage, parity);
                begin_half(qk, keys + TILE, keys + group * 1024);
                barrier_wait(known + 8 * stage, parity);
                wgmma_wait<0>();
                there(qk);
                put_scores<4>(keys + 7 * TILE, logs[stage], qk, thread, group, plant);
                writes_to_async();
                __syncwarp();  // (else the compiler has too few registers)
                arrive(scored + 8 * stage);
            }
            float answer[32];
            narrow(walker);
            barrier_wait(ready + 8 * stage, parity);
            step(walker, answer, keys, keys + (4 + group) * TILE + own_pieces, keys + 6 * TILE,
                 shared_address(factors + stage), thread, plant, [&] { if (0 < i) send(CHUNK); },
                 [&] { barrier_wait(scored + 8 * stage, parity); });
            arrive(empty + 8 * stage);
            if (++stage == STAGES) stage = 0, parity ^= 1;
            some_wait(2 + group, 128);
            put_answer(own_answers + own_pieces, 2048, answer);
        }
        if (0 < all) send(rows_of(all - 1));
        end(walker, state_out + own);
    }
}
