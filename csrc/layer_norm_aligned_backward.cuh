// Layer norm backward of aligned rows that fit the registers of a block (see
// layer_norm_aligned.cuh).
#pragma once
#include "layer_norm_aligned.cuh"
#include "layer_norm_backward.cuh"

namespace fastnorm {
namespace layer_norm {

// The rows that a thread has one after the other, `step` apart, and what it has read of one of
// them. dy that is wider than x is brought to L2 only: there are no registers to hold it.
template <class T, int n>
struct AlignedRows {
    static constexpr int kVector = Vector<T>::size;
    const LayerNormBackward& a;
    const Part<T>& part;
    int row;
    const int step;
    bool in[n];
    uint4 x[n], dy[n];
    float mean, rstd;

    __device__ __forceinline__ AlignedRows(const LayerNormBackward& a_, const Part<T>& part_,
                                           int first, int step_)
        : a(a_), part(part_), row(first), step(step_) {
#pragma unroll
        for (int k = 0; k < n; ++k) in[k] = part.column(k) < part.span;
        load();
    }
    __device__ __forceinline__ bool exists() const { return row < int(a.rows); }
    // Whether any thread of the block has a row.
    __device__ __forceinline__ bool any() const { return row - part.group < int(a.rows); }
    __device__ __forceinline__ bool wide() const {
        return sizeof(T) == 2 && a.dy_dtype != dtype_of<T>;
    }
    __device__ __forceinline__ const float* wide_dy(int k) const {
        return static_cast<const float*>(a.dy.data) + row_offset(a.dy, row, a.rows, a.batch_rows) +
               part.column(k);
    }
    __device__ __forceinline__ void load_wide_dy(int k, bool there, float (&out)[kVector]) const {
        Words words = {};
        if (there) words.low = load_words<true>(wide_dy(k));
        if (there) words.high = load_words<true>(wide_dy(k) + 4);
        memcpy(out, &words, sizeof(out));
    }
    // To the next row.
    __device__ __forceinline__ void advance() {
        row += step;
        load();
    }

  private:
    __device__ __forceinline__ void load() {
        const T* from_x = row_of<T>(a.x, row, a.rows, a.batch_rows);
        const T* from_dy = row_of<T>(a.dy, row, a.rows, a.batch_rows);
        const bool there = exists(), narrow = !wide();
        // no other branch: where two of them met, registers would be copied as soon as loads end
#pragma unroll
        for (int k = 0; k < n; ++k) {
            x[k] = dy[k] = {0, 0, 0, 0};
            if (in[k] && there) x[k] = load_words<true>(from_x + part.column(k));
            if (in[k] && there && narrow) dy[k] = load_words<true>(from_dy + part.column(k));
        }
        mean = rstd = 0;
        if (!there) return;
        mean = static_cast<const float*>(a.mean)[row];
        rstd = static_cast<const float*>(a.rstd)[row];
        if (narrow) return;
#pragma unroll
        for (int k = 0; k < n; ++k)
            if (in[k]) prefetch(wide_dy(k));
    }
};

// The worker's share of the rows: every `workers`-th tile of as many rows as fit a block. The next
// row is loaded while this one's sums are on their way; parameters come from L1 for every row, as
// there are no registers to hold them.
template <class T, bool kActivates>
__device__ __forceinline__ void work_aligned(const LayerNormBackward& a, long worker) {
    constexpr int n = kBackwardVectors<T>, kVector = Vector<T>::size;
    const Part<T> part(a.plan.threads, int(a.cols));
    const float share = reciprocal(float(part.span));
    const T* dsum = static_cast<const T*>(a.dsum);
    const bool adds = dsum != nullptr && a.dx != nullptr;
    Gradients<T, n> sums(a);
    AlignedRows<T, n> rows(a, part, int(worker) * part.groups + part.group,
                           int(a.plan.workers) * part.groups);
    auto at = [&](int row, int k) { return row * a.cols + part.column(k); };
    int turn = 0;
#pragma unroll 1
    while (rows.any()) {
        const float mean = rows.mean, rstd = rows.rstd;
        const int row = rows.row;
        const bool exists = rows.exists();
        float g[n][kVector];
        uint4 x[n];
        Sums<2, float> s = {};
#pragma unroll
        for (int k = 0; k < n; ++k) {
            const bool there = rows.in[k] && exists;
            const float center = there ? mean : 0.0f;  // beyond the row x_hat is 0: dy times it is
            float x_hat[kVector], dz[kVector], w[kVector];
            const Words weight = load_parameter<T>(a.weight, part.column(k), there, 1);
            uint4 other = {0, 0, 0, 0};
            auto load_other = [&] {
                if (adds && there) other = load_words<true>(dsum + at(row, k));
            };
            if (!kActivates) load_other();  // else there are no registers for it yet
            x[k] = rows.x[k];
            widen_words<T>(weight, wider<T>(a.weight), w);
            if (!rows.wide())
                widen(as_vector<T>(rows.dy[k]), dz);
            else
                rows.load_wide_dy(k, there, dz);
            widen(as_vector<T>(rows.x[k]), x_hat);
#pragma unroll
            for (int j = 0; j < kVector; ++j) x_hat[j] = (x_hat[j] - center) * rstd;
            if constexpr (kActivates) {
                float b[kVector];
                widen_words<T>(load_parameter<T>(a.bias, part.column(k), there, 0),
                               wider<T>(a.bias), b);
                // four at a time: more would take registers that the sums are in
#pragma unroll
                for (int four = 0; four < kVector; four += 4) {
                    with_activation(a.activation, [&](auto formula) {
#pragma unroll
                        for (int j = four; j < four + 4; ++j)
                            dz[j] *= decltype(formula)::template slope<T>(x_hat[j] * w[j] + b[j]);
                    });
                }
            }
#pragma unroll
            for (int j = 0; j < kVector; ++j) {
                g[k][j] = dz[j] * w[j];
                s.v[0] += g[k][j];
                s.v[1] += g[k][j] * x_hat[j];
            }
            sums.add(k, dz, x_hat);
            if (!adds) continue;
            if (kActivates) load_other();
            widen(as_vector<T>(other), w);
#pragma unroll
            for (int j = 0; j < kVector; ++j) g[k][j] = rstd * g[k][j] + w[j];
        }
        const float scale = adds ? 1.0f : rstd;  // of g in dx

        // on the way while the row is summed: the next one
        rows.advance();
        if (adds && rows.exists()) {
#pragma unroll
            for (int k = 0; k < n; ++k)
                if (rows.in[k]) prefetch(dsum + at(rows.row, k));
        }
        if (a.dx == nullptr) continue;
        s = row_total(s, part.threads, turn);
        turn ^= 1;
        // rstd * (g - mean of g - x_hat * mean of g * x_hat), which is a multiple of a vector
        const float slope = -rstd * (s.v[1] * share), offset = -rstd * (s.v[0] * share);
#pragma unroll
        for (int k = 0; k < n; ++k) {
            if (!rows.in[k] || !exists) continue;
            float d[kVector];
            widen(as_vector<T>(x[k]), d);
#pragma unroll
            for (int j = 0; j < kVector; ++j)
                d[j] = scale * g[k][j] + ((d[j] - mean) * rstd * slope + offset);
            store_vector(static_cast<T*>(a.dx) + at(row, k), narrow<T>(d));
        }
    }
    leave_gradients<true>(a, part, sums, worker);
}

template <class T, bool kActivates>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    backward_aligned_kernel(LayerNormBackward a) {
    with_workers<float>(a, [&](long worker) { work_aligned<T, kActivates>(a, worker); });
}

}  // namespace layer_norm
}  // namespace fastnorm
