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
    asm volatile("ld.global.L1::no_allocate.L2::evict_first.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

__device__ __forceinline__ void store_evict_first(uint4* p, uint4 v) {
    __stcs(p, v);
}

// 1 / x to one unit in the last place, subnormal results included, without a slow path.
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
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
inline float reciprocal(float x) {
    return 1.0f / x;
}
inline void forget(uint4&) {
}

#endif
}  // namespace fastnorm
