// What the whole model needs beside its ops: steps between them, fused, with everything that the host would
// have to say of single tokens read from the device. The residual stream is f32; activations are E, weights W.
//
// engine_synthesise:    a synthetic weight tensor; one thread per element.
// engine_embedding:     rows of the embedding, widened; one thread per element.
// engine_norm:          an addition to the residual stream and its norm; one block per row.
// engine_linear_one:    a projection of one token; one warp per output.
// engine_linear_many:   the same of eight tokens at a time, in the same order: the bits are equal.
// engine_delta_in:      what the delta rule reads: projections ungrouped, convolution, gates; one thread per
//                       token and channel. Where every sequence has one token it leaves the windows behind, too.
// engine_conv_state:    the last raw inputs of the convolution; one thread per sequence and channel.
// engine_gated_norm:    the gated norm of the delta rule's output; one warp per head.
// engine_attention_in:  norm and rotation of queries and keys, keys and values into the cache; one block per
//                       token and head.
// engine_route:         the experts of a token, and how far the shared one opens, which may be a slot behind them,
//                       of the expert after all others; two warps per token.
// engine_experts_up:    silu(gate) * up of the experts of a token; one warp per token, expert and channel.
// engine_experts_down:  their weighted sum, in the order in which they were chosen; one block per token and four
//                       channels, one warp per expert.
// engine_gather:        rows of a matrix; one thread per element.
// engine_repeat:        a few rows again and again; one thread per element.
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

// Rows `first` to `first + N` become those of x, row after row.
extern "C" __global__ void engine_repeat(
    E* __restrict__ o,        // rows of D
    const E* __restrict__ x,  // [M, D]
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
    constexpr int KEPT = 8;  // Numbers of a thread that stay in registers.
    let_next_start();
    wait_for_previous();
    const size_t row = (size_t)blockIdx.x * D;
    float *x = x_out + row, own[KEPT], squares = 0;
    const auto value_at = [&](int d) {
        float value = begins ? 0 : x[d];
        if (add) value += add[row + d];
        if (narrow) value += load(narrow[row + d]);
        if (more) value += load(more[row + d]);
        return value;
    };
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        const int d = threadIdx.x + i * blockDim.x;
        own[i] = d < D ? value_at(d) : 0;
    }
#pragma unroll
    for (int i = 0; i < KEPT; i++) squares += own[i] * own[i];
    for (int d = threadIdx.x + KEPT * blockDim.x; d < D; d += blockDim.x) {
        const float value = value_at(d);
        x[d] = value;
        squares += value * value;
    }
    const float scale = rsqrtf(sum_of_block(squares) / D + eps);
    E* to = o + (size_t)blockIdx.x * stride;
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        const int d = threadIdx.x + i * blockDim.x;
        if (d < D) x[d] = own[i], to[d] = store<E>(own[i] * scale * (1 + weight[d]));
    }
    for (int d = threadIdx.x + KEPT * blockDim.x; d < D; d += blockDim.x)
        to[d] = store<E>(x[d] * scale * (1 + weight[d]));
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
    const int all = channels + HV * V + HV;
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const int n = i / all;
    int c = i % all;
    if (N <= n) return;
    if (c < channels) {
        const int s = sequence_of(cu_seqlens, S, n), place = place_of(c, HK, K, values);
        const long long begin = cu_seqlens[s];
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
        const E o = store<E>(silu(sum));
        if (c < HK * K) q[(size_t)n * HK * K + c] = o;
        else if (c < 2 * HK * K) k[(size_t)n * HK * K + c - HK * K] = o;
        else v[(size_t)n * HV * V + c - 2 * HK * K] = o;
        return;
    }
    c -= channels;
    if (c < HV * V) {
        const int place = c / values * (2 * K + 2 * values) + 2 * K + values + c % values;
        z[(size_t)n * HV * V + c] = projected[(size_t)n * width + place];
        return;
    }
    // Of a value head; of each key head there are first all b and then all a.
    const int h = c - HV * V, group = HV / HK;
    const float* own = gates + (size_t)n * 2 * HV + h / group * 2 * group + h % group;
    const float x = own[group] + dt_bias[h];
    // ln(1 + e^x), of which nothing but x is left above 20.
    const float time = x > 20 ? x : log1pf(expf(x));
    g[(size_t)n * HV + h] = -expf(a_log[h]) * time;
    beta[(size_t)n * HV + h] = store<E>(sigmoid(own[0]));
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

extern "C" __global__ void engine_attention_in(
    E* __restrict__ q,                        // [N, HQ, H]
    E* __restrict__ gate,                     // [N, HQ, H]
    E* __restrict__ k_cache,                  // rows of [HKV, H]
    E* __restrict__ v_cache,                  // rows of [HKV, H]
    const E* __restrict__ both,               // [N, HQ, 2 H]
    const E* __restrict__ keys,               // [N, HKV, H]
    const E* __restrict__ values,             // [N, HKV, H]
    const float* __restrict__ q_norm,         // [H]
    const float* __restrict__ k_norm,         // [H]
    const float* __restrict__ inv_freq,       // [R / 2]
    const long long* __restrict__ positions,  // [N]
    const long long* __restrict__ rows,       // [N] where each token goes in the cache
    float eps,
    float attention_factor,
    int HQ,
    int HKV,
    int H,
    int R)
{
    extern __shared__ float head[];  // [H]
    let_next_start();
    wait_for_previous();
    const int n = blockIdx.x / (HQ + HKV), h = blockIdx.x % (HQ + HKV);
    const bool query = h < HQ;
    const size_t kept = ((size_t)rows[n] * HKV + h - HQ) * H, own = ((size_t)n * HKV + h - HQ) * H;
    const E* from = query ? both + ((size_t)n * HQ + h) * 2 * H : keys + own;
    E* to = query ? q + ((size_t)n * HQ + h) * H : k_cache + kept;

    float squares = 0;
    for (int c = threadIdx.x; c < H; c += blockDim.x) squares += load(from[c]) * load(from[c]);
    const float scale = rsqrtf(sum_of_block(squares) / H + eps);
    const float* weight = query ? q_norm : k_norm;
    for (int c = threadIdx.x; c < H; c += blockDim.x) {
        head[c] = rounded<E>(load(from[c]) * scale * (1 + weight[c]));
        if (query) gate[((size_t)n * HQ + h) * H + c] = from[H + c];
        else v_cache[kept + c] = values[own + c];
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
        to[c] = store<E>(x);
    }
}

// A number that is larger where a logit comes earlier: larger first, what is no number last; 0 is none.
__device__ inline unsigned order_of(float x)
{
    const unsigned bits = __float_as_uint(x + 0.0f);  // One zero.
    return x != x ? 1 : bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

// The experts of a token by one warp, whose lanes keep SLOTS logits each, or none and read them again. Ties go to
// the lower id.
template <int SLOTS>
__device__ void choose(long long* ids, float* weights, float* margin, const float* row, const long long* forced,
                       int norm_topk_prob, int A, int EXPERTS)
{
    const int lane = threadIdx.x % WARP;
    unsigned keys[SLOTS ? SLOTS : 1];
#pragma unroll
    for (int s = 0; s < SLOTS; s++) keys[s] = s * WARP + lane < EXPERTS ? order_of(row[s * WARP + lane]) : 0;
    unsigned last = ~0u;
    int last_id = -1;
    float largest = 0, before = 0, chosen = 0, all = 0;
    for (int a = 0; a <= A; a++) {
        unsigned best = 0;
        int of_best = 0;
#pragma unroll
        for (int s = 0; s < SLOTS; s++)
            if (best < keys[s]) best = keys[s], of_best = s * WARP + lane;
        if (SLOTS == 0) {
            for (int e = lane; e < EXPERTS; e += WARP) {
                const unsigned key = order_of(row[e]);
                const bool left = key < last || (key == last && last_id < e);
                if (left && best < key) best = key, of_best = e;
            }
        }
        const unsigned top = __reduce_max_sync(~0u, best);
        if (top == 0) {
            // All have been chosen.
            if (lane == 0) *margin = INFINITY;
            break;
        }
        const int id = __reduce_min_sync(~0u, best == top ? of_best : EXPERTS);
        const float x = row[id];
        if (a == 0) {
            largest = x;
            if (!norm_topk_prob) {
                for (int e = lane; e < EXPERTS; e += WARP) all += expf(row[e] - largest);
                all = warp_sum(all);
            }
        }
        if (a == A) {
            if (lane == 0) *margin = before - x;
            break;
        }
#pragma unroll
        for (int s = 0; s < SLOTS; s++)
            if (s * WARP + lane == id) keys[s] = 0;
        last = top, last_id = id, before = x;
        const int own = forced ? forced[a] : id;
        const float power = expf(row[own] - largest);
        chosen += power;
        if (lane == 0) ids[a] = own, weights[a] = power;
    }
    __syncwarp();
    const float total = norm_topk_prob ? chosen : all;
    for (int a = lane; a < A; a += WARP) weights[a] /= total;
}

extern "C" __global__ void engine_route(
    long long* __restrict__ ids,           // [N, SLOTS]
    float* __restrict__ weights,           // [N, SLOTS]
    float* __restrict__ margins,           // [N]
    float* __restrict__ shared,            // [N] how far the shared expert opens
    const float* __restrict__ logits,      // [N, EXPERTS]
    const long long* __restrict__ forced,  // [N, A], or none
    const E* __restrict__ x,               // [N, D]
    const W* __restrict__ gate,            // [1, D]
    int norm_topk_prob,
    int N,
    int A,
    int SLOTS,
    int EXPERTS,
    int D)
{
    const int warp = threadIdx.x / WARP, n = blockIdx.x * (blockDim.x / WARP / 2) + warp / 2;
    let_next_start();
    wait_for_previous();
    if (N <= n) return;
    ids += (size_t)n * SLOTS;
    weights += (size_t)n * SLOTS;
    if (warp % 2) {
        float gates[1] = {};
        lane_products<1>(gates, {gate, 0, 0}, x + (size_t)n * D, D, D);
        const float open = sigmoid(warp_sum(gates[0]));
        if (threadIdx.x % WARP) return;
        shared[n] = open;
        if (A < SLOTS) ids[A] = EXPERTS, weights[A] = open;
        return;
    }
    const float* row = logits + (size_t)n * EXPERTS;
    const long long* own = forced ? forced + (size_t)n * A : 0;
    if (EXPERTS <= 512) choose<16>(ids, weights, margins + n, row, own, norm_topk_prob, A, EXPERTS);
    else if (EXPERTS <= 1024) choose<32>(ids, weights, margins + n, row, own, norm_topk_prob, A, EXPERTS);
    else choose<0>(ids, weights, margins + n, row, own, norm_topk_prob, A, EXPERTS);
}

// Slots of a token are the experts that were chosen, and one more for the shared expert, if it is done along.
extern "C" __global__ void engine_experts_up(
    E* __restrict__ hidden,                    // [N, SLOTS, F]
    const E* __restrict__ x,                   // [N, D]
    const long long* __restrict__ ids,         // [N, A]
    const W* __restrict__ gate_proj,           // [EXPERTS, F, D]
    const float* __restrict__ gate_scales,     // of codes
    const W* __restrict__ up_proj,             // [EXPERTS, F, D]
    const float* __restrict__ up_scales,       // of codes
    const W* __restrict__ shared_gate_proj,    // [F, D]
    const float* __restrict__ shared_gate_scales,  // of codes
    const W* __restrict__ shared_up_proj,      // [F, D]
    const float* __restrict__ shared_up_scales,  // of codes
    int block_rows,
    int block_cols,
    int A,
    int SLOTS,
    int F,
    int D)
{
    const int f = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, a = blockIdx.y;
    if (F <= f) return;
    const size_t n = blockIdx.z;
    const bool routed = a < A;
    const size_t e = routed ? ids[n * A + a] : 0;
    const Row gate = row_of(routed ? gate_proj : shared_gate_proj, routed ? gate_scales : shared_gate_scales, f, F, D,
                            block_rows, block_cols, e);
    const Row up = row_of(routed ? up_proj : shared_up_proj, routed ? up_scales : shared_up_scales, f, F, D, block_rows,
                          block_cols, e);
    float opens[1] = {}, passes[1] = {};
    lane_products<1>(opens, gate, x + n * D, D, D);
    lane_products<1>(passes, up, x + n * D, D, D);
    const float open = warp_sum(opens[0]), pass = warp_sum(passes[0]);
    if (threadIdx.x % WARP == 0) hidden[(n * SLOTS + a) * F + f] = store<E>(silu(open) * pass);
}

// Rows that a warp does at once.
#define ROWS 4

// o <- (o +) sum of weights down(hidden) over routed slots, and then the shared one as far as it opens.
extern "C" __global__ void engine_experts_down(
    float* __restrict__ o,                     // [N, D]
    const E* __restrict__ hidden,              // [N, SLOTS, F]
    const long long* __restrict__ ids,         // [N, A]
    const float* __restrict__ weights,         // [N, A]
    const float* __restrict__ shared,          // [N], or none where it opens all
    const W* __restrict__ down_proj,           // [EXPERTS, D, F]
    const float* __restrict__ down_scales,     // of codes
    const W* __restrict__ shared_down_proj,    // [D, F]
    const float* __restrict__ shared_down_scales,  // of codes
    int block_rows,
    int block_cols,
    int adds,
    int A,
    int SLOTS,
    int F,
    int D)
{
    extern __shared__ float parts[];  // [SLOTS, ROWS]
    const int first = blockIdx.x * ROWS, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const size_t n = blockIdx.z;
    for (int a = warp; a < SLOTS; a += blockDim.x / WARP) {
        const bool routed = a < A;
        const size_t e = routed ? ids[n * A + a] : 0;
        const E* x = hidden + (n * SLOTS + a) * F;
        Row rows[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            rows[r] = row_of(routed ? down_proj : shared_down_proj, routed ? down_scales : shared_down_scales,
                             min(first + r, D - 1), D, F, block_rows, block_cols, e);
        float sums[ROWS] = {};
        if (F % 8 == 0 && (!rows[0].scales || 3 <= rows[0].shift)) {
            for (int f = 8 * lane; f < F; f += 8 * WARP) {
                float own[8];
                eight(x + f, own);
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    float w[8], sum = 0;
                    eight(rows[r].weights + f, w);
#pragma unroll
                    for (int i = 0; i < 8; i++) sum = __fmaf_rn(own[i], w[i], sum);
                    sums[r] = rows[r].scales ? __fmaf_rn(rows[r].scales[f >> rows[r].shift], sum, sums[r])
                                             : __fadd_rn(sums[r], sum);
                }
            }
        } else {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float own[1] = {};
                lane_products<1>(own, rows[r], x, F, F);
                sums[r] = own[0];
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float sum = warp_sum(sums[r]);
            if (lane == 0) parts[a * ROWS + r] = sum;
        }
    }
    __syncthreads();
    const int d = first + threadIdx.x;
    if (ROWS <= threadIdx.x || D <= d) return;
    float all = 0;
    for (int a = 0; a < A; a++) all = __fmaf_rn(weights[n * A + a], parts[a * ROWS + threadIdx.x], all);
    if (adds) all = o[n * D + d];
    const float own = A < SLOTS ? parts[A * ROWS + threadIdx.x] : 0;
    if (A < SLOTS) all = __fadd_rn(all, shared ? rounded<E>(__fmul_rn(shared[n], own)) : own);
    o[n * D + d] = all;
}
