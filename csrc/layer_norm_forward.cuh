// Layer norm forward: rows that live in registers, and rows that many blocks share.
#pragma once
#include "layer_norm_rows.cuh"

namespace fastnorm {
namespace layer_norm {

constexpr int kForwardThreads = 512;  // at most
constexpr int kForwardVectors = 4;    // of a thread
constexpr int kTicketThreads = 256;

// ---- pieces -------------------------------------------------------------------------------------

// x + residual, rounded as the sum is returned.
template <class T>
__device__ __forceinline__ void add(Vector<T>& x, const Vector<T>& residual) {
#pragma unroll
    for (int j = 0; j < Vector<T>::size; ++j)
        x.v[j] = static_cast<T>(widen(x.v[j]) + widen(residual.v[j]));
}

// A vector of a residual at p, see load_row; a narrower one is widened.
template <bool kFast, class T, class R>
__device__ __forceinline__ Vector<T> load_residual(const R* p, int rest) {
    if constexpr (std::is_same_v<R, T>) {
        return load_row<kFast>(p, rest);
    } else {
        static_assert(sizeof(R) == 2 && Vector<T>::size == 4, "");
        Vector<T> wide = {};
        if (kFast ? rest > 0 : rest >= 4 && reinterpret_cast<uintptr_t>(p) % 8 == 0) {
            const uint2 raw = *reinterpret_cast<const uint2*>(p);
            const Vector<R> narrow = as_vector<R>({raw.x, raw.y, 0, 0});  // 4 of its 8
#pragma unroll
            for (int j = 0; j < 4; ++j) wide.v[j] = widen(narrow.v[j]);
        } else if constexpr (!kFast) {
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (j < rest) wide.v[j] = widen(p[j]);
        }
        return wide;
    }
}

template <bool kFast, class R, class T, int n>
__device__ __forceinline__ void add_row(const LayerNormForward& a, const Part<T>& part, long row,
                                        long begin, Vector<T> (&x)[n]) {
    const R* residual = row_of<R>(a.residual, row, a.rows, a.batch_rows) + begin;
#pragma unroll
    for (int k = 0; k < n; ++k) {
        if (part.used(k))
            add(x[k], load_residual<kFast, T>(residual + part.column(k), part.rest(k)));
    }
}

// Adds the residual, if there is one, to columns of x that begin at `begin`; stores the sum if it
// is wanted.
template <bool kFast, class T, int n>
__device__ __forceinline__ void add_residual(const LayerNormForward& a, const Part<T>& part,
                                             long row, long begin, Vector<T> (&x)[n], bool store) {
    if (a.residual.data == nullptr) return;
    if constexpr (std::is_same_v<T, float>) {  // a switch, for kernels of their own are many
        if (a.residual_dtype == Dtype::bfloat16)
            add_row<kFast, __nv_bfloat16>(a, part, row, begin, x);
        else if (a.residual_dtype == Dtype::float16)
            add_row<kFast, __half>(a, part, row, begin, x);
        else
            add_row<kFast, float>(a, part, row, begin, x);
    } else {
        add_row<kFast, T>(a, part, row, begin, x);
    }
    if (a.sum == nullptr || !store) return;
    T* sum = static_cast<T*>(a.sum) + row * a.cols + begin;
#pragma unroll
    for (int k = 0; k < n; ++k) {
        if (part.used(k))
            store_row<kFast>(sum + part.column(k), x[k], part.rest(k), part.first, part.last);
    }
}

// What a warp, or a group of lanes, has of a row: `sum` is that of the deviations from `mean`,
// which is not zero, as the mean is rounded.
template <class W>
struct Centred {
    W count, mean, sum, m2;
};

template <class W>
struct WarpMoments {
    Centred<W> warp[kWarp];
};

// Merges what a group of `warps` lanes has; every lane gets the same.
template <class W>
__device__ __forceinline__ Moments<W> merge_lanes(const Centred<W>& own, W pivot, int warps,
                                                  W count) {
    // means as differences from one of them: at mean 1e4 their sum would lose digits
    const W shift = own.count * (own.mean - pivot) + own.sum;
    const W mean = pivot + warp_sum(Sums<1, W>{shift}, warps).v[0] / count;
    const W delta = own.mean - mean;
    const W m2 = own.m2 + delta * (W(2) * own.sum + own.count * delta);
    return {count, mean, warp_sum(Sums<1, W>{m2}, warps).v[0]};
}

// Mean and squared deviations of a part, in two passes over registers.
template <bool kFast, class T, int n>
__device__ __forceinline__ Moments<Wide<T>> moments(const Part<T>& part, Vector<T> (&x)[n]) {
    using W = Wide<T>;
    constexpr int kVector = Vector<T>::size;
    const int width = min(part.threads, kWarp), begin = part.lane / kWarp * kWarp * kVector;
    W sum = 0;
    Sums<2, W> s = {};
    int count = 0;
#pragma unroll
    for (int k = 0; k < n; ++k) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) sum += widen(x[k].v[j]);
        count += max(0, min(part.span - k * part.threads * kVector - begin, width * kVector));
    }
    sum = warp_sum(Sums<1, W>{sum}, width).v[0];
    forget(x);
    const W mean = count > 0 ? sum / W(count) : W(0);
#pragma unroll
    for (int k = 0; k < n; ++k) {
        if (!part.used(k) || (kFast && part.rest(k) <= 0)) continue;
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
            // elements beyond the row hold zero, not the mean: they must not count
            const W centred = kFast || j < part.rest(k) ? widen(x[k].v[j]) - mean : W(0);
            s.v[0] += centred;
            s.v[1] += centred * centred;
        }
    }
    forget(x);
    s = warp_sum(s, width);
    Centred<W> own = {W(count), mean, s.v[0], s.v[1]};
    if (part.threads <= kWarp) return merge_lanes(own, mean, 1, own.count);
    auto& shared = block_shared<WarpMoments<W>>();
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = part.threads / kWarp;
    __syncthreads();  // the last use of `shared` is over
    if (lane == 0) shared.warp[warp] = own;
    __syncthreads();
    const int first = warp & ~(warps - 1);  // of the warps that share the row
    own = shared.warp[first + (lane & (warps - 1))];
    return merge_lanes(own, shared.warp[first].mean, warps, W(part.span));
}

template <class T, class W>
__device__ __forceinline__ W store_statistics(const LayerNormForward& a, long row, W mean, W m2,
                                              bool store) {
    const W rstd = rsqrt(m2 / W(a.cols) + W(a.eps));
    if (store) {
        static_cast<W*>(a.mean)[row] = mean;
        static_cast<W*>(a.rstd)[row] = rstd;
    }
    return rstd;
}

// y of a vector at column `col` of a row; `at` is where y's begins. kOnce: see store_row.
template <bool kFast, class Act, bool kOnce, class T>
__device__ __forceinline__ void normalize(const LayerNormForward& a, const Part<T>& part,
                                          const Vector<T>& x, long at, long col, int rest,
                                          Wide<T> mean, Wide<T> rstd) {
    using W = Wide<T>;
    constexpr int kVector = Vector<T>::size;
    W z[kVector], parameter[kVector];
    load_columns<kFast, T>(a.weight, col, rest, W(1), parameter);
#pragma unroll
    for (int j = 0; j < kVector; ++j) z[j] = (widen(x.v[j]) - mean) * rstd * parameter[j];
    load_columns<kFast, T>(a.bias, col, rest, W(0), parameter);
#pragma unroll
    for (int j = 0; j < kVector; ++j) z[j] += parameter[j];
    activate<T, Act>(a.activation, z);
    if (a.y.dtype == dtype_of<T>) {
        Vector<T> y;
#pragma unroll
        for (int j = 0; j < kVector; ++j) y.v[j] = static_cast<T>(z[j]);
        store_row<kFast, kOnce>(static_cast<T*>(a.y.data) + at, y, rest, part.first, part.last);
    } else if constexpr (kFast && sizeof(T) == 2) {  // fp32
#pragma unroll
        for (int half = 0; half < kVector; half += 4) {
            Vector<float> y;
#pragma unroll
            for (int j = 0; j < 4; ++j) y.v[j] = z[half + j];
            store_row<kFast, kOnce>(static_cast<float*>(a.y.data) + at + half, y, rest, part.first,
                                    part.last);
        }
    } else if constexpr (!kFast) {
#pragma unroll
        for (int j = 0; j < kVector; ++j)
            if (j < rest) store_any(a.y, at + j, z[j]);
    }
}

// ---- kernel: a row in the registers of 1 to 512 threads -----------------------------------------

template <class T, bool kFast, class Act>
__global__ void __launch_bounds__(kForwardThreads, kFast ? 2 : 1)
    forward_rows_kernel(LayerNormForward a) {
    using W = Wide<T>;
    constexpr int n = kForwardVectors;
    Part<T> part(a.plan.threads, int(a.cols));
    const bool transposed = !kFast && a.x.column != 1;
    long first = long(blockIdx.x) * a.plan.tile, end = a.rows;
    [[maybe_unused]] T* staged = dynamic_shared<T>();
    if constexpr (!kFast) {
        if (transposed) {
            const long tiles = a.plan.tiles, batch = blockIdx.x / tiles;  // tiles of a batch
            const long row = (blockIdx.x - batch * tiles) * a.plan.tile;
            stage(staged, a.x, batch, row, a.batch_rows, a.plan.tile, part.span);
            first = batch * a.batch_rows + row, end = (batch + 1) * a.batch_rows;
        }
    }
    for (int r = part.group; r < a.plan.tile; r += part.groups) {
        const long row = first + r;
        part.length = row < end ? part.span : 0;
        Vector<T> x[n] = {};
        const T* from = row_of<T>(a.x, row, a.rows, a.batch_rows);
#pragma unroll
        for (int k = 0; k < n; ++k) {
            if (!part.used(k)) continue;
            if (transposed)
                x[k] = load_staged(staged + r * staged_pitch(part.span) + part.column(k),
                                   part.rest(k));
            else
                x[k] = load_row<kFast, true>(from + part.column(k), part.rest(k));
        }
        add_residual<kFast>(a, part, row, 0, x, true);
        const Moments<W> m = moments<kFast>(part, x);
        const W rstd = store_statistics<T>(a, row, m.mean, m.m2, part.lane == 0 && row < end);
#pragma unroll
        for (int k = 0; k < n; ++k) {
            if (part.used(k))
                normalize<kFast, Act, false>(a, part, x[k], row * a.cols + part.column(k),
                                             part.column(k), part.rest(k), m.mean, rstd);
        }
    }
}

// ---- kernel: a row cut into chunks --------------------------------------------------------------

// The moments of a row from the (mean, m2) of its chunks, always in the same order.
template <class W>
__device__ __forceinline__ Moments<W> merge_chunks(const LayerNormForward& a, const W* partials) {
    const W pivot = partials[0];
    auto count = [&](long k) { return W(min(a.cols - k * a.plan.chunk, a.plan.chunk)); };
    Sums<1, W> shift = {}, m2 = {};
    for (long k = threadIdx.x; k < a.plan.chunks; k += blockDim.x)
        shift.v[0] += count(k) * (partials[2 * k] - pivot);
    const W mean = pivot + block_sum(shift).v[0] / W(a.cols);
    for (long k = threadIdx.x; k < a.plan.chunks; k += blockDim.x) {
        const W delta = partials[2 * k] - mean;
        m2.v[0] += partials[2 * k + 1] + count(k) * delta * delta;
    }
    return {W(a.cols), mean, block_sum(m2).v[0]};
}

// A tile is a chunk of a row. Ticket k takes the statistics of tile k and normalises tile k - lag,
// which waits for the statistics of its row: with lag >= chunks - 1 those of smaller tickets, which
// are running or done, on any grid. The second read of x finds it in L2.
template <class T, bool kFast>
__global__ void __launch_bounds__(kTicketThreads, 2) forward_ticket_kernel(LayerNormForward a) {
    using W = Wide<T>;
    constexpr int n = kForwardVectors;
    W *means = static_cast<W*>(a.mean), *partials = static_cast<W*>(a.partials);
    unsigned* arrivals = a.counters + 2;
    const long ticket = take_ticket(a.counters), chunks = a.plan.chunks;
    Vector<T> x[n];

    if (ticket < a.rows * chunks) {
        const long row = ticket / chunks, chunk = ticket - row * chunks,
                   begin = chunk * a.plan.chunk;
        Part<T> part(blockDim.x, int(min(a.cols - begin, a.plan.chunk)));
        part.length = part.span;
        const T* from = row_of<T>(a.x, row, a.rows, a.batch_rows) + begin;
#pragma unroll
        for (int k = 0; k < n; ++k) {
            x[k] = {};
            if (part.used(k)) x[k] = load_row<kFast>(from + part.column(k), part.rest(k));
        }
        add_residual<kFast>(a, part, row, begin, x, true);
        const Moments<W> m = moments<kFast>(part, x);
        if (threadIdx.x == 0) partials[2 * ticket] = m.mean, partials[2 * ticket + 1] = m.m2;
        if (arrive_last(arrivals + row, unsigned(chunks))) {
            const Moments<W> whole = merge_chunks(a, partials + 2 * row * chunks);
            store_statistics<T>(a, row, whole.mean, whole.m2, threadIdx.x == 0);
            arrive(arrivals + row);
        }
    }
    if (ticket >= a.plan.lag) {
        const long tile = ticket - a.plan.lag, row = tile / chunks, chunk = tile - row * chunks;
        const long begin = chunk * a.plan.chunk;
        Part<T> part(blockDim.x, int(min(a.cols - begin, a.plan.chunk)));
        part.length = part.span;
        wait(arrivals + row, unsigned(chunks) + 1);
        const W mean = means[row], rstd = static_cast<const W*>(a.rstd)[row];
        const bool summed = a.sum != nullptr;
        const T* from = (summed ? static_cast<const T*>(a.sum) + row * a.cols
                                : row_of<T>(a.x, row, a.rows, a.batch_rows)) +
                        begin;
#pragma unroll
        for (int k = 0; k < n; ++k)
            if (part.used(k)) x[k] = load_row<kFast, true>(from + part.column(k), part.rest(k));
        if (!summed) add_residual<kFast>(a, part, row, begin, x, false);
#pragma unroll
        for (int k = 0; k < n; ++k) {
            const long col = begin + part.column(k);
            if (part.used(k))
                normalize<kFast, Any, true>(a, part, x[k], row * a.cols + col, col, part.rest(k),
                                            mean, rstd);
        }
    }
    leave_zero(a.counters, 2 + a.rows);
}

}  // namespace layer_norm
}  // namespace fastnorm
