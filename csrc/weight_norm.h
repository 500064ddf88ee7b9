// Weight norm: what the launchers take.
#pragma once
#include "fastnorm.h"

namespace fastnorm {

// A weight as the kernels see it: v is [A, K, B], row-major, with one norm for each of K. A dim in
// the middle has A and B, dim 0 has A = 1, the norm of a whole tensor has A = K = 1.
struct WeightNormSizes {
    long A, K, B;
    double eps;  // smaller norms count as eps; 0: none does
    Dtype w, v, g;
};

// Of one layer, forward and backward; what the pass does not use is null.
struct WeightNormLayer {
    void* out;       // [A, K, B]: w, of w's dtype, or dv, of v's; dv may be null
    const void* v;   // [A, K, B]
    const void* dw;  // [A, K, B], of w's dtype; backward
    const void* g;   // [K]
    void* norm;      // [K], wide; written forward, read backward
    void* dg;        // [K], of g's dtype; backward, may be null
    WeightNormSizes sizes;
};

// What the launches over some layers need: `partials` of 8 bytes; `counters` that are zero, and are
// left zero. 0 where every norm is one block's own.
struct WeightNormWorkspace {
    long partials, counters;
};

// For a device of that many multiprocessors.
WeightNormWorkspace weight_norm_workspace(const WeightNormSizes* sizes, int count, int processors);

struct WeightNorm {
    const WeightNormLayer* layers;  // [count], in host memory: it travels by value
    int count;
    void* partials;
    unsigned* counters;
    int processors;
};

// One launch for all layers, up to 227 of them, and one more for those computed in fp64; a driver
// before CUDA 12.1 takes 28 layers in a launch.
cudaError_t weight_norm_forward(const WeightNorm& a, cudaStream_t stream);
cudaError_t weight_norm_backward(const WeightNorm& a, cudaStream_t stream);

}  // namespace fastnorm
