// Layer norm backward; kernels in layer_norm_backward.cuh and the headers named after it.
#include "layer_norm.h"
#include "layer_norm_aligned_backward.cuh"
#include "layer_norm_backward_long.cuh"
#include "layer_norm_backward_streams.cuh"

namespace fastnorm {
namespace {

using namespace layer_norm;

template <class T>
bool aligned(const LayerNormBackward& a) {
    Alignment<T> all(a.rows, a.batch_rows, a.cols);
    all.matrix(a.x), all.matrix(a.dy), all.address(a.dx), all.address(a.dsum);
    all.array(a.weight), all.array(a.bias);
    return all.good;
}

// Rows are counted in 32 bits in these.
template <class T>
void (*aligned_rows(const LayerNormBackward& a))(LayerNormBackward) {
    if (a.rows >= 1l << 30) return backward_rows_kernel<T>;
    if (a.activation == Activation::identity) return backward_aligned_kernel<T, false>;
    return backward_aligned_kernel<T, true>;
}

}  // namespace

cudaError_t layer_norm_backward(const LayerNormBackward& a, Dtype dtype, cudaStream_t stream) {
    return with_type(dtype, [&](auto t) {
        using T = decltype(t);
        void (*kernel)(LayerNormBackward) =
            a.plan.ticket ? backward_ticket_kernel<T, false> : backward_rows_kernel<T>;
        if constexpr (sizeof(T) < 8) {
            const bool fast = aligned<T>(a);
            if (a.plan.streams)
                kernel =
                    fast ? backward_streams_kernel<T, true> : backward_streams_kernel<T, false>;
            else if (fast)
                kernel = a.plan.ticket ? backward_ticket_kernel<T, true> : aligned_rows<T>(a);
        }
        return launch(kernel, unsigned(a.plan.blocks), a.plan.block, a.plan.shared_bytes, stream,
                      a);
    });
}

}  // namespace fastnorm
