// Weight norm of many layers in one launch, which a table in the kernel's parameters describes.
//
// A block owns whole norms, or a part of one that is long. It holds what it loads in registers,
// reduces it, and writes the result from them: v (and dw) are read once. A part that does not fit
// goes in tiles, and all but the last are read again, in reverse. The parts of a norm publish their
// sums and wait for each other: they are few enough to run at the same time.
#pragma once
#include "weight_norm_tile.cuh"

namespace fastnorm::weight_norm_kernels {

// ---- forward and backward, as what differs between them -----------------------------------------

template <class W>
struct Coefficients {
    W scale, along;
};

struct Forward {
    static constexpr int kOperands = 1;  // v

    template <class W>
    static __device__ __forceinline__ W product(const W (&x)[1]) {
        return x[0] * x[0];
    }
    template <class W>
    static __device__ __forceinline__ W result(const W (&x)[1], const Coefficients<W>& c) {
        return x[0] * c.scale;
    }
    // norm, and what each element of the channel is multiplied by
    template <class W>
    static __device__ __forceinline__ Coefficients<W> finish(const WeightNormLayer& a, long k,
                                                             W squares, bool write) {
        const W norm = sqrt(squares), eps = W(a.sizes.eps);
        if (write) static_cast<W*>(a.norm)[k] = norm;
        const Array g = {const_cast<void*>(a.g), a.sizes.g};
        return {load_any<W>(g, k) / (norm < eps ? eps : norm), W(0)};
    }
};

struct Backward {
    static constexpr int kOperands = 2;  // v, dw

    template <class W>
    static __device__ __forceinline__ W product(const W (&x)[2]) {
        return x[0] * x[1];
    }
    template <class W>
    static __device__ __forceinline__ W result(const W (&x)[2], const Coefficients<W>& c) {
        return c.scale * (x[1] - c.along * x[0]);
    }
    // dg, and the length of dw along v; a norm below eps is a constant
    template <class W>
    static __device__ __forceinline__ Coefficients<W> finish(const WeightNormLayer& a, long k,
                                                             W dot, bool write) {
        const W norm = static_cast<const W*>(a.norm)[k], eps = W(a.sizes.eps);
        const W length = norm < eps ? eps : norm, dg = dot / length;
        if (write && a.dg != nullptr) store_any(Array{a.dg, a.sizes.g}, k, dg);
        const Array g = {const_cast<void*>(a.g), a.sizes.g};
        return {load_any<W>(g, k) / length, norm < eps ? W(0) : dg / length};
    }
};

template <class Pass, class W>
struct Operands {
    W v[Pass::kOperands][kHeld<W>];

    __device__ __forceinline__ void load_tile(const WeightNormLayer& a, const Share& s,
                                              bool aligned) {
        load<W>(a.v, a.sizes.v, s, aligned, v[0]);
        if constexpr (Pass::kOperands == 2) load<W>(a.dw, a.sizes.w, s, aligned, v[1]);
    }
    __device__ __forceinline__ void get(int i, W (&x)[Pass::kOperands]) const {
#pragma unroll
        for (int k = 0; k < Pass::kOperands; ++k) x[k] = v[k][i];
    }
};

// ---- sums ---------------------------------------------------------------------------------------

// Over the `lanes` adjacent threads of which this is one (a power of two), in each of them.
template <class W>
__device__ __forceinline__ W lanes_sum(W sum, int lanes) {
    auto& shared = block_shared<WarpSums<1, W>>();
    const Sums<1, W> s = warp_sum(Sums<1, W>{{sum}}, min(lanes, kWarp));
    if (lanes <= kWarp) return s.v[0];
    const int warp = threadIdx.x / kWarp, warps = lanes / kWarp, first = warp / warps * warps;
    __syncthreads();  // the last use of `shared` is over
    if (threadIdx.x % kWarp == 0) shared.warp[warp] = s;
    __syncthreads();
    sum = 0;
    for (int i = 0; i < warps; ++i) sum += shared.warp[first + i].v[0];
    return sum;
}

// All parts of a group of channels come here; what each wrote before is then seen by all. The
// counter is zero again when they have gone.
__device__ __forceinline__ void meet(unsigned* counter, unsigned parts) {
    arrive(counter);
    wait(counter, parts);
    if (threadIdx.x == 0 && add_acq_rel(counter, 1u) == 2 * parts - 1) atomicExch(counter, 0u);
}

// The sum over all parts of one channel, from this part's, in every thread.
template <class W>
__device__ __forceinline__ W parts_sum(W sum, W* partials, unsigned* counter, const Cut& cut,
                                       int part) {
    if (threadIdx.x == 0) partials[part] = sum;
    meet(counter, cut.parts);
    sum = 0;
    for (int i = threadIdx.x; i < cut.parts; i += kThreads) sum += partials[i];
    return lanes_sum(sum, kThreads);
}

// Of a group of channels, at most: no more channels than columns, and these are about as many.
constexpr int kColumns = 128;

template <class W>
struct ColumnSums {
    W sum[kThreads * kUnit];  // [rows of lanes, or warps; columns]
    Coefficients<W> channel[kColumns];
};

// The block's sums over its rows, of every column: in shared.sum[column].
template <class W>
__device__ __forceinline__ void rows_sum(const Work<W>& work, W (&sums)[kUnit],
                                         ColumnSums<W>& shared) {
    const int lanes = work.cut.lanes, columns = lanes * work.run;
    for (int step = kWarp / 2; step >= lanes; step /= 2) {
#pragma unroll
        for (int j = 0; j < kUnit; ++j) sums[j] += __shfl_xor_sync(kFullWarp, sums[j], step);
    }
    const bool in_warp = lanes < kWarp;  // a warp's rows have been added up
    const int rows = kThreads / (in_warp ? kWarp : lanes);
    const int row = in_warp ? threadIdx.x / kWarp : work.y;
    if (!in_warp || int(threadIdx.x) % kWarp < lanes) {
#pragma unroll
        for (int j = 0; j < kUnit; ++j)
            if (j < work.run) shared.sum[row * columns + work.x * work.run + j] = sums[j];
    }
    __syncthreads();
    for (int column = threadIdx.x; column < columns; column += kThreads) {
        W sum = 0;
        for (int i = 0; i < rows; ++i) sum += shared.sum[i * columns + column];
        shared.sum[column] = sum;
    }
    __syncthreads();
}

// Form::columns: the coefficients of this thread's columns, from its sums over their rows.
template <class Pass, class W>
__device__ __forceinline__ void finish_columns(const WeightNormLayer& a, const Work<W>& work,
                                               W* partials, unsigned* counter, W (&sums)[kUnit],
                                               Coefficients<W> (&c)[kUnit]) {
    auto& shared = block_shared<ColumnSums<W>>();
    const Cut& cut = work.cut;
    const int B = int(a.sizes.B), channel = threadIdx.x;
    const long k = work.block * cut.group + channel;
    const bool owner = channel < cut.group && k < a.sizes.K;
    rows_sum(work, sums, shared);
    W sum = 0;
    for (int i = 0; owner && i < B; ++i) sum += shared.sum[channel * B + i];
    if (cut.parts > 1) {
        if (owner) partials[work.part * cut.group + channel] = sum;
        meet(counter, cut.parts);
        sum = 0;
        for (int i = 0; owner && i < cut.parts; ++i) sum += partials[i * cut.group + channel];
    }
    if (owner) shared.channel[channel] = Pass::finish(a, k, sum, work.part == 0);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
        const int column = work.x * work.run + (j < work.run ? j : 0);
        c[j] = shared.channel[min(column / B, cut.group - 1)];
    }
}

// ---- kernel -------------------------------------------------------------------------------------

template <class Pass, class W>
__device__ __forceinline__ void normalize(const Entry& entry, int item, W* partials,
                                          unsigned* counters) {
    const WeightNormLayer& a = entry.layer;
    const Work<W> work(entry, item);
    const Cut& cut = work.cut;
    const long begin = long(work.part) * cut.tiles_of_part;
    const long end = min(begin + cut.tiles_of_part, cut.tiles);
    partials += cut.partial + work.block * cut.parts * cut.group;
    unsigned* counter = counters + cut.counter + work.block;

    // sums
    Operands<Pass, W> held;
    W sums[kUnit] = {};
    for (long tile = begin; tile < end; ++tile) {
        held.load_tile(a, work.share(tile), cut.aligned);
#pragma unroll
        for (int i = 0; i < kHeld<W>; ++i) {
            W x[Pass::kOperands];
            held.get(i, x);
            sums[i % kUnit] += Pass::product(x);
        }
    }

    // norm or dg
    Coefficients<W> c[kUnit];
    if (cut.form != Form::columns || !cut.aligned) {
#pragma unroll
        for (int j = 1; j < kUnit; ++j) sums[0] += sums[j];
    }
    if (cut.form == Form::columns) {
        finish_columns<Pass>(a, work, partials, counter, sums, c);
    } else {
        const int lanes = cut.form == Form::flat ? cut.lanes : kThreads;
        W sum = lanes_sum(sums[0], lanes);
        if (cut.parts > 1) sum = parts_sum(sum, partials, counter, cut, work.part);
        const long k = work.channel();
        const bool first = threadIdx.x % lanes == 0 && work.part == 0;
        if (k < a.sizes.K) c[0] = Pass::finish(a, k, sum, first);
#pragma unroll
        for (int j = 1; j < kUnit; ++j) c[j] = c[0];
    }

    // w or dv
    if (a.out == nullptr) return;
    const Dtype dtype = Pass::kOperands == 1 ? a.sizes.w : a.sizes.v;
    for (long tile = end - 1; tile >= begin; --tile) {
        const Share share = work.share(tile);
        if (tile != end - 1) held.load_tile(a, share, cut.aligned);
        store<W>(a.out, dtype, share, cut.aligned, [&](int i) {
            W x[Pass::kOperands];
            held.get(i, x);
            return Pass::result(x, c[i % kUnit]);
        });
    }
}

template <class Pass, class W, int Capacity>
__global__ void __launch_bounds__(kThreads, 2)
    weight_norm_kernel(const __grid_constant__ Table<Capacity> table) {
    int item = blockIdx.x;
    if (table.counters != nullptr) {
        item = int(take_ticket(table.counters));
        if (threadIdx.x == 0 && item + 1 == int(gridDim.x)) atomicExch(table.counters, 0u);
    }
    int layer = 0, last = table.count - 1;
    while (layer < last) {
        const int middle = (layer + last + 1) / 2;
        if (table.entries[middle].cut.first <= item) {
            layer = middle;
        } else {
            last = middle - 1;
        }
    }
    const Entry& entry = table.entries[layer];
    normalize<Pass>(entry, item - entry.cut.first, static_cast<W*>(table.partials), table.counters);
}

// ---- launcher -----------------------------------------------------------------------------------

// Launches over as many of the layers from `next` on as a table holds, those computed in W, and
// moves `next` behind them.
template <class Pass, class W, int Capacity>
cudaError_t launch_table(const WeightNorm& a, int& next, cudaStream_t stream) {
    Table<Capacity> table;
    table.count = 0;
    Filling filling = {0, {0, 0}};
    for (; next < a.count && table.count < Capacity; ++next) {
        if (wide_is_double(a.layers[next].sizes) != (sizeof(W) == 8)) continue;
        if (!enter(table.entries[table.count], a.layers[next], a.processors, filling)) break;
        ++table.count;
    }
    if (table.count == 0) return next < a.count ? cudaErrorInvalidValue : cudaSuccess;
    table.counters = filling.used.counters > 0 ? a.counters : nullptr;
    table.partials = a.partials;
    return launch(weight_norm_kernel<Pass, W, Capacity>, unsigned(filling.blocks), kThreads, 0,
                  stream, table);
}

// Of weight_norm_many.cu, which drivers before CUDA 12.1 cannot load: with tables of kMany.
cudaError_t launch_many_forward(const WeightNorm& a, int& next, cudaStream_t stream);
cudaError_t launch_many_backward(const WeightNorm& a, int& next, cudaStream_t stream);

}  // namespace fastnorm::weight_norm_kernels
