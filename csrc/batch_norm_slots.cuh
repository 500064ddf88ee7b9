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
    int low, left;  // elements of the run before that one (negative: the run begins later), from it

    // Bit j: whether element j belongs to the run.
    template <int V>
    __device__ __forceinline__ unsigned elements() const {
        const int begin = max(-low, 0), end = min(max(left, 0), V);
        return ((1u << V) - 1) >> (V - end) & ((1u << V) - 1) << begin;
    }
};

// What is left of a slot once it has been read: where y's elements lie, and which of them exist.
struct Target {
    long y;
    unsigned elements;
};

template <class T, bool kLast>
struct Lane {
    static constexpr int kVector = Vector<T>::size;
    static constexpr unsigned kWhole = (1u << kVector) - 1;  // all elements of a slot
    int column, index;   // of slots in the group; among the threads of the column
    long channel;        // the first of the slots'
    int place;           // in a row of slots in shared memory
    unsigned positions;  // none past the last channel

    __device__ __forceinline__ Lane(const BatchNormPlan& p, unsigned group) {
        const int t = threadIdx.x;
        column = t >> bits(p.lanes) & (p.columns - 1);
        index = (t & (p.lanes - 1)) + (t >> bits(p.lanes * p.columns)) * p.lanes;
        channel = long(group) * p.channels + column * kChannels<T, kLast>;
        place = t + (t >> p.pad);
        positions = channel < p.shape.C ? p.positions : 0;
    }

    // Of this thread's slot in a row of one slot for every thread.
    __device__ __forceinline__ unsigned position(const BatchNormPlan& p, unsigned row) const {
        return row * p.threads + index;
    }
    // Where the slot at a position lies. Offset: what counts a tensor's elements; kWholeSlots: all
    // slots are whole.
    template <class Offset, bool kWholeSlots>
    __device__ __forceinline__ Slot slot(const BatchNormPlan& p, unsigned i) const {
        using Length = std::make_signed_t<Offset>;
        const BatchNormShape& s = p.shape;
        const unsigned n = quotient(i, p.row), rest = i - n * p.row.divisor;
        const Offset x = n * Offset(s.x_stride_n) + Offset(channel) * Offset(s.x_stride_c);
        const Offset y = n * Offset(s.y_stride_n) + Offset(channel) * Offset(s.y_stride_c);
        const auto length = [](Length l) { return int(min(l, Length(1) << 30)); };
        if constexpr (kLast) {
            return {long(x + rest * Offset(s.x_stride_s)), long(y + rest * Offset(s.y_stride_s)),
                    length(Length(channel)), length(Length(s.C) - Length(channel))};
        } else if constexpr (kWholeSlots) {
            return {long(x + rest * kVector), long(y + rest * kVector), 0, kVector};
        } else {
            const Length low =
                Length(rest) * kVector - (p.skewed ? Length(y & (kVector - 1)) : Length(0));
            return {long(x + Offset(low)), long(y + Offset(low)), length(low),
                    length(Length(s.S) - low)};
        }
    }

    // The same without what only reading needs.
    __device__ __forceinline__ Target target(const BatchNormPlan& p, unsigned i) const {
        if (i >= positions) return {0, 0};
        if (!p.quick) {
            const Slot s = slot<long, false>(p, i);
            return {s.y, s.template elements<kVector>()};
        }
        if (!kLast && p.ragged) {
            const Slot s = slot<unsigned, false>(p, i);
            return {s.y, s.template elements<kVector>()};
        }
        return {slot<unsigned, true>(p, i).y, kWhole};
    }
};

// 16 bytes that lie across two aligned ones, both of which may be read.
template <class T>
__device__ __forceinline__ uint4 load_across(const T* p) {
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
    return {w[0], w[1], w[2], w[3]};
}

// The elements of a slot that exist, zero for the others.
template <class T>
__device__ __forceinline__ Vector<T> load_part(const T* p, const Slot& s) {
    constexpr int V = Vector<T>::size;
    const int before = misalignment(p);  // elements, of the first of two aligned vectors
    uint4 raw;
    if (s.low >= before && s.left + before >= 2 * V) {
        raw = load_across(p);
    } else {
        const unsigned elements = s.elements<V>();
        Vector<T> v = {};
#pragma unroll
        for (int j = 0; j < V; ++j)
            if (elements & 1u << j) v.v[j] = p[j];
        raw = as_words(v);
    }
    return as_vector<T>(raw);
}

template <class T>
__device__ __forceinline__ void store_target(void* tensor, const Target& target,
                                             const Wide<T> (&wide)[Vector<T>::size], bool aligned,
                                             bool once) {
    constexpr int V = Vector<T>::size;
    T* p = static_cast<T*>(tensor) + target.y;
    const Vector<T> v = narrow<T>(wide);
    if (target.elements == (1u << V) - 1 && (aligned || misalignment(p) == 0)) {
        if (once) {
            store_vector_once(p, v);
        } else {
            store_vector(p, v);
        }
        return;
    }
#pragma unroll
    for (int j = 0; j < V; ++j)
        if (target.elements & 1u << j) p[j] = v.v[j];
}

}  // namespace batch_norm
}  // namespace fastnorm
