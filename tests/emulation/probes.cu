// Healthy kernels through which tests/test_emulation.py asks the engine what it does.
#include "planted.h"

namespace planted {
namespace {

struct WarpSums {
    float v[32];
};

// y[block] = the sum of x over the block's threads, of any number
__global__ void block_sum(Work w) {
    WarpSums& sums = block_shared<WarpSums>();
    const int t = threadIdx.x, warps = (blockDim.x + 31) / 32;
    const unsigned mask = __ballot_sync(kFull, true);  // the last warp may be a part of one
    float s = w.x[t];
    for (int step = 16; step > 0; step /= 2) {
        const int other = t % 32 ^ step;
        const float there = __shfl_sync(mask, s, mask >> other & 1 ? other : t % 32);
        if (mask >> other & 1) s += there;
    }
    if (t % 32 == 0) sums.v[t / 32] = s;
    __syncthreads();
    if (t != 0) return;
    s = 0;
    for (int i = 0; i < warps; ++i) s += sums.v[i];
    w.y[blockIdx.x] = s;
}

// y = [xor 5, up 3, down 3, lane 7, each of width 8, then the same in double of width 32][32]
__global__ void shuffles(Work w) {
    const int t = threadIdx.x;
    const float x = w.x[t];
    const double wide = x + 1e9;
    float* y = w.y + t;
    y[0] = __shfl_xor_sync(kFull, x, 5, 8);
    y[32] = __shfl_up_sync(kFull, x, 3, 8);
    y[64] = __shfl_down_sync(kFull, x, 3, 8);
    y[96] = __shfl_sync(kFull, x, 7, 8);
    y[128] = float(__shfl_xor_sync(kFull, wide, 5) - 1e9);
    y[160] = float(__shfl_up_sync(kFull, wide, 3) - 1e9);
    y[192] = float(__shfl_down_sync(kFull, wide, 3) - 1e9);
    y[224] = float(__shfl_sync(kFull, wide, 7) - 1e9);
}

// y[thread] = [ballot, any, all, threads of the block that vote, or, and], one vote per thread % 3
__global__ void votes(Work w) {
    const int t = threadIdx.x, vote = t % 3 == 0;
    float* y = w.y + 6 * t;
    y[0] = float(__popc(__ballot_sync(kFull, vote)));
    y[1] = float(__any_sync(kFull, vote));
    y[2] = float(__all_sync(kFull, vote));
    y[3] = float(__syncthreads_count(vote));
    y[4] = float(__syncthreads_or(vote));
    y[5] = float(__syncthreads_and(vote));
}

// Two halves of a warp work apart, then together.
__global__ void halves(Work w) {
    const int t = threadIdx.x;
    const unsigned mask = t < 16 ? 0xffffu : 0xffff0000u;
    float s = w.x[t];
    if (t < 16) {
        for (int step = 8; step > 0; step /= 2) s += __shfl_xor_sync(mask, s, step);
    } else {
        for (int step = 8; step > 0; step /= 2) s *= __shfl_xor_sync(mask, s, step);
    }
    __syncwarp();
    w.y[t] = __shfl_xor_sync(kFull, s, 16);
}

// y[thread] = what stands in shared memory that nobody has written
__global__ void fresh_shared(Work w) {
    float* dynamic = dynamic_shared<float>();
    w.y[threadIdx.x] = block_shared<WarpSums>().v[threadIdx.x] + dynamic[threadIdx.x];
}

// y[thread] = [copy that was asked for][before a wait, then with 2, 1, 0 groups still running]
__global__ void copies(Work w) {
    float* to = dynamic_shared<float>() + 12 * threadIdx.x;
    float* y = w.y + 12 * threadIdx.x;
    for (int i = 0; i < 3; ++i) {
        copy_async(to + 4 * i, w.x + 4 * i, copy_policy(false));
        copies_end();
    }
    for (int waited = 0; waited < 4; ++waited) {
        if (waited > 0) copies_done(3 - waited);
        for (int i = 0; i < 3; ++i) y[4 * i + waited] = to[4 * i + 3];
    }
}

// y[thread] = its place in the grid, in three dimensions of both
__global__ void places(Work w) {
    const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    const unsigned place = block * blockDim.x * blockDim.y * blockDim.z + thread;
    w.y[place] = float(place);
}

// Ends only if all blocks are in flight at once; y[block] = 1
__global__ void together(Work w) {
    if (threadIdx.x == 0) add_release(w.counter, 1);
    while (load_acquire(w.counter) < gridDim.x) __nanosleep(20);
    w.y[blockIdx.x] = 1;
}

// y[ticket] = the block that took it
__global__ void start_order(Work w) {
    w.y[atomicAdd(w.counter, 1)] = float(blockIdx.x);
}

// y = the atomics, one word each
__global__ void atomics(Work w) {
    struct Words {
        unsigned sum, most, least, last, swapped, bits;
        unsigned long long wide;
        float real;
        double real_wide;
    };
    Words& s = block_shared<Words>();
    const unsigned t = threadIdx.x;
    if (t == 0) s = {0, 0, 99, 7, 0, 0, 0, 0, 0};
    __syncthreads();
    atomicAdd(&s.sum, 1);
    atomicMax(&s.most, t);
    atomicMin(&s.least, t);
    atomicExch(&s.last, 8u);
    for (unsigned seen = s.swapped;;) {  // add by compare and swap
        const unsigned found = atomicCAS(&s.swapped, seen, seen + 2);
        if (found == seen) break;
        seen = found;
    }
    atomicOr(&s.bits, 1u << t % 8);
    atomicAdd(&s.wide, 1ull << 20);
    atomicAdd(&s.real, 0.5f);
    atomicAdd(&s.real_wide, 0.25);
    __syncthreads();
    if (t != 0) return;
    const float found[] = {float(s.sum),        float(s.most),    float(s.least),
                           float(s.last),       float(s.swapped), float(s.bits),
                           float(s.wide >> 20), s.real,           float(s.real_wide)};
    for (int i = 0; i < 9; ++i) w.y[i] = found[i];
}

// y = intrinsics at 2 (and 3), then conversions of x[1] / 3
__global__ void arithmetic(Work w) {
    const float two = w.x[1], three = w.x[2], third = two / three;
    const float4 row = __ldcs(reinterpret_cast<const float4*>(w.x));
    const float found[] = {rsqrtf(two),
                           float(rsqrt(double(two))),
                           __expf(two),
                           __logf(two),
                           __frcp_rn(two),
                           __fdividef(two, three),
                           __fmaf_rn(two, three, 1.0f),
                           tanhf(two),
                           erff(two),
                           expm1f(two),
                           log1pf(two),
                           __ldg(w.x + 1) + __ldcg(w.x + 2) + row.w,
                           __uint_as_float(__float_as_uint(two) + (1u << 23)),
                           float(__clz(1)),
                           static_cast<float>(static_cast<__nv_bfloat16>(third)),
                           static_cast<float>(static_cast<__half>(third))};
    for (int i = 0; i < 16; ++i) __stcs(w.y + i, found[i]);
}

const Kernel kProbes[] = {
    {"block_sum", block_sum, {}},
    {"shuffles", shuffles, {}},
    {"votes", votes, {}},
    {"halves", halves, {}},
    {"fresh_shared", fresh_shared, {}},
    {"places", places, {}},
    {"together", together, {}},
    {"start_order", start_order, {}},
    {"atomics", atomics, {}},
    {"arithmetic", arithmetic, {}},
    {"copies", copies, {}},
};

}  // namespace
}  // namespace planted

// `shape` is grid, block, bytes of dynamic shared memory, bytes of it asked for (0: not asked),
// cooperative or not.
extern "C" __attribute__((visibility("default"))) int run_probe(const char* name,
                                                                const unsigned (&shape)[9],
                                                                float* y, int count, char* text,
                                                                size_t size) {
    for (const planted::Kernel& k : planted::kProbes) {
        if (std::strcmp(k.name, name) != 0) continue;
        const auto& s = shape;
        if (s[7] != 0)
            if (cudaError_t e = cudaFuncSetAttribute(
                    k.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(s[7])))
                return e;
        const planted::Shape given = {{s[0], s[1], s[2]}, {s[3], s[4], s[5]}, s[6], s[8] != 0};
        return planted::run(k, given, false, y, count, text, size);
    }
    std::snprintf(text, size, "no such probe");
    return -2;
}
