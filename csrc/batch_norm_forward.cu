// Batch norm forward: x is read from memory once where a group of channels fits on the chip.
#include "batch_norm_tiles.cuh"

namespace fastnorm {
namespace {

using namespace batch_norm;

// ---- kernels ------------------------------------------------------------------------------------

template <class T, bool kLast>
using ForwardTile = Tile<T, kLast, kForwardSlots, 1>;

// The middle one of three numbers where it is finite: one outlier among them is not taken.
template <class W>
__device__ __forceinline__ W middle_of(W a, W b, W c, W otherwise) {
    const W low = min(a, b), high = max(a, b), middle = max(low, min(high, c));
    return middle - middle == W(0) ? middle : otherwise;
}

// Zero for what is not finite.
template <class W>
__device__ __forceinline__ W or_zero(W x) {
    return x - x == W(0) ? x : W(0);
}

// A number of the channel's own to measure deviations from: a large mean would round at every
// merge.
template <class T>
__device__ __forceinline__ Wide<T> pivot_of(const T* x, const BatchNormShape& s, long c) {
    const auto at = [&](long n, long i) {
        return widen(x[n * s.x_stride_n + c * s.x_stride_c + i * s.x_stride_s]);
    };
    return middle_of(at(0, 0), at(s.N / 2, s.S / 2), at(s.N - 1, s.S - 1), Wide<T>(0));
}

// One thread's part of K channels: count, sum and squared deviations of x - pivot.
template <class W, int K>
struct Collected {
    W count = W(0), sum[K] = {}, m2[K] = {};

    // Chan's merge with a set of n numbers: their means and squared deviations from these.
    __device__ __forceinline__ void add(int n, const W (&mean)[K], const W (&squares)[K]) {
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
        const W per_count = count > W(0) ? reciprocal(count) : W(0);
#pragma unroll
        for (int k = 0; k < K; ++k) m[k] = {count, sum[k] * per_count, m2[k]};
    }
};

// Elements of a thread's slots: how many, and per channel the sums of their distances from a number
// near them and of its squares. Near is, to begin with, the middle one of the thread's first three:
// the squares lose precision by n / m if m of n numbers are as far from the others as that one.
template <class T, bool kLast>
struct Gathered {
    using W = Wide<T>;
    static constexpr int V = Vector<T>::size, K = kChannels<T, kLast>;
    int n = 0;
    W near[K] = {}, sum[K] = {}, squares[K] = {};

    __device__ __forceinline__ void begin(const ForwardTile<T, kLast>& tile, unsigned h,
                                          const W (&pivot)[K], const Collected<W, K>& all) {
        n = 0;
#pragma unroll
        for (int k = 0; k < K; ++k) sum[k] = squares[k] = W(0);
        if (all.count > W(0)) {
            const W per_count = reciprocal(all.count);
#pragma unroll
            for (int k = 0; k < K; ++k) near[k] = pivot[k] + or_zero(all.sum[k] * per_count);
            return;
        }
        const Vector<T>* slots = tile.slots(h, 0);
        const bool three = kLast ? tile.exists(h, 2) : (tile.target(h, 0).elements & 7) == 7;
        const auto first = [&](int i, int k) {
            return widen(kLast ? slots[i * tile.p.pitch].v[k] : slots->v[V > 2 ? i : i % 2]);
        };
#pragma unroll
        for (int k = 0; k < K; ++k)
            near[k] = three ? middle_of(first(0, k), first(1, k), first(2, k), pivot[k]) : pivot[k];
    }

    __device__ __forceinline__ void add(const ForwardTile<T, kLast>& tile, unsigned h) {
        const Vector<T>* slots = tile.slots(h, 0);
        if (kLast || !tile.p.ragged) {
#pragma unroll
            for (int u = 0; u < kForwardSlots; ++u)
                if (tile.exists(h, u)) add<true>(tile, slots, u, tile.kWhole);
        } else {
#pragma unroll 1
            for (int u = 0; u < kForwardSlots; ++u)
                add<false>(tile, slots, u, tile.target(h, u).elements);
        }
    }

    // Their means, from the pivot, and squared deviations from these.
    __device__ __forceinline__ void settle(const W (&pivot)[K], Collected<W, K>& all) {
        if (n == 0) return;
        const W per_n = reciprocal(W(n));
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const W mean = sum[k] * per_n, deviations = squares[k] - sum[k] * mean;
            sum[k] = near[k] - pivot[k] + mean;
            squares[k] = deviations < W(0) ? W(0) : deviations;
        }
        all.add(n, sum, squares);
    }

  private:
    template <bool kWhole>
    __device__ __forceinline__ void add(const ForwardTile<T, kLast>& tile, const Vector<T>* slots,
                                        int u, unsigned elements) {
        W x[V];
        tile.get(slots, u, x);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const int k = kLast ? j : 0;
            x[j] = kWhole || (elements & 1u << j) ? x[j] - near[k] : W(0);
            sum[k] += x[j];
            squares[k] += x[j] * x[j];
        }
        n += kLast ? 1 : kWhole ? V : __popc(elements);
    }
};

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

// The moments of a tile: what stays in shared memory is one set, every batch that does not another.
template <class T, bool kLast, int K>
__device__ __forceinline__ void collect(const BatchNormForward& a, ForwardTile<T, kLast>& tile,
                                        const Shared<T, Moments<Wide<T>>>& shared,
                                        Moments<Wide<T>> (&m)[K]) {
    using W = Wide<T>;
    Collected<W, K> all;
    Gathered<T, kLast> set;
    W pivot[K];
#pragma unroll 1
    for (unsigned h = 0; h < tile.count; ++h) {
        tile.advance(h);
        if (h == 0) {
            find_pivots<T>(a, tile.group, shared.values);
            __syncthreads();
            shared.get(kMean, a.plan, tile.lane.column, pivot);
        }
        tile.arrived(h);
        if (h <= tile.loose) set.begin(tile, h, pivot, all);
        set.add(tile, h);
        if (h < tile.loose || h + 1 == tile.count) set.settle(pivot, all);
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
__device__ __forceinline__ void normalize(const ForwardTile<T, kLast>& tile, const Vector<T>* slots,
                                          const Vector<T>* residuals, int u,
                                          const Wide<T> (&mean)[K], const Wide<T> (&scale)[K],
                                          const Wide<T> (&bias)[K], const Activity& activity,
                                          Wide<T> (&y)[Vector<T>::size]) {
    constexpr int V = Vector<T>::size;
    tile.get(slots, u, y);
#pragma unroll
    for (int j = 0; j < V; ++j) {
        const int k = kLast ? j : 0;
        y[j] = (y[j] - mean[k]) * scale[k] + bias[k];
    }
    if (tile.extra != nullptr) {
        Wide<T> residual[V];
        tile.get(residuals, u, residual);
#pragma unroll
        for (int j = 0; j < V; ++j) y[j] += residual[j];
    }
    with_formula(activity, [&](auto formula) {
#pragma unroll
        for (int j = 0; j < V; ++j) y[j] = formula.template value<T>(y[j]);
    });
}

template <class T, class Activity, bool kLast>
__global__ void __launch_bounds__(kThreads, blocks_for(kLast, sizeof(T)))
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
        const Vector<T>*slots = tile.slots(h, 0), *residuals = tile.slots(h, 1);
#pragma unroll 1
        for (int u = 0; u < kForwardSlots; ++u) {
            const Target target = tile.target(h, u);
            if (target.elements == 0) continue;
            W y[Vector<T>::size];
            normalize<T>(tile, slots, residuals, u, mean, scale, bias, activity, y);
            store_target<T>(a.y, target, y, p.quick, p.form == BatchNormForm::ticket);
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

cudaError_t batch_norm_forward(const BatchNormForward& given, Dtype dtype, cudaStream_t stream) {
    BatchNormForward a = given;
    a.plan.quick = a.plan.quick && begins_on_16_bytes({a.x, a.residual, a.y});
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
