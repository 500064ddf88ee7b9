// Lets g++ compile csrc/*.cu and run the kernels on the CPU, one fiber per CUDA thread. Forced into
// every kernel source by build.py. This header is the surface: the language, the intrinsics and the
// part of the runtime API that kernels and launchers use. engine.cpp runs the fibers, runtime.cpp
// answers for the device.
#pragma once
#ifdef __CUDACC__
#error "tests/emulation/emulation.h is for the host compiler"
#endif
#define __CUDA_RUNTIME_H__  // keeps cuda_runtime.h out: its cudaLaunchKernelEx is defined here
// the toolkit defines it empty for g++: the variable would silently be one per thread
#define __shared__ use_block_shared_or_dynamic_shared_of_platform_cuh_instead
// clang-format off
#include <cuda_runtime_api.h>
#include <vector_functions.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
// clang-format on

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>
#undef __launch_bounds__
#define __launch_bounds__(...)
#ifndef __grid_constant__
#define __grid_constant__
#endif

extern uint3 threadIdx, blockIdx;  // of the fiber that runs
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// Where a kernel calls, for the reports: defaulted last parameters.
#define EMULATION_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace emulation {

using Word = unsigned long long;
enum class Exchange { sync, shuffle, ballot };

// Checks the configuration as a device would, then calls body(arguments) in every thread of the
// grid. Misuse inside the kernel throws std::runtime_error with file and line.
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*),
                   void* arguments);

unsigned barrier(bool vote, const char* file, int line);  // how many of the block's threads voted
Word exchange(Exchange kind, unsigned mask, Word value, int source, const char* file, int line);
void yield(const char* file, int line);  // lets others run; spinning for ever is reported
void progress();                         // memory that others may spin on has changed
void fence();
void acquire(const void*);  // these two order memory as the race detector sees it
void release(const void*);
void fenced(const void*);                     // before a relaxed atomic: fences make it a release
void touched(const void*);                    // after one: a later fence makes it an acquire
void* shared(const void* key, size_t bytes);  // this block's variable `key`
void* dynamic_shared();
int lane();
struct Copy {
    void* to;
    const void* from;
    int bytes;  // of 16; zeros for the rest
};
void enqueue(Copy copy);  // of this thread's group of copies
void copies_end();
bool due(unsigned running, Copy* copy);  // the next one of all groups but the last `running`

template <class T>
struct SameType {
    using type = T;
};
template <class T>
using Same = typename SameType<T>::type;  // not deduced: atomicAdd(unsigned*, 1) converts the 1

template <class T>
T& block_shared() {
    static char key;
    return *static_cast<T*>(shared(&key, sizeof(T)));
}

template <class T>
T shuffle(unsigned mask, T v, int source, const char* file, int line) {
    static_assert(sizeof(T) <= sizeof(Word) && std::is_trivially_copyable_v<T>);
    Word word = 0;
    std::memcpy(&word, &v, sizeof v);
    word = exchange(Exchange::shuffle, mask, word, source, file, line);
    std::memcpy(&v, &word, sizeof v);
    return v;
}

// A relaxed read-modify-write; other threads may run before it.
template <class T, class F>
T atomic(T* p, F change, const char* file, int line) {
    using W = std::conditional_t<sizeof(T) == 4, unsigned, Word>;
    static_assert(sizeof(T) == sizeof(W));
    yield(file, line);
    fenced(p);
    W now, was = __atomic_load_n(reinterpret_cast<W*>(p), __ATOMIC_RELAXED);
    T old, value;
    std::memcpy(&old, &was, sizeof was);
    value = change(old);
    std::memcpy(&now, &value, sizeof now);
    __atomic_store_n(reinterpret_cast<W*>(p), now, __ATOMIC_RELAXED);
    touched(p);
    if (now != was) progress();
    return old;
}

template <class T>
T add_release(T* p, Same<T> v, EMULATION_HERE) {
    const T old = atomic(p, [&](T old) { return T(old + v); }, file, line);
    release(p);  // afterwards: the addition itself has happened too
    return old;
}

template <class T>
T add_acq_rel(T* p, Same<T> v, EMULATION_HERE) {
    const T old = add_release(p, v, file, line);
    acquire(p);
    return old;
}

template <class T>
T load_acquire(const T* p, EMULATION_HERE) {
    yield(file, line);
    const T v = __atomic_load_n(p, __ATOMIC_RELAXED);
    acquire(p);
    return v;
}

// Copies of 16 bytes happen when they are waited for, as late as a device may perform them.
inline uint64_t copy_policy(bool) {
    return 0;
}
inline void copy_async(void* shared, const void* global, uint64_t, int bytes = 16) {
    std::memset(shared, 0xff, 16);
    enqueue({shared, global, bytes});
}
inline void copies_done(unsigned running) {
    for (Copy copy; due(running, &copy);) {
        std::memset(copy.to, 0, 16);
        std::memcpy(copy.to, copy.from, std::size_t(copy.bytes));
    }
}

}  // namespace emulation

// barriers, warps

inline void __syncthreads(EMULATION_HERE) {
    emulation::barrier(false, file, line);
}
inline int __syncthreads_count(int vote, EMULATION_HERE) {
    return int(emulation::barrier(vote != 0, file, line));
}
inline int __syncthreads_or(int vote, EMULATION_HERE) {
    return emulation::barrier(vote != 0, file, line) != 0;
}
inline int __syncthreads_and(int vote, EMULATION_HERE) {
    return emulation::barrier(vote == 0, file, line) == 0;
}
inline void __syncwarp(unsigned mask = ~0u, EMULATION_HERE) {
    emulation::exchange(emulation::Exchange::sync, mask, 0, 0, file, line);
}
template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32, EMULATION_HERE) {
    const int base = emulation::lane() & -width;
    return emulation::shuffle(mask, v, base + (source & (width - 1)), file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int flip, int width = 32, EMULATION_HERE) {
    const int me = emulation::lane(), source = me ^ flip;
    return emulation::shuffle(mask, v, source < (me & -width) + width ? source : me, file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32, EMULATION_HERE) {
    const int me = emulation::lane(), source = me + int(by);
    return emulation::shuffle(mask, v, source < (me & -width) + width ? source : me, file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32, EMULATION_HERE) {
    const int me = emulation::lane(), source = me - int(by);
    return emulation::shuffle(mask, v, source >= (me & -width) ? source : me, file, line);
}
inline unsigned __ballot_sync(unsigned mask, int vote, EMULATION_HERE) {
    return unsigned(
        emulation::exchange(emulation::Exchange::ballot, mask, vote != 0, 0, file, line));
}
inline int __any_sync(unsigned mask, int vote, EMULATION_HERE) {
    return __ballot_sync(mask, vote, file, line) != 0;
}
inline int __all_sync(unsigned mask, int vote, EMULATION_HERE) {
    return __ballot_sync(mask, !vote, file, line) == 0;
}

// atomics and memory

#define EMULATION_ATOMIC(name, value)                                             \
    template <class T>                                                            \
    T name(T* p, emulation::Same<T> v, EMULATION_HERE) {                          \
        return emulation::atomic(p, [&](T old) { return T(value); }, file, line); \
    }
EMULATION_ATOMIC(atomicAdd, old + v)
EMULATION_ATOMIC(atomicSub, old - v)
EMULATION_ATOMIC(atomicMax, std::max(old, v))
EMULATION_ATOMIC(atomicMin, std::min(old, v))
EMULATION_ATOMIC(atomicOr, old | v)
EMULATION_ATOMIC(atomicAnd, old& v)
EMULATION_ATOMIC(atomicExch, ((void)old, v))
EMULATION_ATOMIC(atomicInc, old >= v ? 0 : old + 1)
#undef EMULATION_ATOMIC
template <class T>
T atomicCAS(T* p, emulation::Same<T> expected, emulation::Same<T> v, EMULATION_HERE) {
    return emulation::atomic(p, [&](T old) { return old == expected ? v : old; }, file, line);
}
inline void __threadfence() {
    emulation::fence();
}
inline void __threadfence_block() {
    emulation::fence();
}
inline void __nanosleep(unsigned, EMULATION_HERE) {
    emulation::yield(file, line);
}

// where a device has a cache hint, memory is memory here
template <class T>
T __ldg(const T* p) {
    return *p;
}
template <class T>
T __ldcs(const T* p) {
    return *p;
}
template <class T>
T __ldcg(const T* p) {
    return *p;
}
template <class T>
T __ldca(const T* p) {
    return *p;
}
template <class T>
T __ldlu(const T* p) {
    return *p;
}
template <class T>
void __stwb(T* p, emulation::Same<T> v) {
    *p = v;
}
template <class T>
void __stcg(T* p, emulation::Same<T> v) {
    *p = v;
}
template <class T>
void __stcs(T* p, emulation::Same<T> v) {
    *p = v;
}

// arithmetic

inline float rsqrtf(float x) {
    return 1.0f / std::sqrt(x);
}
inline double rsqrt(double x) {
    return 1.0 / std::sqrt(x);
}
inline float rsqrt(float x) {
    return rsqrtf(x);
}
inline float __frsqrt_rn(float x) {
    return rsqrtf(x);
}
inline float __fsqrt_rn(float x) {
    return std::sqrt(x);
}
inline float __expf(float x) {
    return std::exp(x);
}
inline float __logf(float x) {
    return std::log(x);
}
inline float __log2f(float x) {
    return std::log2(x);
}
inline float __powf(float x, float y) {
    return std::pow(x, y);
}
inline float __frcp_rn(float x) {
    return 1.0f / x;
}
inline double __drcp_rn(double x) {
    return 1.0 / x;
}
inline float __fdividef(float a, float b) {
    return a / b;
}
inline float __fdiv_rn(float a, float b) {
    return a / b;
}
inline double __ddiv_rn(double a, double b) {
    return a / b;
}
inline float __fadd_rn(float a, float b) {
    return a + b;
}
inline float __fmul_rn(float a, float b) {
    return a * b;
}
inline float __fmaf_rn(float a, float b, float c) {
    return std::fma(a, b, c);
}
inline double __fma_rn(double a, double b, double c) {
    return std::fma(a, b, c);
}
inline float __saturatef(float x) {
    return x > 0.0f ? std::fmin(x, 1.0f) : 0.0f;
}
inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}
inline int __ffs(int x) {
    return __builtin_ffs(x);
}
inline int __clz(int x) {
    return x ? __builtin_clz(unsigned(x)) : 32;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
    return unsigned((uint64_t(a) * b) >> 32);
}
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
    return uint64_t((static_cast<unsigned __int128>(a) * b) >> 64);
}
inline int __mul24(int a, int b) {
    return a * b;
}

template <class To, class From>
To emulation_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline int __float_as_int(float x) {
    return emulation_bits<int>(x);
}
inline unsigned __float_as_uint(float x) {
    return emulation_bits<unsigned>(x);
}
inline float __int_as_float(int x) {
    return emulation_bits<float>(x);
}
inline float __uint_as_float(unsigned x) {
    return emulation_bits<float>(x);
}
inline long long __double_as_longlong(double x) {
    return emulation_bits<long long>(x);
}
inline double __longlong_as_double(long long x) {
    return emulation_bits<double>(x);
}
using std::isfinite, std::isinf, std::isnan, std::max, std::min;

// the part of the runtime API that is a template; the rest is in runtime.cpp

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... given) {
    std::tuple<Parameters...> arguments(static_cast<Parameters>(given)...);
    auto call = [&] { std::apply(kernel, arguments); };  // every thread has copies, as on a device
    return emulation::launch(
        *config, reinterpret_cast<const void*>(kernel),
        [](void* body) { (*static_cast<decltype(call)*>(body))(); }, &call);
}
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
    return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
template <class... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*kernel)(P...),
                                                          int threads, size_t dynamic_bytes) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        blocks, reinterpret_cast<const void*>(kernel), threads, dynamic_bytes);
}
