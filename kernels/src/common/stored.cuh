// What tensors are stored in. E is the type of activations, W that of weight matrices; the host says
// which (-DE=bf16 -DW=Int8). Everything is computed in f32.

// As <math.h> has them, which is not at hand.
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)

typedef float f32;
struct bf16 { unsigned short bits; };
struct f16 { unsigned short bits; };

__device__ inline float load(f32 x) { return x; }

__device__ inline float load(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }

__device__ inline float load(f16 x)
{
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
    return wide;
}

// The nearest number of a type, ties to even.
template <class T> __device__ inline T store(float x);

template <> __device__ inline f32 store<f32>(float x) { return x; }

template <> __device__ inline bf16 store<bf16>(float x)
{
    bf16 narrow;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(x));
    return narrow;
}

template <> __device__ inline f16 store<f16>(float x)
{
    f16 narrow;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(x));
    return narrow;
}

// What a type makes of a number.
template <class T> __device__ inline float rounded(float x) { return load(store<T>(x)); }
