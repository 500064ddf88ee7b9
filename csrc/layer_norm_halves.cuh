// Layer norm of 16-bit rows as most models have them: kFast (see layer_norm_rows.cuh), parameters
// and y or dy in the dtype of x, and one of the frequent activations. An H100 has time for some 38
// instructions per element of forward and 57 of backward; what can differ from launch to launch is
// therefore decided once per row, or not at all.
#pragma once
#include "layer_norm_backward.cuh"
#include "layer_norm_forward.cuh"

namespace fastnorm {
namespace layer_norm {

// ---- pieces -------------------------------------------------------------------------------------

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

// ---- kernel: forward ----------------------------------------------------------------------------

// x + residual of the vectors of a row, rounded as the sum is returned.
template <class T, int n>
__device__ __forceinline__ void add_residual(const LayerNormForward& a, const Part<T>& part,
                                             long row, const bool (&in)[n], uint4 (&raw)[n]) {
    const T* residual = row_of<T>(a.residual, row, a.rows, a.batch_rows);
    T* sum = static_cast<T*>(a.sum) + row * a.cols;
    uint4 other[n];
#pragma unroll
    for (int k = 0; k < n; ++k) {
        if (in[k])
            other[k] = load_evict_first(reinterpret_cast<const uint4*>(residual + part.column(k)));
    }
#pragma unroll
    for (int k = 0; k < n; ++k) {
        if (!in[k]) continue;
        float x[Vector<T>::size], y[Vector<T>::size];
        widen(as_vector<T>(raw[k]), x);
        widen(as_vector<T>(other[k]), y);
#pragma unroll
        for (int j = 0; j < Vector<T>::size; ++j) x[j] += y[j];
        raw[k] = as_words(narrow<T>(x));
        if (a.sum != nullptr) store16(reinterpret_cast<uint4*>(sum + part.column(k)), raw[k]);
    }
}

// y of a row: (x - mean) * scale + shift is normalised.
template <class T, class Act, int n>
__device__ __forceinline__ void finish_row(const LayerNormForward& a, const Part<T>& part, long row,
                                           const bool (&in)[n], const uint4 (&raw)[n], float mean,
                                           float scale, float shift) {
    constexpr int kVector = Vector<T>::size;
    const Act activation(a.activation);
    T* y = static_cast<T*>(a.y.data) + row * a.cols;
    // found again, not kept from the loads
    uint4 place = {unsigned(part.column(0)), unsigned(part.column(1)), 0, 0};
    fastnorm::forget(place);
    const int step = int(place.y - place.x);
#pragma unroll
    for (int k = 0; k < n; ++k) {
        if (!in[k]) continue;
        const int column = int(place.x) + k * step;
        float x[kVector], w[kVector], b[kVector];
        widen(as_vector<T>(raw[k]), x);
        const uint4 weight = parameter_words<T>(a.weight, column, true, 1);
        const uint4 bias = parameter_words<T>(a.bias, column, true, 0);
        widen(as_vector<T>(weight), w);
        widen(as_vector<T>(bias), b);
#pragma unroll
        for (int j = 0; j < kVector; ++j)
            x[j] = activation.template value<T>(((x[j] - mean) * scale + shift) * w[j] + b[j]);
        store_vector(y + column, narrow<T>(x));
    }
}

// A row in the registers of 8 to 512 threads.
template <class T, class Act>
__global__ void __launch_bounds__(kForwardThreads, 2) forward_halves_kernel(LayerNormForward a) {
    constexpr int n = kForwardVectors, kVector = Vector<T>::size;
    const Part<T> part(a.plan.threads, int(a.cols));
    const long row = long(blockIdx.x) * part.groups + part.group;
    const bool exists = row < a.rows;
    const T* from = row_of<T>(a.x, row, a.rows, a.batch_rows);
    uint4 raw[n];
    bool in[n];
#pragma unroll
    for (int k = 0; k < n; ++k) {
        in[k] = exists && part.column(k) < part.span;
        raw[k] = {0, 0, 0, 0};
        if (in[k]) raw[k] = load_evict_first(reinterpret_cast<const uint4*>(from + part.column(k)));
    }
    if (a.residual.data != nullptr) add_residual(a, part, row, in, raw);

    const float share = reciprocal(float(part.span));
    float x[kVector];  // widened anew each time: 64 registers hold a row only as it came
    Sums<1, float> sum = {};
#pragma unroll
    for (int k = 0; k < n; ++k) {
        widen(as_vector<T>(raw[k]), x);
#pragma unroll
        for (int j = 0; j < kVector; ++j) sum.v[0] += x[j];
    }
    const float mean = row_total(sum, part.threads, 0).v[0] * share;
    // the distances' sum is not zero, as the mean is rounded: it corrects mean and variance
    Sums<2, float> s = {};
#pragma unroll
    for (int k = 0; k < n; ++k) {
        if (!in[k]) continue;
        widen(as_vector<T>(raw[k]), x);
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
            const float distance = x[j] - mean;
            s.v[0] += distance;
            s.v[1] += distance * distance;
        }
    }
    s = row_total(s, part.threads, 1);
    const float rest = s.v[0] * share, variance = (s.v[1] - s.v[0] * rest) * share;
    const float rstd = rsqrt((variance < 0.0f ? 0.0f : variance) + float(a.eps));
    if (part.lane == 0 && exists) {
        static_cast<float*>(a.mean)[row] = mean + rest;
        static_cast<float*>(a.rstd)[row] = rstd;
    }
    finish_row<T, Act>(a, part, row, in, raw, mean, rstd, -rest * rstd);
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
bool halves(const LayerNormForward& a) {
    return !a.plan.ticket && a.y.dtype == dtype_of<T> && of_type<T>(a.weight) && of_type<T>(a.bias);
}

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
