// What the whole model needs beside its ops: steps between them, fused, with everything that the host would
// have to say of single tokens read from the device. The residual stream is f32; activations are E, weights W.
// Sparse layers are in engine_experts.cu.
//
// engine_synthesise:    a synthetic weight tensor; one thread per element.
// engine_embedding:     rows of the embedding, widened; one thread per element.
// engine_norm:          an addition to the residual stream and its norm; one block per row.
// engine_linear_one:    a projection of one token; one warp per output.
// engine_linear_many:   the same of eight tokens at a time, in the same order: the bits are equal.
// engine_delta_in:      what the delta rule reads: projections ungrouped, convolution, gates; one thread per
//                       `together` tokens and channel. Where every sequence has one token it leaves the windows behind, too.
// engine_conv_state:    the last raw inputs of the convolution; one thread per sequence and channel.
// engine_gated_norm:    the gated norm of the delta rule's output; one warp per head.
// engine_attention_in:  norm and rotation of queries and keys, keys and values into the cache; one block per
//                       token and head.
// engine_attention_in_fp8: the same into a cache in FP8, without a scale.
// engine_sum:           what several GPUs add to the residual stream, in their order; one thread per element.
// engine_gather:        rows of a matrix; one thread per element.
// engine_greedy:        the largest logit of each row; one block of 1024 threads per row.
// engine_repeat:        a few rows again and again; one thread per byte.
// engine_read:          reads memory, to see how fast that is; every thread 16 bytes at a time.

#include "common/activation.cuh"
#include "common/early.cuh"
#include "common/rows.cuh"

// The sum of every thread's x, in one order; once in a kernel, of whole warps.
__device__ inline float sum_of_block(float x)
{
    __shared__ float sums[WARP];
    x = warp_sum(x);
    if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = x;
    __syncthreads();
    float all = 0;
    for (int i = 0; i < blockDim.x / WARP; i++) all += sums[i];
    return all;
}

__device__ inline unsigned long long mix(unsigned long long z)
{
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

// n / 1024 of an even integer as a code of float8_e4m3fn, ties to even.
__device__ inline unsigned char fp8_of(int n)
{
    const unsigned magnitude = n < 0 ? -n : n;
    if (magnitude == 0) return 0;
    // The step of a number is 2^-3 of its power of two, 2^-9 at the least: here in units of 2^-10.
    const int power = 31 - __clz(magnitude), step = power < 4 ? 1 : power - 3;
    const unsigned half = 1u << (step - 1), rest = magnitude & ((1u << step) - 1);
    unsigned steps = magnitude >> step;
    if (half < rest || (rest == half && (steps & 1))) steps += 1;
    return (n < 0 ? 0x80 : 0) | ((step - 1) * 8 + steps);
}

// What `kind` says: 0 f32, 1 bf16, 2 f16, 3 codes of FP8, 4 their scales.
extern "C" __global__ void engine_synthesise(
    unsigned char* __restrict__ o,  // elements of that kind
    int key_low,
    int key_high,
    float offset,
    float unit,
    int kind,
    int count_low,
    int count_high)
{
    const unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x;
    const unsigned long long count = (unsigned long long)(unsigned)count_high << 32 | (unsigned)count_low;
    if (count <= i) return;
    const unsigned long long key = (unsigned long long)(unsigned)key_high << 32 | (unsigned)key_low;
    const unsigned long long h = mix(key + (i + 1) * 0x9e3779b97f4a7c15);
    const int sum = (h & 0xffff) + (h >> 16 & 0xffff) + (h >> 32 & 0xffff) + (h >> 48);
    const int n = 2 * sum - 262140;
    const float value = __fadd_rn(offset, __fmul_rn((float)n, unit));
    if (kind == 0) ((float*)o)[i] = value;
    if (kind == 1) ((bf16*)o)[i] = store<bf16>(value);
    if (kind == 2) ((f16*)o)[i] = store<f16>(value);
    if (kind == 3) o[i] = fp8_of(n);
    const float scale = __fmul_rn((float)(4 + (int)(h & 7)), unit);
    if (kind == 4) ((float*)o)[i] = scale;
}

extern "C" __global__ void engine_embedding(
    float* __restrict__ o,              // [N, D]
    const long long* __restrict__ ids,  // [N]
    const W* __restrict__ table,        // [M, D]
    int N,
    int D)
{
    let_next_start();
    wait_for_previous();
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const int n = i / D, d = i % D;
    if (n < N) o[i] = bare(table[ids[n] * D + d]);
}

// Of parts in f32 or in E the sum, which may be rounded to E.
extern "C" __global__ void engine_sum(
    float* __restrict__ o,           // [N, D]
    const float* __restrict__ wide,  // [RANKS, N, D], or none
    const E* __restrict__ narrow,    // [RANKS, N, D], or none
    int rounds,
    int RANKS,
    int N,
    int D)
{
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, all = (size_t)N * D;
    if (all <= i) return;
    float sum = wide ? wide[i] : load(narrow[i]);
    for (int rank = 1; rank < RANKS; rank++)
        sum = __fadd_rn(sum, wide ? wide[rank * all + i] : load(narrow[rank * all + i]));
    o[i] = rounds ? rounded<E>(sum) : sum;
}

extern "C" __global__ void engine_gather(
    unsigned char* __restrict__ o,       // [N, D] bytes
    const unsigned char* __restrict__ x, // rows of D bytes
    const long long* __restrict__ rows,  // [N]
    int N,
    int D)
{
    let_next_start();
    wait_for_previous();
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const int n = i / D, d = i % D;
    if (n < N) o[i] = x[rows[n] * D + d];
}

// The id of the largest of M logits, of equal ones the lowest; M where one is NaN or infinite.
extern "C" __global__ void engine_greedy(
    long long* __restrict__ ids,        // [N]
    const float* __restrict__ logits,   // [N, M]
    int N,
    int M)
{
    if (N <= blockIdx.x) return;
    __shared__ float largest[32];
    __shared__ int where[32];
    const float* row = logits + (size_t)blockIdx.x * M;
    float best = -INFINITY;
    int id = M;
    bool finite = true;
#pragma unroll 8
    for (int i = threadIdx.x; i < M; i += 1024) {
        const float x = row[i];
        finite &= fabsf(x) < INFINITY;
        if (best < x) best = x, id = i;  // Later ones of a thread are higher.
    }
    const auto take = [&](float x, int i) {
        if (best < x || (best == x && i < id)) best = x, id = i;
    };
    for (int by = 16; 0 < by; by /= 2) take(__shfl_xor_sync(~0u, best, by), __shfl_xor_sync(~0u, id, by));
    if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = best, where[threadIdx.x / 32] = id;
    finite = __syncthreads_and(finite);
    if (threadIdx.x != 0) return;
    for (int i = 1; i < 32; i++) take(largest[i], where[i]);
    ids[blockIdx.x] = finite ? id : M;
}

// Rows `first` to `first + N` become those of x, row after row.
extern "C" __global__ void engine_repeat(
    unsigned char* __restrict__ o,        // rows of D bytes
    const unsigned char* __restrict__ x,  // [M, D]
    int first,
    int N,
    int M,
    int D)
{
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const int n = i / D, d = i % D;
    if (n < N) o[(size_t)(first + n) * D + d] = x[(size_t)(n % M) * D + d];
}

extern "C" __global__ void engine_read(
    unsigned* __restrict__ o,             // [1]
    const unsigned char* __restrict__ x,  // 16 N bytes
    int N)
{
    const uint4* words = (const uint4*)x;
    const long long threads = (long long)gridDim.x * blockDim.x;
    unsigned all = 0;
#pragma unroll 8
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < N; i += threads) {
        const uint4 word = words[i];
        all ^= word.x ^ word.y ^ word.z ^ word.w;
    }
    if (all == 0x9e3779b9) *o = all;  // So that it is read.
}

constexpr int KEPT = 8;  // Numbers of a thread of engine_norm that stay in registers.

template <class T> __device__ void ask(float (&to)[KEPT], const T* from, int D)
{
#pragma unroll
    for (int i = 0; i < KEPT; i++)
        if (threadIdx.x + i * blockDim.x < D) to[i] = load(from[threadIdx.x + i * blockDim.x]);
}

// x <- x + what is added (or that alone, if it begins the stream), o = x rsqrt(mean(x^2) + eps) (1 + weight).
extern "C" __global__ void engine_norm(
    E* __restrict__ o,                 // [N, ...] rows `stride` apart
    float* __restrict__ x_out,         // [N, D]
    const float* __restrict__ add,     // [N, D], or none
    const E* __restrict__ narrow,      // [N, D], or none
    const E* __restrict__ more,        // [N, D], or none
    const float* __restrict__ weight,  // [D]
    float eps,
    int begins,
    int stride,
    int D)
{
    float weights[KEPT], own[KEPT], more_of[3][KEPT] = {};
    const int stride_of = blockDim.x, first = threadIdx.x, rest = first + KEPT * stride_of;
#pragma unroll
    for (int i = 0; i < KEPT; i++) weights[i] = first + i * stride_of < D ? weight[first + i * stride_of] : 0;
    wait_for_previous();
    const size_t row = (size_t)blockIdx.x * D;
    float *x = x_out + row, squares = 0;
    // Everything is asked for before anything is waited for.
#pragma unroll
    for (int i = 0; i < KEPT; i++)
        own[i] = !begins && first + i * stride_of < D ? x[first + i * stride_of] : 0;
    if (add) ask(more_of[0], add + row, D);
    if (narrow) ask(more_of[1], narrow + row, D);
    if (more) ask(more_of[2], more + row, D);
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        own[i] = own[i] + more_of[0][i] + more_of[1][i] + more_of[2][i];
        squares += own[i] * own[i];
    }
    for (int d = rest; d < D; d += stride_of) {
        float value = begins ? 0 : x[d];
        if (add) value += add[row + d];
        if (narrow) value += load(narrow[row + d]);
        if (more) value += load(more[row + d]);
        x[d] = value;
        squares += value * value;
    }
    const float scale = rsqrtf(sum_of_block(squares) / D + eps);
    let_next_start();
    E* to = o + (size_t)blockIdx.x * stride;
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        const int d = first + i * stride_of;
        if (d < D) x[d] = own[i], to[d] = store<E>(own[i] * scale * (1 + weights[i]));
    }
    for (int d = rest; d < D; d += stride_of) to[d] = store<E>(x[d] * scale * (1 + weight[d]));
}

// Where the result goes: o in E, or `wide` in f32, of which `rounds` says whether it is a number of E.
template <int T>
__device__ void project(E* o, float* wide, int rounds, const E* x, const Row& row, int first, int m, int N, int M,
                        int D)
{
    float sums[T] = {};
    const int tokens = min(T, N - first);
    if (tokens == T) {
        lane_products<T>(sums, row, x + (size_t)first * D, D, D);
    } else {
        // The last few, each in the same order as ever.
        for (int t = 0; t < tokens; t++) {
            float sum[1] = {};
            lane_products<1>(sum, row, x + (size_t)(first + t) * D, D, D);
#pragma unroll
            for (int i = 0; i < T; i++)
                if (i == t) sums[i] = sum[0];
        }
    }
#pragma unroll
    for (int t = 0; t < T; t++) {
        const float sum = warp_sum(sums[t]);
        if (threadIdx.x % WARP != 0 || tokens <= t) continue;
        const size_t at = (size_t)(first + t) * M + m;
        if (wide) wide[at] = rounds ? rounded<E>(sum) : sum;
        else o[at] = store<E>(sum);
    }
}

extern "C" __global__ void engine_linear_one(
    E* __restrict__ o,             // [N, M], or none
    float* __restrict__ wide,      // [N, M], or none
    const E* __restrict__ x,       // [N, D]
    const W* __restrict__ weight,  // [M, D]
    const float* __restrict__ scales,  // of codes
    int block_rows,
    int block_cols,
    int rounds,
    int N,
    int M,
    int D)
{
    const int m = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (M <= m) return;
    project<1>(o, wide, rounds, x, row_of(weight, scales, m, M, D, block_rows, block_cols), blockIdx.y, m, N, M, D);
}

extern "C" __global__ void engine_linear_many(
    E* __restrict__ o,             // [N, M], or none
    float* __restrict__ wide,      // [N, M], or none
    const E* __restrict__ x,       // [N, D]
    const W* __restrict__ weight,  // [M, D]
    const float* __restrict__ scales,  // of codes
    int block_rows,
    int block_cols,
    int rounds,
    int N,
    int M,
    int D)
{
    const int m = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (M <= m) return;
    project<8>(o, wide, rounds, x, row_of(weight, scales, m, M, D, block_rows, block_cols), 8 * blockIdx.y, m, N, M, D);
}

// Where a channel of the convolution stands in a row of projections: HK groups of query, key, values, and
// gates of the values.
__device__ inline int place_of(int c, int HK, int K, int values)
{
    const int group = 2 * K + 2 * values;
    if (c < HK * K) return c / K * group + c % K;
    if (c < 2 * HK * K) return (c - HK * K) / K * group + K + c % K;
    c -= 2 * HK * K;
    return c / values * group + 2 * K + c % values;
}

__device__ inline int sequence_of(const long long* cu_seqlens, int S, int n)
{
    // The last one that begins at or before n: empty ones begin where the next does.
    int low = 0, high = S - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (cu_seqlens[middle] <= n) low = middle;
        else high = middle - 1;
    }
    return low;
}

extern "C" __global__ void engine_delta_in(
    E* __restrict__ q,                         // [N, HK, K]
    E* __restrict__ k,                         // [N, HK, K]
    E* __restrict__ v,                         // [N, HV, V]
    E* __restrict__ z,                         // [N, HV, V]
    float* __restrict__ g,                     // [N, HV]
    E* __restrict__ beta,                      // [N, HV]
    const E* __restrict__ projected,           // [N, HK (2 K + 2 HV / HK V)]
    const float* __restrict__ gates,           // [N, 2 HV]
    const float* __restrict__ conv,            // [C, W]
    const float* __restrict__ a_log,           // [HV]
    const float* __restrict__ dt_bias,         // [HV]
    E* __restrict__ state,                     // [S, C, TAPS - 1]
    const long long* __restrict__ cu_seqlens,  // [S + 1]
    int advances,
    int together,
    int N,
    int S,
    int HK,
    int HV,
    int K,
    int V,
    int TAPS)
{
    let_next_start();
    wait_for_previous();
    const int values = HV / HK * V, channels = 2 * HK * K + HV * V, width = HK * (2 * K + 2 * values);
    int c = blockIdx.y * blockDim.x + threadIdx.x;
    const int first = blockIdx.x * together, end = min(first + together, N);
    if (c < channels) {
        const int place = place_of(c, HK, K, values);
        E* const to = c < HK * K ? q + c : c < 2 * HK * K ? k + (c - HK * K) : v + (c - 2 * HK * K);
        const int apart = c < 2 * HK * K ? HK * K : HV * V;
        int s = sequence_of(cu_seqlens, S, first);
        long long begin = cu_seqlens[s], after = cu_seqlens[s + 1];
        if (TAPS == 4 && begin + 3 <= first && end <= after) {
            // All of one sequence, and what is before too: what was read is kept.
            const E* from = projected + (size_t)(first - 3) * width + place;
            float x[4] = {load(from[0]), load(from[width]), load(from[2 * width])}, own[4];
            for (int j = 0; j < 4; j++) own[j] = conv[c * 4 + j];
            from += 3 * (size_t)width;
            E* o = to + (size_t)first * apart;
#pragma unroll 4
            for (int n = first; n < end; n++, from += width, o += apart) {
                x[3] = load(*from);
                float sum = 0;
                for (int j = 0; j < 4; j++) sum += own[j] * x[j];
                for (int j = 0; j < 3; j++) x[j] = x[j + 1];
                *o = store<E>(silu(sum));
            }
            return;
        }
        for (int n = first; n < end; n++) {
            while (after <= n) begin = after, after = cu_seqlens[++s + 1];
            E* before = state + ((size_t)s * channels + c) * (TAPS - 1);
            float sum = 0;
            for (int j = 0; j < TAPS; j++) {
                const long long t = n - (TAPS - 1) + j;
                const float x = load(begin <= t ? projected[t * width + place] : before[t - begin + (TAPS - 1)]);
                sum += conv[c * TAPS + j] * x;
            }
            if (advances) {
                for (int j = 0; j + 2 < TAPS; j++) before[j] = before[j + 1];
                if (1 < TAPS) before[TAPS - 2] = projected[(size_t)n * width + place];
            }
            to[(size_t)n * apart] = store<E>(silu(sum));
        }
        return;
    }
    c -= channels;
    if (c < HV * V) {
        const int place = c / values * (2 * K + 2 * values) + 2 * K + values + c % values;
        for (int n = first; n < end; n++) z[(size_t)n * HV * V + c] = projected[(size_t)n * width + place];
        return;
    }
    // Of a value head; of each key head there are first all b and then all a.
    const int h = c - HV * V, group = HV / HK;
    if (HV <= h) return;
    for (int n = first; n < end; n++) {
        const float* own = gates + (size_t)n * 2 * HV + h / group * 2 * group + h % group;
        const float x = own[group] + dt_bias[h];
        // ln(1 + e^x), of which nothing but x is left above 20.
        const float time = x > 20 ? x : log1pf(expf(x));
        g[(size_t)n * HV + h] = -expf(a_log[h]) * time;
        beta[(size_t)n * HV + h] = store<E>(sigmoid(own[0]));
    }
}

extern "C" __global__ void engine_conv_state(
    E* __restrict__ state_out,                 // [S, C, TAPS - 1]
    const E* __restrict__ projected,           // [N, HK (2 K + 2 HV / HK V)]
    const long long* __restrict__ cu_seqlens,  // [S + 1]
    int S,
    int HK,
    int HV,
    int K,
    int V,
    int TAPS)
{
    const int values = HV / HK * V, channels = 2 * HK * K + HV * V, width = HK * (2 * K + 2 * values);
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const int s = i / channels, c = i % channels;
    if (S <= s) return;
    const long long begin = cu_seqlens[s], tokens = cu_seqlens[s + 1] - begin;
    E* state = state_out + i * (TAPS - 1);
    // Columns move towards the older end; what is read has not been written yet.
    for (int j = 0; j < TAPS - 1; j++) {
        const long long at = tokens + j;
        state[j] = at < TAPS - 1 ? state[at]
                                 : projected[(begin + at - (TAPS - 1)) * width + place_of(c, HK, K, values)];
    }
}

extern "C" __global__ void engine_gated_norm(
    E* __restrict__ o,                 // [N, V]
    const E* __restrict__ x,           // [N, V]
    const E* __restrict__ z,           // [N, V]
    const float* __restrict__ weight,  // [V]
    float eps,
    int N,
    int V)
{
    let_next_start();
    wait_for_previous();
    const int n = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (N <= n) return;
    const size_t row = (size_t)n * V;
    float squares = 0;
    for (int v = lane; v < V; v += WARP) squares += load(x[row + v]) * load(x[row + v]);
    const float scale = rsqrtf(warp_sum(squares) / V + eps);
    for (int v = lane; v < V; v += WARP) {
        const float normed = rounded<E>(weight[v] * rounded<E>(load(x[row + v]) * scale));
        o[row + v] = store<E>(normed * silu(load(z[row + v])));
    }
}

// A number of E where a cache keeps it: as it is, or as the nearest code of FP8.
__device__ inline void keep(E* to, E x) { *to = x; }
__device__ inline void keep(unsigned char* to, E x) { *to = fp8_code(load(x)); }

template <class C>
__device__ void attention_in(E* q, E* gate, C* k_cache, C* v_cache, const E* both, const E* keys, const E* values,
                             const float* q_norm, const float* k_norm, const float* inv_freq,
                             const long long* positions, const long long* rows, float eps, float attention_factor,
                             int of_queries, int of_keys, int HQ, int HKV, int H, int R)
{
    extern __shared__ float head[];  // [H]
    wait_for_previous();
    const int n = blockIdx.x / (HQ + HKV), h = blockIdx.x % (HQ + HKV);
    const bool query = h < HQ;
    const size_t kept = ((size_t)rows[n] * HKV + h - HQ) * H, own = (size_t)n * of_keys + (h - HQ) * H;
    const E* from = query ? both + (size_t)n * of_queries + h * 2 * H : keys + own;
    E* const to = q + ((size_t)n * HQ + h) * H;

    float squares = 0;
    for (int c = threadIdx.x; c < H; c += blockDim.x) squares += load(from[c]) * load(from[c]);
    const float scale = rsqrtf(sum_of_block(squares) / H + eps);
    let_next_start();
    const float* weight = query ? q_norm : k_norm;
    for (int c = threadIdx.x; c < H; c += blockDim.x) {
        head[c] = rounded<E>(load(from[c]) * scale * (1 + weight[c]));
        if (query) gate[((size_t)n * HQ + h) * H + c] = from[H + c];
        else keep(v_cache + kept + c, values[own + c]);
    }
    __syncthreads();
    for (int c = threadIdx.x; c < H; c += blockDim.x) {
        float x = head[c];
        if (c < R) {
            const bool second = R / 2 <= c;
            const int pair = second ? c - R / 2 : c;
            const float angle = __fmul_rn((float)positions[n], inv_freq[pair]);
            const float turned = cosf(angle) * attention_factor, across = sinf(angle) * attention_factor;
            const float other = head[second ? pair : pair + R / 2];
            x = second ? x * turned + other * across : x * turned - other * across;
        }
        if (query) to[c] = store<E>(x);
        else keep(k_cache + kept + c, store<E>(x));
    }
}

extern "C" __global__ void engine_attention_in(
    E* __restrict__ q,                        // [N, HQ, H]
    E* __restrict__ gate,                     // [N, HQ, H]
    E* __restrict__ k_cache,                  // rows of [HKV, H]
    E* __restrict__ v_cache,                  // rows of [HKV, H]
    const E* __restrict__ both,               // rows of [HQ, 2 H], `of_queries` apart
    const E* __restrict__ keys,               // rows of [HKV, H], `of_keys` apart
    const E* __restrict__ values,             // likewise
    const float* __restrict__ q_norm,         // [H]
    const float* __restrict__ k_norm,         // [H]
    const float* __restrict__ inv_freq,       // [R / 2]
    const long long* __restrict__ positions,  // [N]
    const long long* __restrict__ rows,       // [N] where each token goes in the cache
    float eps,
    float attention_factor,
    int of_queries,
    int of_keys,
    int HQ,
    int HKV,
    int H,
    int R)
{
    attention_in(q, gate, k_cache, v_cache, both, keys, values, q_norm, k_norm, inv_freq, positions, rows, eps,
                 attention_factor, of_queries, of_keys, HQ, HKV, H, R);
}

extern "C" __global__ void engine_attention_in_fp8(
    E* __restrict__ q,                        // [N, HQ, H]
    E* __restrict__ gate,                     // [N, HQ, H]
    unsigned char* __restrict__ k_cache,      // rows of [HKV, H]
    unsigned char* __restrict__ v_cache,      // rows of [HKV, H]
    const E* __restrict__ both,               // rows of [HQ, 2 H], `of_queries` apart
    const E* __restrict__ keys,               // rows of [HKV, H], `of_keys` apart
    const E* __restrict__ values,             // likewise
    const float* __restrict__ q_norm,         // [H]
    const float* __restrict__ k_norm,         // [H]
    const float* __restrict__ inv_freq,       // [R / 2]
    const long long* __restrict__ positions,  // [N]
    const long long* __restrict__ rows,       // [N] where each token goes in the cache
    float eps,
    float attention_factor,
    int of_queries,
    int of_keys,
    int HQ,
    int HKV,
    int H,
    int R)
{
    attention_in(q, gate, k_cache, v_cache, both, keys, values, q_norm, k_norm, inv_freq, positions, rows, eps,
                 attention_factor, of_queries, of_keys, HQ, HKV, H, R);
}
