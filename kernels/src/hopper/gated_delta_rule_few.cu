// Gated delta rule, K = V = 128, of few tokens, for decoding and for tokens to be verified: the state is read
// once and written once, at the speed of memory. What is computed is told in ../gated_delta_rule.cu. All is f32.
//
// gated_delta_rule_few: any number of tokens one by one, meant for 1 to 8. Grid (S x HV, 4), 128 threads. The
//     state is read once and written once; state_out may be state_in.

#include "common/delta_rule.cuh"
#include "common/early.cuh"

// Four numbers of a row, of 16 bits or of 32.
template <class T> __device__ inline float4 load_4(const T* from)
{
    const uint2 pairs = *(const uint2*)from;
    T x[4];
    x[0].bits = pairs.x & 0xffff, x[1].bits = pairs.x >> 16, x[2].bits = pairs.y & 0xffff, x[3].bits = pairs.y >> 16;
    return make_float4(load(x[0]), load(x[1]), load(x[2]), load(x[3]));
}

template <> __device__ inline float4 load_4(const f32* from) { return *(const float4*)from; }

__device__ inline float dot(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }

const int FEW = 8;

// 32 columns of a state by 128 threads: a thread has 4 of them, and 8 rows.
//
// The answer is that of the decayed state and what the write adds to it, (q k') d: both products with the
// state are then taken at once, and the threads meet once a token.
__device__ inline void walk(E* o, float* state_out, const E* q, const E* k, const E* v, const float* g,
                            const E* beta, const float* state_in, long long begin, long long end, int h, int HK,
                            int HV, float eps, int plant)
{
    __shared__ __align__(16) float keys[FEW][DIM], queries[FEW][DIM], values[FEW][32], decays[FEW], writes[FEW],
        both[FEW];
    __shared__ __align__(16) float sums[2][4][8][8];  // two, so that threads wait once a token
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, columns = lane % 8;
    const int row = threadIdx.x / 8 * 8, column = blockIdx.y * 32, head = h / (HV / HK);
    const size_t own = (size_t)row * DIM + column + columns * 4;
    float state[8][4];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float4 x = *(const float4*)(state_in + own + i * DIM);
        state[i][0] = x.x, state[i][1] = x.y, state[i][2] = x.z, state[i][3] = x.w;
    }

    for (long long first = begin; first < end; first += FEW) {
        const int n = end - first < FEW ? (int)(end - first) : FEW;
        if (first != begin) __syncthreads();
        // A warp has a token.
        for (int i = warp; i < n; i += 4) {
            const long long t = first + i;
            const float4 key = load_4(k + (t * HK + head) * DIM + lane * 4);
            const float4 query = load_4(q + (t * HK + head) * DIM + lane * 4);
            values[i][lane] = load(v[(t * HV + h) * DIM + column + lane]);
            float gate = g[t * HV + h];
            if (plant == GATE_OFF_BY_ONE) gate = t == begin ? 0 : g[(t - 1) * HV + h];
            if (plant == DECAY_DROPPED_AT_EACH_CHUNK && (t - begin) % 64 == 0) gate = 0;
            float kk = dot(key, key), qq = dot(query, query), kq = dot(key, query);
#pragma unroll
            for (int by = 1; by < 32; by *= 2) {
                kk += __shfl_xor_sync(~0u, kk, by);
                qq += __shfl_xor_sync(~0u, qq, by);
                kq += __shfl_xor_sync(~0u, kq, by);
            }
            const float on_key = inverse_norm(kk, eps, plant);
            const float scale = plant == QUERY_NOT_SCALED ? 1 : 0.08838834764831845f;
            const float on_query = inverse_norm(qq, eps, plant) * scale;
            *(float4*)&keys[i][lane * 4] = make_float4(key.x * on_key, key.y * on_key, key.z * on_key, key.w * on_key);
            *(float4*)&queries[i][lane * 4] =
                make_float4(query.x * on_query, query.y * on_query, query.z * on_query, query.w * on_query);
            if (lane == 0) {
                decays[i] = expf(gate), writes[i] = load(beta[t * HV + h]);
                both[i] = plant == ANSWER_BEFORE_WRITE ? 0 : kq * on_key * on_query;
            }
        }
        if (plant == INITIAL_STATE_IGNORED && first == begin)
#pragma unroll
            for (int i = 0; i < 32; i++) state[i / 4][i % 4] = 0;
        __syncthreads();

        for (int t = 0; t < n; t++) {
            float key[8], sum[8] = {};
#pragma unroll
            for (int i = 0; i < 8; i += 4) {
                const float4 a = *(const float4*)&keys[t][row + i], b = *(const float4*)&queries[t][row + i];
                const float query[4] = {b.x, b.y, b.z, b.w};
                key[i] = a.x, key[i + 1] = a.y, key[i + 2] = a.z, key[i + 3] = a.w;
#pragma unroll
                for (int j = 0; j < 4; j++)
#pragma unroll
                    for (int l = 0; l < 4; l++)
                        sum[l] += state[i + j][l] * key[i + j], sum[4 + l] += state[i + j][l] * query[j];
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
            float(*const all)[8][8] = sums[t & 1];
            *(float2*)&all[warp][columns][lane / 16 * 4 + lane / 8 % 2 * 2] = make_float2(sum[0], sum[1]);
            __syncthreads();

            const float decay = decays[t], write = writes[t];
            float on_said = write * decay;
            if (plant == NO_DELTA_RULE) on_said = 0;
            if (plant == BETA_ON_VALUE_ONLY) on_said = decay;
            if (plant == PREDICTION_BEFORE_DECAY) on_said = write;
            const float(*const part)[8] = &all[0][columns];  // of a warp; the next one's stands 8 on
            float d[4];
#pragma unroll
            for (int l = 0; l < 4; l++) {
                const float said = (part[0][l] + part[8][l]) + (part[16][l] + part[24][l]);
                d[l] = write * values[t][columns * 4 + l] - on_said * said;
            }
            if (threadIdx.x < 8)
#pragma unroll
                for (int l = 0; l < 4; l++) {
                    const float answer = (part[0][4 + l] + part[8][4 + l]) + (part[16][4 + l] + part[24][4 + l]);
                    o[((first + t) * HV + h) * DIM + column + columns * 4 + l] =
                        store<E>(decay * answer + both[t] * d[l]);
                }
#pragma unroll
            for (int i = 0; i < 8; i++)
#pragma unroll
                for (int l = 0; l < 4; l++) {
                    state[i][l] = decay * state[i][l] + key[i] * d[l];
                    if (plant == STATE_IN_BF16) state[i][l] = rounded<bf16>(state[i][l]);
                }
        }
    }

#pragma unroll
    for (int i = 0; i < 8; i++)
        *(float4*)(state_out + own + i * DIM) = make_float4(state[i][0], state[i][1], state[i][2], state[i][3]);
}

extern "C" __global__ __launch_bounds__(128, 7) void gated_delta_rule_few(
    E* __restrict__ o,                         // [N, HV, V]
    float* state_out,                          // [S, HV, K, V]
    const E* __restrict__ q,                   // [N, HK, K]
    const E* __restrict__ k,                   // [N, HK, K]
    const E* __restrict__ v,                   // [N, HV, V]
    const float* __restrict__ g,               // [N, HV]
    const E* __restrict__ beta,                // [N, HV]
    const float* state_in,                     // [S, HV, K, V]
    const long long* __restrict__ cu_seqlens,  // [S + 1]
    float eps,
    int HK,
    int HV,
    int plant)
{
    wait_for_previous();
    const int s = blockIdx.x / HV, h = blockIdx.x % HV;
    const size_t state = (size_t)blockIdx.x * DIM * DIM;
    walk(o, state_out + state, q, k, v, g, beta, state_in + state, cu_seqlens[s], cu_seqlens[s + 1], h, HK, HV, eps,
         plant);
}
