// What the kernels of aligned rows share. Aligned: every row begins and ends on 16 bytes with its
// columns adjacent, parameters, y and dy begin there too and have the dtype of x or fp32 (see
// aligned() in layer_norm.cu). An H100 has time for some 38 instructions per 16-bit element of
// forward and 57 of backward; what can differ from launch to launch is therefore decided once per
// row or vector, or not at all.
#pragma once
#include "layer_norm_rows.cuh"

namespace fastnorm {
namespace layer_norm {

// ---- sums over rows -----------------------------------------------------------------------------

// Over the 2, 4, ... or 32 lanes of a row, or of a row's warps.
template <int Count>
__device__ __forceinline__ Sums<Count, float> lane_sum(Sums<Count, float> s, int width) {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
#pragma unroll
        for (int i = 0; i < Count; ++i) {
            const float other = __shfl_xor_sync(kFullWarp, s.v[i], step);
            if (step < width) s.v[i] += other;
        }
    }
    return s;
}

template <int Count>
struct RowTotals {
    Sums<Count, float> warp[2][kWarp];
};

// Over the threads of a row, in every row of the block; `turn` is 0 and 1 by turns, so that one
// barrier a call is enough.
template <int Count>
__device__ __forceinline__ Sums<Count, float> row_total(Sums<Count, float> s, int threads,
                                                        int turn) {
    s = lane_sum(s, threads);
    if (threads <= kWarp) return s;
    auto& shared = block_shared<RowTotals<Count>>();
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = threads / kWarp;
    if (lane == 0) shared.warp[turn][warp] = s;
    __syncthreads();
    return lane_sum(shared.warp[turn][(warp & ~(warps - 1)) + (lane & (warps - 1))], warps);
}

// ---- arrays of the dtype of x or fp32 -----------------------------------------------------------

// Whether it is there, and of fp32 where x is narrower.
template <class T>
__device__ __forceinline__ bool wider(Array a) {
    return sizeof(T) == 2 && a.data != nullptr && a.dtype == Dtype::float32;
}

// A vector of columns as it came: 16 bytes, or 32 of fp32.
struct Words {
    uint4 low, high;
};

// Those of a parameter from column c on; of T's `missing` where there is none. All is loaded before
// any of it is looked at. kPlain: it is known to be of T.
template <class T, bool kPlain = false>
__device__ __forceinline__ Words load_parameter(Array a, long c, bool inside, float missing) {
    Vector<T> v;
#pragma unroll
    for (int j = 0; j < Vector<T>::size; ++j) v.v[j] = static_cast<T>(missing);
    Words words = {as_words(v), {0, 0, 0, 0}};
    const bool wide = !kPlain && wider<T>(a);
    const char* p = static_cast<const char*>(a.data) + c * (wide ? 4 : int(sizeof(T)));
    if (a.data != nullptr && inside) words.low = *reinterpret_cast<const uint4*>(p);
    if (wide && inside) words.high = *reinterpret_cast<const uint4*>(p + 16);
    return words;
}

// By selects: after a branch all values would be in registers.
template <class T>
__device__ __forceinline__ void widen_words(const Words& words, bool wide,
                                            float (&out)[Vector<T>::size]) {
    widen(as_vector<T>(words.low), out);
    if constexpr (sizeof(T) == 2) {
        float floats[8];
        memcpy(floats, &words, 32);
#pragma unroll
        for (int j = 0; j < 8; ++j) out[j] = wide ? floats[j] : out[j];
    }
}

// kOnce: evict first.
template <bool kOnce, bool kPlain, class T>
__device__ __forceinline__ void store_aligned(Array a, long at,
                                              const float (&values)[Vector<T>::size]) {
    if (kPlain || !wider<T>(a)) {
        T* p = static_cast<T*>(a.data) + at;
        const Vector<T> v = narrow<T>(values);
        return kOnce ? store_vector_once(p, v) : store_vector(p, v);
    }
    float* p = static_cast<float*>(a.data) + at;
#pragma unroll
    for (int j = 0; j < Vector<T>::size; j += 4) {
        Vector<float> v;
#pragma unroll
        for (int i = 0; i < 4; ++i) v.v[i] = values[j + i];
        kOnce ? store_vector_once(p + j, v) : store_vector(p + j, v);
    }
}

// kOnce: evict first; else it is read again.
template <bool kOnce, class T>
__device__ __forceinline__ uint4 load_words(const T* p) {
    const uint4* from = reinterpret_cast<const uint4*>(p);
    return kOnce ? load_evict_first(from) : *from;
}

}  // namespace layer_norm
}  // namespace fastnorm
