// Weight norm of more layers than 4 KB of kernel parameters describe.
#include "weight_norm_kernel.cuh"

namespace fastnorm::weight_norm_kernels {

cudaError_t launch_many_forward(const WeightNorm& a, int& next, cudaStream_t stream) {
    return launch_table<Forward, float, kMany>(a, next, stream);
}

cudaError_t launch_many_backward(const WeightNorm& a, int& next, cudaStream_t stream) {
    return launch_table<Backward, float, kMany>(a, next, stream);
}

}  // namespace fastnorm::weight_norm_kernels
