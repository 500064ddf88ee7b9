// Batch norm forward: x is read from memory once where a group of channels fits on the chip.
#include "batch_norm_tiles.cuh"

namespace fastnorm {
namespace {

using namespace batch_norm;

// ---- kernels ------------------------------------------------------------------------------------

template <class T, bool kLast>
using ForwardTile = Tile<T, kLast, kForwardSlots, 1>;

// A number of the channel's own to measure deviations from: a large mean would round at every
// merge. Of three, so that one outlier is not taken.
template <class T>
__device__ __forceinline__ Wide<T> pivot_of(const T* x, const BatchNormShape& s, long c) {
    using W = Wide<T>;
    const auto at = [&](long n, long i) {
        return widen(x[n * s.x_stride_n + c * s.x_stride_c + i * s.x_stride_s]);
    };
    const W a = at(0, 0), b = at(s.N / 2, s.S / 2), d = at(s.N - 1, s.S - 1);
    const W low = a < b ? a : b, high = a < b ? b : a;
    const W middle = d < low ? low : d > high ? high : d;
    return middle - middle == W(0) ? middle : W(0);
}

// One thread's part of K channels: count, sum and squared deviations of x - pivot.
template <class W, int K>
struct Collected {
    W count = W(0), sum[K] = {}, m2[K] = {};

    // Chan's merge with a set of n numbers: their means and squared deviations from these.
    __device__ __forceinline__ void add(int n, const W (&mean)[K], const W (&squares)[K]) {
        if (n == 0) return;
        const W per_count = count > W(0) ? reciprocal(count) : W(0);
        const W weight = count * W(n) * reciprocal(count + W(n));
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const W delta = mean[k] - sum[k] * per_count;
            m2[k] += count > W(0) ? squares[k] + delta * delta * weight : squares[k];
            sum[k] += mean[k] * W(n);
        }
        count += W(n);
    }

    __device__ __forceinline__ void moments(Moments<W> (&m)[K]) const {
#pragma unroll
        for (int k = 0; k < K; ++k) m[k] = {count, count > W(0) ? sum[k] / count : W(0), m2[k]};
    }
};

// Calls f(k, x - pivot) for every element of a batch; returns how many each channel has.
template <class T, bool kLast, int K, class F>
__device__ __forceinline__ int each(const ForwardTile<T, kLast>& tile, unsigned h,
                                    const Wide<T> (&pivot)[K], F f) {
    constexpr int V = Vector<T>::size;
    int elements = 0;
#pragma unroll 1
    for (int u = 0; u < kForwardSlots; ++u) {
        const Part part = tile.part(h, u);
        const Vector<T> x = tile.at(h, 0, u);
        elements += kLast ? part.end > 0 : part.end - part.begin;
        if (part.end - part.begin == V) {
#pragma unroll
            for (int j = 0; j < V; ++j) f(kLast ? j : 0, widen(x.v[j]) - pivot[kLast ? j : 0]);
        } else if (!kLast) {
#pragma unroll
            for (int j = 0; j < V; ++j)
                if (j >= part.begin && j < part.end) f(0, widen(x.v[j]) - pivot[0]);
        }
    }
    return elements;
}

enum Value { kMean, kScale, kBias };  // per channel, in shared memory; the pivot is kMean at first

// Puts the pivots of a group into shared memory, each by the thread that will settle its channel.
template <class T, class V>
__device__ __forceinline__ void find_pivots(const BatchNormForward& a, unsigned group, V* values) {
    const BatchNormPlan& p = a.plan;
    const int t = threadIdx.x;
    const long c = long(group) * p.channels + t;
    if (t < p.channels)
        values[kMean * p.channels + t] =
            c < p.shape.C ? pivot_of(static_cast<const T*>(a.x), p.shape, c) : V(0);
}

// The moments of a tile: two passes over what stays in shared memory, and over every batch that
// does not.
template <class T, bool kLast, int K>
__device__ __forceinline__ void collect(const BatchNormForward& a, ForwardTile<T, kLast>& tile,
                                        const Shared<T, Moments<Wide<T>>>& shared,
                                        Moments<Wide<T>> (&m)[K]) {
    using W = Wide<T>;
    Collected<W, K> all;
    W pivot[K] = {};
    for (unsigned h = 0, end; h < tile.count; h = end) {
        end = h < tile.loose ? h + 1 : tile.count;
        W mean[K] = {}, squares[K] = {};
        int n = 0;
        for (unsigned i = h; i < end; ++i) {
            tile.advance(i);
            if (i == 0) {
                find_pivots<T>(a, tile.group, shared.values);
                __syncthreads();
                shared.get(kMean, a.plan, tile.lane.column, pivot);
            }
            tile.arrived(i);
            n += each(tile, i, pivot, [&](int k, W d) { mean[k] += d; });
        }
        const W per_n = n > 0 ? reciprocal(W(n)) : W(0);
#pragma unroll
        for (int k = 0; k < K; ++k) mean[k] *= per_n;
        for (unsigned i = h; i < end && !a.center_only; ++i)
            each(tile, i, pivot, [&](int k, W d) { squares[k] += (d - mean[k]) * (d - mean[k]); });
        all.add(n, mean, squares);
    }
    all.moments(m);
}

// Thread c computes what normalising needs of channel c of the group, and stores its statistics.
template <class W>
__device__ __forceinline__ void settle(const BatchNormForward& a, const Work& work,
                                       const Moments<W>& m, W* values) {
    const BatchNormPlan& p = a.plan;
    const int t = threadIdx.x;
    const long c = long(work.group) * p.channels + t;
    if (t >= p.channels || c >= p.shape.C) return;
    W mean, rstd = W(1);
    if (a.batch_stats) {
        const W count = W(p.shape.N * p.shape.S), pivot = values[kMean * p.channels + t];
        mean = pivot + m.mean;
        if (!a.center_only) rstd = W(1) / sqrt(m.m2 / count + W(a.eps));
        if (work.member == 0) move_running(a.running, c, mean, m.m2 / (count - W(1)));
    } else {
        mean = load_any<W>(a.running.mean, c);
        if (!a.center_only) rstd = W(1) / sqrt(load_any<W>(a.running.var, c) + W(a.eps));
    }
    if (work.member == 0 && a.mean != nullptr) {
        static_cast<W*>(a.mean)[c] = mean;
        static_cast<W*>(a.rstd)[c] = a.y == nullptr ? m.m2 : rstd;
    }
    if (a.y == nullptr && c == 0) *static_cast<W*>(a.count) = m.count;
    values[kMean * p.channels + t] = mean;
    values[kScale * p.channels + t] =
        a.weight.data != nullptr ? rstd * load_any<W>(a.weight, c) : rstd;
    values[kBias * p.channels + t] = a.bias.data != nullptr ? load_any<W>(a.bias, c) : W(0);
}

// y of one slot.
template <class T, class Activity, bool kLast, int K>
__device__ __forceinline__ Vector<T> normalized(const Vector<T>& x, const Vector<T>* residual,
                                                const Wide<T> (&mean)[K], const Wide<T> (&scale)[K],
                                                const Wide<T> (&bias)[K],
                                                const Activity& activity) {
    constexpr int V = Vector<T>::size;
    Wide<T> z[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
        const int k = kLast ? j : 0;
        z[j] = (widen(x.v[j]) - mean[k]) * scale[k] + bias[k];
    }
    if (residual != nullptr) {
        const Vector<T> r = *residual;
#pragma unroll
        for (int j = 0; j < V; ++j) z[j] += widen(r.v[j]);
    }
    with_formula(activity, [&](auto formula) {
#pragma unroll
        for (int j = 0; j < V; ++j) z[j] = formula.value(z[j]);
    });
    Vector<T> y;
#pragma unroll
    for (int j = 0; j < V; ++j) y.v[j] = static_cast<T>(z[j]);
    return y;
}

template <class T, class Activity, bool kLast>
__global__ void __launch_bounds__(kThreads, kLast && sizeof(T) == 2 ? 2 : 3)
    batch_norm_forward_kernel(const __grid_constant__ BatchNormForward a) {
    using W = Wide<T>;
    constexpr int K = kChannels<T, kLast>;
    const BatchNormPlan& p = a.plan;
    const T *x = static_cast<const T*>(a.x), *residual = static_cast<const T*>(a.residual);
    Work work = take_work(p, a.counters);
    work.reduces = work.reduces && a.batch_stats;
    const Shared<T, Moments<W>> shared(p);
    ForwardTile<T, kLast> tile(p, {x}, residual, true, shared.tiles, work);

    Moments<W> found = {};
    Moments<W>* partials = partials_of<Moments<W>>(a.partials, p, work.group);
    unsigned* arrivals = a.counters + kArrivals + work.group;
    if (work.reduces) {
        Moments<W> mine[K];
        collect(a, tile, shared, mine);
        found = combine_block<W>(mine, p.lanes, p.columns, shared.table);
    } else if (a.batch_stats) {
        find_pivots<T>(a, work.group, shared.values);
    }
    if (work.applies && a.y != nullptr) {
        tile.turn();
        tile.advance(0);
    }
    if (a.batch_stats && p.partials > 0) {
        if (const int t = threadIdx.x; work.reduces && t < p.channels)
            partials[long(work.member) * p.channels + t] = found;
        if (a.y == nullptr) {
            if (!arrive_last(arrivals, p.members)) return;
            if (threadIdx.x == 0) *arrivals = 0;
            work.member = 0;
        } else if (work.reduces) {
            arrive(arrivals);
        }
        if (!work.applies) return finish(a.counters, p.counters, a.running.num_batches_tracked);
        if (a.y != nullptr) wait(arrivals, p.members);
        found = combine_members<W>(partials, p, shared.table);
    }
    settle(a, work, found, shared.values);
    if (a.y == nullptr) return;
    __syncthreads();

    const Activity activity(a.activation);
    W mean[K], scale[K], bias[K];
    shared.get(kMean, p, tile.lane.column, mean);
    shared.get(kScale, p, tile.lane.column, scale);
    shared.get(kBias, p, tile.lane.column, bias);
    for (unsigned i = 0; i < tile.count; ++i) {
        const unsigned h = tile.batch(i);
        tile.advance(i);
        tile.arrived(i);
#pragma unroll 1
        for (int u = 0; u < kForwardSlots; ++u) {
            const Slot s = tile.slot(h, u);
            if (s.run == 0) continue;
            const Vector<T> y = normalized<T, Activity, kLast>(
                tile.at(h, 0, u), residual == nullptr ? nullptr : &tile.at(h, 1, u), mean, scale,
                bias, activity);
            store_slot(static_cast<T*>(a.y) + s.y, s, y, p.form == BatchNormForm::ticket);
        }
    }
    finish(a.counters, p.counters, a.running.num_batches_tracked);
}

template <class F>
cudaError_t with_kernel(Dtype dtype, Activation activation, bool last, F f) {
    return with_type(dtype, [&](auto t) {
        using T = decltype(t);
        return with_activity<T>(activation, [&](auto activity) {
            return with_flag(last, [&](auto flag) {
                return f(batch_norm_forward_kernel<T, typename decltype(activity)::type,
                                                   decltype(flag)::value>);
            });
        });
    });
}

}  // namespace

// ---- launchers ----------------------------------------------------------------------------------

cudaError_t batch_norm_forward(const BatchNormForward& a, Dtype dtype, cudaStream_t stream) {
    return with_kernel(dtype, a.activation, a.plan.last, [&](auto kernel) {
        return launch(kernel, a.plan.blocks, kThreads, a.plan.shared_bytes, stream, a);
    });
}

cudaError_t batch_norm_forward_resident(const BatchNormPlan& plan, const BatchNormRequest& request,
                                        int* blocks) {
    return with_kernel(request.dtype, request.activation, plan.last, [&](auto kernel) {
        return resident_blocks(kernel, kThreads, plan.shared_bytes, blocks);
    });
}

}  // namespace fastnorm
