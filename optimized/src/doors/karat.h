/* karat.h: kernels of other hands, called by karat. Version 1.
 *
 * A shared library exports `karat_abi` (KARAT_DEFINE_ABI writes it) and one function per op:
 *
 *     int karat_rms_norm(const karat_call *call);                  0, or what went wrong
 *     uint64_t karat_rms_norm_workspace(const karat_call *call);   optional: bytes of workspace
 *
 * Outputs are written in place. Between and around tensors lie guard bands, outputs and workspace
 * arrive filled with NaN, and inputs belong to karat: a kernel that writes anywhere but to outputs and
 * workspace, or keeps an address for the next call, is found out.
 */
#ifndef KARAT_H
#define KARAT_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KARAT_ABI 1u

/* What a tensor is stored in. */
enum { KARAT_F64 = 0, KARAT_F32 = 1, KARAT_F16 = 2, KARAT_BF16 = 3, KARAT_I64 = 4, KARAT_U8 = 5 };

typedef struct karat_tensor {
    const char *name;       /* as `karat explain OP` names it */
    void *data;             /* 64-byte aligned */
    int32_t dtype;          /* KARAT_F32, ... */
    int32_t rank;
    const int64_t *shape;   /* rank sizes, outermost first */
    const int64_t *strides; /* rank strides, in elements */
} karat_tensor;

/* A number that belongs to the problem: eps, top_k, ...; or a letter of the case: N, D, ... */
typedef struct karat_number {
    const char *name;
    double value;
} karat_number;

/* One call. Later versions append fields and raise `size`; what is here stays where it is. */
typedef struct karat_call {
    uint32_t abi;  /* KARAT_ABI */
    uint32_t size; /* of this struct, in bytes */
    const char *op;
    void *stream; /* NULL on the CPU */
    void *workspace;
    uint64_t workspace_bytes;
    const karat_tensor *inputs; /* optional ones are listed where they are given */
    const karat_tensor *outputs;
    const karat_number *scalars;
    const karat_number *sizes;
    uint32_t n_inputs, n_outputs, n_scalars, n_sizes;
    char *message; /* room for message_bytes of text that says what went wrong, ended by a zero */
    uint64_t message_bytes;
} karat_call;

#define KARAT_DEFINE_ABI                                                                           \
    uint32_t karat_abi(void) { return KARAT_ABI; }
uint32_t karat_abi(void);

/* The input of a name, or NULL. */
static inline const karat_tensor *karat_input(const karat_call *call, const char *name) {
    for (uint32_t i = 0; i < call->n_inputs; i++)
        if (strcmp(call->inputs[i].name, name) == 0) return &call->inputs[i];
    return NULL;
}

/* The output of a name, or NULL. */
static inline const karat_tensor *karat_output(const karat_call *call, const char *name) {
    for (uint32_t i = 0; i < call->n_outputs; i++)
        if (strcmp(call->outputs[i].name, name) == 0) return &call->outputs[i];
    return NULL;
}

/* The scalar of a name; 0 where there is none. */
static inline double karat_scalar(const karat_call *call, const char *name) {
    for (uint32_t i = 0; i < call->n_scalars; i++)
        if (strcmp(call->scalars[i].name, name) == 0) return call->scalars[i].value;
    return 0.0;
}

/* The size of a letter of the case; 0 where there is none. */
static inline int64_t karat_size(const karat_call *call, const char *letter) {
    for (uint32_t i = 0; i < call->n_sizes; i++)
        if (strcmp(call->sizes[i].name, letter) == 0) return (int64_t)call->sizes[i].value;
    return 0;
}

/* Says what went wrong; returns 1 for the kernel to return. */
static inline int karat_fail(const karat_call *call, const char *why) {
    if (call->message_bytes) {
        strncpy(call->message, why, call->message_bytes - 1);
        call->message[call->message_bytes - 1] = 0;
    }
    return 1;
}

#ifdef __cplusplus
}
#endif

#endif
