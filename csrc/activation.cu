// Activations and Swish, bound by memory: 16 bytes per access, four accesses per thread in flight.
// Swish's beta gradient is summed in the pass that computes the input's.
#include "activation.cuh"
#include "activation.h"

namespace fastnorm {
namespace {

constexpr int kThreads = 256;
// 16-byte loads of a thread before the first is used: four, and two of fp64, which needs two
// registers for each value on the way.
template <class T>
constexpr int kInFlight = sizeof(T) == 8 ? 2 : 4;
// ... or fewer, down to one, where there would be fewer blocks than an H100 has at once.
constexpr long kSmallGrid = 384;
// Blocks per multiprocessor that registers are given out for: 96 KB in flight are more than enough,
// and ptxas would spill to fit more.
template <class T>
constexpr int kBlocks = sizeof(T) == 8 ? 2 : 3;

// ---- kernels: elementwise -----------------------------------------------------------------------

// Elements of a block.
template <class T>
__host__ __device__ __forceinline__ int tile(long count) {
    constexpr int kStep = kThreads * Vector<T>::size;
    int vectors = 1;
    while (vectors < kInFlight<T> && count > vectors * kSmallGrid * kStep) vectors *= 2;
    return vectors * kStep;
}

// out[i] = f({in[0][i], in[1][i], ...}) for one tile per block, element by element where an array
// does not begin on 16 bytes (slices).
template <int Inputs, class T, class F>
__device__ __forceinline__ void map(T* out, const T* const (&in)[Inputs], long count, F f) {
    constexpr int kVector = Vector<T>::size, kStep = kThreads * kVector, kCount = kInFlight<T>;
    bool aligned = misalignment(out) == 0;
    for (int i = 0; i < Inputs; ++i) aligned = aligned && misalignment(in[i]) == 0;
    const int size = tile<T>(count);
    const long first = long(blockIdx.x) * size;
    const int length = int(min(count - first, long(size)));
    const int whole = aligned ? length / kVector * kVector : 0;
    const int begin = threadIdx.x * kVector;
    out += first;

    Vector<T> v[Inputs][kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
#pragma unroll
        for (int i = 0; i < Inputs; ++i)
            if (begin + k * kStep < whole) v[i][k] = load_vector(in[i] + first + begin + k * kStep);
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
        if (begin + k * kStep >= whole) break;
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
            Wide<T> wide[Inputs];
#pragma unroll
            for (int i = 0; i < Inputs; ++i) wide[i] = widen(v[i][k].v[j]);
            v[0][k].v[j] = static_cast<T>(f(wide));
        }
        store_vector(out + begin + k * kStep, v[0][k]);
    }
    for (int at = whole + threadIdx.x; at < length; at += kThreads) {
        Wide<T> wide[Inputs];
        for (int i = 0; i < Inputs; ++i) wide[i] = widen(in[i][first + at]);
        out[at] = static_cast<T>(f(wide));
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    activation_forward_kernel(ActivationForward a) {
    const T* const in[1] = {static_cast<const T*>(a.x)};
    with_activation(a.activation, [&](auto formula) {
        map(static_cast<T*>(a.y), in, a.count,
            [](const Wide<T>(&v)[1]) { return decltype(formula)::template value<T>(v[0]); });
    });
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    activation_backward_kernel(ActivationBackward a) {
    const T* const in[2] = {static_cast<const T*>(a.x), static_cast<const T*>(a.dy)};
    with_activation(a.activation, [&](auto formula) {
        map(static_cast<T*>(a.dx), in, a.count,
            [](const Wide<T>(&v)[2]) { return v[1] * decltype(formula)::template slope<T>(v[0]); });
    });
}

// ---- kernels: Swish -----------------------------------------------------------------------------

template <class T>
struct ColumnSums {  // of every thread, one per channel of its vector
    Wide<T> v[kThreads][Vector<T>::size];
};

// Where this thread works: its channels and its positions within them.
template <class T>
struct SwishWork {
    static constexpr int kVector = Vector<T>::size;
    SwishSizes sizes;
    int group, split;
    int column, row, rows;  // channels_last: the thread's vector of channels, its row of `rows`
    bool aligned;           // every run of channels or of positions begins on 16 bytes

    __device__ __forceinline__ SwishWork(const SwishSizes& s, bool pointers_aligned)
        : sizes(s), group(blockIdx.x / s.splits), split(blockIdx.x % s.splits) {
        column = threadIdx.x % s.width, row = threadIdx.x / s.width, rows = kThreads / s.width;
        aligned = pointers_aligned && (by_channel() ? s.inner : s.channels) % kVector == 0;
    }
    __device__ __forceinline__ bool by_channel() const { return sizes.inner > 1; }
    // the first of the thread's channels
    __device__ __forceinline__ long channel() const {
        return by_channel() ? group : (long(group) * sizes.width + column) * kVector;
    }

    // Calls use(offset, run, load(offset, run)) for each of the thread's runs of up to kVector
    // adjacent elements, which are positions of one channel, or one position of as many channels;
    // run is Whole or Loose, of which Ahead whole ones are loaded before the first is used. Each
    // has a loop of its own: where their values met, halves would be merged one by one, which waits
    // for every load at once.
    template <int Ahead, class Load, class Use>
    __device__ __forceinline__ void for_each(Load load, Use use) const {
        if (aligned) {
            for_each_run<Ahead>(kVector, [](int) { return Whole{}; }, load, use);
        } else {
            for_each_run<1>(1, [](int lanes) { return Loose{lanes}; }, load, use);
        }
    }

    struct Whole {  // 16 bytes that begin on 16 bytes
        __device__ __forceinline__ Vector<T> load(const T* p) const { return load_vector(p); }
        __device__ __forceinline__ void store(T* p, const Vector<T>& v) const {
            store_vector(p, v);
        }
    };
    struct Loose {
        int lanes;
        __device__ __forceinline__ Vector<T> load(const T* p) const {
            Vector<T> v = {};
#pragma unroll
            for (int j = 0; j < kVector; ++j)
                if (j < lanes) v.v[j] = p[j];
            return v;
        }
        __device__ __forceinline__ void store(T* p, const Vector<T>& v) const {
#pragma unroll
            for (int j = 0; j < kVector; ++j)
                if (j < lanes) p[j] = v.v[j];
        }
    };

    // `step` positions of a channel are a run.
    template <int Ahead, class Run, class Load, class Use>
    __device__ __forceinline__ void for_each_run(int step, Run run, Load load, Use use) const {
        if (by_channel()) {
            const long per_row = sizes.inner / step, runs = sizes.outer * per_row;
            const long first = long(split) * kThreads + threadIdx.x;
            const long stride = long(sizes.splits) * kThreads;
            // a 64-bit division is a subroutine: nearly every tensor does with 32 bits
            const bool quick = runs < (1l << 31);
            const long row = quick ? unsigned(first) / unsigned(per_row) : first / per_row;
            const long turn = quick ? unsigned(stride) / unsigned(per_row) : stride / per_row;
            const long plane = sizes.channels * sizes.inner, ahead = stride - turn * per_row;
            long place = first - row * per_row;  // within its row
            long at = row * plane + group * sizes.inner + place * step;
            const auto next = [&] {
                const long here = at;
                at += turn * plane + ahead * step, place += ahead;
                if (place >= per_row) place -= per_row, at += plane - sizes.inner;
                return here;
            };
            each_of<Ahead>(first, runs, stride, next, run(step), load, use);
        } else {
            const long lanes = min(sizes.channels - channel(), long(kVector));
            if (lanes <= 0) return;
            const long first = long(split) * rows + row, stride = long(sizes.splits) * rows;
            long at = first * sizes.channels + channel();
            const auto next = [&] {
                const long here = at;
                at += stride * sizes.channels;
                return here;
            };
            each_of<Ahead>(first, sizes.outer, stride, next, run(int(lanes)), load, use);
        }
    }

    // The runs first, first + stride, ... below end; next() is the offset of each in turn.
    template <int Ahead, class Next, class Run, class Load, class Use>
    __device__ __forceinline__ static void each_of(long first, long end, long stride, Next next,
                                                   Run run, Load load, Use use) {
        for (; first < end; first += Ahead * stride) {
            long at[Ahead];
            decltype(load(0l, run)) loaded[Ahead];
#pragma unroll
            for (int k = 0; k < Ahead; ++k) {
                if (first + k * stride >= end) break;
                at[k] = next();
                loaded[k] = load(at[k], run);
            }
#pragma unroll
            for (int k = 0; k < Ahead; ++k) {
                if (first + k * stride >= end) break;
                use(at[k], run, loaded[k]);
            }
        }
    }

    __device__ __forceinline__ void load_beta(Array beta, Wide<T> (&b)[kVector]) const {
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
            const long c = channel() + (by_channel() ? 0 : j);
            b[j] = c < sizes.channels ? load_any<Wide<T>>(beta, c) : Wide<T>(0);
        }
    }

    // The sum of every thread's s over the rows, per channel: in thread (row 0, column), or, where
    // the block has one channel, in s[0] of every thread.
    __device__ __forceinline__ void reduce(Wide<T> (&s)[kVector]) const {
        if (by_channel()) {
            Sums<1, Wide<T>> all = {};
#pragma unroll
            for (int j = 0; j < kVector; ++j) all.v[0] += s[j];
            s[0] = block_sum(all).v[0];
            return;
        }
        auto& shared = block_shared<ColumnSums<T>>();
        __syncthreads();  // the last use of `shared` is over
#pragma unroll
        for (int j = 0; j < kVector; ++j) shared.v[threadIdx.x][j] = s[j];
        for (int half = rows / 2; half > 0; half /= 2) {
            __syncthreads();
            if (row >= half) continue;
#pragma unroll
            for (int j = 0; j < kVector; ++j) {
                s[j] += shared.v[threadIdx.x + half * sizes.width][j];
                shared.v[threadIdx.x][j] = s[j];
            }
        }
    }
};

template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 4)
    swish_forward_kernel(SwishForward a) {
    constexpr int kVector = Vector<T>::size;
    T* y = static_cast<T*>(a.y);
    const T* x = static_cast<const T*>(a.x);
    const SwishWork<T> work(a.sizes, misalignment(x) == 0 && misalignment(y) == 0);
    Wide<T> beta[kVector];
    work.load_beta(a.beta, beta);
    const auto load = [&](long at, auto run) { return run.load(x + at); };
    work.template for_each<kInFlight<T>>(load, [&](long at, auto run, const Vector<T>& v) {
        Wide<T> z[kVector];
        widen(v, z);
#pragma unroll
        for (int j = 0; j < kVector; ++j) z[j] *= logistic<T>(beta[j] * z[j]);
        run.store(y + at, narrow<T>(z));
    });
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3) swish_backward_kernel(SwishBackward a) {
    constexpr int kVector = Vector<T>::size;
    using W = Wide<T>;
    T* dx = static_cast<T*>(a.dx);
    const T *x = static_cast<const T*>(a.x), *dy = static_cast<const T*>(a.dy);
    const SwishWork<T> work(a.sizes,
                            misalignment(x) == 0 && misalignment(dy) == 0 && misalignment(dx) == 0);
    W beta[kVector], sum[kVector] = {};
    work.load_beta(a.beta, beta);
    struct Pair {
        Vector<T> x, dy;
    };
    const auto load = [&](long at, auto run) { return Pair{run.load(x + at), run.load(dy + at)}; };
    work.template for_each<kInFlight<T> / 2>(load, [&](long at, auto run, const Pair& v) {
        W z[kVector], g[kVector];
        widen(v.x, z);
        widen(v.dy, g);
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
            const Sigmoids<W> sigmoid(beta[j] * z[j]);
            const W rest = z[j] * (sigmoid.s * sigmoid.rest);
            sum[j] += g[j] * (z[j] * rest);
            g[j] *= sigmoid.s + beta[j] * rest;
        }
        if (dx != nullptr) run.store(dx + at, narrow<T>(g));
    });
    if (a.dbeta.data == nullptr) return;

    const int width = work.by_channel() ? 1 : a.sizes.width * kVector;  // channels of a group
    const bool owner = work.by_channel() ? threadIdx.x == 0 : work.row == 0;
    const int lanes = work.by_channel() ? 1 : kVector;
    W* partials = static_cast<W*>(a.partials) + long(work.group) * a.sizes.splits * width;
    work.reduce(sum);
    if (owner) {
#pragma unroll
        for (int j = 0; j < kVector; ++j)
            if (j < lanes)
                partials[work.split * width + work.column * kVector * (lanes > 1) + j] = sum[j];
    }
    if (!arrive_last(a.counters + work.group, a.sizes.splits)) return;

#pragma unroll
    for (int j = 0; j < kVector; ++j) sum[j] = W(0);
    if (work.by_channel()) {
        for (int i = threadIdx.x; i < a.sizes.splits; i += kThreads) sum[0] += partials[i];
    } else {
        for (int i = work.row; i < a.sizes.splits; i += work.rows) {
#pragma unroll
            for (int j = 0; j < kVector; ++j)
                sum[j] += partials[i * width + work.column * kVector + j];
        }
    }
    work.reduce(sum);
    if (owner) {
#pragma unroll
        for (int j = 0; j < kVector; ++j)
            if (j < lanes && work.channel() + j < a.sizes.channels)
                store_any(a.dbeta, work.channel() + j, sum[j]);
    }
    if (threadIdx.x == 0) a.counters[work.group] = 0;
}

}  // namespace

// ---- launchers ----------------------------------------------------------------------------------

namespace {

template <class T>
unsigned tiles(long count) {
    return unsigned((count + tile<T>(count) - 1) / tile<T>(count));
}

long vector_size(Dtype dtype) {
    return dtype == Dtype::float64 ? 2 : dtype == Dtype::float32 ? 4 : 8;
}

}  // namespace

cudaError_t activation_forward(const ActivationForward& a, Dtype dtype, cudaStream_t stream) {
    return with_type(dtype, [&](auto t) {
        using T = decltype(t);
        return launch(activation_forward_kernel<T>, tiles<T>(a.count), kThreads, 0, stream, a);
    });
}

cudaError_t activation_backward(const ActivationBackward& a, Dtype dtype, cudaStream_t stream) {
    return with_type(dtype, [&](auto t) {
        using T = decltype(t);
        return launch(activation_backward_kernel<T>, tiles<T>(a.count), kThreads, 0, stream, a);
    });
}

// Twelve blocks a multiprocessor, which has three (backward) or four of them (forward) at a time.
SwishSizes swish_sizes(long outer, long channels, long inner, Dtype dtype, int processors) {
    const long vector = vector_size(dtype);
    SwishSizes s = {outer, channels, inner, 1, 1, 1};
    long work;  // vectors in a group
    if (inner > 1) {
        s.groups = int(channels);
        work = outer * inner / vector;
    } else {
        while (s.width < kWarp && s.width * vector < channels) s.width *= 2;
        s.groups = int((channels + s.width * vector - 1) / (s.width * vector));
        work = outer * s.width;
    }
    const long wanted = 12l * processors / s.groups;
    const long each = work * s.groups / (long(processors) * kThreads);
    const long vectors = each < 1 ? 1 : each < kInFlight<float> ? each : kInFlight<float>;
    const long most = (work + vectors * kThreads - 1) / (vectors * kThreads);
    s.splits = int(wanted < most ? wanted : most);
    if (s.splits < 1) s.splits = 1;
    return s;
}

long swish_partials(const SwishSizes& s, Dtype dtype) {
    const long width = s.inner > 1 ? 1 : s.width * vector_size(dtype);
    return long(s.groups) * s.splits * width;
}

cudaError_t swish_forward(const SwishForward& a, Dtype dtype, cudaStream_t stream) {
    return with_type(dtype, [&](auto t) {
        return launch(swish_forward_kernel<decltype(t)>, a.sizes.groups * a.sizes.splits, kThreads,
                      0, stream, a);
    });
}

cudaError_t swish_backward(const SwishBackward& a, Dtype dtype, cudaStream_t stream) {
    return with_type(dtype, [&](auto t) {
        return launch(swish_backward_kernel<decltype(t)>, a.sizes.groups * a.sizes.splits, kThreads,
                      0, stream, a);
    });
}

}  // namespace fastnorm
