// Layer norm forward of aligned rows (see layer_norm_aligned.cuh).
#pragma once
#include "layer_norm_aligned.cuh"
#include "layer_norm_forward.cuh"

namespace fastnorm {
namespace layer_norm {

// ---- pieces -------------------------------------------------------------------------------------

// What a thread has of a row, or of a chunk of one: vectors as they came, as 64 registers do not
// hold them widened.
template <class T, int n = kForwardVectors>
struct Held {
    static constexpr int kVector = Vector<T>::size;
    uint4 raw[n];
    bool in[n];

    __device__ __forceinline__ Held(const Part<T>& part, bool exists) {
#pragma unroll
        for (int k = 0; k < n; ++k) in[k] = exists && part.column(k) < part.span;
    }

    template <bool kOnce>
    __device__ __forceinline__ void load(const Part<T>& part, const T* from) {
#pragma unroll
        for (int k = 0; k < n; ++k) {
            raw[k] = {0, 0, 0, 0};
            if (in[k]) raw[k] = load_words<kOnce>(from + part.column(k));
        }
    }

    // The next vector becomes the first.
    __device__ __forceinline__ void rotate() {
#pragma unroll
        for (int k = 0; k + 1 < n; ++k) raw[k] = raw[k + 1];
    }

    // Adds a residual; rounded as the sum is returned, and stored to `sum` unless that is null.
    template <bool kOnce>
    __device__ __forceinline__ void add(const Part<T>& part, const T* residual, T* sum) {
        uint4 other[n];
#pragma unroll
        for (int k = 0; k < n; ++k)
            if (in[k]) other[k] = load_words<kOnce>(residual + part.column(k));
#pragma unroll
        for (int k = 0; k < n; ++k) {
            if (!in[k]) continue;
            float x[kVector], y[kVector];
            widen(as_vector<T>(raw[k]), x);
            widen(as_vector<T>(other[k]), y);
#pragma unroll
            for (int j = 0; j < kVector; ++j) x[j] += y[j];
            raw[k] = as_words(narrow<T>(x));
            if (sum != nullptr) store16(reinterpret_cast<uint4*>(sum + part.column(k)), raw[k]);
        }
    }
};

// The mean is mean + rest; m2 is the sum of squared distances to it.
struct Deviations {
    float mean, rest, m2;
};

// Of the rows, or chunks, that the block has; `share` is one of their columns.
template <class T, int n>
__device__ __forceinline__ Deviations deviations(const Part<T>& part, const Held<T, n>& held,
                                                 float share) {
    constexpr int kVector = Vector<T>::size;
    float x[kVector];
    Sums<1, float> sum = {};
#pragma unroll
    for (int k = 0; k < n; ++k) {
        widen(as_vector<T>(held.raw[k]), x);
#pragma unroll
        for (int j = 0; j < kVector; ++j) sum.v[0] += x[j];
    }
    const float mean = row_total(sum, part.threads, 0).v[0] * share;
    // the distances' sum is not zero, as the mean is rounded: it corrects mean and variance
    Sums<2, float> s = {};
#pragma unroll
    for (int k = 0; k < n; ++k) {
        if (!held.in[k]) continue;
        widen(as_vector<T>(held.raw[k]), x);
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
            const float distance = x[j] - mean;
            s.v[0] += distance;
            s.v[1] += distance * distance;
        }
    }
    s = row_total(s, part.threads, 1);
    const float rest = s.v[0] * share, m2 = s.v[1] - s.v[0] * rest;
    return {mean, rest, m2 < 0.0f ? 0.0f : m2};
}

// Whether what most models have is all there is: parameters and y of the dtype of x, no activation.
// Its code is apart (kPlain), as it is a third shorter.
template <class T>
__host__ __device__ __forceinline__ bool plain(const LayerNormForward& a) {
    return a.activation == Activation::identity && a.y.dtype == dtype_of<T> &&
           (a.weight.data == nullptr || a.weight.dtype == dtype_of<T>) &&
           (a.bias.data == nullptr || a.bias.dtype == dtype_of<T>);
}

// y of one vector of a row: (x - mean) * scale + shift is normalised.
template <bool kOnce, bool kPlain, class T>
__device__ __forceinline__ void finish_vector(const LayerNormForward& a, long row, long column,
                                              const uint4& raw, float mean, float scale,
                                              float shift) {
    constexpr int kVector = Vector<T>::size;
    float x[kVector], w[kVector], b[kVector];
    const Words weight = load_parameter<T, kPlain>(a.weight, column, true, 1);
    const Words bias = load_parameter<T, kPlain>(a.bias, column, true, 0);
    widen(as_vector<T>(raw), x);
    widen_words<T>(weight, !kPlain && wider<T>(a.weight), w);
    widen_words<T>(bias, !kPlain && wider<T>(a.bias), b);
#pragma unroll
    for (int j = 0; j < kVector; ++j) x[j] = ((x[j] - mean) * scale + shift) * w[j] + b[j];
    if constexpr (!kPlain) activate<T>(a.activation, x);
    store_aligned<kOnce, kPlain, T>(a.y, row * a.cols + column, x);
}

// y of a row from column `begin` on.
template <bool kOnce, bool kPlain, class T, int n>
__device__ __forceinline__ void finish_row(const LayerNormForward& a, const Part<T>& part, long row,
                                           long begin, Held<T, n>& held, float mean, float scale,
                                           float shift) {
    // found again, not kept from the loads
    uint4 place = {unsigned(part.column(0)), unsigned(part.column(1)), 0, 0};
    fastnorm::forget(place);
    const int step = int(place.y - place.x);
    if constexpr (kPlain) {
#pragma unroll
        for (int k = 0; k < n; ++k) {
            if (held.in[k])
                finish_vector<kOnce, true, T>(a, row, begin + (int(place.x) + k * step),
                                              held.raw[k], mean, scale, shift);
        }
    } else {
        // vector after vector through the first one's registers: the code of all activations once
        const int end = held.in[0] ? min(part.span, n * step) : 0;
#pragma unroll 1
        for (int column = int(place.x); column < end; column += step) {
            finish_vector<kOnce, false, T>(a, row, begin + column, held.raw[0], mean, scale, shift);
            held.rotate();
        }
    }
}

// ---- kernel: a row in the registers of 8 to 512 threads -----------------------------------------

template <class T, bool kPlain>
__global__ void __launch_bounds__(kForwardThreads, 2) forward_aligned_kernel(LayerNormForward a) {
    const Part<T> part(a.plan.threads, int(a.cols));
    const long row = long(blockIdx.x) * part.groups + part.group;
    const bool exists = row < a.rows;
    Held<T> held(part, exists);
    held.template load<true>(part, row_of<T>(a.x, row, a.rows, a.batch_rows));
    if (a.residual.data != nullptr) {
        T* sum = static_cast<T*>(a.sum);
        if (sum != nullptr) sum += row * a.cols;
        held.template add<true>(part, row_of<T>(a.residual, row, a.rows, a.batch_rows), sum);
    }
    const float share = reciprocal(float(part.span));
    const Deviations d = deviations(part, held, share);
    const float rstd = rsqrt(d.m2 * share + float(a.eps));
    if (part.lane == 0 && exists) {
        static_cast<float*>(a.mean)[row] = d.mean + d.rest;
        static_cast<float*>(a.rstd)[row] = rstd;
    }
    finish_row<false, kPlain>(a, part, row, 0, held, d.mean, rstd, -d.rest * rstd);
}

// ---- kernel: a row cut into chunks, see forward_ticket_kernel -----------------------------------

template <class T>
__device__ __forceinline__ void leave_deviations(const LayerNormForward& a, unsigned ticket) {
    const Tile tile = first_tile(a, ticket);
    const long begin = tile.chunk * a.plan.chunk;
    const Part<T> part(kTicketThreads, int(min(a.cols - begin, a.plan.chunk)));
    Held<T> held(part, true);
    held.template load<false>(part, row_of<T>(a.x, tile.row, a.rows, a.batch_rows) + begin);
    if (a.residual.data != nullptr) {
        T* sum = static_cast<T*>(a.sum);
        if (sum != nullptr) sum += tile.row * a.cols + begin;
        held.template add<false>(
            part, row_of<T>(a.residual, tile.row, a.rows, a.batch_rows) + begin, sum);
    }
    const Deviations d = deviations(part, held, reciprocal(float(part.span)));
    leave_moments(a, tile, d.mean + d.rest, d.m2);
}

template <class T>
__device__ __forceinline__ void normalize_rows(const LayerNormForward& a, unsigned index) {
    const Tile tile = second_tile(a, index);
    const long begin = tile.chunk * a.plan.chunk, end = min(a.rows, tile.row + a.plan.span);
    const Part<T> part(kTicketThreads, int(min(a.cols - begin, a.plan.chunk)));
    const bool summed = a.sum != nullptr;
    // before the first row: every wait empties L1, where the next rows find the parameters
    for (long row = tile.row; row < end; ++row)
        wait(a.counters + 2 + row, unsigned(a.plan.chunks) + 1);
    Held<T> held(part, true);
#pragma unroll 1
    for (long row = tile.row; row < end; ++row) {
        const T* from = summed ? static_cast<const T*>(a.sum) + row * a.cols
                               : row_of<T>(a.x, row, a.rows, a.batch_rows);
        held.template load<true>(part, from + begin);
        if (!summed && a.residual.data != nullptr)
            held.template add<true>(part, row_of<T>(a.residual, row, a.rows, a.batch_rows) + begin,
                                    nullptr);
        const float mean = static_cast<const float*>(a.mean)[row];
        const float rstd = static_cast<const float*>(a.rstd)[row];
        if (plain<T>(a))
            finish_row<true, true>(a, part, row, begin, held, mean, rstd, 0.0f);
        else
            finish_row<true, false>(a, part, row, begin, held, mean, rstd, 0.0f);
    }
}

template <class T>
__global__ void __launch_bounds__(kTicketThreads, 3)
    forward_aligned_ticket_kernel(LayerNormForward a) {
    const unsigned ticket = take_ticket(a.counters);
    if (ticket < a.rows * a.plan.chunks) leave_deviations<T>(a, ticket);
    if (ticket >= a.plan.lag) normalize_rows<T>(a, unsigned(ticket - a.plan.lag));
    leave_zero(a.counters, 2 + a.rows);
}

}  // namespace layer_norm
}  // namespace fastnorm
