// The runtime API as one device would answer it, and the functions through which the tests choose
// that device and the schedule (ctypes: csrc/bindings.cpp knows nothing of them).
#include <cstdio>
#include <map>
#include <stdexcept>
#include <string>

#include "engine.h"

namespace emulation {
namespace {

std::map<const void*, size_t> allowed_dynamic;  // by kernel, above kStaticShared only if asked for
cudaError_t last = cudaSuccess;

cudaError_t noted(cudaError_t e) {
    if (e != cudaSuccess) last = e;
    return e;
}

struct Named {
    cudaError_t code;
    const char *name, *text;
};
constexpr Named kErrors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration",
     "invalid configuration argument"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
    {cudaErrorCooperativeLaunchTooLarge, "cudaErrorCooperativeLaunchTooLarge",
     "too many blocks in cooperative launch"},
};

const Named* named(cudaError_t code) {
    for (const Named& e : kErrors)
        if (e.code == code) return &e;
    return nullptr;
}

}  // namespace

int occupancy(size_t threads, size_t dynamic_bytes) {
    if (threads == 0 || threads > kThreadsPerBlock || dynamic_bytes > kSharedPerBlock) return 0;
    return int(std::min({size_t(device.blocks_per_sm), kThreadsPerSm / threads,
                         kSharedPerSm / (dynamic_bytes + kReservedShared)}));
}

bool cooperative(const cudaLaunchConfig_t& config) {
    for (unsigned i = 0; i < config.numAttrs; ++i)
        if (config.attrs[i].id == cudaLaunchAttributeCooperative)
            return config.attrs[i].val.cooperative != 0;
    return false;
}

cudaError_t check(const cudaLaunchConfig_t& config, const void* kernel) {
    const dim3 g = config.gridDim, b = config.blockDim;
    const size_t threads = size_t(b.x) * b.y * b.z, blocks = size_t(g.x) * g.y * g.z;
    for (unsigned i = 0; i < config.numAttrs; ++i)
        if (config.attrs[i].id == cudaLaunchAttributeClusterDimension)
            throw std::runtime_error("emulated launch: clusters are not modelled");
    if (blocks == 0 || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535)
        return noted(cudaErrorInvalidConfiguration);
    if (threads == 0 || threads > kThreadsPerBlock || b.z > 64)
        return noted(cudaErrorInvalidConfiguration);
    const auto asked = allowed_dynamic.find(kernel);
    if (config.dynamicSmemBytes > (asked == allowed_dynamic.end() ? kStaticShared : asked->second))
        return noted(cudaErrorInvalidValue);
    const size_t fit = size_t(device.sms) * occupancy(threads, config.dynamicSmemBytes);
    if (cooperative(config) && blocks > fit) return noted(cudaErrorCooperativeLaunchTooLarge);
    return cudaSuccess;
}

}  // namespace emulation

using emulation::device;
using emulation::noted;
extern "C" {

__attribute__((visibility("default"))) void emulation_configure(unsigned seed, unsigned resident,
                                                                int sms, int blocks_per_sm,
                                                                bool dry) {
    device.seed = seed, device.resident = resident;
    device.sms = sms, device.blocks_per_sm = blocks_per_sm, device.dry = dry;
}
__attribute__((visibility("default"))) size_t emulation_launches() {
    return device.launches;
}
__attribute__((visibility("default"))) size_t emulation_switches() {
    return device.switches;
}

__attribute__((visibility("default"))) const char* emulation_error_name(int code) {
    return cudaGetErrorName(cudaError_t(code));
}

const char* cudaGetErrorName(cudaError_t e) {
    const auto* known = emulation::named(e);
    return known ? known->name : "an error that the emulation never returns";
}
const char* cudaGetErrorString(cudaError_t e) {
    const auto* known = emulation::named(e);
    return known ? known->text : "an error that the emulation never returns";
}
cudaError_t cudaPeekAtLastError() {
    return emulation::last;
}
cudaError_t cudaGetLastError() {
    const cudaError_t e = emulation::last;
    emulation::last = cudaSuccess;
    return e;
}

cudaError_t cudaGetDeviceCount(int* n) {
    return *n = 1, cudaSuccess;
}
cudaError_t cudaGetDevice(int* d) {
    return *d = 0, cudaSuccess;
}
cudaError_t cudaSetDevice(int d) {
    return noted(d == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
cudaError_t cudaDriverGetVersion(int* v) {
    return *v = CUDART_VERSION, cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* v) {
    return *v = CUDART_VERSION, cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int d) {
    if (d != 0) return noted(cudaErrorInvalidDevice);
    const std::map<cudaDeviceAttr, int> attributes = {
        {cudaDevAttrMultiProcessorCount, device.sms},
        {cudaDevAttrWarpSize, warpSize},
        {cudaDevAttrMaxThreadsPerBlock, int(emulation::kThreadsPerBlock)},
        {cudaDevAttrMaxThreadsPerMultiProcessor, int(emulation::kThreadsPerSm)},
        {cudaDevAttrMaxBlocksPerMultiprocessor, int(emulation::kBlocksPerSm)},
        {cudaDevAttrMaxRegistersPerBlock, 64 << 10},
        {cudaDevAttrMaxRegistersPerMultiprocessor, 64 << 10},
        {cudaDevAttrMaxSharedMemoryPerBlock, int(emulation::kStaticShared)},
        {cudaDevAttrMaxSharedMemoryPerBlockOptin, int(emulation::kSharedPerBlock)},
        {cudaDevAttrMaxSharedMemoryPerMultiprocessor, int(emulation::kSharedPerSm)},
        {cudaDevAttrReservedSharedMemoryPerBlock, int(emulation::kReservedShared)},
        {cudaDevAttrL2CacheSize, 50 << 20},
        {cudaDevAttrCooperativeLaunch, 1},
        {cudaDevAttrComputeCapabilityMajor, 9},
        {cudaDevAttrComputeCapabilityMinor, 0},
    };
    const auto found = attributes.find(attribute);
    if (found == attributes.end()) return noted(cudaErrorInvalidValue);
    return *value = found->second, cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads,
                                                          size_t dynamic_bytes) {
    return *blocks = emulation::occupancy(size_t(threads), dynamic_bytes), cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    return *attributes = {}, cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
        size_t(value) > emulation::kSharedPerBlock)
        return noted(cudaErrorInvalidValue);
    emulation::allowed_dynamic[kernel] = std::max(size_t(value), emulation::kStaticShared);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
    return std::memset(p, value, bytes), cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
    return std::memcpy(to, from, bytes), cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
    return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
// It knows neither the kernel's type nor its arguments' sizes: nothing could be run.
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) {
    throw std::runtime_error("emulated launch: use the template cudaLaunchKernelEx, not the C one");
}
}
