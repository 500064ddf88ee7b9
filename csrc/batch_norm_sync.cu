// Synchronised batch norm: what batch_norm_forward.cu and batch_norm_backward.cu do not have.
#include "batch_norm_tiles.cuh"

namespace fastnorm {
namespace {

using namespace batch_norm;

// One thread per channel, the ranks in order (Chan, Golub & LeVeque 1979): the same bits
// everywhere.
template <class W>
__global__ void __launch_bounds__(kThreads) batch_norm_merge_kernel(BatchNormMerge a) {
    const long c = long(blockIdx.x) * kThreads + threadIdx.x, stride = 2 * a.C + 1;
    const W* gathered = static_cast<const W*>(a.gathered);
    if (c < a.C) {
        // distances from one rank's mean keep their digits; an infinite mean must stay infinite
        const W first = gathered[c], pivot = first - first == W(0) ? first : W(0);
        Moments<W> all = {};
        for (const W* rank = gathered; rank < gathered + a.ranks * stride; rank += stride)
            all = merge(all, Moments<W>{rank[2 * a.C], rank[c] - pivot, rank[a.C + c]});
        const W mean = pivot + all.mean, divisor = all.count > W(1) ? all.count : W(1);
        static_cast<W*>(a.mean)[c] = mean;
        static_cast<W*>(a.var)[c] = all.m2 / divisor;
        if (c == 0) *static_cast<W*>(a.count) = all.count;
        // fewer than two values have no unbiased variance: the running ones stay
        if (all.count > W(1)) move_running(a.running, c, mean, all.m2 / (all.count - W(1)));
    }
    finish(a.counters, 2, a.running.num_batches_tracked);
}

}  // namespace

// ---- launchers ----------------------------------------------------------------------------------

cudaError_t batch_norm_merge(const BatchNormMerge& a, Dtype dtype, cudaStream_t stream) {
    const unsigned blocks = unsigned((a.C + kThreads - 1) / kThreads);
    return dtype == Dtype::float64
               ? launch(batch_norm_merge_kernel<double>, blocks, kThreads, 0, stream, a)
               : launch(batch_norm_merge_kernel<float>, blocks, kThreads, 0, stream, a);
}

}  // namespace fastnorm
