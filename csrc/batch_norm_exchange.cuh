// What the threads of a block and the blocks of a group tell each other of its channels.
#pragma once
#include "batch_norm_slots.cuh"

namespace fastnorm {
namespace batch_norm {

// Counters: of tickets, of finished blocks, then those of each group.
constexpr int kTicket = 0, kFinished = 1, kArrivals = 2;

// ---- sums over threads and blocks, in fixed order -----------------------------------------------

template <class W>
__device__ __forceinline__ Moments<W> combine(const Moments<W>& a, const Moments<W>& b) {
    return merge(a, b);
}

template <int Count, class W>
__device__ __forceinline__ Sums<Count, W> combine(Sums<Count, W> a, const Sums<Count, W>& b) {
#pragma unroll
    for (int i = 0; i < Count; ++i) a.v[i] += b.v[i];
    return a;
}

template <class W, class E>
__device__ __forceinline__ E shuffle_xor(const E& e, int step) {
    W v[sizeof(E) / sizeof(W)];
    memcpy(v, &e, sizeof(E));
#pragma unroll
    for (W& x : v) x = __shfl_xor_sync(kFullWarp, x, step);
    E other;
    memcpy(&other, v, sizeof(E));
    return other;
}

// What all threads of a column found, combined: thread c returns it for channel c of the group.
template <class W, int K, class E>
__device__ __forceinline__ E combine_block(E (&mine)[K], int lanes, int columns, E* table) {
    const int t = threadIdx.x, lane = t % kWarp, owned = lanes * columns;
#pragma unroll 1
    for (int step = 1; step < kWarp; step *= 2) {
        if (step >= lanes && step < owned) continue;  // those threads have other columns
#pragma unroll
        for (int k = 0; k < K; ++k) mine[k] = combine(mine[k], shuffle_xor<W>(mine[k], step));
    }
    const int channels = columns * K, span = owned < kWarp ? kWarp : owned;
    __syncthreads();  // the table's last use is over
    if ((lane & (lanes - 1)) == 0 && lane < owned) {
        E* row = table + (t >> bits(span)) * channels + (t >> bits(lanes) & (columns - 1)) * K;
#pragma unroll
        for (int k = 0; k < K; ++k) row[k] = mine[k];
    }
    __syncthreads();
    E all = {};
    if (t < channels) {
#pragma unroll 1
        for (int row = 0; row < kThreads >> bits(span); ++row)
            all = combine(all, table[row * channels + t]);
    }
    return all;
}

// What `count` blocks have left, combined: thread c returns it for channel c.
template <class W, class E>
__device__ __forceinline__ E combine_partials(const E* partials, unsigned count,
                                              const BatchNormPlan& p, E* table) {
    const int channel = threadIdx.x & (p.channels - 1), width = bits(p.channels);
    E mine[1] = {};
#pragma unroll 4
    for (unsigned m = threadIdx.x >> width; m < count; m += kThreads >> width)
        mine[0] = combine(mine[0], partials[long(m) * p.channels + channel]);
    return combine_block<W>(mine, 1, p.channels, table);
}

// How the members of a group tell each other what they found, per channel. Few of them: each
// combines what all left. Many: the last of each `fan` to arrive combines what those left, the last
// of these the rest, and all others read the result alone.
template <class W, class E>
struct Exchange {
    const BatchNormPlan& p;
    E *partials, *branches, *result;
    unsigned* arrivals;  // of all members or of the result; of branches; of each one's members
    E* table;

    __device__ __forceinline__ Exchange(const BatchNormPlan& plan, void* all, unsigned* counters,
                                        unsigned group, E* memory)
        : p(plan), arrivals(counters + kArrivals + group * plan.arrivals), table(memory) {
        partials = static_cast<E*>(all) + long(group) * p.partial_rows * p.channels;
        branches = partials + long(p.members) * p.channels;
        result = branches + long(p.branches) * p.channels;
    }

    __device__ __forceinline__ void leave(unsigned member, const E& found) const {
        if (int(threadIdx.x) < p.channels)
            partials[long(member) * p.channels + threadIdx.x] = found;
    }

    __device__ __forceinline__ void publish(unsigned member, const E& found) const {
        leave(member, found);
        if (p.branches == 0) return arrive(arrivals);
        const unsigned branch = member / p.fan, first = branch * p.fan;
        const unsigned size = min(p.fan, p.members - first);
        const bool thread = int(threadIdx.x) < p.channels;
        if (!arrive_last(arrivals + 2 + branch, size)) return;
        E all = combine_partials<W>(partials + long(first) * p.channels, size, p, table);
        if (thread) branches[long(branch) * p.channels + threadIdx.x] = all;
        if (!arrive_last(arrivals + 1, p.branches)) return;
        all = combine_partials<W>(branches, p.branches, p, table);
        if (thread) result[threadIdx.x] = all;
        arrive(arrivals);
    }

    // Waits for all members.
    __device__ __forceinline__ E gather() const {
        wait(arrivals, p.branches == 0 ? p.members : 1);
        if (p.branches == 0) return combine_partials<W>(partials, p.members, p, table);
        return int(threadIdx.x) < p.channels ? result[threadIdx.x] : E{};
    }

    // The same where nothing else is left to do: only the last member to come gets it.
    __device__ __forceinline__ bool gather_last(E* found) const {
        if (!arrive_last(arrivals, p.members)) return false;
        if (threadIdx.x == 0) *arrivals = 0;
        *found = combine_partials<W>(partials, p.members, p, table);
        return true;
    }
};

}  // namespace batch_norm
}  // namespace fastnorm
