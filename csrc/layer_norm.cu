// Layer norm forward; kernels in layer_norm_forward.cuh and layer_norm_aligned_forward.cuh.
#include "layer_norm.h"
#include "layer_norm_aligned_forward.cuh"

namespace fastnorm {
namespace {

using namespace layer_norm;

template <class T>
bool aligned(const LayerNormForward& a) {
    Alignment<T> all(a.rows, a.batch_rows, a.cols);
    all.matrix(a.x), all.matrix(a.residual), all.address(a.sum);
    all.array(a.y), all.array(a.weight), all.array(a.bias);
    return all.good && (a.residual.data == nullptr || a.residual_dtype == dtype_of<T>);
}

}  // namespace

cudaError_t layer_norm_forward(const LayerNormForward& a, Dtype dtype, cudaStream_t stream) {
    return with_type(dtype, [&](auto t) {
        using T = decltype(t);
        void (*kernel)(LayerNormForward) =
            a.plan.ticket ? forward_ticket_kernel<T> : forward_rows_kernel<T>;
        if constexpr (sizeof(T) < 8) {
            if (aligned<T>(a)) {
                kernel = a.plan.ticket ? forward_aligned_ticket_kernel<T>
                                       : forward_aligned_kernel<T, false>;
                if (!a.plan.ticket && plain<T>(a)) kernel = forward_aligned_kernel<T, true>;
            }
        }
        return launch(kernel, unsigned(a.plan.blocks), a.plan.block, a.plan.shared_bytes, stream,
                      a);
    });
}

}  // namespace fastnorm
