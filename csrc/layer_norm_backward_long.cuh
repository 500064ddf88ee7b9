// Layer norm backward for rows that do not fit registers: chunks of columns of a few rows each,
// visited twice in the order of tickets.
#pragma once
#include "layer_norm_backward.cuh"

namespace fastnorm {
namespace layer_norm {

constexpr int kChunkThreads = 256, kChunkVectors = 1;
constexpr int kGroupRows = 32;  // at most
// what the assembler is told, so that it neither spills nor takes all of 128 registers
template <class T, bool kFast>
constexpr int kChunkBound = sizeof(T) == 8 || kFast ? kChunkThreads : kChunkThreads + 64;

template <class W>
struct GroupSums {
    Sums<2, W> row[kGroupRows][kChunkThreads / kWarp];
};

// The columns that a block has of a chunk.
template <class T>
__device__ __forceinline__ Part<T> part_of(const LayerNormBackward& a, long begin) {
    Part<T> part(blockDim.x, int(min(a.cols - begin, a.plan.chunk)));
    part.length = part.span;
    return part;
}

// x and what pull_back makes of dy, for one vector of a row. kOnce: for the last time.
template <bool kFast, bool kOnce, class T>
struct Visit {
    static constexpr int kVector = Vector<T>::size;
    Vector<T> x;
    Wide<T> dz[kVector], x_hat[kVector], g[kVector];

    __device__ __forceinline__ Visit(const LayerNormBackward& a, long row, long col, int rest) {
        x = load_row<kFast, kOnce>(row_of<T>(a.x, row, a.rows, a.batch_rows) + col, rest);
        load_dy<kFast, kOnce, T>(a.dy_dtype, dy_at<T>(a, row, col), rest, dz);
        const Wide<T> mean = static_cast<const Wide<T>*>(a.mean)[row];
        const Wide<T> rstd = static_cast<const Wide<T>*>(a.rstd)[row];
        pull_back<kFast>(a, x, col, rest, mean, rstd, dz, x_hat, g);
    }
};

// First visit: a chunk's part in the sums of g and g * x_hat of each row of the group; whoever
// comes last merges those of all chunks, in fixed order.
template <class T, bool kFast>
__device__ __forceinline__ void sum_rows(const LayerNormBackward& a, long tile) {
    using W = Wide<T>;
    const long chunks = a.plan.chunks, group = tile / chunks, chunk = tile - group * chunks;
    const long begin = chunk * a.plan.chunk, first = group * a.plan.group;
    const int rows = int(min(a.rows - first, long(a.plan.group)));
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    auto& shared = block_shared<GroupSums<W>>();
    W* partials = static_cast<W*>(a.partials) + 2 * first * chunks;
    const Part<T> part = part_of<T>(a, begin);

#pragma unroll 1
    for (int i = 0; i < rows; ++i) {
        Sums<2, W> s = {};
#pragma unroll
        for (int k = 0; k < kChunkVectors; ++k) {
            if (!part.used(k)) continue;
            const Visit<kFast, false, T> at(a, first + i, begin + part.column(k), part.rest(k));
#pragma unroll
            for (int j = 0; j < Vector<T>::size; ++j)
                s.v[0] += at.g[j], s.v[1] += at.g[j] * at.x_hat[j];
        }
        s = warp_sum(s);
        if (lane == 0) shared.row[i][warp] = s;
    }
    __syncthreads();
    if (int(threadIdx.x) < rows) {
        Sums<2, W> s = shared.row[threadIdx.x][0];
        for (int j = 1; j < warps; ++j) {
            s.v[0] += shared.row[threadIdx.x][j].v[0];
            s.v[1] += shared.row[threadIdx.x][j].v[1];
        }
        partials[2 * (threadIdx.x * chunks + chunk)] = s.v[0];
        partials[2 * (threadIdx.x * chunks + chunk) + 1] = s.v[1];
    }

    unsigned* arrivals = a.counters + 3 + group;
    if (!arrive_last(arrivals, unsigned(chunks))) return;
    W* totals = static_cast<W*>(a.totals) + 2 * first;
    for (int i = warp; i < rows; i += warps) {
        Sums<2, W> s = {};
        for (long k = lane; k < chunks; k += kWarp) {
            s.v[0] += partials[2 * (i * chunks + k)];
            s.v[1] += partials[2 * (i * chunks + k) + 1];
        }
        s = warp_sum(s);
        if (lane == 0) totals[2 * i] = s.v[0] / W(a.cols), totals[2 * i + 1] = s.v[1] / W(a.cols);
    }
    arrive(arrivals);
}

// A thread's sums of a chunk, over all rows, where the gradient of a parameter is wanted.
template <bool kFast, class T, class W, int n, int kVector>
__device__ __forceinline__ void store_gradient(Array to, const Part<T>& part, long begin,
                                               const W (&sums)[n][kVector]) {
    if (to.data == nullptr) return;
    if (kFast && to.dtype == dtype_of<W>)
        return store_sums<kFast>(part, static_cast<W*>(to.data) + begin, sums);
#pragma unroll
    for (int k = 0; k < n; ++k) {
#pragma unroll
        for (int j = 0; j < kVector; ++j)
            if (part.column(k) + j < part.span)
                store_any(to, begin + part.column(k) + j, sums[k][j]);
    }
}

// Second visit: dx, and the sums of dweight and dbias over the rows of `span` groups. Tile after
// tile of a chunk they are added to one of `parts` rows in turn; by then the tile `parts` before
// this one, whose ticket is smaller, has long done so, and their order is the same in every run.
// Tiles that have all rows (`parts` is zero) go backwards, as L2 has what was read last, and store
// the gradients themselves.
template <class T, bool kFast>
__device__ __forceinline__ void apply_rows(const LayerNormBackward& a, long tile) {
    using W = Wide<T>;
    const bool whole = a.plan.parts == 0;
    const long chunks = a.plan.chunks, index = tile / chunks, place = tile - index * chunks;
    const long chunk = whole ? chunks - 1 - place : place, begin = chunk * a.plan.chunk;
    const Part<T> part = part_of<T>(a, begin);
    const W* totals = static_cast<const W*>(a.totals);
    Gradients<T, kChunkVectors> sums(a);

    for (long group = index * a.plan.span; group < (index + 1) * a.plan.span; ++group) {
        if (a.dx != nullptr) wait(a.counters + 3 + group, unsigned(chunks) + 1);
        const long first = group * a.plan.group, end = min(a.rows, first + a.plan.group);
#pragma unroll 1
        for (long row = first; row < end; ++row) {
            W m1 = 0, m2 = 0;
            if (a.dx != nullptr) m1 = totals[2 * row], m2 = totals[2 * row + 1];
            const W rstd = static_cast<const W*>(a.rstd)[row];
#pragma unroll
            for (int k = 0; k < kChunkVectors; ++k) {
                if (!part.used(k)) continue;
                const long col = begin + part.column(k), offset = row * a.cols + col;
                const Visit<kFast, true, T> at(a, row, col, part.rest(k));
                sums.add(k, at.dz, at.x_hat);
                if (a.dx == nullptr) continue;
                Vector<T> out = {};
                if (a.dsum != nullptr)
                    out =
                        load_row<kFast, true>(static_cast<const T*>(a.dsum) + offset, part.rest(k));
#pragma unroll
                for (int j = 0; j < Vector<T>::size; ++j) {
                    const W d = rstd * (at.g[j] - m1 - at.x_hat[j] * m2);
                    out.v[j] = static_cast<T>(d + widen(out.v[j]));
                }
                store_row<kFast, true>(static_cast<T*>(a.dx) + offset, out, part.rest(k),
                                       part.first, part.last);
            }
        }
    }
    if (!sums.wanted) return;
    if (whole) {
        store_gradient<kFast>(a.dweight, part, begin, sums.dweight);
        return store_gradient<kFast>(a.dbias, part, begin, sums.dbias);
    }
    const long turn = index / a.plan.parts, row = index - turn * a.plan.parts;
    unsigned* added = a.counters + 3 + a.plan.groups + row * chunks + chunk;
    if (turn > 0) wait(added, unsigned(turn));
    sums.for_wanted(a, row, [&](W* p, const auto& own) {
        if (turn == 0)
            store_sums<kFast>(part, p + begin, own);
        else
            store_sums<kFast, true>(part, p + begin, own);
    });
    arrive(added);
    arrive(a.counters + 2);
}

// Ticket k visits tile k for the first time and tile k - lag for the second, which finds x and dy
// in L2 and waits for smaller tickets alone, as lag >= chunks - 1. Where a group of rows is too
// large for L2, lag is the number of tiles: the second visits follow all the first ones.
template <class T, bool kFast>
__global__ void __launch_bounds__(kChunkBound<T, kFast>, sizeof(T) == 8 ? 1 : 2)
    backward_ticket_kernel(LayerNormBackward a) {
    const LayerNormPlan& plan = a.plan;
    const long ticket = take_ticket(a.counters);
    const bool wanted = a.dweight.data != nullptr || a.dbias.data != nullptr;
    const long visited = plan.groups / plan.span * plan.chunks;  // tiles of the second visit
    if (ticket < plan.workers) {
        if (a.dx != nullptr && ticket < plan.groups * plan.chunks) sum_rows<T, kFast>(a, ticket);
        if (ticket >= plan.lag) apply_rows<T, kFast>(a, ticket - plan.lag);
    } else {
        wait(a.counters + 2, unsigned(visited));
        finish<Wide<T>>(a, ticket - plan.workers, gridDim.x - plan.workers);
    }
    leave_zero(a.counters, 3 + plan.groups + (wanted ? plan.parts * plan.chunks : 0));
}

}  // namespace layer_norm
}  // namespace fastnorm
