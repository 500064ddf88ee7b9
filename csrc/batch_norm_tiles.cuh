// What batch norm's kernels share: the order of work, and tiles in shared memory.
#pragma once
#include <initializer_list>

#include "batch_norm_exchange.cuh"

namespace fastnorm {
namespace batch_norm {

// Slots of a batch per thread and operand; buffers for the batches that do not stay.
constexpr int kForwardSlots = 4, kBackwardSlots = 2, kStages = 2;

// Blocks of a multiprocessor that registers are given out for.
constexpr int blocks_for(bool last, int size) {
    return last || size == 8 ? 2 : 3;
}

// Values per channel in shared memory.
constexpr int kForwardValues = 3, kBackwardValues = 6;

// ---- the order of work --------------------------------------------------------------------------

struct Work {
    unsigned group, member;
    bool reduces, applies;  // its tile
};

__device__ __forceinline__ Work take_work(const BatchNormPlan& p, unsigned* counters) {
    if (p.form == BatchNormForm::pass || p.form == BatchNormForm::owner)
        return {blockIdx.x / p.members, blockIdx.x % p.members, true, true};
    unsigned ticket = take_ticket(counters + kTicket);
    if (p.form != BatchNormForm::ticket)
        return {ticket / p.members, ticket % p.members, true, true};
    // the first tickets reduce, the last ones apply; between them the two alternate
    const unsigned count = p.groups * p.members;
    const unsigned delay = min(p.members + p.lag, count);
    bool reduces = ticket < delay;
    if (!reduces && ticket < 2 * count - delay) {
        reduces = (ticket - delay) % 2 == 0;
        ticket = (ticket - delay) / 2 + (reduces ? delay : 0);
    } else if (!reduces) {
        ticket -= count;
    }
    return {ticket / p.members, ticket % p.members, reduces, !reduces};
}

// The last block to finish leaves every counter zero and counts the batch.
__device__ __forceinline__ void finish(unsigned* counters, long count, long* num_batches_tracked) {
    if (counters == nullptr || !arrive_last(counters + kFinished, gridDim.x)) return;
    for (long i = threadIdx.x; i < count; i += kThreads) counters[i] = 0;
    if (threadIdx.x == 0 && num_batches_tracked != nullptr) ++*num_batches_tracked;
}

// Moves the running statistics of one channel towards mean and unbiased variance.
template <class W>
__device__ __forceinline__ void move_running(const BatchNormRunning& r, long c, W mean, W var) {
    const W share = r.cumulative ? W(1) / W(*r.num_batches_tracked + 1) : W(r.momentum);
    const auto move = [&](Array running, W value) {
        if (running.data == nullptr) return;
        const W old = load_any<W>(running, c);
        store_any(running, c, old * (W(1) - share) + value * share);
    };
    move(r.mean, mean);
    move(r.var, var);
}

// ---- shared memory ------------------------------------------------------------------------------

// Tiles; then a table of partial results E; then values per channel.
template <class T, class E>
struct Shared {
    using W = Wide<T>;
    Vector<T>* tiles;
    E* table;
    W* values;

    __device__ __forceinline__ explicit Shared(const BatchNormPlan& p) {
        auto* begin = dynamic_shared<unsigned char>();
        tiles = reinterpret_cast<Vector<T>*>(begin);
        table = reinterpret_cast<E*>(begin + p.tiles_bytes);
        values = reinterpret_cast<W*>(begin + p.tiles_bytes + p.table_bytes);
    }
    // Value `which` of this thread's channels.
    template <int K>
    __device__ __forceinline__ void get(int which, const BatchNormPlan& p, int column,
                                        W (&v)[K]) const {
#pragma unroll
        for (int k = 0; k < K; ++k) v[k] = values[which * p.channels + column * K + k];
    }
};

// A block's share of a group: its batches, each kSlots slots of every thread, on their way through
// shared memory. The first `loose` of them pass through kStages buffers, the others have their own
// and stay. The first visit, to reduce them, goes from batch to batch in order; the second, to
// apply, in reverse: what was read last is still close by. advance(i) starts copies, arrived(i)
// waits.
template <class T, bool kLast, int kSlots, int kOperands>
struct Tile {
    static constexpr int kVector = Vector<T>::size;
    static constexpr unsigned kWhole = Lane<T, kLast>::kWhole;
    const BatchNormPlan& p;
    const T* operands[kOperands];  // x first, unless there is none; p.operands of them
    const T* extra;                // one that applying alone reads, or null
    bool has_x;
    Vector<T>* buffers;
    unsigned group, first, count, loose;
    Lane<T, kLast> lane;
    bool back = false;    // the second visit
    unsigned copied = 0;  // batches of this visit

    __device__ __forceinline__ Tile(const BatchNormPlan& plan, const T* const (&tensors)[kOperands],
                                    const T* more, bool x_first, Vector<T>* memory,
                                    const Work& work)
        : p(plan),
          extra(more),
          has_x(x_first),
          buffers(memory),
          group(work.group),
          first(work.member * plan.batches),
          count(min(plan.batches, plan.total - first)),
          loose(!work.reduces || count <= plan.held ? (work.reduces ? 0 : count)
                                                    : count - plan.held),
          lane(plan, work.group) {
#pragma unroll
        for (int o = 0; o < kOperands; ++o) operands[o] = tensors[o];
    }

    // Rows of slots of batch h of an operand, p.pitch apart; of the extra one where there is no
    // such operand.
    __device__ __forceinline__ Vector<T>* rows(unsigned h, int operand) const {
        const unsigned place = h < loose ? p.held + h % kStages : h - loose;
        const unsigned buffer =
            operand == p.operands ? p.buffers + h % kStages : place * p.operands + operand;
        return buffers + buffer * kSlots * p.pitch;
    }
    // This thread's slot of the first row.
    __device__ __forceinline__ Vector<T>* slots(unsigned h, int operand) const {
        return rows(h, operand) + lane.place;
    }
    __device__ __forceinline__ void get(const Vector<T>* slots, int u,
                                        Wide<T> (&wide)[kVector]) const {
        widen(load_vector(slots[u * p.pitch].v), wide);
    }
    __device__ __forceinline__ unsigned position(unsigned h, int u) const {
        return lane.position(p, (first + h) * kSlots + u);
    }
    __device__ __forceinline__ Target target(unsigned h, int u) const {
        return lane.target(p, position(h, u));
    }
    __device__ __forceinline__ bool exists(unsigned h, int u) const {
        return position(h, u) < lane.positions;
    }

    __device__ __forceinline__ unsigned batch(unsigned i) const { return back ? count - 1 - i : i; }
    // Starts copying batch i of this visit, then what follows it.
    __device__ __forceinline__ void advance(unsigned i) {
        while (copied < count && (copied < i + kStages || (!back && copied >= loose))) {
            const unsigned h = batch(copied++);
            const int begin = back && h >= loose ? p.operands : 0;
            copy_batch(h, begin, back && extra != nullptr, back || h >= loose);
        }
    }
    __device__ __forceinline__ void arrived(unsigned i) const { copies_done(copied - 1 - i); }
    // Between the two visits.
    __device__ __forceinline__ void turn() {
        back = true;
        copied = 0;
    }

  private:
    // Operands from `begin` on; with the extra one if applying needs it.
    __device__ __forceinline__ void copy_batch(unsigned h, int begin, bool with_extra, bool once) {
        if constexpr (!kLast) {
            if (p.transposed && has_x && begin == 0) {
                copy_transposed(h, operands[0]);
                begin = 1;
            }
        }
        const uint64_t policy = copy_policy(once && p.hints);
        if (p.quick && (kLast || !p.ragged)) {
            copy_quick<true>(h, begin, with_extra, policy);
        } else if (p.quick) {
            copy_quick<false>(h, begin, with_extra, policy);
        } else if (begin < p.operands || with_extra) {
#pragma unroll 1
            for (int u = 0; u < kSlots; ++u) copy_slowly(h, u, begin, with_extra, policy);
        }
        copies_end();
    }

    // x has strides of its own, the others lie as y does. The neighbours of a run's first or last
    // elements may be read with them.
    template <bool kWholeSlots>
    __device__ __forceinline__ void copy_quick(unsigned h, int begin, bool with_extra,
                                               uint64_t policy) {
#pragma unroll
        for (int u = 0; u < kSlots; ++u) {
            const unsigned i = position(h, u);
            if (i >= lane.positions) continue;
            const Slot s = lane.template slot<unsigned, kWholeSlots>(p, i);
            if (!kWholeSlots && s.left <= 0) continue;  // past the end of its row, or of the tensor
            const unsigned left = unsigned(p.elements) - unsigned(s.y);  // of the tensor
            const int bytes = !kWholeSlots && left < kVector ? int(left * sizeof(T)) : 16;
            Vector<T>* to = slots(h, 0) + u * p.pitch;
#pragma unroll
            for (int o = 0; o < kOperands && o < p.operands; ++o, to += kSlots * p.pitch) {
                if (o >= begin)
                    copy_async(to, operands[o] + (has_x && o == 0 ? s.x : s.y), policy, bytes);
            }
            if (with_extra)
                copy_async(slots(h, p.operands) + u * p.pitch, extra + s.y, policy, bytes);
        }
    }

    __device__ __forceinline__ void copy_slowly(unsigned h, int u, int begin, bool with_extra,
                                                uint64_t policy) {
        const unsigned i = position(h, u);
        if (i >= lane.positions) return;
        const Slot s = lane.template slot<long, false>(p, i);
        const bool inside = s.y + kVector <= p.elements;
        const bool whole = s.elements<kVector>() == kWhole;
#pragma unroll 1
        for (int o = begin; o < p.operands + with_extra; ++o) {
            const T* from = o == p.operands ? extra : operands[0];
#pragma unroll
            for (int i = 1; i < kOperands; ++i)
                if (i == o && o != p.operands) from = operands[i];
            const bool is_x = has_x && o == 0;
            from += is_x ? s.x : s.y;
            Vector<T>* to = slots(h, o) + u * p.pitch;
            if ((whole || ((!is_x || p.dense) && inside)) && misalignment(from) == 0) {
                copy_async(to, from, policy);
            } else {
                *to = load_part(from, s);
            }
        }
    }

    // x with channels adjacent while slots lie along positions: read 16 bytes of channels at a
    // time, transposed on the way.
    __device__ __forceinline__ void copy_transposed(unsigned h, const T* x) {
        const BatchNormShape& s = p.shape;
        const int vectors = p.columns / kVector, threads = p.threads;
        __syncthreads();  // the last batch that was here has been used
#pragma unroll 1
        for (int item = threadIdx.x; item < kSlots * threads * kVector * vectors;
             item += kThreads) {
            const int column = (item & (vectors - 1)) * kVector, element = item >> bits(vectors);
            const int position = element / kVector, j = element % kVector;
            const unsigned i = (first + h) * kSlots * threads + position;
            const long c = long(group) * p.channels + column;
            const unsigned n = quotient(i, p.row);
            const long rest = long(i - n * p.row.divisor) * kVector + j;
            uint4 raw = {0, 0, 0, 0};
            if (i < p.positions && rest < s.S && c < s.C) {
                const T* begin = x + n * s.x_stride_n + rest * s.x_stride_s + c;
                const long left = s.C - c;
                const Slot channels = {0, 0, int(min(c, long(kVector))),
                                       int(min(left, long(kVector) * 2))};
                raw = left >= kVector && misalignment(begin) == 0
                          ? *reinterpret_cast<const uint4*>(begin)
                          : as_words(load_part(begin, channels));
            }
            const Vector<T> v = as_vector<T>(raw);
            const int index = position & (threads - 1), round = index >> bits(p.lanes);
            Vector<T>* to = rows(h, 0) + (position >> bits(threads)) * p.pitch;
#pragma unroll
            for (int k = 0; k < kVector; ++k) {
                const int thread =
                    (index & (p.lanes - 1)) + p.lanes * (column + k + p.columns * round);
                to[thread + (thread >> p.pad)].v[j] = v.v[k];
            }
        }
        __syncthreads();
    }
};

// ---- activations --------------------------------------------------------------------------------

// Identity and relu in one kernel.
struct Straight {
    bool rectified;
    __device__ __forceinline__ explicit Straight(Activation activation)
        : rectified(activation == Activation::relu) {}
    template <class T, class W = Wide<T>>
    __device__ __forceinline__ W value(W z) const {
        return rectified && z <= W(0) ? W(0) : z;
    }
    template <class T, class W = Wide<T>>
    __device__ __forceinline__ W slope(W z) const {
        return rectified && z <= W(0) ? W(0) : W(1);
    }
};

// Calls f with the activation's formulas: any switch is passed once per call.
template <class Activity, class F>
__device__ __forceinline__ void with_formula(const Activity& activity, F f) {
    if constexpr (std::is_same_v<Activity, Any>) {
        with_activation(activity.activation, f);
    } else {
        f(activity);
    }
}

inline bool begins_on_16_bytes(std::initializer_list<const void*> tensors) {
    uintptr_t all = 0;
    for (const void* tensor : tensors) all |= reinterpret_cast<uintptr_t>(tensor);
    return all % 16 == 0;
}

// Calls f with the kernel's type of an activation: that of one of its own, or Any.
template <class T, class F>
cudaError_t with_activity(Activation activation, F f) {
    if constexpr (!std::is_same_v<T, double>) {
        if (activation == Activation::identity || activation == Activation::relu)
            return f(Type<Straight>{});
        if (activation == Activation::silu) return f(Type<Fixed<activations::silu>>{});
        if (activation == Activation::gelu) return f(Type<Fixed<activations::gelu>>{});
    }
    return f(Type<Any>{});
}

}  // namespace batch_norm
}  // namespace fastnorm
