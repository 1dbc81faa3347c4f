#include "common/stored.cuh"

// What kernels of the gated delta rule for the model's channels share.

enum Plant {
    HONEST,
    DECAY_DROPPED_AT_EACH_CHUNK,
    GATE_OFF_BY_ONE,
    NO_DELTA_RULE,
    BETA_ON_VALUE_ONLY,
    EPS_ON_MEAN,
    EPS_OUTSIDE_ROOT,
    NOT_NORMED,
    QUERY_NOT_SCALED,
    STATE_IN_BF16,
    INITIAL_STATE_IGNORED,
    PREDICTION_BEFORE_DECAY,
    ANSWER_BEFORE_WRITE,
};

const int DIM = 128;  // K and V

// What makes the length of a key or a query one, of its squares' sum.
__device__ inline float inverse_norm(float squares, float eps, int plant)
{
    if (plant == NOT_NORMED) return 1;
    if (plant == EPS_ON_MEAN) return rsqrtf(squares + DIM * eps);
    if (plant == EPS_OUTSIDE_ROOT) return 1 / (sqrtf(squares) + eps);
    return rsqrtf(squares + eps);
}
