// What crosses the border between Python and the kernels, in every family: no torch type, no
// pybind11 type. Each family's own structs stand in its header.
#pragma once
#include <cuda_runtime.h>

namespace fastnorm {

// The one list of dtypes, by torch's names.
#define FASTNORM_DTYPES(X) X(float32) X(bfloat16) X(float16) X(float64)

enum class Dtype : int {
#define FASTNORM_DTYPE(name) name,
    FASTNORM_DTYPES(FASTNORM_DTYPE)
#undef FASTNORM_DTYPE
};

// An array whose type is known at run time; data is null for an optional one that is absent.
struct Array {
    void* data;
    Dtype dtype;
};

// The one list of activations of this language, by Python's names; activation.cuh has their
// formulas.
// clang-format off
#define FASTNORM_ACTIVATIONS(X) \
    X(identity) X(relu) X(relu6) X(leaky_relu) X(elu) X(selu) X(gelu) X(gelu_tanh) \
    X(gelu_sigmoid) X(silu) X(hardswish) X(mish) X(tanh) X(sigmoid)
// clang-format on

enum class Activation : int {
#define FASTNORM_ACTIVATION(name) name,
    FASTNORM_ACTIVATIONS(FASTNORM_ACTIVATION)
#undef FASTNORM_ACTIVATION
};

}  // namespace fastnorm
