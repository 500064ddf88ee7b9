// Weight norm: the table of layers, how blocks are cut from a layer, and a thread's share of it.
#pragma once
#include "common.cuh"
#include "weight_norm.h"

namespace fastnorm::weight_norm_kernels {

constexpr int kThreads = 256;
constexpr int kUnit =
    8;  // adjacent elements of a thread: 16 bytes of a half type, twice 16 of fp32
template <class W>
constexpr int kUnits = sizeof(W) == 8 ? 1 : 4;  // that a thread holds of each operand
template <class W>
constexpr int kHeld = kUnit * kUnits<W>;

// ---- the table --------------------------------------------------------------------------------

// How the threads of a block lie on [A, K, B].
enum class Form : char {
    flat,     // A = 1: `lanes` threads on each of `group` channels, all 256 where it is one
    single,   // one channel, A runs of B: `lanes` threads on a run, 256 / lanes runs at once
    columns,  // a group of channels: `lanes` threads on a row of group * B columns
};

// What a layer's blocks do; the same for all of them.
struct Cut {
    int first;          // block
    int counter;        // of the first group of channels; one for each group
    long partial;       // of the first group
    long tiles;         // of a group of channels
    int parts;          // that share those, one after the other
    int tiles_of_part;  // the last may have fewer
    int column_tiles;   // single: tiles along a run
    short lanes;        // power of two
    short group;        // channels
    Form form;
    bool aligned;  // every access of 16 bytes is within the array and on a boundary
};

struct Entry {
    WeightNormLayer layer;
    Cut cut;
};

template <int Capacity>
struct Table {
    int count;
    unsigned* counters;  // the first numbers the blocks; null where no norm has parts
    void* partials;
    Entry entries[Capacity];
};

// Kernel parameters have 4 KB, since CUDA 12.1 32,764 bytes.
constexpr int kParameters = 4096;
constexpr int kLargeParameters = CUDART_VERSION >= 12010 ? 32764 : kParameters;
constexpr int kHead = sizeof(Table<1>) - sizeof(Entry);
constexpr int kFew = (kParameters - kHead) / int(sizeof(Entry));
constexpr int kMany = (kLargeParameters - kHead) / int(sizeof(Entry));
static_assert(sizeof(Table<kFew>) <= kParameters && sizeof(Table<kMany>) <= kLargeParameters);

// What the entries of a table take so far.
struct Filling {
    long blocks;
    WeightNormWorkspace used;
};

// Writes a layer's entry; false where the grid has no room for its blocks.
bool enter(Entry& entry, const WeightNormLayer& layer, int processors, Filling& filling);

inline bool wide_is_double(const WeightNormSizes& s) {
    return s.w == Dtype::float64;
}

// ---- a thread's share of a tile -----------------------------------------------------------------

// Units of up to kUnit adjacent elements where accesses are aligned, else single elements: the i-th
// begins at origin + i * stride.
struct Share {
    long origin, stride;
    int left, step;  // the i-th is there if left - i * step > 0
    int width;       // elements of a unit, if as many are left

    __device__ __forceinline__ int length(int i) const { return min(width, left - i * step); }
};

// Beyond any i * step, so that what is left fits an int.
__device__ __forceinline__ int clamped(long n) {
    return int(max(min(n, 1l << 30), -(1l << 30)));
}

template <class W>
struct Work {
    const WeightNormSizes& sizes;
    const Cut& cut;
    long block;  // group of channels
    int part;
    int x, y, run;  // position among the lanes, row of lanes; elements that a lane takes at once

    __device__ __forceinline__ Work(const Entry& entry, int item)
        : sizes(entry.layer.sizes), cut(entry.cut) {
        block = item / cut.parts, part = item % cut.parts;
        x = threadIdx.x % cut.lanes, y = threadIdx.x / cut.lanes;
        run = cut.aligned ? kUnit : 1;
    }

    // the channel of a form where a thread has one
    __device__ __forceinline__ long channel() const {
        return cut.form == Form::flat ? block * cut.group + y : block;
    }

    __device__ __forceinline__ Share share(long tile) const {
        const long A = sizes.A, K = sizes.K, B = sizes.B;
        if (cut.form == Form::flat) {
            const int step = cut.lanes * run;
            const long at = tile * (kThreads * kHeld<W>)+x * run;
            return {channel() * B + at, step, channel() < K ? clamped(B - at) : 0, step, kUnit};
        }
        const int rows = kThreads / cut.lanes;
        const long across = cut.form == Form::single ? tile % cut.column_tiles : 0;
        const long down = cut.form == Form::single ? tile / cut.column_tiles : tile;
        const long first = block * cut.group * B;
        const long columns = min(K * B - first, cut.group * B);
        const long column = across * cut.lanes * run + x * run;
        const long row = down * rows * (kHeld<W> / run) + y;
        const bool inside = row < A && column < columns;
        return {row * K * B + first + column, rows * K * B, inside ? clamped((A - row) * kUnit) : 0,
                rows * kUnit, clamped(columns - column)};
    }
};

// f(array), its type known.
template <class W, class F>
__device__ __forceinline__ void with_array(void* data, Dtype dtype, F f) {
    switch (dtype) {
        case Dtype::float32:
            return f(static_cast<float*>(data));
        case Dtype::bfloat16:
            return f(static_cast<__nv_bfloat16*>(data));
        case Dtype::float16:
            return f(static_cast<__half*>(data));
        case Dtype::float64:
            if constexpr (sizeof(W) == 8) f(static_cast<double*>(data));
    }
}

template <class W>
__device__ __forceinline__ void load(const void* data, Dtype dtype, const Share& s, bool aligned,
                                     W (&x)[kHeld<W>]) {
    with_array<W>(const_cast<void*>(data), dtype, [&](auto* array) {
        using T = std::remove_pointer_t<decltype(array)>;
        constexpr int kVector = Vector<T>::size;
        const T* p = array + s.origin;
        if (!aligned) {
#pragma unroll
            for (int i = 0; i < kHeld<W>; ++i)
                x[i] = s.length(i) > 0 ? static_cast<W>(widen(p[i * s.stride])) : W(0);
            return;
        }
        uint4 raw[kHeld<W> / kVector];
#pragma unroll
        for (int i = 0; i < kUnits<W>; ++i, p += s.stride) {
#pragma unroll
            for (int j = 0; j < kUnit; j += kVector) {
                auto& vector = raw[(i * kUnit + j) / kVector];
                vector = {0, 0, 0, 0};
                if (j < s.length(i)) vector = *reinterpret_cast<const uint4*>(p + j);
            }
        }
#pragma unroll
        for (int i = 0; i < kHeld<W>; i += kVector) {
            const Vector<T> v = as_vector<T>(raw[i / kVector]);
#pragma unroll
            for (int j = 0; j < kVector; ++j) x[i + j] = static_cast<W>(widen(v.v[j]));
        }
    });
}

// f(i) of every element that this thread has.
template <class W, class F>
__device__ __forceinline__ void store(void* data, Dtype dtype, const Share& s, bool aligned, F f) {
    with_array<W>(data, dtype, [&](auto* array) {
        using T = std::remove_pointer_t<decltype(array)>;
        constexpr int kVector = Vector<T>::size;
        T* p = array + s.origin;
        if (!aligned) {
#pragma unroll
            for (int i = 0; i < kHeld<W>; ++i)
                if (s.length(i) > 0) p[i * s.stride] = static_cast<T>(f(i));
            return;
        }
#pragma unroll
        for (int i = 0; i < kUnits<W>; ++i, p += s.stride) {
#pragma unroll
            for (int j = 0; j < kUnit; j += kVector) {
                Vector<T> vector;
#pragma unroll
                for (int l = 0; l < kVector; ++l)
                    vector.v[l] = static_cast<T>(f(i * kUnit + j + l));
                if (j < s.length(i)) store_vector(p + j, vector);
            }
        }
    });
}

}  // namespace fastnorm::weight_norm_kernels
