#include "common/stored.cuh"

// The order in which logits are chosen: larger first, ties to the lower id.
struct Place { float x; int id; };

// Before the first of a row.
__device__ inline Place start() { return {INFINITY, -1}; }

__device__ inline bool comes_before(Place a, Place b)
{
    return b.x < a.x || (a.x == b.x && a.id < b.id);
}

// What of a row of n comes next after a place; found by the threads of a block together. Where nothing
// is left its id is n and it is no number.
template <class T> __device__ Place next(const T* row, int n, Place after)
{
    __shared__ Place best[256];
    Place own = {NAN, n};
    for (int id = threadIdx.x; id < n; id += blockDim.x) {
        const Place place = {load(row[id]), id};
        if (comes_before(after, place) && (own.id == n || comes_before(place, own))) own = place;
    }
    __syncthreads();  // An earlier place has been read.
    best[threadIdx.x] = own;
    for (int half = blockDim.x / 2; 0 < half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            const Place a = best[threadIdx.x], b = best[threadIdx.x + half];
            if (a.id == n || comes_before(b, a)) best[threadIdx.x] = b;
        }
    }
    __syncthreads();
    return best[0];
}
