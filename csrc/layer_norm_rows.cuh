// Rows that begin anywhere, 16 bytes at a time: a thread keeps its columns from row to row, so that
// parameters and their gradients stay where they are, and the bytes of a row are shifted into place
// (two loads and a funnel shift; on the way out the neighbour's part comes by shuffle).
//
// kFast, here and in the kernels: every row begins and ends on 16 bytes with its columns adjacent,
// parameters and y begin there too and have the dtype of x or fp32 (see aligned() in
// layer_norm_backward.cu).
#pragma once
#include "activation.cuh"
#include "layer_norm.h"

namespace fastnorm {
namespace layer_norm {

template <class T>
constexpr Dtype dtype_of = std::is_same_v<T, double>          ? Dtype::float64
                           : std::is_same_v<T, float>         ? Dtype::float32
                           : std::is_same_v<T, __nv_bfloat16> ? Dtype::bfloat16
                                                              : Dtype::float16;

// ---- 16 bytes anywhere --------------------------------------------------------------------------

// The 16 of 32 bytes that begin at `bytes`, 0 to 16, of elements of type T.
template <class T>
__device__ __forceinline__ uint4 realign(const uint4& low, const uint4& high, int bytes) {
    unsigned w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    // selects: no register is addressed at run time
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = bytes & 16 ? w[i + 4] : w[i];
#pragma unroll
    for (int i = 0; i < 6; ++i) w[i] = bytes & 8 ? w[i + 2] : w[i];
#pragma unroll
    for (int i = 0; i < 5; ++i) w[i] = bytes & 4 ? w[i + 1] : w[i];
    if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            w[i] = unsigned((uint64_t(w[i + 1]) << 32 | w[i]) >> bytes % 4 * 8);
    }
    return {w[0], w[1], w[2], w[3]};
}

// A vector at p, `rest` elements before the end of its row; zeros beyond. kOnce: evict first.
template <bool kFast, bool kOnce = false, class T>
__device__ __forceinline__ Vector<T> load_row(const T* p, int rest) {
    constexpr int kVector = Vector<T>::size;
    uint4 raw = {0, 0, 0, 0};
    if constexpr (kFast) {
        const uint4* from = reinterpret_cast<const uint4*>(p);
        if (rest > 0) raw = kOnce ? load_evict_first(from) : *from;
        return as_vector<T>(raw);
    }
    const int shift = misalignment(p);
    if (rest >= (shift == 0 ? kVector : 2 * kVector - shift)) {  // both blocks end within the row
        const uint4* from = reinterpret_cast<const uint4*>(p - shift);
        raw = *from;
        if (shift != 0) raw = realign<T>(raw, from[1], shift * int(sizeof(T)));
    } else {
        Vector<T> v = {};
#pragma unroll
        for (int j = 0; j < kVector; ++j)
            if (j < rest) v.v[j] = p[j];
        raw = as_words(v);
    }
    return as_vector<T>(raw);
}

// Stores v at p. Lanes from `first` to `last` of the warp, all of which calls this together, hold
// adjacent vectors of one row; each stores the 16-byte block in which its own vector begins. kOnce:
// evict first, where kFast.
template <bool kFast, bool kOnce = false, class T>
__device__ __forceinline__ void store_row(T* p, const Vector<T>& v, int rest, bool first,
                                          bool last) {
    constexpr int kVector = Vector<T>::size;
    if constexpr (kFast) {
        if (rest <= 0) return;
        if (kOnce) return store_vector_once(p, v);
        return store_vector(p, v);
    }
    const int shift = misalignment(p), own = kVector - shift;  // elements of v in that block
    const uint4 words = as_words(v);
    const uint4 neighbours = {
        __shfl_up_sync(kFullWarp, words.x, 1), __shfl_up_sync(kFullWarp, words.y, 1),
        __shfl_up_sync(kFullWarp, words.z, 1), __shfl_up_sync(kFullWarp, words.w, 1)};
    const Vector<T> before = as_vector<T>(neighbours);
    if (rest >= own && (!first || shift == 0)) {
        store16(reinterpret_cast<uint4*>(p - shift),
                realign<T>(neighbours, words, own * int(sizeof(T))));
    } else {
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
            if (!first && j >= own && j < rest + kVector) p[j - kVector] = before.v[j];
            if (j < own && j < rest) p[j] = v.v[j];
        }
    }
    if (last) {
#pragma unroll
        for (int j = 0; j < kVector; ++j)
            if (j >= own && j < rest) p[j] = v.v[j];
    }
}

// ---- parts of rows ------------------------------------------------------------------------------

// Where a row of a [batches, batch_rows, cols] view begins.
__device__ __forceinline__ long row_offset(const Rows& m, long row, long rows, long batch_rows) {
    if (batch_rows == rows) return row * m.row;
    // a 64-bit division is a subroutine: rows in several batches are fewer than 2^31
    const long batch = unsigned(row) / unsigned(batch_rows);
    return batch * m.batch + (row - batch * batch_rows) * m.row;
}

template <class T>
__device__ __forceinline__ const T* row_of(const Rows& m, long row, long rows, long batch_rows) {
    return static_cast<const T*>(m.data) + row_offset(m, row, rows, batch_rows);
}

// A row, or a chunk of one, and this thread's place among those that share it: a vector of columns,
// again after every `threads` vectors.
template <class T>
struct Part {
    static constexpr int kVector = Vector<T>::size;
    int threads, lane, group, groups;  // of the block's groups of threads: this one's, all
    bool first, last;                  // see store_row
    int span;                          // columns, the same number in the whole block
    int length = 0;                    // columns: span, or 0 where there is no such row

    __device__ __forceinline__ Part(int threads_, int span_) : threads(threads_), span(span_) {
        lane = threadIdx.x & (threads - 1);
        group = threadIdx.x >> (__ffs(threads) - 1);
        groups = blockDim.x >> (__ffs(threads) - 1);
        first = lane % kWarp == 0, last = lane == threads - 1 || lane % kWarp == kWarp - 1;
    }
    __device__ __forceinline__ int column(int k) const { return (k * threads + lane) * kVector; }
    __device__ __forceinline__ int rest(int k) const { return length - column(k); }
    // whether any thread of the block has columns there
    __device__ __forceinline__ bool used(int k) const { return k * threads * kVector < span; }
};

// Tiles of rows (of one batch) of a matrix whose rows are adjacent stand row-major in shared
// memory. The pitch of their rows is odd, which keeps both ways of walking free of bank conflicts.
__device__ __forceinline__ int staged_pitch(int cols) {
    return cols | 1;
}

// The block copies rows [row, row + tile) of a batch; rows from `batch_rows` on are zero.
template <class T>
__device__ __forceinline__ void stage(T* to, const Rows& m, long batch, long row, long batch_rows,
                                      int tile, int cols) {
    constexpr int kVector = Vector<T>::size;
    const T* from = static_cast<const T*>(m.data) + batch * m.batch + row;
    const int rows = int(min(batch_rows - row, long(tile))), pitch = staged_pitch(cols);
    const int runs = (tile + kVector - 1) / kVector;  // vectors of a column
    __syncthreads();                                  // whoever used the memory before has finished
#pragma unroll 2
    for (int i = threadIdx.x; i < runs * cols; i += blockDim.x) {
        const int c = i / runs, r = i % runs * kVector;
        const Vector<T> v = load_row<false>(from + c * m.column + r, rows - r);
#pragma unroll
        for (int j = 0; j < kVector; ++j)
            if (r + j < tile) to[(r + j) * pitch + c] = v.v[j];
    }
    __syncthreads();
}

// `rest` elements at p, in shared memory; zeros beyond.
template <class T>
__device__ __forceinline__ Vector<T> load_staged(const T* p, int rest) {
    Vector<T> v = {};
#pragma unroll
    for (int j = 0; j < Vector<T>::size; ++j)
        if (j < rest) v.v[j] = p[j];
    return v;
}

// ---- values of a vector of columns --------------------------------------------------------------

// Keeps vectors packed: 8 halves would be 8 registers. See platform.cuh.
template <class T>
__device__ __forceinline__ void forget(Vector<T>& x) {
    x = as_vector<T>(as_words(x));
}
template <class T, int n>
__device__ __forceinline__ void forget(Vector<T> (&x)[n]) {
#pragma unroll
    for (int k = 0; k < n; ++k) forget(x[k]);
}

// A parameter's values for the columns from c on; `missing` where there is none.
template <bool kFast, class T>
__device__ __forceinline__ void load_columns(Array a, long c, int rest, Wide<T> missing,
                                             Wide<T> (&out)[Vector<T>::size]) {
    constexpr int kVector = Vector<T>::size;
#pragma unroll
    for (int j = 0; j < kVector; ++j) out[j] = missing;
    if (a.data == nullptr || rest <= 0) return;
    const bool whole = kFast || (rest >= kVector && (reinterpret_cast<uintptr_t>(a.data) +
                                                     c * (a.dtype == dtype_of<T> ? sizeof(T) : 4)) %
                                                            16 ==
                                                        0);
    if (whole && a.dtype == dtype_of<T>) {
        const Vector<T> v = load_vector(static_cast<const T*>(a.data) + c);
#pragma unroll
        for (int j = 0; j < kVector; ++j) out[j] = widen(v.v[j]);
    } else if (sizeof(T) == 2 && whole && (kFast || a.dtype == Dtype::float32)) {
#pragma unroll
        for (int half = 0; half < kVector; half += 4) {
            const Vector<float> v = load_vector(static_cast<const float*>(a.data) + c + half);
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (half + j < kVector) out[half + j] = v.v[j];
        }
    } else if (!kFast) {
#pragma unroll
        for (int j = 0; j < kVector; ++j)
            if (j < rest) out[j] = load_any<Wide<T>>(a, c + j);
    }
}

// z becomes the activation's value; one switch for all lanes of a vector.
template <class T, int n>
__device__ __forceinline__ void activate(Activation which, Wide<T> (&z)[n]) {
    if (which == Activation::identity) return;
    with_activation(which, [&](auto formula) {
#pragma unroll
        for (int j = 0; j < n; ++j) z[j] = decltype(formula)::template value<T>(z[j]);
    });
}

// The last block to come (others may spin on them until then) leaves all counters zero.
__device__ __forceinline__ void leave_zero(unsigned* counters, long count) {
    if (!arrive_last(counters + 1, gridDim.x)) return;
    if (threadIdx.x == 0) counters[0] = 0;
    // the other blocks' steps of this one are atomic, and nothing orders them before a plain store
    if (threadIdx.x == 0) atomicExch(counters + 1, 0u);
    for (long i = 2 + threadIdx.x; i < count; i += blockDim.x) counters[i] = 0;
}

// ---- host: whether a launch is kFast ------------------------------------------------------------

template <class T>
class Alignment {
    static constexpr long kVector = Vector<T>::size;
    long rows_, batch_rows_;

  public:
    bool good;

    Alignment(long rows, long batch_rows, long cols)
        : rows_(rows), batch_rows_(batch_rows), good(cols % kVector == 0) {}
    void address(const void* p) { good = good && reinterpret_cast<uintptr_t>(p) % 16 == 0; }
    void matrix(const Rows& m) {
        if (m.data == nullptr) return;
        address(m.data);
        good = good && m.column == 1 && (batch_rows_ == 1 || m.row % kVector == 0) &&
               (batch_rows_ == rows_ || m.batch % kVector == 0);
    }
    void array(Array a) {
        if (a.data == nullptr) return;
        address(a.data);
        good = good && (a.dtype == dtype_of<T> || a.dtype == Dtype::float32);
    }
};

}  // namespace layer_norm
}  // namespace fastnorm
