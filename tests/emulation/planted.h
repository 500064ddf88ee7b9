// What faults.cu and probes.cu share: a table of named kernels that Python calls through ctypes.
#pragma once
#include <cstdio>
#include <memory>
#include <stdexcept>

#include "../../csrc/platform.cuh"

namespace planted {

using fastnorm::add_acq_rel;
using fastnorm::add_release;
using fastnorm::block_shared;
using fastnorm::copies_done;
using fastnorm::copies_end;
using fastnorm::copy_async;
using fastnorm::copy_policy;
using fastnorm::dynamic_shared;
using fastnorm::load_acquire;

constexpr unsigned kFull = 0xffffffffu;

// What every kernel here is given; `broken` switches its fault on.
struct Work {
    float* x;           // [count] 1, 2, 3, ...
    float* y;           // [count], NaN before
    float* partials;    // [blocks], NaN before
    unsigned* counter;  // zero before
    int count;
    bool broken;
};

struct Shape {
    dim3 grid, block;
    size_t shared = 0;
    bool cooperative = false;
};

struct Kernel {
    const char* name;
    void (*kernel)(Work);
    Shape shape;
};

template <class T>
std::unique_ptr<T[]> filled(size_t count, T value) {
    std::unique_ptr<T[]> memory(new T[count]);
    std::fill_n(memory.get(), count, value);
    return memory;
}

// Runs one kernel of a table on buffers of `count`, of exactly that size so that ASan knows their
// ends. Returns a CUDA error, or -1 with the engine's report in `text`.
inline int run(const Kernel& k, const Shape& shape, bool broken, float* y, int count, char* text,
               size_t size) {
    const size_t blocks = size_t(shape.grid.x) * shape.grid.y * shape.grid.z;
    auto x = filled(count, 0.0f), out = filled(count, NAN), partials = filled(blocks, NAN);
    auto counter = filled(1, 0u);
    for (int i = 0; i < count; ++i) x[i] = float(i + 1);
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = shape.cooperative;
    cudaLaunchConfig_t config = {};
    config.gridDim = shape.grid, config.blockDim = shape.block;
    config.dynamicSmemBytes = shape.shared;
    config.attrs = &attribute, config.numAttrs = 1;
    int error;
    try {
        error = int(cudaLaunchKernelEx(
            &config, k.kernel,
            Work{x.get(), out.get(), partials.get(), counter.get(), count, broken}));
    } catch (const std::runtime_error& e) {
        std::snprintf(text, size, "%s", e.what());
        error = -1;
    }
    std::copy_n(out.get(), count, y);
    return error;
}

}  // namespace planted
