#include "common/delta_chunk.cuh"

// What delta_chunk.cuh makes a record of, in parts, for kernels that share them out.

// What gates or betas of a chunk of so many rows, which begin there, are stored as: of the lanes of the first two warps
// of four. Nobody waits for them here.
__device__ inline void fetch(unsigned (&x)[2], const unsigned* g, const bf16* beta, int HV, int number, int rows,
                             int plant)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    if (warp == 0) {
        const int back = plant == GATE_OFF_BY_ONE, from = number == 0 ? back : 0;
        const int forgotten = plant == DECAY_DROPPED_AT_EACH_CHUNK;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = lane + 32 * i;
            x[i] = max(from, forgotten) <= row && row < rows ? g[(row - back) * HV] : 0;
        }
    } else if (warp == 1) {
#pragma unroll
        for (int i = 0; i < 2; i++) x[i] = lane + 32 * i < rows ? beta[(lane + 32 * i) * HV].bits : 0;
    }
}

// G and beta of a chunk, of what was fetched. A gate below -104 leaves nothing.
__device__ inline void tell(Tokens& x, const unsigned (&y)[2])
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    if (warp == 0) {
        const float unit = 1.44269504f;
        float low = fmaxf(__uint_as_float(y[0]), -104) * unit, high = fmaxf(__uint_as_float(y[1]), -104) * unit;
#pragma unroll
        for (int by = 1; by < 32; by *= 2) {
            const float a = __shfl_up_sync(~0u, low, by), b = __shfl_up_sync(~0u, high, by);
            if (by <= lane) low += a, high += b;
        }
        x.sums[lane] = low, x.sums[lane + 32] = high + __shfl_sync(~0u, low, 31);
    } else if (warp == 1) {
#pragma unroll
        for (int i = 0; i < 2; i++) x.writes[lane + 32 * i] = __uint_as_float(y[i] << 16);
    }
}

// Whether it is planted. The compiler is not to make a version for it of all that follows.
__device__ inline bool planted(int plant, int which)
{
    int is = plant == which;
    asm("" : "+r"(is));
    return is;
}

// inverse_norm in one instruction, where nothing is planted.
__device__ inline float inverse_norm_at_once(float squares, float eps, int plant)
{
    float root;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(squares + (planted(plant, EPS_ON_MEAN) ? DIM * eps : eps)));
    if (planted(plant, EPS_OUTSIDE_ROOT)) {
        asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(squares));
        asm("rcp.approx.f32 %0, %1;" : "=f"(root) : "f"(root + eps));
    }
    return planted(plant, NOT_NORMED) ? 1 : root;
}

// What stands among the exponents of A and P.
struct Logs {
    float pasts[CHUNK];  // G - log2 |k|^-1, of a column
    float said[CHUNK];   // G + log2 |k|^-1 beta, of a row of A
    float asked[CHUNK];  // G + log2 |q|^-1 K^-1/2, of a row of P
};

// Factors and logarithms of a token of a chunk of so many rows; the lengths of keys are not in them yet.
__device__ inline void derive(Factors& factors, Logs& logs, const Tokens& x, int row, int rows, float eps, int plant)
{
    const float sum = x.sums[row], last = x.sums[CHUNK - 1], write = x.writes[row];
    float norm = inverse_norm_at_once(x.squares[row], eps, plant), said = sum, beta = log_of_two(write);
    if (!planted(plant, QUERY_NOT_SCALED)) norm *= SCALE;
    const float query = row < rows ? norm : 0;
    if (planted(plant, PREDICTION_BEFORE_DECAY)) said = row == 0 ? 0 : x.sums[row - 1];
    said = power_of_two(said);
    if (planted(plant, BETA_ON_VALUE_ONLY))  // (T has beta, which what is said then must not have.)
        beta = 0, said *= __fdividef(1, fmaxf(write, 1e-20f));
    if (planted(plant, NO_DELTA_RULE)) beta = log_of_two(0), said = 0;
    logs.said[row] = beta;
    logs.asked[row] = sum + log_of_two(query);
    factors.said[row] = said;
    factors.asked[row] = power_of_two(sum) * query;
    factors.kept[row] = power_of_two(last - sum);
    factors.decay[row] = power_of_two(last);
}

// Where a warpgroup makes T of a chunk.
struct Parts {
    unsigned keys, t;       // tiles
    Factors* factors;
    unsigned char* blocks;  // of A and its inverse
    const Tokens* tokens;
    Logs* logs;
};

// begin_scores with every second eight rows of b.
__device__ inline void begin_half(float (&scores)[16], unsigned a, unsigned b)
{
    const unsigned long long a_tile = tile(a), b_tile = half_tile(b);
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int part = i / 4 * HALF + i % 4 * 32;
        wgmma_tiles_32(scores, on(a_tile, part), on(b_tile, part), i);
    }
    wgmma_end_group();
}

// A thread of a warpgroup, as it is kept; what follows from it is made anew for every chunk.
__device__ inline unsigned anew(unsigned thread)
{
    asm volatile("" : "+r"(thread));
    return thread % 128;
}

// Lengths of keys, which stand on the diagonal of K K', and what has waited for them.
__device__ inline void find_lengths(const Parts& at, const float (&kk)[32], unsigned thread, int rows, float eps,
                                    int plant)
{
    thread = anew(thread);
    const int warp = thread / 32, lane = thread % 32, r = lane / 4;
    float diagonal[2] = {};
#pragma unroll
    for (int b = 0; b < 8; b++)
        if (b / 2 == warp) diagonal[b % 2] = r % 2 ? kk[4 * b + b % 2 * 2 + 1] : kk[4 * b + b % 2 * 2];
    if (lane % 4 != lane / 8) return;
    float sum[2], before[2], own[2], said[2], kept[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = 16 * warp + r + 8 * i;
        sum[i] = before[i] = at.tokens->sums[row], own[i] = at.logs->said[row];
        said[i] = at.factors->said[row], kept[i] = at.factors->kept[row];
        if (planted(plant, PREDICTION_BEFORE_DECAY)) before[i] = row == 0 ? 0 : at.tokens->sums[row - 1];
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = 16 * warp + r + 8 * i;
        const float norm = inverse_norm_at_once(diagonal[i], eps, plant);
        const float key = row < rows ? norm : 0, past = log_of_two(key);
        at.logs->pasts[row] = sum[i] - past;
        at.logs->said[row] = before[i] + (past + own[i]);
        at.factors->said[row] = said[i] * key;
        at.factors->kept[row] = kept[i] * key;
    }
}

// A, of K K', as blocks.
__device__ inline void make_blocks(const Parts& at, const float (&kk)[32], unsigned thread)
{
    thread = anew(thread);
    const int warp = thread / 32, lane = thread % 32, r = lane / 4, c = lane % 4 * 2;
    const float own[2] = {at.logs->said[16 * warp + r], at.logs->said[16 * warp + r + 8]};
    const int row16 = lane % 16, piece16 = lane / 16;
    const unsigned blocks = shared_address(at.blocks), here = row16 * 32 + ((piece16 ^ row16 / 4 % 2) << 4);
    unsigned char* const corner_at = at.blocks + warp * DIAGONAL;
    float* const corners = (float*)corner_at;
    float2 then[8];
#pragma unroll
    for (int n = 0; n < 8; n++) then[n] = *(const float2*)&at.logs->pasts[8 * n + c];
#pragma unroll
    for (int b = 0; b < 4; b++) {
        if (warp < b) break;
        float a[2][4];
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float past = i % 2 ? then[2 * b + n].y : then[2 * b + n].x;
                a[n][i] = kk[8 * b + 4 * n + i] * power_of_two(own[i / 2] - past);
            }
        if (b < warp) {
            store_rows(blocks + block_at(warp, b) + here, packed_f16(a[0][0], a[0][1]), packed_f16(a[0][2], a[0][3]),
                       packed_f16(a[1][0], a[1][1]), packed_f16(a[1][2], a[1][3]));
        } else {
#pragma unroll
            for (int i = 0; i < 2; i++)
                corners[(c + i) * 12 + r] = a[0][i], corners[CORNER / 4 + (c + i) * 12 + r] = a[1][2 + i];
            ((unsigned*)(corner_at + 2 * CORNER))[lane] = packed_f16(a[0][2], a[0][3]);
        }
    }
}

// The inverse of the block of the diagonal that a warp has: [T1 0; -T2 A T1, T2], of 8 to 16.
__device__ inline void invert_diagonal(const Parts& at, unsigned thread)
{
    thread = anew(thread);
    const int warp = thread / 32, lane = thread % 32, r = lane / 4, c = lane % 4 * 2;
    const unsigned here16 = shared_address(at.blocks) + warp * DIAGONAL;
    const float* const corners = (const float*)(at.blocks + warp * DIAGONAL);
    __syncwarp();
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
    // Four matrices, of which T2 alone is as it stands, and the others are not needed: what is 0 is their part.
    const int row16 = lane % 16, piece16 = lane / 16, corner = lane % 8 * 32 + (lane % 8 / 4 << 4);
    unsigned left[4], right[4];
    load_rows(left, here16 + row16 * 32 + ((piece16 ^ row16 / 4 % 2) << 4));
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

// [T1 0; -T2 A T1, T2], of 16 to 32, by the first two warps.
__device__ inline void invert_32(const Parts& at, unsigned thread)
{
    thread = anew(thread);
    const int warp = thread / 32, row16 = thread % 16, piece16 = thread % 32 / 16;
    if (2 <= warp) return;
    const unsigned blocks = shared_address(at.blocks), own = row16 * 32 + ((piece16 ^ row16 / 4 % 2) << 4);
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
    put_block(at.t, at.tokens->writes, i, j, y, thread % 32);
}

// And of 32 to 64: a warp has a block, where there is a chunk. Something else is done `meanwhile`.
template <class Meanwhile>
__device__ inline void invert_64(const Parts& at, unsigned thread, bool there_is, Meanwhile meanwhile)
{
    thread = anew(thread);
    const int warp = thread / 32, row16 = thread % 16, piece16 = thread % 32 / 16;
    const unsigned blocks = shared_address(at.blocks), own = row16 * 32 + ((piece16 ^ row16 / 4 % 2) << 4);
    const int i = 2 + warp / 2, j = warp % 2;
    float y[2][4] = {};
    if (there_is) invert_64(y, blocks, own, i, j);
    meanwhile();
    if (there_is) put_block(at.t, at.tokens->writes, i, j, y, thread % 32);
}

// P of a chunk, of N times eight columns of Q K': all, or every second from those of `part` on. What is
// above its blocks on the diagonal is zero before.
template <int N>
__device__ inline void put_scores(unsigned p, const Logs& logs, const float (&qk)[4 * N], unsigned thread, int part,
                                  int plant)
{
    thread = anew(thread);
    const int warp = thread / 32, lane = thread % 32, r = lane / 4, c = lane % 4 * 2;
    const int least = planted(plant, ANSWER_BEFORE_WRITE) ? 1 : 0;
    const float own[2] = {logs.asked[16 * warp + r], logs.asked[16 * warp + r + 8]};
    const unsigned to = p + (16 * warp + lane % 16) * 128;
#pragma unroll
    for (int k = 0; k < N; k += 2) {
        if (16 * warp + 15 < k * 64 / N) break;
        float x[2][4];
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const int column = (k + n) * 64 / N + 8 * part + c;
            const float2 then = *(const float2*)&logs.pasts[column];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                x[n][i] = qk[4 * (k + n) + i] * power_of_two(own[i / 2] - (i % 2 ? then.y : then.x));
                if (16 * warp + r + i / 2 * 8 < column + i % 2 + least) x[n][i] = 0;
            }
        }
        const int piece = (k + lane / 16) * 8 / N + part;
        store_rows(to + ((piece ^ lane % 8) << 4), packed(x[0][0], x[0][1]), packed(x[0][2], x[0][3]),
                   packed(x[1][0], x[1][1]), packed(x[1][2], x[1][3]));
    }
}
