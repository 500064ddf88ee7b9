// The device primitives whose implementation differs between nvcc and the CPU harness of the tests
// (tests/emulation). Inline PTX stands nowhere else.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fastnorm {
#ifdef __CUDACC__

// One object per block and type T: the kernels' only way to static shared memory.
template <class T>
__device__ __forceinline__ T& block_shared() {
    __shared__ T object;
    return object;
}

template <class T>
__device__ __forceinline__ T* dynamic_shared() {
    extern __shared__ __align__(16) unsigned char fastnorm_dynamic_shared[];
    return reinterpret_cast<T*>(fastnorm_dynamic_shared);
}

// Blocks talk through these two: what was written before the release is seen after the acquire.
__device__ __forceinline__ unsigned add_release(unsigned* p, unsigned v) {
    unsigned old;
    asm volatile("atom.add.release.gpu.global.u32 %0, [%1], %2;"
                 : "=r"(old)
                 : "l"(p), "r"(v)
                 : "memory");
    return old;
}

__device__ __forceinline__ unsigned add_acq_rel(unsigned* p, unsigned v) {
    unsigned old;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
                 : "=r"(old)
                 : "l"(p), "r"(v)
                 : "memory");
    return old;
}

__device__ __forceinline__ unsigned load_acquire(const unsigned* p) {
    unsigned v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

// A 16-byte store: plain stores of a struct may come out as four scalar ones.
__device__ __forceinline__ void store16(uint4* p, uint4 v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z),
                 "r"(v.w)
                 : "memory");
}

// Streaming hints: data that this launch will not read again goes first when L2 is full.
__device__ __forceinline__ uint4 load_evict_first(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

__device__ __forceinline__ void store_evict_first(uint4* p, uint4 v) {
    __stcs(p, v);
}

// What L2 is told about data that are copied: whether this launch reads them again.
__device__ __forceinline__ uint64_t copy_policy(bool once) {
    uint64_t first, normal;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(first));
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(normal));
    return once ? first : normal;
}

// Copies 16 bytes, or fewer and then zeros, from global to shared memory without waiting for them:
// the thread that started copies ends a group of them with copies_end(), and finds the groups there
// after copies_done().
__device__ __forceinline__ void copy_async(void* shared, const void* global, uint64_t policy,
                                           int bytes = 16) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;"
                 :
                 : "r"(unsigned(__cvta_generic_to_shared(shared))), "l"(global), "r"(bytes),
                   "l"(policy)
                 : "memory");
}

__device__ __forceinline__ void copies_end() {
    asm volatile("cp.async.commit_group;" : : : "memory");
}

// Waits for all groups of copies but the last `running`, of which it may wait for some.
__device__ __forceinline__ void copies_done(unsigned running) {
    if (running == 0) {
        asm volatile("cp.async.wait_group 0;" : : : "memory");
    } else if (running == 1) {
        asm volatile("cp.async.wait_group 1;" : : : "memory");
    } else {
        asm volatile("cp.async.wait_group 2;" : : : "memory");
    }
}

// Brings the line of p, which will be read soon, to L2.
__device__ __forceinline__ void prefetch(const void* p) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// 1 / x to one unit in the last place, in one instruction: zero where 1 / x is subnormal.
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 2^x to two units in the last place: zero where that is subnormal.
__device__ __forceinline__ float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Hides where v came from: what was computed from it is computed again, not kept in registers (16
// bytes of halves are 4 registers, widened they are 8).
__device__ __forceinline__ void forget(uint4& v) {
    asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w));
}

#else  // tests/emulation/emulation.h has them all

using emulation::add_acq_rel;
using emulation::add_release;
using emulation::block_shared;
using emulation::copies_done;
using emulation::copies_end;
using emulation::copy_async;
using emulation::copy_policy;
using emulation::load_acquire;

template <class T>
T* dynamic_shared() {
    return static_cast<T*>(emulation::dynamic_shared());
}

inline uint4 load_evict_first(const uint4* p) {
    return *p;
}
inline void store16(uint4* p, uint4 v) {
    *p = v;
}
inline void store_evict_first(uint4* p, uint4 v) {
    *p = v;
}
inline void prefetch(const void*) {}
inline float reciprocal(float x) {
    return 1.0f / x;
}
inline float exp2_approximate(float x) {
    return exp2f(x);
}
inline void forget(uint4&) {}

#endif
}  // namespace fastnorm
