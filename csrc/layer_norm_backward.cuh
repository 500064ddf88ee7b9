// Layer norm backward: x and dy are read once by persistent blocks, dweight and dbias are summed on
// the way and finished by the last blocks of the same launch.
#pragma once
#include "layer_norm_rows.cuh"

namespace fastnorm {
namespace layer_norm {

constexpr int kBackwardThreads = 512;  // at most
template <class T>
constexpr int kBackwardVectors = sizeof(T) == 8 ? 1 : 2;  // of a thread

// ---- pieces: dy and the activation --------------------------------------------------------------

// Where dy of a row's columns from `col` on begins, whatever its dtype.
template <class T>
__device__ __forceinline__ const char* dy_at(const LayerNormBackward& a, long row, long col) {
    const long at = row_offset(a.dy, row, a.rows, a.batch_rows) + col;
    return static_cast<const char*>(a.dy.data) + at * (a.dy_dtype == dtype_of<T> ? sizeof(T) : 4);
}

// As many values of dy as a vector of T has, from p on: of T, or fp32 where T is narrower.
template <bool kFast, bool kOnce, class T>
__device__ __forceinline__ void load_dy(Dtype dtype, const char* p, int rest,
                                        Wide<T> (&dy)[Vector<T>::size]) {
    if (sizeof(T) > 2 || dtype == dtype_of<T>) {
        widen(load_row<kFast, kOnce>(reinterpret_cast<const T*>(p), rest), dy);
    } else {
#pragma unroll
        for (int j = 0; j < Vector<T>::size; j += 4) {
            const float* half = reinterpret_cast<const float*>(p) + j;
            const Vector<float> v = load_row<kFast, kOnce>(half, rest - j);
#pragma unroll
            for (int i = 0; i < 4 && i + j < Vector<T>::size; ++i) dy[j + i] = v.v[i];
        }
    }
}

// dy of a vector of columns becomes dz, the gradient of what the activation is given, and g, that
// of x_hat; x_hat is zero beyond the row, dy is so already.
template <bool kFast, class T>
__device__ __forceinline__ void pull_back(const LayerNormBackward& a, const Vector<T>& x, long col,
                                          int rest, Wide<T> mean, Wide<T> rstd,
                                          Wide<T> (&dz)[Vector<T>::size],
                                          Wide<T> (&x_hat)[Vector<T>::size],
                                          Wide<T> (&g)[Vector<T>::size]) {
    using W = Wide<T>;
    constexpr int kVector = Vector<T>::size;
    load_columns<kFast, T>(a.weight, col, rest, W(1), g);
#pragma unroll
    for (int j = 0; j < kVector; ++j)
        x_hat[j] = (kFast ? rest > 0 : j < rest) ? (widen(x.v[j]) - mean) * rstd : W(0);
    if (a.activation != Activation::identity) {
        W bias[kVector];
        load_columns<kFast, T>(a.bias, col, rest, W(0), bias);
        // four at a time: more would take registers that the sums are in
#pragma unroll
        for (int four = 0; four < kVector; four += 4) {
            with_activation(a.activation, [&](auto formula) {
#pragma unroll
                for (int j = four; j < min(four + 4, kVector); ++j)
                    dz[j] *= decltype(formula)::template slope<T>(x_hat[j] * g[j] + bias[j]);
            });
        }
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) g[j] *= dz[j];
}

// ---- pieces: sums -------------------------------------------------------------------------------

template <class W>
struct RowSums {
    Sums<2, W> warp[2][kWarp];
};

// Over the threads of a row, in every row of the block; `turn` is 0 and 1 by turns, so that one
// barrier a call is enough.
template <class W>
__device__ __forceinline__ Sums<2, W> row_sum(Sums<2, W> s, int threads, int turn) {
    s = warp_sum(s, min(threads, kWarp));
    if (threads <= kWarp) return s;
    auto& shared = block_shared<RowSums<W>>();
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = threads / kWarp;
    if (lane == 0) shared.warp[turn][warp] = s;
    __syncthreads();
    return warp_sum(shared.warp[turn][(warp & ~(warps - 1)) + (lane & (warps - 1))], warps);
}

// Sums of a column's dz * x_hat and dz, for each column of a thread.
template <class T, int n>
struct Gradients {
    using W = Wide<T>;
    static constexpr int kVector = Vector<T>::size;
    W dweight[n][kVector] = {}, dbias[n][kVector] = {};
    bool wanted;  // either of them

    __device__ __forceinline__ explicit Gradients(const LayerNormBackward& a)
        : wanted(a.dweight.data != nullptr || a.dbias.data != nullptr) {}

    __device__ __forceinline__ void add(int k, const W (&dz)[kVector], const W (&x_hat)[kVector]) {
        if (!wanted) return;
#pragma unroll
        for (int j = 0; j < kVector; ++j) dweight[k][j] += dz[j] * x_hat[j], dbias[k][j] += dz[j];
    }

    // Calls f(p, sums) for each of the two that is wanted, p where their partial sums of this part
    // begin.
    template <class F>
    __device__ __forceinline__ void for_wanted(const LayerNormBackward& a, long part, F f) const {
        W* p = static_cast<W*>(a.parts) + part * a.cols;
        if (a.dweight.data != nullptr) {
            f(p, dweight);
            p += a.plan.parts * a.cols;
        }
        if (a.dbias.data != nullptr) f(p, dbias);
    }
};

// A thread's sums to its columns at p; added to what is there where kAdd.
template <bool kFast, bool kAdd = false, class T, class W, int n, int kVector>
__device__ __forceinline__ void store_sums(const Part<T>& part, W* p, const W (&sums)[n][kVector]) {
#pragma unroll
    for (int k = 0; k < n; ++k) {
        if constexpr (kFast) {
#pragma unroll
            for (int j = 0; j < kVector; j += Vector<W>::size) {
                if (part.column(k) >= part.span) continue;
                W* to = p + part.column(k) + j;
                Vector<W> v = {};
                if (kAdd) v = load_vector(to);
#pragma unroll
                for (int i = 0; i < Vector<W>::size; ++i) v.v[i] += sums[k][j + i];
                store_vector(to, v);
            }
        } else {
#pragma unroll
            for (int j = 0; j < kVector; ++j) {
                W* to = p + part.column(k) + j;
                if (part.column(k) + j < part.span) *to = (kAdd ? *to : W(0)) + sums[k][j];
            }
        }
    }
}

// Stores a worker's partial sums: the groups of threads that shared the block merge theirs in
// shared memory.
template <bool kFast, class T, int n>
__device__ __forceinline__ void leave_gradients(const LayerNormBackward& a, const Part<T>& part,
                                                const Gradients<T, n>& sums, long worker) {
    using W = Wide<T>;
    W* memory = dynamic_shared<W>();
    sums.for_wanted(a, worker, [&](W* p, const W(&own)[n][Vector<T>::size]) {
        if (part.groups == 1) return store_sums<kFast>(part, p, own);
        __syncthreads();
        store_sums<false>(part, memory + part.group * part.span, own);
        __syncthreads();
        for (int c = threadIdx.x; c < part.span; c += blockDim.x) {
            W sum = 0;
            for (int i = 0; i < part.groups; ++i) sum += memory[i * part.span + c];
            p[c] = sum;
        }
    });
}

constexpr int kFinishLanes = 8;  // 16 bytes each: 128 of a row of partial sums

template <class W>
struct Columns {
    W warp[kBackwardThreads / kWarp][kFinishLanes * Vector<W>::size];
};

// This thread's columns, from p on, of every `step`-th of the partial sums from `first` on. Eight
// loads in flight: nothing else hides their latency.
template <class W>
__device__ __forceinline__ Sums<Vector<W>::size, W> sum_parts(const LayerNormBackward& a,
                                                              const W* p, int rest, int first,
                                                              int step) {
    constexpr int kVector = Vector<W>::size;
    Sums<kVector, W> sum = {};
    if (a.cols % kVector == 0) {
#pragma unroll 8
        for (long part = first; part < a.plan.parts; part += step) {
            const Vector<W> v = load_vector(p + part * a.cols);
#pragma unroll
            for (int j = 0; j < kVector; ++j) sum.v[j] += v.v[j];
        }
    } else {
#pragma unroll 2
        for (long part = first; part < a.plan.parts; part += step) {
#pragma unroll
            for (int j = 0; j < kVector; ++j)
                if (j < rest) sum.v[j] += p[part * a.cols + j];
        }
    }
    return sum;
}

// After all workers have stored their partial sums: these are added in fixed order, 128 bytes of
// columns at a time. Finishers have the largest tickets, so they wait for blocks that are running
// or done.
template <class W>
__device__ __forceinline__ void finish(const LayerNormBackward& a, long finisher, long finishers) {
    constexpr int kVector = Vector<W>::size, kSlab = kFinishLanes * kVector;
    auto& shared = block_shared<Columns<W>>();
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    const int own = lane % kFinishLanes * kVector;
    const long slabs = (a.cols + kSlab - 1) / kSlab;
    const int wanted = (a.dweight.data != nullptr) + (a.dbias.data != nullptr);
    for (long i = finisher; i < wanted * slabs; i += finishers) {
        const bool second = i >= slabs;
        const long begin = (i - second * slabs) * kSlab;
        const int rest = int(min(a.cols - begin, long(kSlab)));
        const W* p = static_cast<const W*>(a.parts) + second * a.plan.parts * a.cols + begin + own;
        Sums<kVector, W> sum = {};
        if (own < rest)
            sum =
                sum_parts(a, p, rest - own, threadIdx.x / kFinishLanes, blockDim.x / kFinishLanes);
#pragma unroll
        for (int step = kFinishLanes; step < kWarp; step *= 2) {
#pragma unroll
            for (int j = 0; j < kVector; ++j)
                sum.v[j] += __shfl_xor_sync(kFullWarp, sum.v[j], step);
        }
        __syncthreads();  // the last use of `shared` is over
        if (lane < kFinishLanes) {
#pragma unroll
            for (int j = 0; j < kVector; ++j) shared.warp[warp][own + j] = sum.v[j];
        }
        __syncthreads();
        if (int(threadIdx.x) >= rest) continue;
        W all = 0;
        for (int j = 0; j < warps; ++j) all += shared.warp[j][threadIdx.x];
        store_any(!second && a.dweight.data != nullptr ? a.dweight : a.dbias, begin + threadIdx.x,
                  all);
    }
}

// ---- kernel: rows in registers ------------------------------------------------------------------

// The worker's share of the rows: every `workers`-th tile. L2 is told of the next rows while these
// are summed.
template <class T>
__device__ __forceinline__ void work(const LayerNormBackward& a, long worker) {
    using W = Wide<T>;
    constexpr int n = kBackwardVectors<T>, kVector = Vector<T>::size;
    const LayerNormPlan& plan = a.plan;
    const bool x_staged = a.x.column != 1, dy_staged = a.dy.column != 1;
    Part<T> part(plan.threads, int(a.cols));
    Gradients<T, n> sums(a);

    auto x_tile = [&](int r) { return dynamic_shared<T>() + r * staged_pitch(part.span); };
    auto dy_tile = [&](int r) { return x_tile(x_staged ? plan.tile + r : r); };
    auto announce = [&](long row, int length) {
        const T* from = row_of<T>(a.x, row, a.rows, a.batch_rows);
#pragma unroll
        for (int k = 0; k < n; ++k) {
            if (part.column(k) >= length) continue;
            prefetch(from + part.column(k));
            prefetch(dy_at<T>(a, row, part.column(k)));
        }
    };

    long t = worker, end = a.rows;
    int r = part.group, turn = 0;
#pragma unroll 1
    while (t < plan.tiles) {
        long row = t * plan.tile + r;
        if (x_staged || dy_staged) {
            const long tiles = (a.batch_rows + plan.tile - 1) / plan.tile, batch = t / tiles;
            const long first = (t - batch * tiles) * plan.tile;
            if (r == part.group && x_staged)
                stage(x_tile(0), a.x, batch, first, a.batch_rows, plan.tile, part.span);
            if (r == part.group && dy_staged)
                stage(dy_tile(0), a.dy, batch, first, a.batch_rows, plan.tile, part.span);
            row = batch * a.batch_rows + first + r, end = (batch + 1) * a.batch_rows;
        }
        part.length = row < end ? part.span : 0;
        const bool exists = part.length > 0;
        const W mean = exists ? static_cast<const W*>(a.mean)[row] : W(0);
        const W rstd = exists ? static_cast<const W*>(a.rstd)[row] : W(0);
        const T* from = row_of<T>(a.x, row, a.rows, a.batch_rows);
        Vector<T> x[n] = {}, dsum[n] = {};
#pragma unroll
        for (int k = 0; k < n; ++k) {
            const int col = part.column(k), rest = part.rest(k);
            if (!part.used(k)) continue;
            x[k] =
                x_staged ? load_staged(x_tile(r) + col, rest) : load_row<false>(from + col, rest);
        }
        forget(x);
        W g[n][kVector];
        Sums<2, W> s = {};
#pragma unroll
        for (int k = 0; k < n; ++k) {
            if (!part.used(k)) continue;
            const int col = part.column(k), rest = part.rest(k);
            W dz[kVector], x_hat[kVector];
            if (dy_staged)
                widen(load_staged(dy_tile(r) + col, rest), dz);
            else
                load_dy<false, false, T>(a.dy_dtype, dy_at<T>(a, row, col), rest, dz);
            pull_back<false>(a, x[k], col, rest, mean, rstd, dz, x_hat, g[k]);
            sums.add(k, dz, x_hat);
#pragma unroll
            for (int j = 0; j < kVector; ++j) s.v[0] += g[k][j], s.v[1] += g[k][j] * x_hat[j];
        }

        // on the way while the row is summed: dsum and the next row
#pragma unroll
        for (int k = 0; k < n; ++k) {
            if (a.dsum == nullptr || a.dx == nullptr || !part.used(k)) continue;
            const T* other = static_cast<const T*>(a.dsum) + row * a.cols;
            dsum[k] = load_row<false>(other + part.column(k), part.rest(k));
        }
        forget(dsum);
        r += part.groups;
        if (r >= plan.tile) r = part.group, t += plan.workers;
        const long next = t * plan.tile + r;
        if (!x_staged && !dy_staged) announce(next, next < a.rows ? part.span : 0);
        if (a.dx == nullptr) continue;

        forget(x);
        s = row_sum(s, part.threads, turn);
        turn ^= 1;
        const W m1 = s.v[0] / W(a.cols), m2 = s.v[1] / W(a.cols);
        T* dx = static_cast<T*>(a.dx) + row * a.cols;
#pragma unroll
        for (int k = 0; k < n; ++k) {
            if (!part.used(k)) continue;
            Vector<T> out;
#pragma unroll
            for (int j = 0; j < kVector; ++j) {
                const W x_hat = (widen(x[k].v[j]) - mean) * rstd;
                const W d = rstd * (g[k][j] - m1 - x_hat * m2);
                out.v[j] = static_cast<T>(d + widen(dsum[k].v[j]));
            }
            store_row<false>(dx + part.column(k), out, part.rest(k), part.first, part.last);
        }
    }

    leave_gradients<false>(a, part, sums, worker);
}

// Runs `work` of a worker in the first blocks to start, and finishes the gradients of parameters,
// if any is wanted, in the others.
template <class W, class F>
__device__ __forceinline__ void with_workers(const LayerNormBackward& a, F work) {
    const bool wanted = a.counters != nullptr;  // dweight or dbias
    const long ticket = wanted ? take_ticket(a.counters) : blockIdx.x, workers = a.plan.workers;
    unsigned* arrivals = a.counters + 2;
    if (ticket < workers) {
        work(ticket);
        if (!wanted) return;
        arrive(arrivals);
    } else {
        wait(arrivals, unsigned(workers));
        finish<W>(a, ticket - workers, gridDim.x - workers);
    }
    leave_zero(a.counters, 3);
}

template <class T>
__global__ void __launch_bounds__(kBackwardThreads, 1) backward_rows_kernel(LayerNormBackward a) {
    with_workers<Wide<T>>(a, [&](long worker) { work<T>(a, worker); });
}

}  // namespace layer_norm
}  // namespace fastnorm
