#include "common/delta_rule.cuh"
#include "common/mma.cuh"

// The gated delta rule for the model's channels in chunks of 64 tokens, on tensor cores of sm_90a. In a chunk,
// with G the sum of gates from its first token on, D_ij = exp(G_i - G_j), S the state before it, and q and k
// normed:
//
//   A = strictly lower part of (beta K K') D,  T = (I + A)^-1 beta,  P = lower part of (Q K') D
//   X  = v - exp(G) (K S)             what the state before the chunk does not say
//   d  = T X                          what every token writes
//   o  = exp(G) (Q S) + P d
//   S <- exp(G_last) S + (exp(G_last - G) K)' d
//
// Rounding: factors, norms, gates, A and every sum are f32 (the lengths of keys and queries and all products
// summed by tensor cores); a decay is 2 to a difference of two sums of gates of the chunk. In f16: the operands
// that make (I + A)^-1 of its inverted blocks of 16, which are f32. In bf16: T and P; S, X, d and what is kept
// of d as operands. The state that is carried is f32. q, k and v are operands as they are stored.

const int CHUNK = 64;
const int TILE = CHUNK * 128;        // bytes of 64 rows of 64 numbers
const int HALF = 2 * TILE;           // keys, queries, and the second halves of their columns
const int RECORD = 2 * TILE + 1024;  // T, P, and the factors of a chunk

// Factors of the tokens of a chunk, behind T and P. Rows behind the end of a sequence have zeros.
struct Factors {
    float said[CHUNK];    // exp(G) |k|^-1
    float asked[CHUNK];   // exp(G) |q|^-1 K^-1/2
    float kept[CHUNK];    // exp(G_last - G) |k|^-1
    float decay[CHUNK];   // exp(G_last)
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

// Blocks of 16x16 of the lower triangle of A, and of its inverse in their place: on the diagonal in f32, transposed
// and in rows of 20 so that lanes meet in no bank; below it, and of the inverse, in f16.
const int DIAGONAL = 16 * 20 * 4, BLOCK = 16 * 16 * 2, BLOCKS = 4 * DIAGONAL + 6 * BLOCK;

__device__ inline unsigned block_at(int i, int j)
{
    return i == j ? i * DIAGONAL : 4 * DIAGONAL + (i * (i - 1) / 2 + j) * BLOCK;
}

// Gates and writes of a chunk, as lanes of every warp of four hold them.
struct Gates {
    float low, high;  // of rows lane and lane + 32
    float write;      // beta of row lane % 16 of those of the warp
};

// Those of a chunk of so many rows, whose gates and betas of a head begin there.
__device__ inline Gates gates_of(const float* g, const bf16* beta, int HV, int number, int rows, int plant)
{
    const int lane = threadIdx.x % 32, of_warp = threadIdx.x / 32 % 4 * 16 + lane % 16;
    const int back = plant == GATE_OFF_BY_ONE, from = number == 0 ? back : 0;
    const int forgotten = plant == DECAY_DROPPED_AT_EACH_CHUNK;
    float gate[2] = {}, write = 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = lane + 32 * i;
        if (max(from, forgotten) <= row && row < rows) gate[i] = g[(row - back) * HV];
    }
    if (of_warp < rows) write = load(beta[of_warp * HV]);
    return {gate[0], gate[1], write};
}

// A block of 16x16 as a factor, or as four of 8x8 to be stored.
__device__ inline void signed_f16(unsigned (&to)[4], const float (&y)[2][4], float sign)
{
#pragma unroll
    for (int i = 0; i < 4; i++) to[i] = packed_f16(sign * y[i / 2][i % 2 * 2], sign * y[i / 2][i % 2 * 2 + 1]);
}

__device__ inline void multiply(float (&z)[2][4], const unsigned (&a)[4], const unsigned (&b)[4])
{
    mma_f16(z[0], a, b[0], b[1]), mma_f16(z[1], a, b[2], b[3]);
}

// A row of the inverse of I + a block of the diagonal, from its end on: t (I + A) is a row of I.
__device__ inline void invert_row(float (&t)[16], const float* block, int row)
{
#pragma unroll
    for (int j = 15; 0 <= j; j--) {
        float even = j == row, odd = 0;
#pragma unroll
        for (int k = 12; (j + 1) / 4 * 4 <= k; k -= 4) {
            const float4 a = *(const float4*)&block[j * 20 + k];
            odd -= a.w * t[k + 3];
            if (j < k + 2) even -= a.z * t[k + 2];
            if (j < k + 1) odd -= a.y * t[k + 1];
            if (j < k) even -= a.x * t[k];
        }
        t[j] = even + odd;
    }
}

// Where a warpgroup makes the record of a chunk.
struct Place {
    unsigned keys, queries;   // tiles
    unsigned t, p;            // tiles of T and P
    Factors* factors;
    unsigned char* blocks;    // of A and its inverse
    float *pasts, *writes;    // of every token; the next chunk has others
};

// T, P and the factors of a chunk, by a warpgroup, whose barrier it is. Queries are read no more when `asked` is
// called, all rows of T and P are there for reads by wgmma and bulk copies when all threads have come back.
template <class Asked>
__device__ inline void make_record(const Place& at, Gates gates, int rows, float eps, int barrier, int plant, Asked asked)
{
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4 * 2;
    const unsigned long long key_tile = tile(at.keys), query_tile = tile(at.queries);
    float kk[32];
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int part = i / 4 * HALF + i % 4 * 32;
        wgmma_tiles(kk, on(key_tile, part), on(key_tile, part), i);
    }
    wgmma_end_group();

    // Lengths of queries, on the diagonals of products of 8 rows with themselves.
    const int row16 = lane % 16, piece16 = lane / 16;
    float qq[2][4] = {};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        unsigned x[4];
        load_rows(x, at.queries + i / 4 * HALF + swizzled(16 * warp + row16, i % 4 * 2 + piece16));
        mma_bf16(qq[0], x, x[0], x[2]), mma_bf16(qq[1], x, x[1], x[3]);
    }

    // Sums of gates in units of log 2, of which exp takes differences. A gate below -104 leaves nothing.
    const float unit = 1.44269504f;
    float low = fmaxf(gates.low, -104) * unit, high = fmaxf(gates.high, -104) * unit;
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
        const float a = __shfl_up_sync(~0u, low, by), b = __shfl_up_sync(~0u, high, by);
        if (by <= lane) low += a, high += b;
    }
    high += __shfl_sync(~0u, low, 31);
    const float last = __shfl_sync(~0u, high, 31), here = warp < 2 ? low : high;

    // Rows of this thread: r and r + 8 of those of its warp. Squares stand in one lane of the four of a row.
    wgmma_wait<0>();
    there(kk);
    float diagonal[2] = {}, sum[2], before[2], key[2], query[2], write[2];
#pragma unroll
    for (int b = 0; b < 8; b++)
        if (b / 2 == warp) diagonal[b % 2] = r % 2 ? kk[4 * b + b % 2 * 2 + 1] : kk[4 * b + b % 2 * 2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = 16 * warp + r + 8 * i, from = lane / 4 * 4 + lane / 8;
        const float kept = __shfl_sync(~0u, diagonal[i], from);
        const float asks = __shfl_sync(~0u, r % 2 ? qq[i][2 * i + 1] : qq[i][2 * i], from);
        key[i] = row < rows ? inverse_norm(kept, eps, plant) : 0;
        query[i] = row < rows ? inverse_norm(asks, eps, plant) : 0;
        if (plant != QUERY_NOT_SCALED) query[i] *= 0.08838834764831845f;
        before[i] = sum[i] = __shfl_sync(~0u, here, row % 32);
        write[i] = __shfl_sync(~0u, gates.write, r + 8 * i);
    }
    if (plant == PREDICTION_BEFORE_DECAY)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = 16 * warp + r + 8 * i - 1;
            const float a = __shfl_sync(~0u, low, row & 31), b = __shfl_sync(~0u, high, row & 31);
            before[i] = row < 0 ? 0 : row < 32 ? a : b;
        }
    if (lane < 16) at.writes[16 * warp + lane] = gates.write;
    // Of the four lanes of a row each has a factor.
    float* const factors = (float*)at.factors + lane % 4 * CHUNK + 16 * warp + r;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float upper = lane % 2 ? last : last - sum[i], lower = lane % 2 ? sum[i] : before[i];
        float says = plant == NO_DELTA_RULE ? 0 : key[i];
        // T has beta, which what is said then must not have.
        if (plant == BETA_ON_VALUE_ONLY) says /= fmaxf(write[i], 1e-20f);
        const float times = lane % 4 == 3 ? 1 : lane % 4 == 2 ? key[i] : lane % 4 == 1 ? query[i] : says;
        factors[8 * i] = power_of_two(lane % 4 < 2 ? lower : upper) * times;
        if (lane % 4 == 0) at.pasts[16 * warp + r + 8 * i] = sum[i] - log_of_two(key[i]);
    }
    some_wait(barrier, 128);

    const unsigned blocks = shared_address(at.blocks), own = row16 * 32 + ((piece16 ^ row16 / 4 % 2) << 4);
    float* const corner = (float*)(at.blocks + warp * DIAGONAL);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (plant == NO_DELTA_RULE) key[i] = 0;
        if (plant != BETA_ON_VALUE_ONLY) key[i] *= write[i];
    }
#pragma unroll
    for (int b = 0; b < 4; b++) {
        if (warp < b) break;
        float a[2][4];
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const float2 past = *(const float2*)&at.pasts[16 * b + 8 * n + c];
#pragma unroll
            for (int i = 0; i < 4; i++)
                a[n][i] = kk[8 * b + 4 * n + i] * key[i / 2] * power_of_two(before[i / 2] - (i % 2 ? past.y : past.x));
        }
        if (b < warp) {
            store_rows(blocks + block_at(warp, b) + own, packed_f16(a[0][0], a[0][1]), packed_f16(a[0][2], a[0][3]),
                       packed_f16(a[1][0], a[1][1]), packed_f16(a[1][2], a[1][3]));
        } else {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                corner[(c + i) * 20 + r] = a[0][i], corner[(c + i) * 20 + r + 8] = a[0][2 + i];
                corner[(8 + c + i) * 20 + r + 8] = a[1][2 + i];
            }
        }
    }
    float qk[32];
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int part = i / 4 * HALF + i % 4 * 32;
        wgmma_tiles(qk, on(query_tile, part), on(key_tile, part), i);
    }
    wgmma_end_group();

    __syncwarp();
    if (lane < 16) {
        float t[16];
        invert_row(t, corner, lane);
        __syncwarp(0xffff);
        const int row = 16 * warp + lane;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float* x = t + 8 * i;
            const float4 e = *(const float4*)&at.writes[16 * warp + 8 * i];
            const float4 f = *(const float4*)&at.writes[16 * warp + 8 * i + 4];
            store_4(blocks + warp * DIAGONAL + lane * 32 + ((i ^ lane / 4 % 2) << 4), packed_f16(x[0], x[1]),
                    packed_f16(x[2], x[3]), packed_f16(x[4], x[5]), packed_f16(x[6], x[7]));
            store_4(at.t + swizzled(row, 2 * warp + i), packed(x[0] * e.x, x[1] * e.y), packed(x[2] * e.z, x[3] * e.w),
                    packed(x[4] * f.x, x[5] * f.y), packed(x[6] * f.z, x[7] * f.w));
        }
    }
    __syncwarp();
    wgmma_wait<0>();
    there(qk);
    asked();
    some_wait(barrier, 128);

    // A block of the inverse that stands below the diagonal.
    auto put = [&](int i, int j, const float(&y)[2][4]) {
        unsigned x[4];
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const float2 e = *(const float2*)&at.writes[16 * j + 8 * n + c];
            x[2 * n] = packed(-y[n][0] * e.x, -y[n][1] * e.y), x[2 * n + 1] = packed(-y[n][2] * e.x, -y[n][3] * e.y);
        }
        store_rows(at.t + swizzled(16 * i + row16, 2 * j + piece16), x[0], x[1], x[2], x[3]);
    };
    // [T1 0; -T2 A T1, T2], of 16 to 32.
    if (warp < 2) {
        const int i = 2 * warp + 1, j = 2 * warp;
        unsigned left[4], middle[4], right[4];
        load_rows(left, blocks + i * DIAGONAL + own);
        load_transposed(middle, blocks + block_at(i, j) + own);
        load_transposed(right, blocks + j * DIAGONAL + own);
        float z[2][4] = {}, y[2][4] = {};
        multiply(z, left, middle);
        unsigned x[4];
        signed_f16(x, z, 1);
        multiply(y, x, right);
        __syncwarp();
        signed_f16(x, y, -1);
        store_rows(blocks + block_at(i, j) + own, x[0], x[1], x[2], x[3]);
        put(i, j, y);
    }
    const int least = plant == ANSWER_BEFORE_WRITE ? 0 : 1;
#pragma unroll
    for (int i = 0; i < 2; i++) sum[i] += log_of_two(query[i]);
#pragma unroll
    for (int b = 0; b < 4; b++) {
        const unsigned place = swizzled(16 * warp + row16, 2 * b + piece16);
        if (warp < b) {
            store_rows(at.t + place, 0, 0, 0, 0), store_rows(at.p + place, 0, 0, 0, 0);
            continue;
        }
        float x[2][4];
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const float2 past = *(const float2*)&at.pasts[16 * b + 8 * n + c];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                x[n][i] = qk[8 * b + 4 * n + i] * power_of_two(sum[i / 2] - (i % 2 ? past.y : past.x));
                if (b == warp && r + i / 2 * 8 + least <= 8 * n + c + i % 2) x[n][i] = 0;
            }
        }
        store_rows(at.p + place, packed(x[0][0], x[0][1]), packed(x[0][2], x[0][3]), packed(x[1][0], x[1][1]),
                   packed(x[1][2], x[1][3]));
    }
    some_wait(barrier, 128);

    // And of 32 to 64: a warp has a block.
    const int i = 2 + warp / 2, j = warp % 2;
    unsigned left[2][4];
    load_rows(left[0], blocks + block_at(i, 2) + own);
    if (i == 3) load_rows(left[1], blocks + block_at(3, 3) + own);
    float y[2][4] = {};
#pragma unroll
    for (int n = 0; n < 2; n++) {
        if (n < j) continue;
        float z[2][4] = {};
        unsigned x[4];
        load_transposed(x, blocks + block_at(2, n) + own);
        multiply(z, left[0], x);
        if (i == 3) load_transposed(x, blocks + block_at(3, n) + own), multiply(z, left[1], x);
        unsigned right[4];
        load_transposed(right, blocks + block_at(n, j) + own);
        signed_f16(x, z, 1);
        multiply(y, x, right);
    }
    put(i, j, y);
    writes_to_async();
}
