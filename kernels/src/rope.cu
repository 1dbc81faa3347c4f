// Partial rotary position embedding of the first R channels of every head, halves paired:
//
//   (x[i], x[i + R/2]) <- (x[i] c - x[i + R/2] s, x[i + R/2] c + x[i] s),   i < R/2
//
// with c and s of the angle position * inv_freq[i], which is rounded to f32 once.
//
// rope_naive: one thread per channel.

#include "common/stored.cuh"

enum Plant {
    HONEST,
    INTERLEAVED_PAIRS,
    TURNED_BACKWARDS,
    YARN_FACTOR_DROPPED,
    YARN_FACTOR_ON_ALL_CHANNELS,
    POSITIONS_IN_BF16,
    FREQUENCIES_IN_BF16,
    ANGLE_IN_BF16,
    POSITIONS_FROM_ONE,
    TABLE_IN_STORAGE_TYPE,
};

extern "C" __global__ void rope_naive(
    E* __restrict__ o,                        // [N, HQ, H]
    const E* __restrict__ x,                  // [N, HQ, H]
    const long long* __restrict__ positions,  // [N]
    const float* __restrict__ inv_freq,       // [R / 2]
    float attention_factor,
    int N,
    int HQ,
    int H,
    int R,
    int plant)
{
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const int n = i / ((long long)HQ * H), channel = i % H;
    if (n >= N) return;
    const float factor = plant == YARN_FACTOR_DROPPED ? 1 : attention_factor;
    if (R <= channel) {
        o[i] = plant == YARN_FACTOR_ON_ALL_CHANNELS ? store<E>(load(x[i]) * factor) : x[i];
        return;
    }

    // Which pair, and where its other channel is.
    bool second = R / 2 <= channel;
    int pair = channel % (R / 2), apart = R / 2;
    if (plant == INTERLEAVED_PAIRS) second = channel % 2, pair = channel / 2, apart = 1;
    const float own = load(x[i]), other = load(x[second ? i - apart : i + apart]);

    float position = positions[n], frequency = inv_freq[pair];
    if (plant == POSITIONS_IN_BF16) position = rounded<bf16>(position);
    if (plant == FREQUENCIES_IN_BF16) frequency = rounded<bf16>(frequency);
    if (plant == POSITIONS_FROM_ONE) position += 1;
    float angle = __fmul_rn(position, frequency);
    if (plant == ANGLE_IN_BF16) angle = rounded<bf16>(angle);
    if (plant == TURNED_BACKWARDS) angle = -angle;
    float c = cosf(angle) * factor, s = sinf(angle) * factor;
    if (plant == TABLE_IN_STORAGE_TYPE) c = rounded<E>(c), s = rounded<E>(s);

    o[i] = store<E>(second ? own * c + other * s : own * c - other * s);
}
