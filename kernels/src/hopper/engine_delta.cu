// What is between the projections of a layer of the delta rule, for one token of each sequence: what
// ../engine.cu does in engine_delta_in and engine_gated_norm, with gated_delta_rule_few.cu between them and the
// narrow projection before, in one launch. K = V = 128, two value heads to a key head, four taps; activations in
// bf16, rounded where those kernels round; all else is f32.
//
// engine_delta_step: grid (8, HK, S), clusters of 8 blocks of 128 threads: four to a value head, 32 columns of its
//     state each. It may be launched to start before the kernel before has ended.

#include "common/activation.cuh"
#include "common/early.cuh"
#include "common/stored.cuh"
#include "common/wgmma.cuh"

const int DIM = 128, TAPS = 4, OWN = 32;  // Columns of a block.

__device__ inline float warp_sum(float x)
{
#pragma unroll
    for (int by = 16; 0 < by; by /= 2) x += __shfl_xor_sync(~0u, x, by);
    return x;
}

// Eight numbers to f32.
__device__ inline void eight(const bf16* from, float (&x)[8])
{
    const uint4 words = *(const uint4*)from;
    const unsigned pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; i++)
        x[2 * i] = __uint_as_float(pairs[i] << 16), x[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000);
}

// The window of a channel and its newest input, weighed; and what becomes of the window.
struct Window {
    float taps[TAPS], before[TAPS - 1], now;

    __device__ Window(const float* conv, const bf16* state, const bf16* x, int channel)
    {
        const float4 own = *(const float4*)(conv + (size_t)channel * TAPS);
        taps[0] = own.x, taps[1] = own.y, taps[2] = own.z, taps[3] = own.w;
#pragma unroll
        for (int i = 0; i < TAPS - 1; i++) before[i] = load(state[(size_t)channel * (TAPS - 1) + i]);
        now = load(*x);
    }

    __device__ float value() const
    {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < TAPS - 1; i++) sum += taps[i] * before[i];
        return rounded<bf16>(silu(sum + taps[TAPS - 1] * now));
    }

    __device__ void advance(bf16* state, int channel) const
    {
#pragma unroll
        for (int i = 0; i < TAPS - 1; i++)
            state[(size_t)channel * (TAPS - 1) + i] = store<bf16>(i + 2 < TAPS ? before[i + 1] : now);
    }
};

extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(128) engine_delta_step(
    E* __restrict__ o,                // [N, HV, V] after the gated norm
    float* state_out,                 // [S, HV, K, V], goes on where it is
    E* __restrict__ window,           // [S, C, TAPS - 1], goes on where it is
    const E* __restrict__ projected,  // [N, HK (2 K + 4 V)]
    const E* __restrict__ x,          // [N, D]
    const E* __restrict__ ba,         // [2 HV, D]
    const float* __restrict__ conv,   // [C, TAPS]
    const float* __restrict__ a_log,  // [HV]
    const float* __restrict__ dt_bias,  // [HV]
    const float* __restrict__ norm,   // [V]
    float eps,
    float norm_eps,
    int HK,
    int D)
{
    __shared__ __align__(16) float keys[DIM], queries[DIM], values[OWN];
    __shared__ __align__(16) float sums[4][8][8];
    __shared__ float of_warps[4][5], square;
    const int part = blockIdx.x % 4, which = blockIdx.x / 4, group = blockIdx.y, HV = 2 * HK;
    const size_t s = blockIdx.z;
    const int h = 2 * group + which, t = threadIdx.x, warp = t / 32, lane = t % 32;
    const int columns = lane % 8, row = t / 8 * 8, first = part * OWN;
    // Of a key head there are first both b and then both a.
    const E* b_row = ba + (size_t)(4 * group + which) * D;
    const E* a_row = b_row + 2 * D;
    wait_for_previous();

    float* own = state_out + ((s * HV + h) * DIM + row) * DIM + first + columns * 4;
    float state[8][4];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float4 four = *(const float4*)(own + i * DIM);
        state[i][0] = four.x, state[i][1] = four.y, state[i][2] = four.z, state[i][3] = four.w;
    }
    // Where channels stand: queries, keys, values of all heads in the window; of each key head in the projection.
    const int value = first + lane, width = 2 * DIM + 4 * DIM, channels = (2 * HK + HV) * DIM;
    const E* from = projected + (s * HK + group) * width;
    E* windows = window + s * channels * (TAPS - 1);
    const int of_query = group * DIM + t, of_key = (HK + group) * DIM + t;
    const int of_value = (2 * HK + h) * DIM + value;
    const Window query_in(conv, windows, from + t, of_query), key_in(conv, windows, from + DIM + t, of_key);
    const Window value_in(conv, windows, from + 2 * DIM + which * DIM + value, of_value);

    float b = 0, a = 0;
    for (int d = 8 * t; d < D; d += 8 * 128) {
        float of_x[8], of_b[8], of_a[8];
        eight(x + s * D + d, of_x), eight(b_row + d, of_b), eight(a_row + d, of_a);
#pragma unroll
        for (int i = 0; i < 8; i++) b += of_x[i] * of_b[i], a += of_x[i] * of_a[i];
    }
    const float query = query_in.value(), key = key_in.value();
    const float parts[5] = {warp_sum(key * key), warp_sum(query * query), warp_sum(key * query), warp_sum(b),
                            warp_sum(a)};
    if (lane < 5) {
#pragma unroll
        for (int i = 0; i < 5; i++)
            if (i == lane) of_warps[warp][i] = parts[i];
    }
    keys[t] = key, queries[t] = query;
    if (warp == 0) values[lane] = value_in.value();
    __syncthreads();

    float all[5];
#pragma unroll
    for (int i = 0; i < 5; i++)
        all[i] = (of_warps[0][i] + of_warps[1][i]) + (of_warps[2][i] + of_warps[3][i]);
    const float on_key = rsqrtf(all[0] + eps), on_query = rsqrtf(all[1] + eps) * 0.08838834764831845f;
    const float both = all[2] * on_key * on_query, write = rounded<bf16>(sigmoid(all[3]));
    const float time = all[4] + dt_bias[h];
    // ln(1 + e^x), of which nothing but x is left above 20.
    const float decay = expf(-expf(a_log[h]) * (time > 20 ? time : log1pf(expf(time))));

    float of_key_rows[8], sum[8] = {};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        of_key_rows[i] = keys[row + i] * on_key;
        const float of_query_row = queries[row + i] * on_query;
#pragma unroll
        for (int l = 0; l < 4; l++)
            sum[l] += state[i][l] * of_key_rows[i], sum[4 + l] += state[i][l] * of_query_row;
    }
    // Of the eight sums of four lanes each is left with two.
#pragma unroll
    for (int l = 0; l < 4; l++) {
        const float theirs = lane & 16 ? sum[l] : sum[4 + l];
        sum[l] = (lane & 16 ? sum[4 + l] : sum[l]) + __shfl_xor_sync(~0u, theirs, 16);
    }
#pragma unroll
    for (int l = 0; l < 2; l++) {
        const float theirs = lane & 8 ? sum[l] : sum[2 + l];
        sum[l] = (lane & 8 ? sum[2 + l] : sum[l]) + __shfl_xor_sync(~0u, theirs, 8);
    }
    *(float2*)&sums[warp][columns][lane / 16 * 4 + lane / 8 % 2 * 2] = make_float2(sum[0], sum[1]);
    __syncthreads();
    let_next_start();

    const float(*const of)[8] = &sums[0][columns];  // of a warp; the next one's stands 8 on
    float d[4], answer[4];
#pragma unroll
    for (int l = 0; l < 4; l++) {
        const float said = (of[0][l] + of[8][l]) + (of[16][l] + of[24][l]);
        d[l] = write * values[columns * 4 + l] - write * decay * said;
        const float from_before = (of[0][4 + l] + of[8][4 + l]) + (of[16][4 + l] + of[24][4 + l]);
        answer[l] = rounded<bf16>(decay * from_before + both * d[l]);
    }
    if (t < 8) {
        float squares = 0;
#pragma unroll
        for (int l = 0; l < 4; l++) squares += answer[l] * answer[l];
#pragma unroll
        for (int by = 1; by < 8; by *= 2) squares += __shfl_xor_sync(0xffu, squares, by);
        if (t == 0) square = squares;
    }
    cluster_arrive();
    if (warp == 0) value_in.advance(windows, of_value);
#pragma unroll
    for (int i = 0; i < 8; i++) {
#pragma unroll
        for (int l = 0; l < 4; l++) state[i][l] = decay * state[i][l] + of_key_rows[i] * d[l];
        *(float4*)(own + i * DIM) = make_float4(state[i][0], state[i][1], state[i][2], state[i][3]);
    }
    cluster_wait();

    // Everybody has read the windows of the key head.
    if (blockIdx.x == 0) query_in.advance(windows, of_query), key_in.advance(windows, of_key);
    if (t < 8) {
        float squares = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) squares += read_in_cluster(in_block(shared_address(&square), 4 * which + i));
        const float scale = rsqrtf(squares / DIM + norm_eps);
        const E* gate = from + 2 * DIM + 2 * DIM + which * DIM + first + t * 4;
        E* to = o + (s * HV + h) * DIM + first + t * 4;
#pragma unroll
        for (int l = 0; l < 4; l++) {
            const float normed = rounded<bf16>(norm[first + t * 4 + l] * rounded<bf16>(answer[l] * scale));
            to[l] = store<bf16>(normed * silu(load(gate[l])));
        }
    }
    cluster_arrive();
    cluster_wait();  // Nobody reads here any more.
}
