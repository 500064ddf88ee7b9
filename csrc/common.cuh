// What every family's kernels share: types, 16-byte accesses, reductions, tickets, launching.
#pragma once
#include <cstring>
#include <limits>
#include <mutex>
#include <set>
#include <type_traits>
#include <utility>

#include "fastnorm.h"
#include "platform.cuh"

namespace fastnorm {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarp = 32;

// ---- types ------------------------------------------------------------------------------------

// The type that T is computed in.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
__device__ __forceinline__ Wide<T> widen(T x) {
    return static_cast<Wide<T>>(x);
}

// One value of an array whose type is known at run time only (a weight, a running mean, ...).
template <class W>
__device__ __forceinline__ W load_any(Array a, long i) {
    switch (a.dtype) {
        case Dtype::float32:
            return static_cast<W>(static_cast<const float*>(a.data)[i]);
        case Dtype::bfloat16:
            return static_cast<W>(static_cast<float>(static_cast<const __nv_bfloat16*>(a.data)[i]));
        case Dtype::float16:
            return static_cast<W>(static_cast<float>(static_cast<const __half*>(a.data)[i]));
        case Dtype::float64:
            return static_cast<W>(static_cast<const double*>(a.data)[i]);
    }
    return W(0);
}

template <class W>
__device__ __forceinline__ void store_any(Array a, long i, W x) {
    switch (a.dtype) {
        case Dtype::float32:
            static_cast<float*>(a.data)[i] = static_cast<float>(x);
            break;
        case Dtype::bfloat16:
            static_cast<__nv_bfloat16*>(a.data)[i] = static_cast<__nv_bfloat16>(x);
            break;
        case Dtype::float16:
            static_cast<__half*>(a.data)[i] = static_cast<__half>(x);
            break;
        case Dtype::float64:
            static_cast<double*>(a.data)[i] = static_cast<double>(x);
            break;
    }
}

// ---- 16 bytes at a time -----------------------------------------------------------------------

template <class T>
struct alignas(16) Vector {
    static constexpr int size = 16 / sizeof(T);
    T v[size];
};

template <class T>
__device__ __forceinline__ Vector<T> load_vector(const T* p) {
    const uint4 raw = *reinterpret_cast<const uint4*>(p);
    Vector<T> v;
    memcpy(&v, &raw, 16);
    return v;
}

template <class T>
__device__ __forceinline__ Vector<T> as_vector(uint4 raw) {
    // whole registers up to here: where branches meet, halves would be merged one by one, which
    // waits for a load as soon as it is issued
    forget(raw);
    Vector<T> v;
    memcpy(&v, &raw, 16);
    return v;
}
template <class T>
__device__ __forceinline__ uint4 as_words(const Vector<T>& v) {
    uint4 raw;
    memcpy(&raw, &v, 16);
    return raw;
}

// All elements of a vector, wide.
template <class T>
__device__ __forceinline__ void widen(const Vector<T>& v, Wide<T> (&wide)[Vector<T>::size]) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        // the upper halves of floats: one instruction each
        unsigned words[4];
        memcpy(words, &v, 16);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const unsigned pair[2] = {words[i] << 16, words[i] & 0xffff0000u};
            memcpy(wide + 2 * i, pair, 8);
        }
    } else {
#pragma unroll
        for (int j = 0; j < Vector<T>::size; ++j) wide[j] = widen(v.v[j]);
    }
}

template <class T>
__device__ __forceinline__ Vector<T> narrow(const Wide<T> (&wide)[Vector<T>::size]) {
    Vector<T> v;
#pragma unroll
    for (int j = 0; j < Vector<T>::size; ++j) v.v[j] = static_cast<T>(wide[j]);
    return v;
}

// Data that this launch does not read again.
template <class T>
__device__ __forceinline__ Vector<T> load_vector_once(const T* p) {
    const uint4 raw = load_evict_first(reinterpret_cast<const uint4*>(p));
    Vector<T> v;
    memcpy(&v, &raw, 16);
    return v;
}

template <class T>
__device__ __forceinline__ void store_vector(T* p, const Vector<T>& v) {
    uint4 raw;
    memcpy(&raw, &v, 16);
    store16(reinterpret_cast<uint4*>(p), raw);
}

template <class T>
__device__ __forceinline__ void store_vector_once(T* p, const Vector<T>& v) {
    uint4 raw;
    memcpy(&raw, &v, 16);
    store_evict_first(reinterpret_cast<uint4*>(p), raw);
}

// How many elements before p the last 16-byte boundary lies.
template <class T>
__host__ __device__ __forceinline__ int misalignment(const T* p) {
    return int(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(T));
}

// ---- reductions, the same bits in every thread and every run -----------------------------------

template <int Count, class W>
struct Sums {
    W v[Count];
};

template <int Count, class W>
__device__ __forceinline__ Sums<Count, W> warp_sum(Sums<Count, W> s, int width = kWarp) {
    for (int step = width / 2; step > 0; step /= 2) {
#pragma unroll
        for (int i = 0; i < Count; ++i) s.v[i] += __shfl_xor_sync(kFullWarp, s.v[i], step);
    }
    return s;
}

template <int Count, class W>
struct WarpSums {
    Sums<Count, W> warp[kWarp];
};

// Over the whole block (of whole warps), every thread of which takes part.
template <int Count, class W>
__device__ __forceinline__ Sums<Count, W> block_sum(Sums<Count, W> s) {
    auto& shared = block_shared<WarpSums<Count, W>>();
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    s = warp_sum(s);
    if (warps == 1) return s;
    __syncthreads();  // the last use of `shared` is over
    if (lane == 0) shared.warp[warp] = s;
    __syncthreads();
    s = lane < warps ? shared.warp[lane] : Sums<Count, W>{};
    return warp_sum(s);
}

__device__ __forceinline__ double reciprocal(double z) {
    return 1.0 / z;
}

// Count, mean and sum of squared deviations of a set of numbers; Chan's merge of two sets.
template <class W>
struct Moments {
    W count, mean, m2;
};

template <class W>
__device__ __forceinline__ Moments<W> merge(Moments<W> a, Moments<W> b) {
    const W count = a.count + b.count;
    if (b.count == W(0)) return a;
    if (a.count == W(0)) return b;
    const W share = b.count * reciprocal(count);
    // from an infinite mean there is no difference: it must stay infinite, not become NaN
    const W delta = a.mean - a.mean == W(0) ? b.mean - a.mean : b.mean;
    const W mean = a.mean - a.mean == W(0) ? a.mean + delta * share : a.mean + b.mean;
    return {count, mean, a.m2 + b.m2 + delta * delta * a.count * share};
}

// ---- blocks that wait for each other ------------------------------------------------------------

struct Ticket {
    unsigned value;
};

// Numbers blocks in the order in which they start, so that a block may wait for smaller tickets on
// any grid: their blocks are running or done.
__device__ __forceinline__ unsigned take_ticket(unsigned* counter) {
    Ticket& ticket = block_shared<Ticket>();
    __syncthreads();  // the last use of `ticket` is over
    if (threadIdx.x == 0) ticket.value = atomicAdd(counter, 1u);
    __syncthreads();
    return ticket.value;
}

// What the block wrote before is seen by whoever waits for the counter.
__device__ __forceinline__ void arrive(unsigned* counter) {
    __syncthreads();
    if (threadIdx.x == 0) add_release(counter, 1u);
}

// Block until `count` blocks have arrived.
__device__ __forceinline__ void wait(const unsigned* counter, unsigned count) {
    if (threadIdx.x == 0) {
        while (load_acquire(counter) < count) __nanosleep(20);
    }
    __syncthreads();
}

// Whether this block is the last of `count` to arrive; it then sees what all the others wrote.
__device__ __forceinline__ bool arrive_last(unsigned* counter, unsigned count) {
    Ticket& ticket = block_shared<Ticket>();
    __syncthreads();
    if (threadIdx.x == 0) ticket.value = add_acq_rel(counter, 1u);
    __syncthreads();
    return ticket.value + 1 == count;
}

// ---- launching ----------------------------------------------------------------------------------

#define FASTNORM_TRY(call) \
    if (cudaError_t error = (call); error != cudaSuccess) return error

// Calls f with a value of the type; what f returns is a cudaError_t.
template <class F>
cudaError_t with_type(Dtype dtype, F f) {
    switch (dtype) {
        case Dtype::float32:
            return f(float{});
        case Dtype::bfloat16:
            return f(__nv_bfloat16{});
        case Dtype::float16:
            return f(__half{});
        case Dtype::float64:
            return f(double{});
    }
    return cudaErrorInvalidValue;
}

// Calls f with std::true_type or std::false_type.
template <class F>
cudaError_t with_flag(bool flag, F f) {
    return flag ? f(std::true_type{}) : f(std::false_type{});
}

// More than 48 KB have to be asked for: once for each kernel and device, and as much as there is.
// What is allowed belongs to the kernel, not to the launch, so that a smaller number would take
// away what another thread is about to use.
template <class Parameters>
cudaError_t allow_shared(void (*kernel)(Parameters), size_t shared_bytes) {
    if (shared_bytes <= 48 * 1024) return cudaSuccess;
    static std::mutex mutex;
    static std::set<std::pair<const void*, int>> allowed;
    const void* function = reinterpret_cast<const void*>(kernel);
    int device = 0, most = 0;
    FASTNORM_TRY(cudaGetDevice(&device));
    const std::lock_guard lock(mutex);
    if (allowed.count({function, device}) > 0) return cudaSuccess;
    cudaFuncAttributes attributes = {};
    FASTNORM_TRY(cudaFuncGetAttributes(&attributes, function));
    FASTNORM_TRY(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    FASTNORM_TRY(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      most - int(attributes.sharedSizeBytes)));
    // plans count on all of it: not a split with L1 that some other launch would like
    FASTNORM_TRY(cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout,
                                      cudaSharedmemCarveoutMaxShared));
    allowed.insert({function, device});
    return cudaSuccess;
}

template <class Parameters>
cudaError_t launch(void (*kernel)(Parameters), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, const Parameters& parameters) {
    if (grid.x == 0) return cudaSuccess;  // no elements
    FASTNORM_TRY(allow_shared(kernel, shared_bytes));
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, parameters);
}

// How many blocks of a kernel the current device holds at once.
template <class Parameters>
cudaError_t resident_blocks(void (*kernel)(Parameters), int threads, size_t shared_bytes,
                            int* blocks) {
    int device = 0, processors = 0, each = 0;
    FASTNORM_TRY(allow_shared(kernel, shared_bytes));
    FASTNORM_TRY(cudaGetDevice(&device));
    FASTNORM_TRY(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    FASTNORM_TRY(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared_bytes));
    *blocks = processors * each;
    return cudaSuccess;
}

}  // namespace fastnorm
