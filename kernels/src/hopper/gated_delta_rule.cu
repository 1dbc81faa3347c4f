// Gated delta rule on sm_90a, K = V = 128: in chunks of 64 tokens on tensor cores. What is computed is told in
// ../gated_delta_rule.cu. In a chunk, with G the sum of gates from its first token on,
// D_ij = exp(G_i - G_j), S the state before it, and q and k normed:
//
//   A = strictly lower part of (beta K K') D,  T = (I + A)^-1 beta,  P = lower part of (Q K') D
//   X  = v - exp(G) (K S)             what the state before the chunk does not say
//   d  = T X                          what every token writes
//   o  = exp(G) (Q S) + P d
//   S <- exp(G_last) S + (exp(G_last - G) K)' d
//
// gated_delta_rule_chunk_prepare: T and P of every chunk, and factors of its tokens, all chunks at once. Grid
//     (HK, slots, ceil(HV / HK / 2)), 256 threads, 57344 bytes of dynamic shared memory; a slot is a chunk, and
//     there are 65535 at most. `work` takes slots * HV * 17408 bytes, aligned to 16.
// gated_delta_rule_chunk_walk: the states and answers, chunk after chunk. Grid (S x HV, 1) with 384 threads and
//     217088 bytes, or (S x HV, 2) with 256 threads and 184320 bytes, where S x HV is far below the number of
//     multiprocessors. state_out may be state_in.
//     Both take chunks [first, first + chunks) of every sequence; slots are then S * chunks. A long batch
//     is best cut so that the slots of a cut stay in the L2 cache; every cut but the first has state_out for
//     its state_in. With chunks = 0 they take all, and slots are N / 64 + S.
//
// Rounding: factors, norms, gates, A and every sum are f32 (the lengths of keys and all products summed by
// tensor cores); a decay is 2 to a difference of two sums of gates of the chunk. In f16: the operands that
// make (I + A)^-1 of its inverted blocks of 16, which are f32. In bf16: T and P; S, X, d and what is kept of d
// as operands. The state that is carried is f32. q, k and v are operands as they are stored.

#include "common/delta_rule.cuh"
#include "common/mma.cuh"

const int CHUNK = 64;
const int TILE = CHUNK * 128;        // bytes of 64 rows of 64 numbers
const int HALF = 2 * TILE;           // keys, queries, and the second halves of their columns
const int RECORD = 2 * TILE + 1024;  // T, P, and the factors of a chunk

// Factors of the tokens of a chunk, behind T and P. Rows behind the end of a sequence have zeros.
struct Factors {
    float said[CHUNK];    // exp(G) |k|^-1
    float asked[CHUNK];   // exp(G) |q|^-1 K^-1/2
    float kept[CHUNK];    // exp(G_last - G) |k|^-1
    float decay[CHUNK];   // exp(G_last), the first alone
};

// A piece of every BY-th row of a chunk, from `row` on.
template <int BY> __device__ inline void copy_pieces(unsigned to, const bf16* from, size_t stride, int row, int rows)
{
    if (rows == CHUNK)
#pragma unroll
        for (int i = 0; i < CHUNK / BY; i++) copy_16(to + i * BY * 128, from), from += BY * stride;
    else
#pragma unroll
        for (int i = 0; i < CHUNK / BY; i++) {
            const bool there = row + i * BY < rows;
            copy_16(to + i * BY * 128, there ? from : from - row * stride, there);
            if (there) from += BY * stride;
        }
}

// A lower triangle of 64x64 in 10 blocks of 16x16, row after row of blocks. Columns of a block are permuted
// by rows, in fours, so that lanes that read eight rows meet in no bank.
const int BLOCK = 256, TRIANGLE = 10 * BLOCK * 4;

__device__ inline int block_at(int i, int j) { return (i * (i + 1) / 2 + j) * BLOCK; }
__device__ inline int within(int i, int j) { return i * 16 + (j ^ (i & 6) * 2); }

// z += a b, blocks, by a warp, factors in f16; of z the sums are as mma has them.
__device__ inline void multiply(float (&z)[2][4], const unsigned (&a)[4], const float* b, int r, int c)
{
#pragma unroll
    for (int n = 0; n < 2; n++) {
        const int j = 8 * n + r, i = 2 * c;
        mma_f16(z[n], a, packed_f16(b[within(i, j)], b[within(i + 1, j)]),
                packed_f16(b[within(i + 8, j)], b[within(i + 9, j)]));
    }
}

__device__ inline void multiply(float (&z)[2][4], const float* a, const float* b, int r, int c)
{
    unsigned factor[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 x = *(const float2*)&a[within(r + i % 2 * 8, i / 2 * 8 + 2 * c)];
        factor[i] = packed_f16(x.x, x.y);
    }
    multiply(z, factor, b, r, c);
}

// The same, with sums for a.
__device__ inline void multiply(float (&y)[2][4], const float (&z)[2][4], const float* b, int r, int c)
{
    const unsigned factor[4] = {packed_f16(z[0][0], z[0][1]), packed_f16(z[0][2], z[0][3]),
                                packed_f16(z[1][0], z[1][1]), packed_f16(z[1][2], z[1][3])};
    multiply(y, factor, b, r, c);
}

__device__ inline void put_negative(float* to, const float (&y)[2][4], int r, int c)
{
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            *(float2*)&to[within(r + 8 * i, 8 * n + 2 * c)] = make_float2(-y[n][2 * i], -y[n][2 * i + 1]);
}

// The inverse of a lower triangle with ones on its diagonal, of which the part below stands in m (and zeros
// above, in the blocks of the diagonal), by a warpgroup.
__device__ inline void invert(float* m, int warp, int lane, int barrier)
{
    const int r = lane / 4, c = lane % 4;
    // Blocks of 16: a lane has a column, and goes down.
    if (lane < 16) {
        float* block = m + block_at(warp, warp);
        float x[16];
#pragma unroll
        for (int i = 0; i < 16; i++) {
            float even = i == lane, odd = 0;
#pragma unroll
            for (int j = 0; j < i; j += 4) {
                const float4 a = *(const float4*)&block[within(i, j)];
                even -= a.x * x[j];
                if (j + 1 < i) odd -= a.y * x[j + 1];
                if (j + 2 < i) even -= a.z * x[j + 2];
                if (j + 3 < i) odd -= a.w * x[j + 3];
            }
            x[i] = even + odd;
        }
        __syncwarp(0xffff);
#pragma unroll
        for (int i = 0; i < 16; i++) block[within(i, lane)] = x[i];
    }
    some_wait(barrier, 128);

    // [T1 0; -T2 A T1, T2], of 16 to 32.
    if (warp < 2) {
        float* a = m + block_at(2 * warp + 1, 2 * warp);
        float z[2][4] = {}, y[2][4] = {};
        multiply(z, m + block_at(2 * warp + 1, 2 * warp + 1), a, r, c);
        multiply(y, z, m + block_at(2 * warp, 2 * warp), r, c);
        __syncwarp();
        put_negative(a, y, r, c);
    }
    some_wait(barrier, 128);

    // And of 32 to 64: a warp has a block.
    const int i = 2 + warp / 2, j = warp % 2;
    float y[2][4] = {};
#pragma unroll
    for (int n = 0; n < 2; n++) {
        if (n < j) continue;
        float z[2][4] = {};
        multiply(z, m + block_at(i, 2), m + block_at(2, n), r, c);
        if (i == 3) multiply(z, m + block_at(3, 3), m + block_at(3, n), r, c);
        multiply(y, z, m + block_at(n, j), r, c);
    }
    some_wait(barrier, 128);
    put_negative(m + block_at(i, j), y, r, c);
    some_wait(barrier, 128);
}

// Sums of gates in units of log 2, of which exp takes differences. A gate below -104 leaves nothing.
__device__ inline void sum_gates(float* sums, float low, float high, int lane)
{
    const float unit = 1.44269504f;
    low = fmaxf(low, -104) * unit, high = fmaxf(high, -104) * unit;
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
        const float a = __shfl_up_sync(~0u, low, by), b = __shfl_up_sync(~0u, high, by);
        if (by <= lane) low += a, high += b;
    }
    sums[lane] = low;
    sums[lane + 32] = high + __shfl_sync(~0u, low, 31);
}

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
    Factors* const all_factors = (Factors*)(tiles + 4 * TILE + 2 * TRIANGLE);
    float *const norms = (float*)(all_factors + 2), *const pasts = norms + 2 * CHUNK;
    float* const all_sums = pasts + 2 * CHUNK;
    const unsigned base = shared_address(tiles);
    const int per = HV / HK, head = blockIdx.x, slot = blockIdx.y, pair = blockIdx.z;
    const int thread = threadIdx.x, group = thread / 128, warp = thread / 32 % 4, lane = thread % 32;

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

    // A warpgroup has a value head; one that is left over does the last again, for nobody.
    const bool mine = pair * 2 + group < per;
    const int h = head * per + (mine ? pair * 2 + group : per - 1), barrier = 1 + group;
    float *const sums = all_sums + group * CHUNK, *const write = sums + 2 * CHUNK;
    float gate[2] = {};
    if (warp == 0)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = lane + 32 * i;
            const bool is = row < rows;
            if (is) gate[i] = g[(begin + row) * HV + h];
            if (plant == GATE_OFF_BY_ONE && is) gate[i] = row + chunk == 0 ? 0 : g[(begin + row - 1) * HV + h];
            if (plant == DECAY_DROPPED_AT_EACH_CHUNK && row == 0) gate[i] = 0;
            write[row] = is ? load(beta[(begin + row) * HV + h]) : 0;
        }

    const unsigned keys = base, queries = base + TILE;
    const int row_copied = thread / 16, piece_copied = thread % 16;
    const unsigned to = keys + piece_copied / 8 * HALF + swizzled(row_copied, piece_copied % 8);
    const size_t stride = (size_t)HK * DIM, from = ((begin + row_copied) * HK + head) * DIM + piece_copied * 8;
    copy_pieces<16>(to, k + from, stride, row_copied, rows);
    copy_pieces<16>(to + TILE, q + from, stride, row_copied, rows);
    copies_end_group();
    if (warp == 0) sum_gates(sums, gate[0], gate[1], lane);
    copies_wait<0>();
    writes_to_async();
    __syncthreads();

    const unsigned long long key_tile = tile(keys), query_tile = tile(queries);
    float kk[32];
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int at = i / 4 * HALF + i % 4 * 32;
        wgmma_tiles(kk, on(key_tile, at), on(key_tile, at), i);
    }
    wgmma_end_group();

    // A quarter of a query each, its pieces in an order that no two lanes of eight share.
    float squares[2] = {};
    const unsigned char* quarter = tiles + TILE + thread % 2 * HALF + thread / 4 * 128;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int at = (i * 2 + thread / 2 % 2) ^ (thread / 4 % 2 * 2 + thread % 2 * 4);
        const uint4 piece = *(const uint4*)(quarter + at * 16);
        const unsigned pairs[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            squares[0] += first_of(pairs[j]) * first_of(pairs[j]);
            squares[1] += second_of(pairs[j]) * second_of(pairs[j]);
        }
    }
    float sum_of_squares = squares[0] + squares[1];
    sum_of_squares += __shfl_xor_sync(~0u, sum_of_squares, 1);
    sum_of_squares += __shfl_xor_sync(~0u, sum_of_squares, 2);
    if (thread % 4 == 0)
        norms[CHUNK + thread / 4] = thread / 4 < rows ? inverse_norm(sum_of_squares, eps, plant) : 0;

    // Of keys they stand on the diagonal.
    const int r = 16 * warp + lane / 4, c = lane % 4 * 2;
    wgmma_wait<0>();
    there(kk);
    if (group == 0 && lane % 4 == lane / 8) {
        float diagonal[2] = {};
#pragma unroll
        for (int b = 0; b < 8; b++)
            if (b / 2 == warp) diagonal[b % 2] = lane / 4 % 2 ? kk[4 * b + b % 2 * 2 + 1] : kk[4 * b + b % 2 * 2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = r + 8 * i;
            const float norm = row < rows ? inverse_norm(diagonal[i], eps, plant) : 0, log = log_of_two(norm);
            norms[row] = norm;
            pasts[row] = all_sums[row] - log, pasts[CHUNK + row] = all_sums[CHUNK + row] - log;
        }
    }
    __syncthreads();

    float* const m = (float*)(tiles + 4 * TILE + group * TRIANGLE);
    unsigned char* const image = tiles + group * 2 * TILE;
    Factors* const factors = all_factors + group;
    const float scale = plant == QUERY_NOT_SCALED ? 1 : 0.08838834764831845f;
    if (thread % 128 < CHUNK) {
        const int row = thread % 128;
        float before = sums[row];
        if (plant == PREDICTION_BEFORE_DECAY) before = row == 0 ? 0 : sums[row - 1];
        factors->said[row] = plant == NO_DELTA_RULE ? 0 : power_of_two(before) * norms[row];
        factors->asked[row] = power_of_two(sums[row]) * norms[CHUNK + row] * scale;
        factors->kept[row] = power_of_two(sums[CHUNK - 1] - sums[row]) * norms[row];
        if (row == 0) factors->decay[0] = power_of_two(sums[CHUNK - 1]);
    }

    // Rows of this thread: r and r + 8; columns 8 b + c and the next.
    const float* const past_of = pasts + group * CHUNK;
    float sum[2], scaled[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = r + 8 * i;
        sum[i] = sums[row], scaled[i] = norms[row];
        if (plant == PREDICTION_BEFORE_DECAY) sum[i] = row == 0 ? 0 : sums[row - 1];
        if (plant != BETA_ON_VALUE_ONLY) scaled[i] *= write[row];
        if (plant == NO_DELTA_RULE) scaled[i] = 0;
    }
#pragma unroll
    for (int b = 0; b < 8; b++) {
        float a[4] = {};
        if (b <= 2 * warp + 1) {
            const float2 past = *(const float2*)&past_of[8 * b + c];
#pragma unroll
            for (int i = 0; i < 4; i++)
                a[i] = kk[4 * b + i] * scaled[i / 2] *
                       power_of_two(sum[i / 2] - (i % 2 ? past.y : past.x));
            if (2 * warp <= b)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (r + i / 2 * 8 <= 8 * b + c + i % 2) a[i] = 0;
        }
        if (b <= 2 * warp + 1)
#pragma unroll
            for (int i = 0; i < 2; i++)
                *(float2*)&m[block_at(warp, b / 2) + within(lane / 4 + 8 * i, b % 2 * 8 + c)] =
                    make_float2(a[2 * i], a[2 * i + 1]);
    }
    float qk[32];
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int at = i / 4 * HALF + i % 4 * 32;
        wgmma_tiles(qk, on(query_tile, at), on(key_tile, at), i);
    }
    wgmma_end_group();
    some_wait(barrier, 128);
    invert(m, warp, lane, barrier);
    wgmma_wait<0>();
    there(qk);
    __syncthreads();  // Keys and queries have been read; their place is that of T and P.

    const int diagonal = plant == ANSWER_BEFORE_WRITE ? 0 : 1;
#pragma unroll
    for (int i = 0; i < 2; i++)
        sum[i] = sums[r + 8 * i] + log_of_two(norms[CHUNK + r + 8 * i] * scale);
#pragma unroll
    for (int b = 0; b < 8; b++) {
        float p[4] = {};
        if (b <= 2 * warp + 1) {
            const float2 past = *(const float2*)&past_of[8 * b + c];
#pragma unroll
            for (int i = 0; i < 4; i++)
                p[i] = qk[4 * b + i] * power_of_two(sum[i / 2] - (i % 2 ? past.y : past.x));
            if (2 * warp <= b)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (r + i / 2 * 8 + diagonal <= 8 * b + c + i % 2) p[i] = 0;
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
            *(unsigned*)(image + TILE + swizzled(r + 8 * i, b) + 2 * c) = packed(p[2 * i], p[2 * i + 1]);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = thread % 128 / 8 + 16 * i, piece = thread % 8;
        const float* x = &m[block_at(i, piece / 2)];
        const bool is = piece / 2 <= i;
        const float4 none = make_float4(0, 0, 0, 0);
        const float4 a = is ? *(const float4*)&x[within(row % 16, piece % 2 * 8)] : none;
        const float4 b = is ? *(const float4*)&x[within(row % 16, piece % 2 * 8 + 4)] : none;
        float4 e = *(const float4*)&write[8 * piece], f = *(const float4*)&write[8 * piece + 4];
        if (plant == BETA_ON_VALUE_ONLY) e = f = make_float4(1, 1, 1, 1);
        *(uint4*)(image + swizzled(row, piece)) =
            make_uint4(packed(a.x * e.x, a.y * e.y), packed(a.z * e.z, a.w * e.w), packed(b.x * f.x, b.y * f.y),
                       packed(b.z * f.z, b.w * f.w));
    }
    writes_to_async();
    some_wait(barrier, 128);
    if (mine && thread % 128 == 0) {
        unsigned char* to = work + ((size_t)slot * HV + h) * RECORD;
        bulk_store(to, shared_address(image), 2 * TILE);
        bulk_store(to + 2 * TILE, shared_address(factors), sizeof(Factors));
        bulk_stores_wait();
    }
}

const int STAGES = 3;

extern "C" __global__ __launch_bounds__(384, 1) void gated_delta_rule_chunk_walk(
    bf16* __restrict__ o,                      // [N, HV, V]
    float* state_out,                          // [S, HV, K, V]
    const unsigned char* __restrict__ work,    // [slots, HV, 17408]
    const bf16* __restrict__ q,                // [N, HK, K]
    const bf16* __restrict__ k,                // [N, HK, K]
    const bf16* __restrict__ v,                // [N, HV, V]
    const bf16* __restrict__ beta,             // [N, HV]
    const float* state_in,                     // [S, HV, K, V]
    const long long* __restrict__ cu_seqlens,  // [S + 1]
    int HK,
    int HV,
    int first,
    int chunks,
    int plant)
{
    extern __shared__ unsigned char shared[];
    __shared__ unsigned long long barriers[2 * STAGES];
    const unsigned base = (shared_address(shared) + 1023) / 1024 * 1024;
    const unsigned full = shared_address(barriers), empty = full + 8 * STAGES;
    const int groups = blockDim.x / 128 - 1, stage_bytes = 4 * TILE + RECORD + groups * TILE;
    const int s = blockIdx.x / HV, h = blockIdx.x % HV, head = h / (HV / HK);
    const long long begin = cu_seqlens[s], length = cu_seqlens[s + 1] - begin;
    const int all = (int)((length + CHUNK - 1) / CHUNK);
    const int to = chunks && first + chunks < all ? first + chunks : all;

    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(full + 8 * i, 128 + 1);
            barrier_init(empty + 8 * i, 4 * groups);
        }
        barriers_are_there();
    }
    __syncthreads();

    if (threadIdx.x < 128) {
        registers_down<40>();
        const int thread = threadIdx.x, row = thread / 16, piece = thread % 16;
        const int row_v = thread / 8, piece_v = thread % 8;
        const size_t stride = (size_t)HK * DIM, stride_v = (size_t)HV * DIM;
        const long long token = begin + (long long)first * CHUNK;
        const size_t at = ((token + row) * HK + head) * DIM + piece * 8;
        const bf16 *key = k + at, *query = q + at;
        const bf16* value = v + ((token + row_v) * HV + h) * DIM + blockIdx.y * groups * 64 + piece_v * 8;
        const long long slot = chunks ? (long long)s * chunks : begin / CHUNK + s + first;
        const unsigned char* record = work + ((size_t)slot * HV + h) * RECORD;
        const unsigned to_key = base + piece / 8 * HALF + swizzled(row, piece % 8);
        const unsigned to_value = base + 4 * TILE + RECORD + swizzled(row_v, piece_v);
        int stage = 0, parity = 1;
        for (int i = first; i < to; i++) {
            const long long left = length - (long long)i * CHUNK;
            const int rows = left < CHUNK ? (int)left : CHUNK, offset = stage * stage_bytes;
            barrier_wait(empty + 8 * stage, parity);
            if (thread == 0) {
                arrive_expecting(full + 8 * stage, RECORD);
                bulk_load(base + offset + 4 * TILE, record, RECORD, full + 8 * stage);
            }
            copy_pieces<8>(to_key + offset, key, stride, row, rows);
            copy_pieces<8>(to_key + offset + TILE, query, stride, row, rows);
            copy_pieces<16>(to_value + offset, value, stride_v, row_v, rows);
            if (groups == 2) copy_pieces<16>(to_value + offset + TILE, value + 64, stride_v, row_v, rows);
            copies_end_group();
            key += CHUNK * stride, query += CHUNK * stride, value += CHUNK * stride_v, record += (size_t)HV * RECORD;
            // The chunk before is told of, when this one has been asked for.
            if (first < i) {
                copies_wait<1>();
                writes_to_async();
                arrive(full + 8 * (stage ? stage - 1 : STAGES - 1));
            }
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
        copies_wait<0>();
        writes_to_async();
        if (first < to) arrive(full + 8 * (stage ? stage - 1 : STAGES - 1));
        return;
    }

    // A warpgroup has 64 columns of the state, transposed: rows of a thread are columns `row` and row + 8 of
    // the state, and in a chunk of v and o; its columns are 8 b + c and the next, channels of k or tokens.
    registers_up<232>();
    const int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int c = lane % 4 * 2, row = (blockIdx.y * groups + group) * 64 + 16 * warp + lane / 4;
    const size_t own = (size_t)blockIdx.x * DIM * DIM + row;
    float state[64];
#pragma unroll
    for (int i = 0; i < 64; i++) {
        const int channel = i / 4 * 8 + c + i % 2;
        state[i] = plant == INITIAL_STATE_IGNORED && first == 0 ? 0 : state_in[own + channel * DIM + i / 2 % 2 * 8];
    }

    // The answers of a chunk wait in shared memory until the next one is under way.
    const unsigned answers = base + STAGES * stage_bytes + group * TILE;
    bf16* answers_to = o + ((begin + (long long)first * CHUNK + lane / 2) * HV + h) * DIM +
                       (blockIdx.y * groups + group) * 64 + (2 * warp + lane % 2) * 8;
    uint4 leaving[4];
    auto take = [&] {
#pragma unroll
        for (int j = 0; j < 4; j++) leaving[j] = shared_4(answers + swizzled(16 * j + lane / 2, 2 * warp + lane % 2));
    };
    auto answer = [&](int rows) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (16 * j + lane / 2 < rows) *(uint4*)answers_to = leaving[j];
            answers_to += 16 * HV * DIM;
        }
    };
    const unsigned own_pieces = swizzled(lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2);

    unsigned s16[32];
#pragma unroll
    for (int j = 0; j < 32; j++) s16[j] = packed(state[2 * j], state[2 * j + 1]);
    int stage = 0, parity = 0;
    for (int i = first; i < to; i++) {
        const unsigned keys = base + stage * stage_bytes, t = keys + 4 * TILE, p = t + TILE;
        const unsigned values = t + RECORD + group * TILE + own_pieces;
        const unsigned said_at = p + TILE + c * 4, asked_at = said_at + CHUNK * 4, kept_at = asked_at + CHUNK * 4;
        barrier_wait(full + 8 * stage, parity);

        float x[32], answered[32];
        wgmma_begin();
#pragma unroll
        for (int j = 0; j < 8; j++) wgmma_64(x, s16 + 4 * j, tile(keys + j / 4 * HALF + j % 4 * 32), j);
        wgmma_end_group();

        // Meanwhile.
        if (first < i) take(), answer(CHUNK);
        const float decay = shared_2(p + TILE + 3 * CHUNK * 4).x;
#pragma unroll
        for (int j = 0; j < 64; j++) state[j] *= decay;
        unsigned value[4][4];
#pragma unroll
        for (int j = 0; j < 4; j++) load_transposed(value[j], values + j * 2048);
        float2 said[8], asked[8], kept[8];
#pragma unroll
        for (int b = 0; b < 8; b++) said[b] = shared_2(said_at + b * 32);

        unsigned x16[16];
        wgmma_wait<0>();
        there(x);
#pragma unroll
        for (int b = 0; b < 8; b++) {
            const unsigned low = value[b / 2][b % 2 * 2], high = value[b / 2][b % 2 * 2 + 1];
            float2 write = make_float2(1, 1);
            if (plant == BETA_ON_VALUE_ONLY) {
                const long long token = (long long)i * CHUNK + 8 * b + c;
                if (token < length) write.x = load(beta[(begin + token) * HV + h]);
                if (token + 1 < length) write.y = load(beta[(begin + token + 1) * HV + h]);
            }
            x16[2 * b] = packed(first_of(low) * write.x - said[b].x * x[4 * b],
                                second_of(low) * write.y - said[b].y * x[4 * b + 1]);
            x16[2 * b + 1] = packed(first_of(high) * write.x - said[b].x * x[4 * b + 2],
                                    second_of(high) * write.y - said[b].y * x[4 * b + 3]);
        }
        float d[32];
        wgmma_begin();
#pragma unroll
        for (int j = 0; j < 4; j++) wgmma_64(d, x16 + 4 * j, tile(t + j * 32), j);
        wgmma_end_group();
#pragma unroll
        for (int j = 0; j < 8; j++) wgmma_64(answered, s16 + 4 * j, tile(keys + TILE + j / 4 * HALF + j % 4 * 32), j);
        wgmma_end_group();
#pragma unroll
        for (int b = 0; b < 8; b++) kept[b] = shared_2(kept_at + b * 32);

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
        for (int j = 0; j < 4; j++) wgmma_128<1>(state, kept16 + 4 * j, tile(keys + j * 2048, HALF), 1);
        wgmma_end_group();
#pragma unroll
        for (int j = 0; j < 16; j++) d16[j] = packed(d[2 * j], d[2 * j + 1]);
#pragma unroll
        for (int b = 0; b < 8; b++) asked[b] = shared_2(asked_at + b * 32);
        wgmma_wait<1>();
        there(answered);
#pragma unroll
        for (int b = 0; b < 8; b++)
#pragma unroll
            for (int j = 0; j < 4; j++) answered[4 * b + j] *= j % 2 ? asked[b].y : asked[b].x;
        wgmma_begin();
#pragma unroll
        for (int j = 0; j < 4; j++) wgmma_64(answered, d16 + 4 * j, tile(p + j * 32), 1);
        wgmma_end_group();
        wgmma_wait<1>();
        there(state);
        if (plant == STATE_IN_BF16)
#pragma unroll
            for (int j = 0; j < 64; j++) state[j] = rounded<bf16>(state[j]);
#pragma unroll
        for (int j = 0; j < 32; j++) s16[j] = packed(state[2 * j], state[2 * j + 1]);
        wgmma_wait<0>();
        there(answered);
        if (lane == 0) arrive(empty + 8 * stage);
        if (++stage == STAGES) stage = 0, parity ^= 1;

#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float* y = answered + 8 * j;
            store_transposed(answers + own_pieces + j * 2048, packed(y[0], y[1]), packed(y[2], y[3]),
                             packed(y[4], y[5]), packed(y[6], y[7]));
        }
        __syncwarp();
    }
    const long long last = length - (long long)(to - 1) * CHUNK;
    if (first < to) take(), answer(last < CHUNK ? (int)last : CHUNK);

#pragma unroll
    for (int i = 0; i < 64; i++) state_out[own + (i / 4 * 8 + c + i % 2) * DIM + i / 2 % 2 * 8] = state[i];
}
