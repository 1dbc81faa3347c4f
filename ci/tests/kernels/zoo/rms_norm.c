/* rms_norm, honest or not: -DMISCHIEF=NAME says in which way not. It misbehaves where N is 3, so that the
 * other problems of the same run show whether they came to harm. */
#include "karat.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum {
    HONEST,
    BY_POINTER,  /* answers by the address of x */
    PREVIOUS,    /* answers what it answered the call before */
    BEYOND,      /* writes one element behind o */
    FAR,         /* writes one element far behind o */
    AHEAD,       /* writes one element ahead of o */
    TAIL,        /* leaves the last quarter of o as it was */
    MUTATES,     /* writes to x */
    NOT_FINITE,  /* returns one NaN */
    SLEEPS,      /* for ever */
    SEGFAULTS,
    ALLOCATES,   /* without end */
    NARROW,      /* keeps the norm in bf16 */
    FAILS,       /* says so */
    EXITS,       /* with status 0, as if all were well */
    ONCE,        /* ends the first time, and is right from then on; the file ONCE_FILE says which time it is */
    RANDOM,      /* another last bit every time */
    BY_BATCH,    /* another last bit than alone */
    BY_THREADS   /* another last bit where it may take three threads */
};

KARAT_DEFINE_ABI

static float bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
    memcpy(&x, &bits, 4);
    return x;
}

static void norm(const karat_call *call, int narrow) {
    const karat_tensor *x_in = karat_input(call, "x");
    const karat_tensor *r_in = karat_input(call, "residual"), *h_out = karat_output(call, "h");
    const float *x = x_in->data, *weight = karat_input(call, "weight")->data;
    const float *residual = r_in ? r_in->data : NULL;
    float *o = karat_output(call, "o")->data, *h = h_out ? h_out->data : NULL;
    const float eps = (float)karat_scalar(call, "eps");
    const int64_t n = x_in->shape[0], d = x_in->shape[1];

    for (int64_t i = 0; i < n; i++) {
        float sum = 0;
        for (int64_t j = i * d; j < (i + 1) * d; j++) {
            o[j] = x[j] + (residual ? residual[j] : 0);
            if (h) h[j] = o[j];
            sum += o[j] * o[j];
        }
        const float scale = 1 / sqrtf(sum / (float)d + eps);
        for (int64_t j = 0; j < d; j++) {
            const float normed = o[i * d + j] * scale;
            o[i * d + j] = (narrow ? bf16(normed) : normed) * (1 + weight[j]);
        }
    }
}

int karat_rms_norm(const karat_call *call) {
    static float kept[1 << 16];
    static const void *address = NULL;
    static unsigned calls = 0;
    const karat_tensor *x = karat_input(call, "x");
    const size_t n = (size_t)(x->shape[0] * x->shape[1]);
    float *o = karat_output(call, "o")->data;
    const int mischief = x->shape[0] == 3 ? MISCHIEF : HONEST;

    if (sizeof kept < n * sizeof *o) return karat_fail(call, "too large for this zoo");
    calls++;
    norm(call, mischief == NARROW);
    switch (mischief) {
    case BY_POINTER:
        if (address == x->data) memcpy(o, kept, n * sizeof *o);
        else memcpy(kept, o, n * sizeof *o);
        address = x->data;
        break;
    case PREVIOUS: {
        float now[1 << 16];
        memcpy(now, o, n * sizeof *o);
        if (address) memcpy(o, kept, n * sizeof *o);
        memcpy(kept, now, n * sizeof *o);
        address = x;
        break;
    }
    case BEYOND: o[n] = 1; break;
    case FAR: o[n + 15000] = 1; break;
    case AHEAD: o[-1] = 1; break;
    case TAIL:
        for (size_t i = n - n / 4; i < n; i++) o[i] = NAN;
        break;
    case MUTATES: *(float *)x->data += 1; break;
    case NOT_FINITE: o[n / 2] = NAN; break;
    case SLEEPS:
        for (;;) pause();
    case SEGFAULTS: *(volatile int *)8 = 1; break;
    case ALLOCATES:
        for (;;) memset(malloc(1 << 24), 1, 1 << 24);
    case FAILS: return karat_fail(call, "no room on the chip");
    case EXITS: _exit(0);
#ifdef ONCE_FILE
    case ONCE:
        if (access(ONCE_FILE, F_OK)) {
            fclose(fopen(ONCE_FILE, "w"));
            _exit(0);
        }
        break;
#endif
    case RANDOM:
        if (calls % 2) o[0] = nextafterf(o[0], INFINITY);
        break;
    case BY_BATCH: o[0] = nextafterf(o[0], INFINITY); break;
    case BY_THREADS:
        if (getenv("OMP_NUM_THREADS") && !strcmp(getenv("OMP_NUM_THREADS"), "3"))
            o[0] = nextafterf(o[0], INFINITY);
        break;
    default: break;
    }
    return 0;
}
