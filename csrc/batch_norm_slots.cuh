// Which elements of a tensor a thread of batch norm's kernels works on, 16 bytes at a time.
#pragma once
#include "activation.cuh"
#include "batch_norm.h"

namespace fastnorm {
namespace batch_norm {

constexpr int kThreads = 256;

// Channels of one slot.
template <class T, bool kLast>
constexpr int kChannels = kLast ? Vector<T>::size : 1;

// ---- which elements -----------------------------------------------------------------------------

__device__ __forceinline__ unsigned quotient(unsigned i, const Divisor& d) {
    return (__umulhi(i, d.magic) + i) >> d.shift;
}

// Of a power of two: how far to shift instead of dividing.
__device__ __forceinline__ int bits(int n) {
    return __ffs(n) - 1;
}

// A vector of elements that are adjacent in x and in y; the run that it belongs to may begin after
// its first element or end before its last.
struct Slot {
    long x, y;      // offsets of its first element
    long low, run;  // of its first element from the run's beginning; length of the run

    template <class T>
    __device__ __forceinline__ bool whole() const {
        return low >= 0 && low + Vector<T>::size <= run;
    }
    __device__ __forceinline__ bool has(int j) const { return low + j >= 0 && low + j < run; }
};

// Which elements of a slot belong to this thread's channels.
struct Part {
    int begin, end;
};

template <class T, bool kLast>
struct Lane {
    static constexpr int kVector = Vector<T>::size;
    int column, index;  // of slots in the group; among the threads of the column
    long channel;       // the first of the slots'
    int place;          // in a row of slots in shared memory

    __device__ __forceinline__ Lane(const BatchNormPlan& p, unsigned group) {
        const int t = threadIdx.x;
        column = t >> bits(p.lanes) & (p.columns - 1);
        index = (t & (p.lanes - 1)) + (t >> bits(p.lanes * p.columns)) * p.lanes;
        channel = long(group) * p.channels + column * kChannels<T, kLast>;
        place = t + (t >> p.pad);
    }

    // Of this thread's slot in a row of one slot for every thread.
    __device__ __forceinline__ unsigned position(const BatchNormPlan& p, unsigned row) const {
        return row * p.threads + index;
    }

    __device__ __forceinline__ Slot slot(const BatchNormPlan& p, unsigned i) const {
        const BatchNormShape& s = p.shape;
        if (i >= p.positions || channel >= s.C) return {0, 0, 0, 0};
        const unsigned n = quotient(i, p.row), rest = i - n * p.row.divisor;
        if constexpr (kLast) {
            return {n * s.x_stride_n + rest * s.x_stride_s + channel, i * s.C + channel, channel,
                    s.C};
        } else {
            const long y = (n * s.C + channel) * s.S;
            const long low = long(rest) * kVector - (p.skewed ? y & (kVector - 1) : 0);
            return {n * s.x_stride_n + channel * s.x_stride_c + low, y + low, low, s.S};
        }
    }

    // The same without the offsets; past the last channel, values that nobody uses count too.
    __device__ __forceinline__ Part part(const BatchNormPlan& p, unsigned i) const {
        if (i >= p.positions || channel >= p.shape.C) return {0, 0};
        if (kLast || !p.ragged) return {0, kVector};
        const Slot s = slot(p, i);
        const int end = s.run - s.low < kVector ? int(s.run - s.low) : kVector;
        return {s.low < 0 ? int(-s.low) : 0, end > 0 ? end : 0};
    }
};

// 16 bytes that lie across two aligned ones, both of which may be read.
template <class T>
__device__ __forceinline__ Vector<T> load_across(const T* p) {
    const T* from = p - misalignment(p);
    const uint4 a = *reinterpret_cast<const uint4*>(from);
    const uint4 b = *reinterpret_cast<const uint4*>(from + Vector<T>::size);
    unsigned w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    const unsigned bytes = misalignment(p) * sizeof(T);
#pragma unroll
    for (int i = 0; i < 6; ++i) w[i] = bytes & 8 ? w[i + 2] : w[i];
#pragma unroll
    for (int i = 0; i < 5; ++i) w[i] = bytes & 4 ? w[i + 1] : w[i];
    if (sizeof(T) == 2 && (bytes & 2)) {
#pragma unroll
        for (int i = 0; i < 4; ++i) w[i] = w[i] >> 16 | w[i + 1] << 16;
    }
    Vector<T> v;
    memcpy(&v, w, 16);
    return v;
}

// The elements of a slot that exist, zero for the others.
template <class T>
__device__ __forceinline__ Vector<T> load_part(const T* p, const Slot& s) {
    const long before = s.low - misalignment(p);
    if (before >= 0 && before + 2 * Vector<T>::size <= s.run) return load_across(p);
    Vector<T> v = {};
#pragma unroll
    for (int j = 0; j < Vector<T>::size; ++j)
        if (s.has(j)) v.v[j] = p[j];
    return v;
}

template <class T>
__device__ __forceinline__ void store_slot(T* p, const Slot& s, const Vector<T>& v, bool once) {
    if (s.whole<T>() && misalignment(p) == 0) {
        if (once) {
            store_vector_once(p, v);
        } else {
            store_vector(p, v);
        }
        return;
    }
#pragma unroll
    for (int j = 0; j < Vector<T>::size; ++j)
        if (s.has(j)) p[j] = v.v[j];
}

}  // namespace batch_norm
}  // namespace fastnorm
