// Batch norm backward: x and dy (and the residual or y, where the activation's slope needs it) are
// read from memory once where a group of channels fits on the chip; dweight and dbias on the way.
#include "batch_norm_tiles.cuh"

namespace fastnorm {
namespace {

using namespace batch_norm;

// ---- kernels ------------------------------------------------------------------------------------

// Mean-only batch norm needs dy alone; else x, dy and perhaps the residual or y.
template <class T, bool kCenterOnly, bool kLast>
using BackwardTile = Tile<T, kLast, kBackwardSlots, kCenterOnly ? 1 : 3>;
template <bool kCenterOnly>
constexpr int kDy = kCenterOnly ? 0 : 1;
constexpr int kKept = 2;

// Sums over a channel: of dz, and of dz * (x - mean).
template <class W, bool kCenterOnly>
using ChannelSums = Sums<kCenterOnly ? 1 : 2, W>;

enum Value { kMean, kScale, kBias, kMeanDz, kMeanDzXHat };  // per channel, in shared memory

// What a thread needs of its slots' channels: of eight of them, that is too much for registers.
template <class W, int K, bool kCenterOnly>
struct Channels {
    const W* values;  // of the thread's first channel, in shared memory
    int step;         // from one kind of value to the next
    W own[3];         // of a single channel
    // what is summed; once that is known, what dx subtracts: the mean of dz, and the factor of
    // x - mean
    ChannelSums<W, kCenterOnly> sums[K] = {};

    __device__ __forceinline__ Channels(const W* all, const BatchNormPlan& p, int column)
        : values(all + column * K), step(p.channels) {
#pragma unroll
        for (int i = 0; i < 3; ++i) own[i] = values[i * step];
    }
    __device__ __forceinline__ W get(Value which, int k) const {
        return K == 1 ? own[which] : values[which * step + k];
    }
    // What dx subtracts, from where prepare() or settle() put it.
    __device__ __forceinline__ void get_means() {
#pragma unroll
        for (int k = 0; k < K; ++k) {
#pragma unroll
            for (int i = 0; i < (kCenterOnly ? 1 : 2); ++i)
                sums[k].v[i] = values[(kMeanDz + i) * step + k];
        }
    }
};

// What a sweep over a tile does with dz.
struct Sweep {
    bool reduces, writes;
    bool corrects;  // dx subtracts what depends on the sums
    bool computes;  // dz from dy; else the first sweep has left it in dy's place
};

// x - mean of a slot.
template <bool kCenterOnly, bool kLast, class Tile, class C, class W, int V>
__device__ __forceinline__ void center(const Tile& tile, unsigned h, int u, const C& channels,
                                       W (&centred)[V]) {
    if constexpr (kCenterOnly) {
#pragma unroll
        for (int j = 0; j < V; ++j) centred[j] = W(0);
    } else {
        tile.get(tile.slots(h, 0), u, centred);
#pragma unroll
        for (int j = 0; j < V; ++j) centred[j] -= channels.get(kMean, kLast ? j : 0);
    }
}

enum class Kept { nothing, residual, output };  // of a forward pass, beside x

// dz = dy * slope(z) of a slot.
template <bool kLast, class T, class Tile, class C, class Activity, class W, int V>
__device__ __forceinline__ void pull_back(const Tile& tile, unsigned h, int u, Kept kept,
                                          const C& channels, const Activity& activity,
                                          const W (&centred)[V], W (&dz)[V]) {
    W z[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
        const int k = kLast ? j : 0;
        z[j] = centred[j] * channels.get(kScale, k) + channels.get(kBias, k);
    }
    if (kept != Kept::nothing) {
        W other[V];
        tile.get(tile.slots(h, kKept), u, other);
#pragma unroll
        for (int j = 0; j < V; ++j) z[j] = kept == Kept::output ? other[j] : z[j] + other[j];
    }
    // of fp64 one after the other: two at once take more registers than there are
    constexpr int kPart = sizeof(T) == 8 ? 1 : V;
#pragma unroll 1
    for (int part = 0; part < V; part += kPart) {
        with_formula(activity, [&](auto formula) {
#pragma unroll
            for (int j = 0; j < kPart; ++j) dz[j] *= formula.template slope<T>(z[j]);
        });
        if constexpr (kPart < V) {
            static_assert(V == 2 * kPart);
            const W other_z = z[1], other_dz = dz[1];
            z[1] = z[0], dz[1] = dz[0];
            z[0] = other_z, dz[0] = other_dz;
        }
    }
}

// dx of a slot, in dz's place.
template <bool kCenterOnly, bool kLast, class C, class W, int V>
__device__ __forceinline__ void finish_dx(const C& channels, bool corrects, const W (&centred)[V],
                                          W (&dz)[V]) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
        const int k = kLast ? j : 0;
        if (corrects) {
            dz[j] -= channels.sums[k].v[0];
            if constexpr (!kCenterOnly) dz[j] -= centred[j] * channels.sums[k].v[1];
        }
        if constexpr (!kCenterOnly) dz[j] *= channels.get(kScale, k);
    }
}

template <class T, class Activity, bool kCenterOnly, bool kLast, class C>
__device__ __forceinline__ void work_on(const BatchNormBackward& a,
                                        const BackwardTile<T, kCenterOnly, kLast>& tile, unsigned h,
                                        const Sweep& sweep, const Activity& activity, C& channels) {
    constexpr int V = Vector<T>::size;
    Vector<T>* const slots = tile.slots(h, kDy<kCenterOnly>);
    const bool stays = sweep.reduces && !sweep.writes && h >= tile.loose;
    const Kept kept = a.kept == nullptr ? Kept::nothing
                      : a.keeps_output  ? Kept::output
                                        : Kept::residual;
#pragma unroll 1
    for (int u = 0; u < kBackwardSlots; ++u) {
        const Target target = tile.target(h, u);
        if (target.elements == 0) continue;
        Wide<T> centred[V], dz[V];
        tile.get(slots, u, dz);
        center<kCenterOnly, kLast>(tile, h, u, channels, centred);
        if constexpr (!kCenterOnly) {
            if (sweep.computes || h < tile.loose) {
                pull_back<kLast, T>(tile, h, u, kept, channels, activity, centred, dz);
                // rounded to T, as a layer of its own would leave it to the norm
                if (stays) slots[u * a.plan.pitch] = narrow<T>(dz);
            }
        }
        if (sweep.reduces) {
            if (target.elements != tile.kWhole) {
#pragma unroll
                for (int j = 0; j < V; ++j)
                    if ((target.elements & 1u << j) == 0) dz[j] = centred[j] = Wide<T>(0);
            }
#pragma unroll
            for (int j = 0; j < V; ++j) {
                auto& sums = channels.sums[kLast ? j : 0];
                sums.v[0] += dz[j];
                if constexpr (!kCenterOnly) sums.v[1] += dz[j] * centred[j];
            }
        }
        if (!sweep.writes) continue;
        if (a.dresidual != nullptr) store_target<T>(a.dresidual, target, dz, a.plan.quick, true);
        if (a.dx == nullptr) continue;
        finish_dx<kCenterOnly, kLast>(channels, sweep.corrects, centred, dz);
        store_target<T>(a.dx, target, dz, a.plan.quick, true);
    }
}

// Thread c puts what dz depends on of channel c of the group where all threads find it, and what dx
// depends on where that is given; returns rstd.
template <class W>
__device__ __forceinline__ W prepare(const BatchNormBackward& a, unsigned group, W* values) {
    const BatchNormPlan& p = a.plan;
    const int t = threadIdx.x;
    const long c = long(group) * p.channels + t;
    if (t >= p.channels) return W(0);
    const bool there = c < p.shape.C && a.rstd != nullptr;
    const W rstd = there ? static_cast<const W*>(a.rstd)[c] : W(1);
    values[kMean * p.channels + t] = there ? static_cast<const W*>(a.mean)[c] : W(0);
    values[kScale * p.channels + t] =
        there && a.weight.data != nullptr ? rstd * load_any<W>(a.weight, c) : rstd;
    values[kBias * p.channels + t] =
        there && a.bias.data != nullptr ? load_any<W>(a.bias, c) : W(0);
    if (a.sums != nullptr && there) {
        const W* sums = static_cast<const W*>(a.sums);
        const W count = *static_cast<const W*>(a.count);
        values[kMeanDz * p.channels + t] = sums[c] / count;
        values[kMeanDzXHat * p.channels + t] = sums[p.shape.C + c] / count * rstd;
    }
    return rstd;
}

// Thread c stores the gradients of weight and bias of channel c and puts what dx depends on where
// all threads find it.
template <class W, int Count>
__device__ __forceinline__ void settle(const BatchNormBackward& a, unsigned group, bool stores,
                                       const Sums<Count, W>& found, W rstd, W* values) {
    const BatchNormPlan& p = a.plan;
    const int t = threadIdx.x;
    const long c = long(group) * p.channels + t;
    if (t >= p.channels || c >= p.shape.C) return;
    const W count = W(p.shape.N * p.shape.S);
    const W dweight = Count > 1 ? found.v[Count - 1] * rstd : W(0);
    if (stores && a.dbias.data != nullptr) store_any(a.dbias, c, found.v[0]);
    if (stores && a.dweight.data != nullptr) store_any(a.dweight, c, dweight);
    values[kMeanDz * p.channels + t] = found.v[0] / count;
    if (Count > 1) values[kMeanDzXHat * p.channels + t] = dweight / count * rstd;
}

template <class T, class Activity, bool kCenterOnly, bool kLast>
__global__ void __launch_bounds__(kThreads, blocks_for(kLast, sizeof(T)))
    batch_norm_backward_kernel(const __grid_constant__ BatchNormBackward a) {
    using W = Wide<T>;
    using S = ChannelSums<W, kCenterOnly>;
    const BatchNormPlan& p = a.plan;
    const bool one_pass = p.form == BatchNormForm::pass, shares = p.partials > 0;
    const Work work = take_work(p, a.counters);
    const Shared<T, S> shared(p);
    const Exchange<W, S> exchange(p, a.partials, a.counters, work.group, shared.table);
    const T* operands[kCenterOnly ? 1 : 3];
    operands[0] = static_cast<const T*>(a.x);
    operands[kDy<kCenterOnly>] = static_cast<const T*>(a.dy);
    if constexpr (!kCenterOnly) operands[kKept] = static_cast<const T*>(a.kept);
    BackwardTile<T, kCenterOnly, kLast> tile(p, operands, nullptr, !kCenterOnly, shared.tiles,
                                             work);
    const W rstd = prepare(a, work.group, shared.values);
    __syncthreads();
    Channels<W, kChannels<T, kLast>, kCenterOnly> channels(shared.values, p, tile.lane.column);
    if (a.sums != nullptr) channels.get_means();

    const Activity activity(a.activation);
    const bool wants_sums = a.dweight.data != nullptr || a.dbias.data != nullptr;
    Sweep sweep = {work.reduces && (!one_pass || wants_sums), one_pass, a.sums != nullptr, true};
    if (one_pass) tile.turn();
#pragma unroll 1
    while (true) {  // the first sweep or, in one pass, the only one; then the second
        for (unsigned i = 0; i < tile.count && (sweep.reduces || sweep.writes); ++i) {
            tile.advance(i);
            tile.arrived(i);
            work_on<T, Activity, kCenterOnly, kLast>(a, tile, tile.batch(i), sweep, activity,
                                                     channels);
        }
        if (one_pass ? !sweep.reduces : sweep.writes) break;
        S found = {};
        if (sweep.reduces) {
            found = combine_block<W>(channels.sums, p.lanes, p.columns, shared.table);
            if (shares && one_pass) exchange.leave(work.member, found);
            if (shares && !one_pass) exchange.publish(work.member, found);
        }
        if (!one_pass && !work.applies) break;
        if (!one_pass) {
            tile.turn();
            tile.advance(0);
        }
        if (shares) {
            if (!one_pass) found = exchange.gather();
            if (one_pass && !exchange.gather_last(&found)) break;
        }
        settle(a, work.group, one_pass || work.member == 0, found, rstd, shared.values);
        if (one_pass) break;
        __syncthreads();
        channels.get_means();
        sweep = {false, true, true, !work.reduces};
    }
    if (!one_pass) finish(a.counters, p.counters, nullptr);
}

template <class F>
cudaError_t with_kernel(Dtype dtype, Activation activation, bool last, bool center_only, F f) {
    return with_type(dtype, [&](auto t) {
        using T = decltype(t);
        return with_flag(last, [&](auto flag) {
            constexpr bool kLast = decltype(flag)::value;
            if (center_only) return f(batch_norm_backward_kernel<T, Straight, true, kLast>);
            return with_activity<T>(activation, [&](auto activity) {
                return f(
                    batch_norm_backward_kernel<T, typename decltype(activity)::type, false, kLast>);
            });
        });
    });
}

}  // namespace

// ---- launchers ----------------------------------------------------------------------------------

cudaError_t batch_norm_backward(const BatchNormBackward& given, Dtype dtype, cudaStream_t stream) {
    BatchNormBackward a = given;
    a.plan.quick = a.plan.quick && begins_on_16_bytes({a.x, a.dy, a.kept, a.dx, a.dresidual});
    return with_kernel(dtype, a.activation, a.plan.last, a.center_only, [&](auto kernel) {
        return launch(kernel, a.plan.blocks, kThreads, a.plan.shared_bytes, stream, a);
    });
}

cudaError_t batch_norm_backward_resident(const BatchNormPlan& plan, const BatchNormRequest& request,
                                         int* blocks) {
    return with_kernel(
        request.dtype, request.activation, plan.last, request.operands == 1,
        [&](auto kernel) { return resident_blocks(kernel, kThreads, plan.shared_bytes, blocks); });
}

}  // namespace fastnorm
