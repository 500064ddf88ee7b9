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
template <class T, class R>
__device__ __forceinline__ Vector<T> load_residual(const R* p, int rest) {
    if constexpr (std::is_same_v<R, T>) {
        return load_row<false>(p, rest);
    } else {
        static_assert(sizeof(R) == 2 && Vector<T>::size == 4, "");
        Vector<T> wide = {};
        if (rest >= 4 && reinterpret_cast<uintptr_t>(p) % 8 == 0) {
            const uint2 raw = *reinterpret_cast<const uint2*>(p);
            const Vector<R> narrow = as_vector<R>({raw.x, raw.y, 0, 0});  // 4 of its 8
#pragma unroll
            for (int j = 0; j < 4; ++j) wide.v[j] = widen(narrow.v[j]);
        } else {
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (j < rest) wide.v[j] = widen(p[j]);
        }
        return wide;
    }
}

template <class R, class T, int n>
__device__ __forceinline__ void add_row(const LayerNormForward& a, const Part<T>& part, long row,
                                        long begin, Vector<T> (&x)[n]) {
    const R* residual = row_of<R>(a.residual, row, a.rows, a.batch_rows) + begin;
#pragma unroll
    for (int k = 0; k < n; ++k) {
        if (part.used(k)) add(x[k], load_residual<T>(residual + part.column(k), part.rest(k)));
    }
}

// Adds the residual, if there is one, to columns of x that begin at `begin`; stores the sum if it
// is wanted.
template <class T, int n>
__device__ __forceinline__ void add_residual(const LayerNormForward& a, const Part<T>& part,
                                             long row, long begin, Vector<T> (&x)[n], bool store) {
    if (a.residual.data == nullptr) return;
    if constexpr (std::is_same_v<T, float>) {  // a switch, for kernels of their own are many
        if (a.residual_dtype == Dtype::bfloat16)
            add_row<__nv_bfloat16>(a, part, row, begin, x);
        else if (a.residual_dtype == Dtype::float16)
            add_row<__half>(a, part, row, begin, x);
        else
            add_row<float>(a, part, row, begin, x);
    } else {
        add_row<T>(a, part, row, begin, x);
    }
    if (a.sum == nullptr || !store) return;
    T* sum = static_cast<T*>(a.sum) + row * a.cols + begin;
#pragma unroll
    for (int k = 0; k < n; ++k) {
        if (part.used(k))
            store_row<false>(sum + part.column(k), x[k], part.rest(k), part.first, part.last);
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
template <class T, int n>
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
        if (!part.used(k)) continue;
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
            // elements beyond the row hold zero, not the mean: they must not count
            const W centred = j < part.rest(k) ? widen(x[k].v[j]) - mean : W(0);
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

template <class W>
__device__ __forceinline__ W store_statistics(const LayerNormForward& a, long row, W mean, W m2,
                                              bool store) {
    const W rstd = rsqrt(m2 / W(a.cols) + W(a.eps));
    if (store) {
        static_cast<W*>(a.mean)[row] = mean;
        static_cast<W*>(a.rstd)[row] = rstd;
    }
    return rstd;
}

// y of a vector at column `col` of a row; `at` is where y's begins.
template <class T>
__device__ __forceinline__ void normalize(const LayerNormForward& a, const Part<T>& part,
                                          const Vector<T>& x, long at, long col, int rest,
                                          Wide<T> mean, Wide<T> rstd) {
    using W = Wide<T>;
    constexpr int kVector = Vector<T>::size;
    W z[kVector], parameter[kVector];
    load_columns<false, T>(a.weight, col, rest, W(1), parameter);
#pragma unroll
    for (int j = 0; j < kVector; ++j) z[j] = (widen(x.v[j]) - mean) * rstd * parameter[j];
    load_columns<false, T>(a.bias, col, rest, W(0), parameter);
#pragma unroll
    for (int j = 0; j < kVector; ++j) z[j] += parameter[j];
    activate<T>(a.activation, z);
    if (a.y.dtype == dtype_of<T>) {
        Vector<T> y;
#pragma unroll
        for (int j = 0; j < kVector; ++j) y.v[j] = static_cast<T>(z[j]);
        store_row<false>(static_cast<T*>(a.y.data) + at, y, rest, part.first, part.last);
    } else {
#pragma unroll
        for (int j = 0; j < kVector; ++j)
            if (j < rest) store_any(a.y, at + j, z[j]);
    }
}

// ---- kernel: a row in the registers of 1 to 512 threads -----------------------------------------

template <class T>
__global__ void __launch_bounds__(kForwardThreads, 1) forward_rows_kernel(LayerNormForward a) {
    using W = Wide<T>;
    constexpr int n = kForwardVectors;
    Part<T> part(a.plan.threads, int(a.cols));
    const bool transposed = a.x.column != 1;
    long first = long(blockIdx.x) * a.plan.tile, end = a.rows;
    T* staged = dynamic_shared<T>();
    if (transposed) {
        const long tiles = a.plan.tiles, batch = blockIdx.x / tiles;  // tiles of a batch
        const long row = (blockIdx.x - batch * tiles) * a.plan.tile;
        stage(staged, a.x, batch, row, a.batch_rows, a.plan.tile, part.span);
        first = batch * a.batch_rows + row, end = (batch + 1) * a.batch_rows;
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
                x[k] = load_row<false>(from + part.column(k), part.rest(k));
        }
        add_residual(a, part, row, 0, x, true);
        const Moments<W> m = moments(part, x);
        const W rstd = store_statistics(a, row, m.mean, m.m2, part.lane == 0 && row < end);
#pragma unroll
        for (int k = 0; k < n; ++k) {
            if (part.used(k))
                normalize(a, part, x[k], row * a.cols + part.column(k), part.column(k),
                          part.rest(k), m.mean, rstd);
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
//
// Where L2 has no room for a row and what is read beside it, lag is the number of tiles, and tiles
// go chunk by chunk through all rows: parameters are read once, for `span` rows of a tile at a
// time. The second visits go backwards, as L2 has what was read last.
struct Tile {
    long row, chunk;
};

// Tickets are 32 bits, and so are divisions: of 64 bits they are subroutines.
__device__ __forceinline__ Tile first_tile(const LayerNormForward& a, unsigned ticket) {
    const unsigned each = unsigned(a.plan.by_columns ? a.rows : a.plan.chunks);
    const unsigned outer = ticket / each, inner = ticket - outer * each;
    return a.plan.by_columns ? Tile{inner, outer} : Tile{outer, inner};
}

// The first of the `span` rows of a tile.
__device__ __forceinline__ Tile second_tile(const LayerNormForward& a, unsigned index) {
    if (!a.plan.by_columns) return first_tile(a, index);
    const unsigned each = unsigned((a.rows + a.plan.span - 1) / a.plan.span);
    const unsigned outer = index / each, inner = index - outer * each;
    return {(each - 1 - inner) * a.plan.span, a.plan.chunks - 1 - outer};
}

// A chunk's mean and m2; whoever comes last merges those of all chunks of the row.
template <class W>
__device__ __forceinline__ void leave_moments(const LayerNormForward& a, Tile tile, W mean, W m2) {
    W* partials = static_cast<W*>(a.partials) + 2 * tile.row * a.plan.chunks;
    unsigned* arrivals = a.counters + 2 + tile.row;
    if (threadIdx.x == 0) partials[2 * tile.chunk] = mean, partials[2 * tile.chunk + 1] = m2;
    if (!arrive_last(arrivals, unsigned(a.plan.chunks))) return;
    const Moments<W> whole = merge_chunks(a, partials);
    store_statistics(a, tile.row, whole.mean, whole.m2, threadIdx.x == 0);
    arrive(arrivals);
}

// fp32 has room for two blocks on a multiprocessor: with three, a residual of another dtype spills.
template <class T>
__global__ void __launch_bounds__(kTicketThreads, sizeof(T) == 4 ? 2 : 3)
    forward_ticket_kernel(LayerNormForward a) {
    using W = Wide<T>;
    constexpr int n = kForwardVectors;
    const unsigned ticket = take_ticket(a.counters);
    Vector<T> x[n];
    if (ticket < a.rows * a.plan.chunks) {
        const Tile tile = first_tile(a, ticket);
        const long begin = tile.chunk * a.plan.chunk;
        Part<T> part(kTicketThreads, int(min(a.cols - begin, a.plan.chunk)));
        part.length = part.span;
        const T* from = row_of<T>(a.x, tile.row, a.rows, a.batch_rows) + begin;
#pragma unroll
        for (int k = 0; k < n; ++k) {
            x[k] = {};
            if (part.used(k)) x[k] = load_row<false>(from + part.column(k), part.rest(k));
        }
        add_residual(a, part, tile.row, begin, x, true);
        const Moments<W> m = moments(part, x);
        leave_moments(a, tile, m.mean, m.m2);
    }
    if (ticket >= a.plan.lag) {
        const Tile tile = second_tile(a, unsigned(ticket - a.plan.lag));
        const long begin = tile.chunk * a.plan.chunk, end = min(a.rows, tile.row + a.plan.span);
        Part<T> part(kTicketThreads, int(min(a.cols - begin, a.plan.chunk)));
        part.length = part.span;
        const bool summed = a.sum != nullptr;
        for (long row = tile.row; row < end; ++row)
            wait(a.counters + 2 + row, unsigned(a.plan.chunks) + 1);
#pragma unroll 1
        for (long row = tile.row; row < end; ++row) {
            const W mean = static_cast<const W*>(a.mean)[row];
            const W rstd = static_cast<const W*>(a.rstd)[row];
            const T* from = (summed ? static_cast<const T*>(a.sum) + row * a.cols
                                    : row_of<T>(a.x, row, a.rows, a.batch_rows)) +
                            begin;
#pragma unroll
            for (int k = 0; k < n; ++k)
                if (part.used(k)) x[k] = load_row<false>(from + part.column(k), part.rest(k));
            if (!summed) add_residual(a, part, row, begin, x, false);
#pragma unroll
            for (int k = 0; k < n; ++k) {
                const long col = begin + part.column(k);
                if (part.used(k))
                    normalize(a, part, x[k], row * a.cols + col, col, part.rest(k), mean, rstd);
            }
        }
    }
    leave_zero(a.counters, 2 + a.rows);
}

}  // namespace layer_norm
}  // namespace fastnorm
