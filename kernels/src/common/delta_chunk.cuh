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
// Rounding: factors, norms, gates, A and every sum are f32 (the lengths of keys and all products summed by tensor
// cores); a decay is 2 to a difference of two sums of gates of the chunk, and what a row of A is multiplied with
// stands among the exponents, too. In f16: the operands that make (I + A)^-1 of its inverted blocks of 8, which are
// f32. In bf16: T and P; S, X, d and what is kept of d as operands. The state that is carried is f32. q, k and v are
// operands as they are stored.

const int CHUNK = 64;
const float SCALE = 0.08838834764831845f;  // K^-1/2
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
template <int BY, int AT_ONCE = CHUNK / BY>
__device__ inline void copy_pieces(unsigned to, const bf16* from, size_t stride, int row, int rows)
{
    if (rows == CHUNK)
#pragma unroll
        for (int i = 0; i < CHUNK / BY; i++) copy_16(to + i * BY * 128, from), from += BY * stride;
    else
#pragma unroll AT_ONCE
        for (int i = 0; i < CHUNK / BY; i++) {
            const bool there = row + i * BY < rows;
            copy_16(to + i * BY * 128, there ? from : from - row * stride, there);
            if (there) from += BY * stride;
        }
}

// Blocks of 16x16 of the lower triangle of A, and of its inverse in their place, in f16. Of a block on the diagonal
// first the two of 8x8 on its diagonal, in f32, transposed and in rows of 12 so that lanes meet in no bank, and
// behind them the one below.
const int CORNER = 8 * 12 * 4, DIAGONAL = 2 * CORNER + 128, BLOCK = 16 * 16 * 2, BLOCKS = 4 * DIAGONAL + 6 * BLOCK;

__device__ inline unsigned block_at(int i, int j)
{
    return i == j ? i * DIAGONAL : 4 * DIAGONAL + (i * (i - 1) / 2 + j) * BLOCK;
}

// What is known of the tokens of a chunk, when it is there. Rows behind the end of a sequence have gates and betas 0.
struct Tokens {
    float sums[CHUNK];     // G, in units of log 2
    float writes[CHUNK];   // beta
    float squares[CHUNK];  // of queries, summed
};

// G and beta of a chunk of so many rows, whose gates and betas of a head begin there, by the first two warps of four.
// A gate below -104 leaves nothing.
__device__ inline void tell(Tokens& x, const float* g, const bf16* beta, int HV, int number, int rows, int plant)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    if (warp == 0) {
        const int back = plant == GATE_OFF_BY_ONE, from = number == 0 ? back : 0;
        const int forgotten = plant == DECAY_DROPPED_AT_EACH_CHUNK;
        float gate[2] = {};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = lane + 32 * i;
            if (max(from, forgotten) <= row && row < rows) gate[i] = g[(row - back) * HV];
        }
        const float unit = 1.44269504f;
        float low = fmaxf(gate[0], -104) * unit, high = fmaxf(gate[1], -104) * unit;
#pragma unroll
        for (int by = 1; by < 32; by *= 2) {
            const float a = __shfl_up_sync(~0u, low, by), b = __shfl_up_sync(~0u, high, by);
            if (by <= lane) low += a, high += b;
        }
        x.sums[lane] = low, x.sums[lane + 32] = high + __shfl_sync(~0u, low, 31);
    } else if (warp == 1) {
#pragma unroll
        for (int row = lane; row < CHUNK; row += 32) x.writes[row] = row < rows ? load(beta[row * HV]) : 0;
    }
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

// A row of the inverse of I + a corner of the diagonal, from its end on: t (I + A) is a row of I.
__device__ inline void invert_row(float (&t)[8], const float* corner, int row)
{
#pragma unroll
    for (int j = 7; 0 <= j; j--) {
        float even = j == row, odd = 0;
#pragma unroll
        for (int k = 4; (j + 1) / 4 * 4 <= k; k -= 4) {
            const float4 a = *(const float4*)&corner[j * 12 + k];
            odd -= a.w * t[k + 3];
            if (j < k + 2) even -= a.z * t[k + 2];
            if (j < k + 1) odd -= a.y * t[k + 1];
            if (j < k) even -= a.x * t[k];
        }
        t[j] = even + odd;
    }
}

// Sums of squares of ROWS rows of 128 numbers, `step` bytes apart, of which each of 16 lanes has a piece at `from`.
// What the lanes add is halved among them while it can be; row j is `stride` j after `to`, and after `also`.
template <int ROWS>
__device__ inline void sum_squares(float* to, float* also, int stride, unsigned from, int step, int piece)
{
    float x[ROWS];
    uint4 next = shared_4(from);
#pragma unroll
    for (int j = 0; j < ROWS; j++) {
        const uint4 y = next;
        if (j + 1 < ROWS) next = shared_4(from + (j + 1) * step);
        x[j] = first_of(y.x) * first_of(y.x) + second_of(y.x) * second_of(y.x);
        x[j] += first_of(y.y) * first_of(y.y) + second_of(y.y) * second_of(y.y);
        x[j] += first_of(y.z) * first_of(y.z) + second_of(y.z) * second_of(y.z);
        x[j] += first_of(y.w) * first_of(y.w) + second_of(y.w) * second_of(y.w);
    }
    int row = 0, many = ROWS;
#pragma unroll
    for (int by = 8; 0 < by; by /= 2) {
        const bool upper = piece & by;
        many /= 2;
        if (many) row += upper ? many : 0;
#pragma unroll
        for (int j = 0; j < (many ? many : 1); j++) {
            const float mine = many && upper ? x[j + many] : x[j], other = many && !upper ? x[j + many] : x[j];
            x[j] = mine + __shfl_xor_sync(~0u, other, by);
        }
    }
    if (piece % (16 / ROWS) == 0) to[row * stride] = also[row * stride] = x[0];
}

// A block of T that stands below the diagonal, of what is taken from nothing.
__device__ inline void put_block(unsigned t, const float* writes, int i, int j, const float (&y)[2][4], int lane)
{
    const int c = lane % 4 * 2;
    unsigned x[4];
#pragma unroll
    for (int n = 0; n < 2; n++) {
        const float2 e = *(const float2*)&writes[16 * j + 8 * n + c];
        x[2 * n] = packed(-y[n][0] * e.x, -y[n][1] * e.y), x[2 * n + 1] = packed(-y[n][2] * e.x, -y[n][3] * e.y);
    }
    store_rows(t + swizzled(16 * i + lane % 16, 2 * j + lane / 16), x[0], x[1], x[2], x[3]);
}

// A block of the inverse of 64 rows, of those of 32, before it is taken from nothing; `own` is where this thread's row
// of a block is.
__device__ inline void invert_64(float (&y)[2][4], unsigned blocks, unsigned own, int i, int j)
{
    unsigned left[2][4];
    load_rows(left[0], blocks + block_at(i, 2) + own);
    if (i == 3) load_rows(left[1], blocks + block_at(3, 3) + own);
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
}

// Where a warpgroup makes the record of a chunk.
struct Place {
    unsigned keys, queries;   // tiles
    unsigned t, p;            // tiles of T and P
    Factors* factors;
    unsigned char* blocks;    // of A and its inverse
    const Tokens* tokens;
    float* pasts;             // G - log2 |k|^-1 of every token
};

// a b' of two tiles and their other halves, begun.
__device__ inline void begin_scores(float (&scores)[32], unsigned a, unsigned b)
{
    const unsigned long long a_tile = tile(a), b_tile = tile(b);
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int part = i / 4 * HALF + i % 4 * 32;
        wgmma_tiles(scores, on(a_tile, part), on(b_tile, part), i);
    }
    wgmma_end_group();
}

// T, P and the factors of a chunk, by a warpgroup, whose barrier it is. K K' has been begun. Keys and queries are read
// no more when `asked` is called. All rows of T and P are there for reads by wgmma and bulk copies when all threads have
// come back.
template <class Asked>
__device__ inline void make_record(const Place& at, float (&kk)[32], int rows, float eps, int barrier, int plant,
                                   Asked asked)
{
    int thread = threadIdx.x;
    asm volatile("" : "+r"(thread));  // What follows from it is made anew for every chunk, rather than kept.
    const int warp = thread / 32 % 4, lane = thread % 32, r = lane / 4, c = lane % 4 * 2;
    // Rows of this thread: r and r + 8 of those of its warp. Squares of keys stand in one lane of the four of a row.
    const float last = at.tokens->sums[CHUNK - 1];
    float key[2], query[2], sum[2], before[2], write[2], diagonal[2] = {};
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = 16 * warp + r + 8 * i;
        query[i] = at.tokens->squares[row], write[i] = at.tokens->writes[row];
        before[i] = sum[i] = at.tokens->sums[row];
        if (plant == PREDICTION_BEFORE_DECAY) before[i] = row == 0 ? 0 : at.tokens->sums[row - 1];
    }
    wgmma_wait<0>();
    there(kk);
#pragma unroll
    for (int b = 0; b < 8; b++)
        if (b / 2 == warp) diagonal[b % 2] = r % 2 ? kk[4 * b + b % 2 * 2 + 1] : kk[4 * b + b % 2 * 2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float squares = __shfl_sync(~0u, diagonal[i], lane / 4 * 4 + lane / 8), asks = query[i];
        key[i] = rsqrtf(squares + eps), query[i] = rsqrtf(asks + eps) * SCALE;
        if (plant != HONEST) {
            key[i] = inverse_norm(squares, eps, plant), query[i] = inverse_norm(asks, eps, plant);
            if (plant != QUERY_NOT_SCALED) query[i] *= SCALE;
        }
        if (rows <= 16 * warp + r + 8 * i) key[i] = query[i] = 0;
    }
    float past[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        past[i] = log_of_two(key[i]);
        if (lane % 4 == 0) at.pasts[16 * warp + r + 8 * i] = sum[i] - past[i];
    }
    some_wait(barrier, 128);

    // Of the four lanes of a row each has a factor.
    float* const factors = (float*)at.factors + lane % 4 * CHUNK + 16 * warp + r;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float upper = lane % 2 ? last : last - sum[i], lower = lane % 2 ? sum[i] : before[i];
        const float times = lane % 4 == 3 ? 1 : lane % 4 == 1 ? query[i] : key[i];
        factors[8 * i] = power_of_two(lane % 4 < 2 ? lower : upper) * times;
    }
    if (plant == NO_DELTA_RULE || plant == BETA_ON_VALUE_ONLY)  // (T has beta, which what is said then must not have.)
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (lane % 4 == 0) factors[8 * i] *= plant == NO_DELTA_RULE ? 0 : 1 / fmaxf(write[i], 1e-20f);

    // What A has of a row, among the exponents.
#pragma unroll
    for (int i = 0; i < 2; i++) {
        before[i] += plant == BETA_ON_VALUE_ONLY ? past[i] : past[i] + log_of_two(write[i]);
        if (plant == NO_DELTA_RULE) before[i] = log_of_two(0);
    }
    const int row16 = lane % 16, piece16 = lane / 16;
    const unsigned blocks = shared_address(at.blocks), own = row16 * 32 + ((piece16 ^ row16 / 4 % 2) << 4);
    unsigned char* const corner_at = at.blocks + warp * DIAGONAL;
    float* const corners = (float*)corner_at;
#pragma unroll
    for (int b = 0; b < 4; b++) {
        if (warp < b) break;
        float a[2][4];
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const float2 then = *(const float2*)&at.pasts[16 * b + 8 * n + c];
#pragma unroll
            for (int i = 0; i < 4; i++)
                a[n][i] = kk[8 * b + 4 * n + i] * power_of_two(before[i / 2] - (i % 2 ? then.y : then.x));
        }
        if (b < warp) {
            store_rows(blocks + block_at(warp, b) + own, packed_f16(a[0][0], a[0][1]), packed_f16(a[0][2], a[0][3]),
                       packed_f16(a[1][0], a[1][1]), packed_f16(a[1][2], a[1][3]));
        } else {
#pragma unroll
            for (int i = 0; i < 2; i++)
                corners[(c + i) * 12 + r] = a[0][i], corners[CORNER / 4 + (c + i) * 12 + r] = a[1][2 + i];
            ((unsigned*)(corner_at + 2 * CORNER))[lane] = packed_f16(a[0][2], a[0][3]);
        }
    }
    float qk[32];
    begin_scores(qk, at.queries, at.keys);

    // The inverse of the block of the diagonal: [T1 0; -T2 A T1, T2], of 8 to 16.
    __syncwarp();
    const unsigned here16 = blocks + warp * DIAGONAL, corner = lane % 8 * 32 + (lane % 8 / 4 << 4);
    float t[8];
    if (lane < 16) invert_row(t, corners + lane / 8 * (CORNER / 4), lane % 8);
    __syncwarp();
    if (lane < 24) {
        // Of the other lanes, zeros above T2.
        const int row = lane % 16, part = lane < 8 ? 0 : 1;
        float4 e = make_float4(0, 0, 0, 0), f = e;
        const float4* const writes = (const float4*)&at.tokens->writes[16 * warp + 8 * part];
        if (lane < 16) e = writes[0], f = writes[1];
        else
#pragma unroll
            for (int j = 0; j < 8; j++) t[j] = 0;
        store_4(here16 + row * 32 + ((part ^ row / 4 % 2) << 4), packed_f16(t[0], t[1]), packed_f16(t[2], t[3]),
                packed_f16(t[4], t[5]), packed_f16(t[6], t[7]));
        store_4(at.t + swizzled(16 * warp + row, 2 * warp + part), packed(t[0] * e.x, t[1] * e.y),
                packed(t[2] * e.z, t[3] * e.w), packed(t[4] * f.x, t[5] * f.y), packed(t[6] * f.z, t[7] * f.w));
    }
    __syncwarp();
    {
        // Four matrices, of which T2 alone is as it stands, and the others are not needed: what is 0 is their part.
        unsigned left[4], right[4];
        load_rows(left, here16 + own);
        load_transposed(right, lane < 8 ? here16 + 2 * CORNER + lane * 16 : here16 + corner);
        float z[4] = {}, y[4] = {};
        const unsigned a[4] = {left[3], 0, 0, 0};
        mma_f16(z, a, right[0], 0);
        const unsigned x[4] = {packed_f16(z[0], z[1]), 0, 0, 0};
        mma_f16(y, x, right[1], 0);
        const float2 e = *(const float2*)&at.tokens->writes[16 * warp + c];
        __syncwarp();  // Everybody has read what stood there, whatever it was.
        store_1(here16 + (8 + r) * 32 + (((8 + r) / 4 % 2) << 4) + 2 * c, packed_f16(-y[0], -y[1]));
        store_1(at.t + swizzled(16 * warp + 8 + r, 2 * warp) + 2 * c, packed(-y[0] * e.x, -y[1] * e.y));
    }
    wgmma_wait<0>();
    there(qk);
    asked();
    some_wait(barrier, 128);

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
        put_block(at.t, at.tokens->writes, i, j, y, lane);
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
            const float2 then = *(const float2*)&at.pasts[16 * b + 8 * n + c];
#pragma unroll
            for (int i = 0; i < 4; i++)
                x[n][i] = qk[8 * b + 4 * n + i] * power_of_two(sum[i / 2] - (i % 2 ? then.y : then.x));
        }
        if (b == warp)
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (r + i / 2 % 2 * 8 + least <= i / 4 * 8 + c + i % 2) x[i / 4][i % 4] = 0;
        store_rows(at.p + place, packed(x[0][0], x[0][1]), packed(x[0][2], x[0][3]), packed(x[1][0], x[1][1]),
                   packed(x[1][2], x[1][3]));
    }
    some_wait(barrier, 128);

    const int i = 2 + warp / 2, j = warp % 2;
    float y[2][4] = {};
    invert_64(y, blocks, own, i, j);
    put_block(at.t, at.tokens->writes, i, j, y, lane);
    writes_to_async();
}
