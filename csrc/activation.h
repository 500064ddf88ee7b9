// Activations: what the launchers take.
#pragma once
#include "fastnorm.h"

namespace fastnorm {

struct ActivationForward {
    void* y;        // [count]
    const void* x;  // [count]
    long count;
    Activation activation;
};
cudaError_t activation_forward(const ActivationForward& a, Dtype dtype, cudaStream_t stream);

struct ActivationBackward {
    void* dx;        // [count]
    const void* x;   // [count]
    const void* dy;  // [count]
    long count;
    Activation activation;
};
cudaError_t activation_backward(const ActivationBackward& a, Dtype dtype, cudaStream_t stream);

// Swish sees its tensors as [outer, channels, inner], dense: inner is 1 in channels_last. A block
// owns a group of channels, all of them in parts (`splits`): one channel where inner > 1, else
// `width` vectors of channels.
struct SwishSizes {
    long outer, channels, inner;
    int width, groups, splits;
};

// How a tensor is cut, for a device of that many multiprocessors.
SwishSizes swish_sizes(long outer, long channels, long inner, Dtype dtype, int processors);

// How many partial sums swish_backward needs a workspace for.
long swish_partials(const SwishSizes& sizes, Dtype dtype);

struct SwishForward {
    void* y;        // [outer, channels, inner]
    const void* x;  // [outer, channels, inner]
    Array beta;     // [channels]
    SwishSizes sizes;
};
cudaError_t swish_forward(const SwishForward& a, Dtype dtype, cudaStream_t stream);

struct SwishBackward {
    void* dx;            // [outer, channels, inner], or null
    Array dbeta;         // [channels], or null
    const void* x;       // [outer, channels, inner]
    const void* dy;      // [outer, channels, inner]
    Array beta;          // [channels]
    void* partials;      // [groups, splits, channels of a group], wide
    unsigned* counters;  // [groups], zero before and after
    SwishSizes sizes;
};
cudaError_t swish_backward(const SwishBackward& a, Dtype dtype, cudaStream_t stream);

}  // namespace fastnorm
