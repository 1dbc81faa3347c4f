#include "common/delta_parts.cuh"

// A walk over the chunks of the gated delta rule: a warpgroup has 64 columns of the state, transposed. Rows of a
// thread are columns r and r + 8 of the state, and in a chunk of v and o; its columns are 8 b + c and the next,
// channels of k or tokens. It is written for 192 registers: what is said, what is written and the answer are never
// in more than 64 of them.

struct Walker {
    float state[64];
    unsigned state16[32];  // as operands
};

__device__ inline void narrow(Walker& x)
{
#pragma unroll
    for (int j = 0; j < 32; j++) x.state16[j] = packed(x.state[2 * j], x.state[2 * j + 1]);
}

// Columns of the state of a head, from the thread's first on.
__device__ inline void begin(Walker& x, const float* state, bool ignored)
{
#pragma unroll
    for (int i = 0; i < 64; i++)
        x.state[i] = ignored ? 0 : state[(i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2) * DIM + i / 2 % 2 * 8];
}

__device__ inline void end(const Walker& x, float* state)
{
#pragma unroll
    for (int i = 0; i < 64; i++) state[(i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2) * DIM + i / 2 % 2 * 8] = x.state[i];
}

// A chunk: its answer, and the state after it, of which operands have been made. `values` are where the matrices of
// a lane begin in the tile of the warpgroup; `meanwhile` is done while the first products are under way, and `scored`
// waits for P.
template <class Meanwhile, class Scored>
__device__ inline void step(Walker& x, float (&answer)[32], unsigned keys, unsigned values, unsigned record,
                            unsigned factors, unsigned thread, int plant, Meanwhile meanwhile, Scored scored)
{
    const unsigned t = record, p = t + TILE, said_at = factors + thread % 4 * 8;
    const unsigned asked_at = said_at + CHUNK * 4, kept_at = asked_at + CHUNK * 4;
    const unsigned long long key_tile = tile(keys);
    float said_by[32], asked_of[32];
    wgmma_begin();
#pragma unroll
    for (int j = 0; j < 8; j++)  // Queries stand behind keys.
        wgmma_2_64<0>(said_by, asked_of, x.state16 + 4 * j, on(key_tile, j / 4 * HALF + j % 4 * 32), j);
    wgmma_end_group();
    meanwhile();

    unsigned x16[16];
    wgmma_wait<0>();
    there(said_by), there(asked_of);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        unsigned value[4];
        load_transposed(value, values + j * 2048);
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const int b = 2 * j + n;
            const float2 said = shared_2(said_at + b * 32);
            x16[2 * b] = packed(first_of(value[2 * n]) - said.x * said_by[4 * b],
                                second_of(value[2 * n]) - said.y * said_by[4 * b + 1]);
            x16[2 * b + 1] = packed(first_of(value[2 * n + 1]) - said.x * said_by[4 * b + 2],
                                    second_of(value[2 * n + 1]) - said.y * said_by[4 * b + 3]);
        }
    }
#pragma unroll
    for (int b = 0; b < 8; b++) {
        const float2 asked = shared_2(asked_at + b * 32);
#pragma unroll
        for (int j = 0; j < 4; j++) answer[4 * b + j] = asked_of[4 * b + j] * (j % 2 ? asked.y : asked.x);
    }
    float d[32];
    wgmma_begin();
#pragma unroll
    for (int j = 0; j < 4; j++) wgmma_64(d, x16 + 4 * j, on(tile(t), j * 32), j);
    wgmma_end_group();

    const float decay = shared_2(factors + 3 * CHUNK * 4).x;
    if (__any_sync(~0u, decay != 1))  // (so that their registers stay theirs)
#pragma unroll
        for (int j = 0; j < 64; j++) x.state[j] *= decay;
    float2 kept[8];
#pragma unroll
    for (int b = 0; b < 8; b++) kept[b] = shared_2(kept_at + b * 32);

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
    for (int j = 0; j < 4; j++) wgmma_128<1>(x.state, kept16 + 4 * j, on(tile(keys, HALF), j * 2048), 1);
    wgmma_end_group();
#pragma unroll
    for (int j = 0; j < 16; j++) d16[j] = packed(d[2 * j], d[2 * j + 1]);
    scored();
    wgmma_begin();
#pragma unroll
    for (int j = 0; j < 4; j++) wgmma_64(answer, d16 + 4 * j, on(tile(p), j * 32), 1);
    wgmma_end_group();
    wgmma_wait<1>();
    there(x.state);
    if (plant == STATE_IN_BF16)
#pragma unroll
        for (int j = 0; j < 64; j++) x.state[j] = rounded<bf16>(x.state[j]);
    wgmma_wait<0>();
    there(answer);
}

// The answer as bf16, rows of tokens: pieces of the rows that lanes point to, 16 tokens apart by `stride`.
__device__ inline void put_answer(unsigned to, unsigned stride, const float (&answer)[32])
{
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const float* y = answer + 8 * j;
        store_transposed(to + j * stride, packed(y[0], y[1]), packed(y[2], y[3]), packed(y[4], y[5]),
                         packed(y[6], y[7]));
    }
}
