// Kernels with one planted fault each. A line that a report must name ends in a comment that names
// the fault; with `broken` off the same kernel is right, and no check may say anything of it.
#include "planted.h"

namespace planted {
namespace {

struct Row {
    float v[64];
};

__global__ void missing_barrier(Work w) {
    Row& row = block_shared<Row>();
    const int t = threadIdx.x;
    row.v[t] = w.x[t];
    if (!w.broken) __syncthreads();
    w.y[t] = row.v[(t + 1) % 64];  // fault: missing_barrier
}

__global__ void missing_barrier_before_reuse(Work w) {
    Row& row = block_shared<Row>();
    const int t = threadIdx.x;
    row.v[t] = w.x[t];
    __syncthreads();
    const float next = row.v[(t + 1) % 64];
    if (!w.broken) __syncthreads();
    row.v[t] = next;  // fault: missing_barrier_before_reuse
    __syncthreads();
    w.y[t] = row.v[(t + 1) % 64];
}

// The last of the grid's blocks to arrive sums what all of them wrote.
__global__ void relaxed_arrival(Work w) {
    w.partials[blockIdx.x] = w.x[blockIdx.x];
    const unsigned before = w.broken ? atomicAdd(w.counter, 1) : add_acq_rel(w.counter, 1);
    if (before + 1 < gridDim.x) return;
    w.y[0] = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) w.y[0] += w.partials[i];  // fault: relaxed_arrival
}

__global__ void relaxed_wait(Work w) {
    if (blockIdx.x == 0) {
        w.partials[0] = w.x[0];
        add_release(w.counter, 1);
        return;
    }
    while ((w.broken ? atomicAdd(w.counter, 0) : load_acquire(w.counter)) == 0) __nanosleep(20);
    w.y[blockIdx.x] = w.partials[0];  // fault: relaxed_wait
}

// A fence before a relaxed arrival releases too.
__global__ void missing_fence(Work w) {
    w.partials[blockIdx.x] = w.x[blockIdx.x];
    if (!w.broken) __threadfence();
    const unsigned before = atomicAdd(w.counter, 1);
    if (!w.broken) __threadfence();
    if (before + 1 < gridDim.x) return;
    w.y[0] = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) w.y[0] += w.partials[i];  // fault: missing_fence
}

// Thread 1 writes what thread 0 publishes.
__global__ void missing_barrier_before_arrival(Work w) {
    if (threadIdx.x == 1) w.partials[blockIdx.x] = w.x[blockIdx.x];
    if (!w.broken) __syncthreads();
    if (threadIdx.x != 0 || add_acq_rel(w.counter, 1) + 1 < gridDim.x) return;
    w.y[0] = 0;
    for (unsigned i = 0; i < gridDim.x; ++i)
        w.y[0] += w.partials[i];  // fault: missing_barrier_before_arrival
}

__global__ void counter_not_atomic(Work w) {
    if (w.broken)
        *w.counter = *w.counter + 1;  // fault: counter_not_atomic
    else
        atomicAdd(w.counter, 1);
}

// A block that starts late is not thereby ordered after one that has ended.
__global__ void missing_arrival(Work w) {
    if (blockIdx.x == 0 && threadIdx.x == 0) w.partials[0] = w.x[0];
    __syncwarp();
    __syncthreads();
    if (blockIdx.x == 63 && w.broken) w.y[threadIdx.x] = w.partials[0];  // fault: missing_arrival
    __syncthreads();
}

__global__ void global_read(Work w) {
    const int t = threadIdx.x;
    w.y[t] = w.x[t + w.broken];  // fault: global_read
}

__global__ void global_write(Work w) {
    const int t = threadIdx.x;
    w.y[t + w.broken] = w.x[t];  // fault: global_write
}

__global__ void global_read_before(Work w) {
    const int t = threadIdx.x;
    w.y[t] = w.x[t - w.broken];  // fault: global_read_before
}

__global__ void shared_read(Work w) {
    Row& row = block_shared<Row>();
    const int t = threadIdx.x;
    row.v[t] = w.x[t];
    __syncthreads();
    w.y[t] = row.v[t + w.broken];  // fault: shared_read
}

__global__ void shared_write(Work w) {
    float* row = block_shared<Row>().v;
    const int t = threadIdx.x;
    row[t + w.broken] = w.x[t];  // fault: shared_write
    w.y[t] = row[t];
}

__global__ void dynamic_read(Work w) {
    float* row = dynamic_shared<float>();
    const int t = threadIdx.x;
    row[t] = w.x[t];
    __syncthreads();
    w.y[t] = row[t + w.broken];  // fault: dynamic_read
}

__global__ void dynamic_write(Work w) {
    float* row = dynamic_shared<float>();
    const int t = threadIdx.x;
    row[t + w.broken] = w.x[t];  // fault: dynamic_write
    w.y[t] = row[t];
}

__global__ void misaligned(Work w) {
    const int t = threadIdx.x;
    if (t % 4 != 0 || t > 56) return;
    const float4 v = *reinterpret_cast<const float4*>(w.x + t + w.broken);  // fault: misaligned
    *reinterpret_cast<float4*>(w.y + t) = v;
}

__global__ void shuffle_outside_mask(Work w) {
    const int t = threadIdx.x;
    const unsigned half = t % 32 < 16 ? 0xffffu : 0xffff0000u;
    const unsigned mask = w.broken ? half : kFull;
    w.y[t] = __shfl_xor_sync(mask, w.x[t], 16);  // fault: shuffle_outside_mask
}

__global__ void shuffle_without_itself(Work w) {
    const int t = threadIdx.x;
    const unsigned mask = w.broken ? kFull - 1 : kFull;
    w.y[t] = __shfl_sync(mask, w.x[t], 1);  // fault: shuffle_without_itself
}

__global__ void shuffle_with_the_gone(Work w) {
    const int t = threadIdx.x;
    if (w.broken && t % 32 == 31) return;
    w.y[t] = __shfl_xor_sync(kFull, w.x[t], 1);  // fault: shuffle_with_the_gone
}

__global__ void warp_diverges(Work w) {
    const int t = threadIdx.x;
    if (w.broken && t % 32 == 0)
        w.y[t] = __shfl_xor_sync(kFull, w.x[t], 1);  // fault: warp_diverges
    else
        w.y[t] = __shfl_xor_sync(kFull, w.x[t], 1);
}

__global__ void barrier_diverges(Work w) {
    if (w.broken && threadIdx.x >= 32) {
        __syncthreads();  // fault: barrier_diverges
    } else {
        __syncthreads();
    }
    w.y[threadIdx.x] = 1;
}

__global__ void barrier_of_a_part(Work w) {
    if (w.broken && threadIdx.x >= 32) return;
    __syncthreads();  // fault: barrier_of_a_part
    w.y[threadIdx.x] = 1;
}

__global__ void barrier_against_warp(Work w) {
    if (w.broken && threadIdx.x % 32 == 3)
        __syncthreads();
    else
        __syncwarp();  // fault: barrier_against_warp
    w.y[threadIdx.x] = 1;
}

__global__ void spin_without_release(Work w) {
    if (threadIdx.x == 0 && !w.broken) add_release(w.counter, 1);
    while (load_acquire(w.counter) == 0) {  // fault: spin_without_release
    }
    w.y[threadIdx.x] = 1;
}

// More blocks than the device holds wait for each other.
__global__ void grid_barrier(Work w) {
    const unsigned ticket = add_acq_rel(w.counter, 1);
    const unsigned all = w.broken ? gridDim.x : ticket + 1;  // those before: running or done
    while (load_acquire(w.counter) < all) {                  // fault: grid_barrier
    }
    w.y[blockIdx.x] = 1;
}

// Blocks follow each other: by ticket they may, by index only as long as they start in that order.
__global__ void order_by_index(Work w) {
    const unsigned ticket = atomicAdd(w.counter, 1 << 16) >> 16;
    const unsigned turn = w.broken ? blockIdx.x : ticket;
    while ((load_acquire(w.counter) & 0xffff) != turn) {  // fault: order_by_index
    }
    w.y[blockIdx.x] = 1;
    add_release(w.counter, 1);
}

const Kernel kFaults[] = {
    {"missing_barrier", missing_barrier, {1, 64}},
    {"missing_barrier_before_reuse", missing_barrier_before_reuse, {1, 64}},
    {"relaxed_arrival", relaxed_arrival, {4, 1}},
    {"relaxed_wait", relaxed_wait, {4, 1}},
    {"missing_fence", missing_fence, {4, 1}},
    {"missing_barrier_before_arrival", missing_barrier_before_arrival, {4, 2}},
    {"counter_not_atomic", counter_not_atomic, {4, 1}},
    {"missing_arrival", missing_arrival, {64, 64}},
    {"global_read", global_read, {1, 64}},
    {"global_write", global_write, {1, 64}},
    {"global_read_before", global_read_before, {1, 64}},
    {"shared_read", shared_read, {1, 64}},
    {"shared_write", shared_write, {1, 64}},
    {"dynamic_read", dynamic_read, {1, 64, 64 * sizeof(float)}},
    {"dynamic_write", dynamic_write, {1, 64, 64 * sizeof(float)}},
    {"misaligned", misaligned, {1, 64}},
    {"shuffle_outside_mask", shuffle_outside_mask, {1, 64}},
    {"shuffle_without_itself", shuffle_without_itself, {1, 64}},
    {"shuffle_with_the_gone", shuffle_with_the_gone, {1, 64}},
    {"warp_diverges", warp_diverges, {1, 64}},
    {"barrier_diverges", barrier_diverges, {1, 64}},
    {"barrier_of_a_part", barrier_of_a_part, {1, 64}},
    {"barrier_against_warp", barrier_against_warp, {1, 64}},
    {"spin_without_release", spin_without_release, {1, 64}},
    {"grid_barrier", grid_barrier, {64, 1}},
    {"order_by_index", order_by_index, {64, 1}},
};

}  // namespace
}  // namespace planted

extern "C" __attribute__((visibility("default"))) int run_fault(const char* name, bool broken,
                                                                float* y, char* text, size_t size) {
    for (const planted::Kernel& k : planted::kFaults)
        if (std::strcmp(k.name, name) == 0)
            return planted::run(k, k.shape, broken, y, 64, text, size);
    std::snprintf(text, size, "no such fault");
    return -2;
}
