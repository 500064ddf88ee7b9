// What engine.cpp and runtime.cpp share: the pretended device and the limits of a launch.
#pragma once
#include "emulation.h"

namespace emulation {

struct Device {
    unsigned seed = 0;      // the schedule: 0 in order, 1 reversed, others random
    unsigned resident = 0;  // blocks in flight in a plain launch; 0: as many as fit the device
    int sms = 4, blocks_per_sm = 2;
    bool dry = false;                   // launches are looked at and not run
    size_t launches = 0, switches = 0;  // statistics
};
extern Device device;

constexpr size_t kThreadsPerBlock = 1024, kThreadsPerSm = 2048, kBlocksPerSm = 32;
constexpr size_t kStaticShared = 48 << 10;     // what a block may have unasked
constexpr size_t kSharedPerBlock = 227 << 10;  // what it may have once asked for
constexpr size_t kSharedPerSm = 228 << 10, kReservedShared = 1 << 10;

// How many such blocks an SM of the device holds.
int occupancy(size_t threads, size_t dynamic_bytes);
bool cooperative(const cudaLaunchConfig_t& config);
// What a device would answer to such a launch before it runs anything.
cudaError_t check(const cudaLaunchConfig_t& config, const void* kernel);

}  // namespace emulation
