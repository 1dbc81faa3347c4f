/* h = x + residual, o = h * rsqrt(mean(h^2) + eps) * (1 + weight).
 *
 * x, residual, o, h: [N, D]; weight: [D], stored minus one. residual and h are absent in some problems. */
#include "karat.h"

#include <math.h>

KARAT_DEFINE_ABI

int karat_rms_norm(const karat_call *call) {
    const karat_tensor *x_in = karat_input(call, "x");
    const karat_tensor *residual_in = karat_input(call, "residual");
    const karat_tensor *h_out = karat_output(call, "h");
    const float *x = x_in->data;
    const float *residual = residual_in ? residual_in->data : NULL;
    const float *weight = karat_input(call, "weight")->data;
    float *o = karat_output(call, "o")->data;
    const float eps = (float)karat_scalar(call, "eps");
    const int64_t n = x_in->shape[0], d = x_in->shape[1];

    if (x_in->dtype != KARAT_F32) return karat_fail(call, "only f32");
    for (int64_t i = 0; i < n; i++) {
        float sum = 0;
        for (int64_t j = 0; j < d; j++) {
            /* The sum that is normed is written where it is asked for. */
            float h = x[i * d + j] + (residual ? residual[i * d + j] : 0);
            if (h_out) ((float *)h_out->data)[i * d + j] = h;
            o[i * d + j] = h;
            sum += h * h;
        }
        float scale = 1 / sqrtf(sum / (float)d + eps);
        for (int64_t j = 0; j < d; j++) o[i * d + j] *= scale * (1 + weight[j]);
    }
    return 0;
}
