// Layer norm backward for rows that a few blocks share: each keeps one chunk of the columns, and
// the sums of dweight and dbias over it, for a stream of rows. x and dy are visited twice, `lag`
// rows of the stream apart, so that the second time they come from L2.
#pragma once
#include "layer_norm_backward.cuh"

namespace fastnorm {
namespace layer_norm {

constexpr int kStreamThreads = 256, kStreamVectors = 2;

// What a thread reads of a row, and needs of it before it can do anything with that.
template <bool kFast, class T>
struct StreamRow {
    static constexpr int n = kStreamVectors, kVector = Vector<T>::size;
    using W = Wide<T>;
    uint4 x[n], dy[n];
    W mean, rstd;

    // kOnce: for the last time.
    template <bool kOnce>
    __device__ __forceinline__ void load(const LayerNormBackward& a, const Part<T>& part,
                                         long begin, long row) {
        const T* from_x = row_of<T>(a.x, row, a.rows, a.batch_rows) + begin;
        const T* from_dy = row_of<T>(a.dy, row, a.rows, a.batch_rows) + begin;
#pragma unroll
        for (int k = 0; k < n; ++k) {
            const int col = part.column(k), rest = part.rest(k);
            x[k] = as_words(load_row<kFast, kOnce>(from_x + col, rest));
            dy[k] = as_words(load_row<kFast, kOnce>(from_dy + col, rest));
        }
        mean = static_cast<const W*>(a.mean)[row];
        rstd = static_cast<const W*>(a.rstd)[row];
    }

    // x_hat of a vector; zero beyond the row, as dy is already, or their product could be none.
    __device__ __forceinline__ void normalize(int k, int rest, W (&x_hat)[kVector]) const {
        widen(as_vector<T>(x[k]), x_hat);
        const W center = rest > 0 ? mean : W(0);
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
            x_hat[j] = (x_hat[j] - center) * rstd;
            if (!kFast && j >= rest) x_hat[j] = W(0);
        }
    }
};

// The block's columns of weight and bias, wide, in shared memory: each thread has its own.
template <class T>
struct StreamParameters {
    static constexpr int n = kStreamVectors, kVector = Vector<T>::size;
    using W = Wide<T>;

    // Four values of a thread are adjacent, and those of the next thread follow.
    __device__ __forceinline__ static Vector<W>* at(bool bias, int k) {
        constexpr int kEach = kVector / Vector<W>::size;
        return dynamic_shared<Vector<W>>() + (bias * n + k) * kEach * kStreamThreads + threadIdx.x;
    }
    __device__ __forceinline__ static void load(const LayerNormBackward& a, const Part<T>& part,
                                                long begin) {
#pragma unroll 1
        for (int which = 0; which < 2; ++which) {
#pragma unroll 1
            for (int k = 0; k < n; ++k) {
                W values[kVector];
                load_columns<false, T>(which ? a.bias : a.weight, begin + part.column(k),
                                       part.rest(k), W(!which), values);
#pragma unroll
                for (int j = 0; j < kVector; ++j)
                    at(which, k)[j / Vector<W>::size * kStreamThreads].v[j % Vector<W>::size] =
                        values[j];
            }
        }
    }
    __device__ __forceinline__ static void read(bool bias, int k, W (&values)[kVector]) {
#pragma unroll
        for (int j = 0; j < kVector; j += Vector<W>::size) {
            const Vector<W> v = at(bias, k)[j / Vector<W>::size * kStreamThreads];
#pragma unroll
            for (int i = 0; i < Vector<W>::size; ++i) values[j + i] = v.v[i];
        }
    }
};

// dy of a row becomes dz, the gradient of what the activation is given, rounded as dy is. Vector
// after vector goes through the first one's registers: the code of all activations is there once.
template <bool kFast, class T>
__device__ __forceinline__ void pull_back(const LayerNormBackward& a, const Part<T>& part,
                                          StreamRow<kFast, T>& at) {
    using W = Wide<T>;
    constexpr int n = kStreamVectors, kVector = Vector<T>::size;
    if (a.activation == Activation::identity) return;
#pragma unroll 1
    for (int k = 0; k < n; ++k) {
        W x_hat[kVector], dz[kVector], w[kVector], b[kVector];
        at.normalize(0, part.rest(k), x_hat);
        widen(as_vector<T>(at.dy[0]), dz);
        StreamParameters<T>::read(false, k, w);
        StreamParameters<T>::read(true, k, b);
#pragma unroll
        for (int j = 0; j < kVector; ++j) b[j] += x_hat[j] * w[j];
        with_activation(a.activation, [&](auto formula) {
#pragma unroll
            for (int j = 0; j < kVector; ++j) dz[j] *= decltype(formula)::template slope<T>(b[j]);
        });
        const uint4 x = at.x[0];
#pragma unroll
        for (int i = 0; i + 1 < n; ++i) at.x[i] = at.x[i + 1], at.dy[i] = at.dy[i + 1];
        at.x[n - 1] = x, at.dy[n - 1] = as_words(narrow<T>(dz));
    }
}

template <class W>
struct StreamSums {
    Sums<2, W> warp[2][kStreamThreads / kWarp];
};

// First visit: the chunk's part in the row's sums of g and g * x_hat. `turn` is 0 and 1 by turns,
// so that one barrier is enough.
template <bool kFast, class T>
__device__ __forceinline__ void leave_sums(const LayerNormBackward& a, const Part<T>& part,
                                           const StreamRow<kFast, T>& at, long row, long chunk,
                                           int turn) {
    using W = Wide<T>;
    constexpr int kVector = Vector<T>::size, kWarps = kStreamThreads / kWarp;
    Sums<2, W> s = {};
#pragma unroll
    for (int k = 0; k < kStreamVectors; ++k) {
        W x_hat[kVector], g[kVector], w[kVector];
        at.normalize(k, part.rest(k), x_hat);
        widen(as_vector<T>(at.dy[k]), g);
        StreamParameters<T>::read(false, k, w);
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
            g[j] *= w[j];
            s.v[0] += g[j];
            s.v[1] += g[j] * x_hat[j];
        }
    }
    s = warp_sum(s);
    auto& shared = block_shared<StreamSums<W>>();
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    if (lane == 0) shared.warp[turn][warp] = s;
    __syncthreads();
    if (warp != 0) return;
    s = warp_sum(shared.warp[turn][lane % kWarps], kWarps);
    if (lane != 0) return;
    W* partial = static_cast<W*>(a.partials) + 2 * (row * a.plan.chunks + chunk);
    partial[0] = s.v[0], partial[1] = s.v[1];
    add_release(a.counters + 3 + row, 1u);
}

// The row's sums of all its chunks, in the same order everywhere.
template <class W>
__device__ __forceinline__ Sums<2, W> whole_sums(const LayerNormBackward& a, long row) {
    const int chunks = int(a.plan.chunks), lane = threadIdx.x % kWarp;
    const W* partials = static_cast<const W*>(a.partials) + 2 * row * chunks;
    Sums<2, W> s = {};
#pragma unroll 1
    for (int i = lane; i < chunks; i += kWarp) {
        s.v[0] += partials[2 * i];
        s.v[1] += partials[2 * i + 1];
    }
    return warp_sum(s);
}

// Second visit: dx, and what the row adds to dweight and dbias.
template <bool kFast, class T>
__device__ __forceinline__ void apply_row(const LayerNormBackward& a, const Part<T>& part,
                                          const StreamRow<kFast, T>& at,
                                          const uint4 (&dsum)[kStreamVectors], long row, long begin,
                                          Gradients<T, kStreamVectors>& sums) {
    using W = Wide<T>;
    constexpr int kVector = Vector<T>::size;
    W slope = 0, offset = 0;
    if (a.dx != nullptr) {
        const Sums<2, W> s = whole_sums<W>(a, row);
        // rstd * (g - mean of g - x_hat * mean of g * x_hat)
        const W factor = -at.rstd * reciprocal(W(a.cols));
        offset = factor * s.v[0], slope = factor * s.v[1];
    }
#pragma unroll
    for (int k = 0; k < kStreamVectors; ++k) {
        W x_hat[kVector], dz[kVector], w[kVector], d[kVector];
        at.normalize(k, part.rest(k), x_hat);
        widen(as_vector<T>(at.dy[k]), dz);
        sums.add(k, dz, x_hat);
        if (a.dx == nullptr) continue;
        StreamParameters<T>::read(false, k, w);
#pragma unroll
        for (int j = 0; j < kVector; ++j)
            d[j] = at.rstd * (dz[j] * w[j]) + (x_hat[j] * slope + offset);
        if (a.dsum != nullptr) {
            widen(as_vector<T>(dsum[k]), w);
#pragma unroll
            for (int j = 0; j < kVector; ++j) d[j] += w[j];
        }
        T* to = static_cast<T*>(a.dx) + row * a.cols + begin + part.column(k);
        store_row<kFast, true>(to, narrow<T>(d), part.rest(k), part.first, part.last);
    }
}

// The rows of a stream, one after the other, by the block that has one of their chunks.
template <bool kFast, class T>
__device__ __forceinline__ void work_stream(const LayerNormBackward& a, unsigned worker) {
    const unsigned chunks = unsigned(a.plan.chunks), stream = worker / chunks;
    const long chunk = worker - stream * chunks, begin = chunk * a.plan.chunk;
    const long step = a.plan.parts, lag = a.plan.lag * step;
    Part<T> part(kStreamThreads, int(min(a.cols - begin, a.plan.chunk)));
    part.length = part.span;
    StreamParameters<T>::load(a, part, begin);
    Gradients<T, kStreamVectors> sums(a);
    StreamRow<kFast, T> next;
    int turn = 0;
    const bool sums_first = a.dx != nullptr;  // else dx waits for nothing
    if (sums_first && stream < a.rows) next.template load<false>(a, part, begin, stream);
#pragma unroll 1
    for (long first = stream, row = first - lag; row < a.rows; first += step, row += step) {
        if (sums_first && first < a.rows) {
            pull_back(a, part, next);
            leave_sums(a, part, next, first, chunk, turn);
            turn ^= 1;
            if (first + step < a.rows) next.template load<false>(a, part, begin, first + step);
        }
        if (row < 0) continue;
        StreamRow<kFast, T> again;
        again.template load<true>(a, part, begin, row);
        uint4 dsum[kStreamVectors] = {};
        if (a.dsum != nullptr && a.dx != nullptr) {
            const T* from = static_cast<const T*>(a.dsum) + row * a.cols + begin;
#pragma unroll
            for (int k = 0; k < kStreamVectors; ++k)
                dsum[k] = as_words(load_row<kFast, true>(from + part.column(k), part.rest(k)));
        }
        pull_back(a, part, again);
        if (sums_first) wait(a.counters + 3 + row, chunks);
        apply_row(a, part, again, dsum, row, begin, sums);
    }
    sums.for_wanted(a, stream,
                    [&](Wide<T>* p, const auto& own) { store_sums<kFast>(part, p + begin, own); });
}

// The blocks of a stream wait for each other, so they have to be resident together: their tickets
// follow each other, and they are a small share of what the device holds (backward_plan in
// fastnorm/ops/layer_norm/cuda.py), so that some such launches at once all have theirs.
template <class T, bool kFast>
__global__ void __launch_bounds__(kStreamThreads, 2) backward_streams_kernel(LayerNormBackward a) {
    const long ticket = take_ticket(a.counters), workers = a.plan.workers;
    if (ticket < workers) {
        work_stream<kFast, T>(a, unsigned(ticket));
        arrive(a.counters + 2);
    } else {
        wait(a.counters + 2, unsigned(workers));
        finish<Wide<T>>(a, ticket - workers, gridDim.x - workers);
    }
    leave_zero(a.counters, 3 + a.rows);
}

}  // namespace layer_norm
}  // namespace fastnorm
