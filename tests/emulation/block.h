// What the scheduler knows of a block: its threads, where each stands, its warps, and its shared
// memory. Every shared variable is a heap block of its exact size, whose bounds ASan knows.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "emulation.h"
#include "fiber.h"

namespace emulation {

enum class State { ready, barrier, warp, done };
struct Block;

struct Thread {
    Fiber fiber;
    Block* block;
    uint3 index;
    int rank;  // in the block
    State state;
    const char* file;  // where it waits
    int line;
    Exchange kind;
    unsigned mask;
    int source;
    Word value;  // sent, then received
    bool vote;
    const void* atomic;         // the last one touched
    bool fenced;                // a fence since then
    Word key;                   // the least runs first
    std::vector<Copy> copies;   // to shared memory, not performed yet
    std::vector<size_t> ended;  // how many of them each ended group has
};

struct Free {
    void operator()(void* p) const { std::free(p); }
};
using Memory = std::unique_ptr<void, Free>;

struct Warp {
    unsigned alive = 0, waiting = 0;  // lanes
    char order;                       // an address that stands for __syncwarp in TSan
};

struct Block {
    uint3 index;
    std::vector<Thread*> threads;
    std::vector<Warp> warps;
    size_t alive, waiting = 0;
    unsigned votes = 0;  // of the last barrier
    unsigned phase = 0;
    char order[2];  // addresses that stand for the barrier in TSan
    std::vector<std::pair<const void*, Memory>> shared;
    Memory dynamic;
};

inline Memory fresh_shared(size_t bytes) {
    void* p;
    if (posix_memalign(&p, 128, bytes)) throw std::bad_alloc();
    std::memset(p, 0xff, bytes);  // NaN in every type
    return Memory(p);
}

inline std::string where(const Thread& t) {
    char text[400];
    const uint3 b = t.block->index, i = t.index;
    std::snprintf(text, sizeof text, "block (%u,%u,%u) thread (%u,%u,%u) %s %s:%d", b.x, b.y, b.z,
                  i.x, i.y, i.z, t.state == State::done ? "returned, last at" : "at", t.file,
                  t.line);
    return text;
}

}  // namespace emulation
