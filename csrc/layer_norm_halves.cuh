// Layer norm of 16-bit rows as most models have them: kFast (see layer_norm_rows.cuh), parameters
// and y or dy in the dtype of x, and one of the frequent activations. An H100 has time for some 38
// instructions per element of forward and 57 of backward; what can differ from launch to launch is
// therefore decided once per row, or not at all.
#pragma once
#include "layer_norm_aligned.cuh"
#include "layer_norm_backward.cuh"

namespace fastnorm {
namespace layer_norm {

// ---- pieces -------------------------------------------------------------------------------------

// A parameter's 16 bytes for the columns from c on; 16 bytes of `missing` where there is none.
template <class T>
__device__ __forceinline__ uint4 parameter_words(Array a, int c, bool inside, float missing) {
    Vector<T> v;
#pragma unroll
    for (int j = 0; j < Vector<T>::size; ++j) v.v[j] = static_cast<T>(missing);
    uint4 words = as_words(v);
    if (a.data != nullptr && inside)
        words = *reinterpret_cast<const uint4*>(static_cast<const T*>(a.data) + c);
    return words;
}

// ---- kernel: backward ---------------------------------------------------------------------------

// The rows that a thread has one after the other, `step` apart, and what it has read of one of
// them.
template <class T, int n>
struct Stream {
    static constexpr int kVector = Vector<T>::size;
    const LayerNormBackward& a;
    const Part<T>& part;
    int row;
    long at;  // where the thread's columns of that row begin
    const int step;
    bool in[n];
    uint4 x[n], dy[n];
    float mean, rstd;

    __device__ __forceinline__ Stream(const LayerNormBackward& a_, const Part<T>& part_, int first,
                                      int step_)
        : a(a_), part(part_), row(first), at(long(first) * a_.cols + part_.column(0)), step(step_) {
#pragma unroll
        for (int k = 0; k < n; ++k) {
            in[k] = part.column(k) < part.span;
        }
        load();
    }
    __device__ __forceinline__ bool exists() const { return row < int(a.rows); }
    // Whether any thread of the block has a row.
    __device__ __forceinline__ bool any() const { return row - part.group < int(a.rows); }
    // Vector k of the thread, in a matrix of which this is its first one.
    template <class P>
    __device__ __forceinline__ P* vector(P* p, int k) const {
        return p + k * part.threads * kVector;
    }
    // To the next row.
    __device__ __forceinline__ void advance() {
        row += step;
        at += step * a.cols;
        load();
    }

  private:
    __device__ __forceinline__ void load() {
        const T *from_x = static_cast<const T*>(a.x.data) + at,
                *from_dy = static_cast<const T*>(a.dy.data) + at;
        const bool there = exists();
        // no other branch: where two of them met, registers would be copied as soon as loads end
#pragma unroll
        for (int k = 0; k < n; ++k) {
            x[k] = dy[k] = {0, 0, 0, 0};
            if (!in[k] || !there) continue;
            x[k] = load_evict_first(reinterpret_cast<const uint4*>(vector(from_x, k)));
            dy[k] = load_evict_first(reinterpret_cast<const uint4*>(vector(from_dy, k)));
        }
        mean = rstd = 0;
        if (there) {
            mean = static_cast<const float*>(a.mean)[row];
            rstd = static_cast<const float*>(a.rstd)[row];
        }
    }
};

// The worker's share of the rows: every `workers`-th tile of as many rows as fit a block. The next
// row is loaded while this one's sums are on their way; parameters come from L1 for every row, as
// there are no registers to hold them.
template <class T, class Act>
__device__ __forceinline__ void work_halves(const LayerNormBackward& a, long worker) {
    constexpr int n = kBackwardVectors<T>, kVector = Vector<T>::size;
    constexpr bool kActivates = !std::is_same_v<Act, Identity>;
    const Part<T> part(a.plan.threads, int(a.cols));
    const Act activation(a.activation);
    const float share = reciprocal(float(part.span));
    const T* dsum = static_cast<const T*>(a.dsum);
    const bool adds = dsum != nullptr && a.dx != nullptr;
    Gradients<T, n> sums(a);
    Stream<T, n> rows(a, part, int(worker) * part.groups + part.group,
                      int(a.plan.workers) * part.groups);
    int turn = 0;
#pragma unroll 1
    while (rows.any()) {
        const float mean = rows.mean, rstd = rows.rstd;
        const long at = rows.at;
        const bool exists = rows.exists();
        float g[n][kVector];
        uint4 x[n], weight[n], bias[n], others[n];
        Sums<2, float> s = {};
#pragma unroll
        for (int k = 0; k < n; ++k) {
            weight[k] = parameter_words<T>(a.weight, part.column(k), rows.in[k], 1);
            if (kActivates) bias[k] = parameter_words<T>(a.bias, part.column(k), rows.in[k], 0);
            if (!adds) continue;
            const T* from = rows.vector(dsum + at, k);
            others[k] = {0, 0, 0, 0};
            if (rows.in[k] && exists)
                others[k] = load_evict_first(reinterpret_cast<const uint4*>(from));
        }
#pragma unroll
        for (int k = 0; k < n; ++k) {
            float x_hat[kVector], dz[kVector], w[kVector], b[kVector];
            widen(as_vector<T>(weight[k]), w);
            if (kActivates) widen(as_vector<T>(bias[k]), b);
            x[k] = rows.x[k];
            widen(as_vector<T>(rows.x[k]), x_hat);
            widen(as_vector<T>(rows.dy[k]), dz);
#pragma unroll
            for (int j = 0; j < kVector; ++j) {
                x_hat[j] = (x_hat[j] - mean) * rstd;
                if constexpr (kActivates)
                    dz[j] *= activation.template slope<T>(x_hat[j] * w[j] + b[j]);
                g[k][j] = dz[j] * w[j];
                s.v[0] += g[k][j];
                s.v[1] += g[k][j] * x_hat[j];
            }
            sums.add(k, dz, x_hat);
            if (!adds) continue;
            widen(as_vector<T>(others[k]), w);
#pragma unroll
            for (int j = 0; j < kVector; ++j) g[k][j] = rstd * g[k][j] + w[j];
        }
        const float scale = adds ? 1.0f : rstd;  // of g in dx

        // on the way while the row is summed: the next one
        rows.advance();
        if (adds && rows.exists()) {
#pragma unroll
            for (int k = 0; k < n; ++k)
                if (rows.in[k]) prefetch(rows.vector(dsum + rows.at, k));
        }
        if (a.dx == nullptr) continue;
        s = row_total(s, part.threads, turn);
        turn ^= 1;
        // rstd * (g - mean of g - x_hat * mean of g * x_hat), which is a multiple of a vector
        const float slope = -rstd * rstd * (s.v[1] * share), offset = -rstd * (s.v[0] * share);
#pragma unroll
        for (int k = 0; k < n; ++k) {
            if (!rows.in[k] || !exists) continue;
            float d[kVector];
            widen(as_vector<T>(x[k]), d);
#pragma unroll
            for (int j = 0; j < kVector; ++j)
                d[j] = scale * g[k][j] + ((d[j] - mean) * slope + offset);
            store_vector(rows.vector(static_cast<T*>(a.dx) + at, k), narrow<T>(d));
        }
    }
    leave_gradients<true>(a, part, sums, worker);
}

template <class T, class Act>
__global__ void __launch_bounds__(kBackwardThreads, 1) backward_halves_kernel(LayerNormBackward a) {
    with_workers<float>(a, [&](long worker) { work_halves<T, Act>(a, worker); });
}

// ---- host: which launches these kernels serve ---------------------------------------------------

template <class T>
bool of_type(Array a) {
    return a.data == nullptr || a.dtype == dtype_of<T>;
}

// Of those that are kFast.
template <class T>
bool halves(const LayerNormBackward& a) {
    const bool dense = a.rows == a.batch_rows && a.x.row == a.cols && a.dy.row == a.cols &&
                       a.rows < 1l << 30;  // rows are counted in 32 bits
    return !a.plan.ticket && dense && a.dy_dtype == dtype_of<T> && of_type<T>(a.weight) &&
           of_type<T>(a.bias);
}

// Calls f with Type<Act> of the activations that have kernels of their own; else does nothing.
template <class F>
void with_frequent(Activation activation, F f) {
    if (activation == Activation::identity) f(Type<Identity>{});
    if (activation == Activation::silu) f(Type<Fixed<activations::silu>>{});
    if (activation == Activation::gelu) f(Type<Fixed<activations::gelu>>{});
}

}  // namespace layer_norm
}  // namespace fastnorm
