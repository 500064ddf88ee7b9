// Layer norm backward; kernels in layer_norm_backward.cuh and layer_norm_backward_long.cuh.
#include "layer_norm.h"
#include "layer_norm_backward.cuh"
#include "layer_norm_backward_long.cuh"
#include "layer_norm_halves.cuh"

namespace fastnorm {
namespace {

using namespace layer_norm;

template <class T>
bool fast(const LayerNormBackward& a) {
    Alignment<T> all(a.rows, a.batch_rows, a.cols);
    all.matrix(a.x), all.matrix(a.dy), all.address(a.dx), all.address(a.dsum);
    all.array(a.weight), all.array(a.bias);
    return all.good;
}

}  // namespace

cudaError_t layer_norm_backward(const LayerNormBackward& a, Dtype dtype, cudaStream_t stream) {
    return with_type(dtype, [&](auto t) {
        using T = decltype(t);
        void (*kernel)(LayerNormBackward) =
            a.plan.ticket ? backward_ticket_kernel<T, false> : backward_rows_kernel<T, false, Any>;
        if constexpr (sizeof(T) < 8) {
            if (fast<T>(a)) {
                kernel = a.plan.ticket ? backward_ticket_kernel<T, true>
                         : a.activation == Activation::identity
                             ? backward_rows_kernel<T, true, Identity>
                             : backward_rows_kernel<T, true, Any>;
                if constexpr (sizeof(T) == 2) {
                    if (halves<T>(a)) {
                        with_frequent(a.activation, [&](auto activation) {
                            kernel = backward_halves_kernel<T, typename decltype(activation)::type>;
                        });
                    }
                }
            }
        }
        return launch(kernel, unsigned(a.plan.blocks), a.plan.block, a.plan.shared_bytes, stream,
                      a);
    });
}

}  // namespace fastnorm
