#include "common/fp8.cuh"

// Weight matrices of rows of D columns, in W. Those of few bits are codes, and scales that bf16 has, so that
// every weight is exact in f32:
//
//   Fp8   a byte each; a scale per 128 rows and 128 columns
//   Int8  a byte each; a scale per 32 columns of a row
//   Int4  two to a byte, the even column in the lower half; a minimum and a scale per 32 columns of a row
struct Fp8 { unsigned char code; };
struct Int8 { signed char code; };
struct Int4 { unsigned char codes; };

__device__ inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// One of several matrices that stand one after another, each of M rows.
template <class T> struct Matrix {
    const T* codes;
    const bf16* scales;
    int D;

    __device__ Matrix(const T* codes, const bf16* scales, int M, int D, int which = 0)
        : codes(codes + which * per_row(D) * M), scales(scales + which * scales_of(M, D)), D(D) {}

    __device__ static size_t per_row(int D);
    __device__ static size_t scales_of(int M, int D);
    __device__ float at(int row, int column) const;
};

template <class T> __device__ size_t Matrix<T>::per_row(int D) { return D; }
template <> __device__ size_t Matrix<Int4>::per_row(int D) { return ceil_div(D, 2); }

template <class T> __device__ size_t Matrix<T>::scales_of(int, int) { return 0; }
template <> __device__ size_t Matrix<Fp8>::scales_of(int M, int D)
{
    return (size_t)ceil_div(M, 128) * ceil_div(D, 128);
}
template <> __device__ size_t Matrix<Int8>::scales_of(int M, int D) { return (size_t)M * ceil_div(D, 32); }
template <> __device__ size_t Matrix<Int4>::scales_of(int M, int D) { return 2 * ((size_t)M * ceil_div(D, 32)); }

template <class T> __device__ float Matrix<T>::at(int row, int column) const
{
    return load(codes[(size_t)row * D + column]);
}

template <> __device__ float Matrix<Fp8>::at(int row, int column) const
{
    const float scale = load(scales[(size_t)(row / 128) * ceil_div(D, 128) + column / 128]);
    return fp8_value(codes[(size_t)row * D + column].code) * scale;
}

template <> __device__ float Matrix<Int8>::at(int row, int column) const
{
    const float scale = load(scales[(size_t)row * ceil_div(D, 32) + column / 32]);
    return codes[(size_t)row * D + column].code * scale;
}

template <> __device__ float Matrix<Int4>::at(int row, int column) const
{
    const bf16* ends = scales + 2 * ((size_t)row * ceil_div(D, 32) + column / 32);
    const unsigned both = codes[row * per_row(D) + column / 2].codes;
    return load(ends[0]) + (column % 2 ? both >> 4 : both & 15) * load(ends[1]);
}
