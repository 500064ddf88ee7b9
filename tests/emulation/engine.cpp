// The scheduler of emulation.h. It is compiled once, without sanitizers, and does everything in one
// OS thread: a fiber runs until it blocks (barrier, warp exchange, atomic, acquiring load), then
// the ready fiber of least key runs. Keys are first in, first out (seed 0), last in, first out (1),
// or random priorities of threads, warps or blocks that change now and then, so that some run far
// ahead of others. A missing barrier shows as a NaN from fresh shared memory, or as a stale or too
// new value.
#include "engine.h"

#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "block.h"
#include "fiber.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {
Device device;

namespace {

Home home;
Thread* now;
std::vector<Thread*> ready;  // a heap by key
std::vector<Thread*> idle;   // kept for ever, stacks included
std::mt19937_64 rng;
Word tick;
void (*body)(void*);
void* body_arguments;
std::string error;
size_t stalled;    // yields since anything changed
size_t exchanges;  // of warps, likewise
// two addresses in TSan: with one, a thread that starts late would be ordered after one that ended
char launch_begin, launch_end;

void changed() {
    stalled = exchanges = 0;
}

// in a fiber

void leave(State state) {
    Thread* t = now;
    t->state = state;
    home.leave(t->fiber, state == State::done);
}

void thread_main() {
    home.arrived();
    acquire(&launch_begin);
    try {
        body(body_arguments);
    } catch (const std::exception& e) {  // no memory for a shared variable
        error = e.what();
    }
    release(&launch_end);
    changed();
    leave(State::done);
}

}  // namespace

void acquire(const void* p) {
    if (__tsan_acquire) __tsan_acquire(const_cast<void*>(p));
}
void release(const void* p) {
    if (__tsan_release) __tsan_release(const_cast<void*>(p));
}
void fence() {
    if (now->atomic) acquire(now->atomic);
    now->fenced = true;
}
void fenced(const void* p) {
    if (now->fenced) release(p);
}
void touched(const void* p) {
    now->atomic = p;
}
void progress() {
    changed();
}
void yield(const char* file, int line) {
    now->file = file, now->line = line;
    ++stalled;
    leave(State::ready);
}
int lane() {
    return now->rank % 32;
}
void* dynamic_shared() {
    return now->block->dynamic.get();
}
void* shared(const void* key, size_t bytes) {
    Untracked here;
    for (auto& [known, memory] : now->block->shared)
        if (known == key) return memory.get();
    return now->block->shared.emplace_back(key, fresh_shared(bytes)).second.get();
}
void enqueue(Copy copy) {
    now->copies.push_back(copy);
}
void copies_end() {
    size_t grouped = 0;
    for (size_t size : now->ended) grouped += size;
    now->ended.push_back(now->copies.size() - grouped);
}
bool due(unsigned running, Copy* copy) {
    auto& ended = now->ended;
    while (ended.size() > running && ended.front() == 0) ended.erase(ended.begin());
    if (ended.size() <= running) return false;
    *copy = now->copies.front();
    now->copies.erase(now->copies.begin());
    return --ended.front(), true;
}
unsigned barrier(bool vote, const char* file, int line) {
    Thread* t = now;
    char* order = &t->block->order[t->block->phase % 2];
    t->file = file, t->line = line, t->vote = vote;
    release(order);
    leave(State::barrier);
    acquire(order);
    return t->block->votes;
}
Word exchange(Exchange kind, unsigned mask, Word value, int source, const char* file, int line) {
    Thread* t = now;
    t->kind = kind, t->mask = mask, t->value = value, t->source = source;
    t->file = file, t->line = line;
    char* order = &t->block->warps[t->rank / 32].order;
    if (kind == Exchange::sync) release(order);  // shuffles and votes order no memory
    if (!(mask >> (t->rank % 32) & 1)) error = "a lane is not in its own mask: " + where(*t);
    leave(State::warp);
    if (kind == Exchange::sync) acquire(order);
    return t->value;
}

// in the scheduler

namespace {

void resume(Thread* t) {
    now = t, threadIdx = t->index, blockIdx = t->block->index;
    ++device.switches;
    home.enter(t->fiber);
    now = nullptr;
}

bool later(const Thread* a, const Thread* b) {
    return a->key > b->key;
}

void wake(Thread* t, bool yielded = false) {
    constexpr Word middle = Word(1) << 63;
    if (device.seed == 0 || (yielded && (device.seed == 1 || stalled > 100)))
        t->key = middle + ++tick;
    else if (device.seed == 1)
        t->key = middle - ++tick;
    else if (yielded || rng() % 64 == 0 || t->key > middle)
        t->key = rng() / 2;
    t->state = State::ready;
    ready.push_back(t);
    std::push_heap(ready.begin(), ready.end(), later);
}

// Completes the exchange of the lanes in `mask` once all that have not returned are waiting.
void check_warp(Block& b, int rank, unsigned mask) {
    Warp& warp = b.warps[rank / 32];
    mask &= warp.alive;
    if (!mask || (warp.waiting & mask) != mask) return;
    Thread** lane = &b.threads[rank / 32 * 32];
    const Thread& first = *lane[__builtin_ctz(mask)];
    Word sent[32], votes = 0;
    for (unsigned rest = mask; rest; rest &= rest - 1) {
        const int i = __builtin_ctz(rest);
        const Thread& t = *lane[i];
        if (t.mask != first.mask || t.kind != first.kind || t.line != first.line) {
            error = "lanes of one mask meet in different warp operations: " + where(first) +
                    " and " + where(t);
            return;
        }
        if (t.kind == Exchange::shuffle && !(mask >> t.source & 1)) {
            error = "a shuffle reads lane " + std::to_string(t.source) +
                    ", which is not in its mask or has returned: " + where(t);
            return;
        }
        sent[i] = t.value;
        votes |= Word(sent[i] != 0) << i;
    }
    warp.waiting &= ~mask;
    for (unsigned rest = mask; rest; rest &= rest - 1) {
        Thread* t = lane[__builtin_ctz(rest)];
        t->value = t->kind == Exchange::shuffle ? sent[t->source] : votes;
        wake(t);
    }
    // a warp that works is progress, one that spins on a vote is not
    if (++exchanges < 1000000) stalled = 0;
}

void check_barrier(Block& b) {
    if (!b.waiting || b.waiting != b.alive) return;
    const Thread& first = *b.threads[0];
    unsigned votes = 0;
    for (const Thread* t : b.threads) {
        if (t->state != State::barrier || t->line != first.line || t->file != first.file) {
            error =
                "a block meets in different barriers, or part of it has returned: " + where(first) +
                " and " + where(*t);
            return;
        }
        votes += t->vote;
    }
    b.votes = votes, b.waiting = 0, ++b.phase;
    changed();
    for (Thread* t : b.threads) wake(t);
}

Thread* fresh_thread() {
    if (idle.empty()) idle.push_back(new Thread);
    Thread* t = idle.back();
    idle.pop_back();
    t->fiber.start_at(thread_main);
    t->file = "its start", t->line = 0, t->atomic = nullptr, t->fenced = false;
    t->copies.clear(), t->ended.clear();
    return t;
}

std::unique_ptr<Block> start_block(size_t i, size_t dynamic_bytes) {
    auto b = std::make_unique<Block>();
    b->index = make_uint3(i % gridDim.x, i / gridDim.x % gridDim.y, i / gridDim.x / gridDim.y);
    b->alive = size_t(blockDim.x) * blockDim.y * blockDim.z;
    b->dynamic = fresh_shared(dynamic_bytes);
    b->warps.resize((b->alive + 31) / 32);
    Word priority = rng();  // of the block; of each thread or each warp with other seeds
    for (size_t k = 0; k < b->alive; ++k) {
        Thread* t = fresh_thread();
        if (device.seed % 3 == 0 || (device.seed % 3 == 1 && k % 32 == 0)) priority = rng();
        t->key = ((priority & ~Word(0xffff)) | (rng() & 0xffff)) / 2;
        t->block = b.get(), t->rank = int(k);
        t->index =
            make_uint3(k % blockDim.x, k / blockDim.x % blockDim.y, k / blockDim.x / blockDim.y);
        b->threads.push_back(t);
        b->warps[k / 32].alive |= 1u << k % 32;
        wake(t);
    }
    return b;
}

// What follows from where `t` stopped; true when its block has ended.
bool stopped(Thread* t) {
    Block& b = *t->block;
    Warp& warp = b.warps[t->rank / 32];
    const unsigned bit = 1u << t->rank % 32;
    if (t->state == State::ready) wake(t, true);
    if (t->state == State::warp) warp.waiting |= bit, check_warp(b, t->rank, t->mask);
    if (t->state == State::barrier) ++b.waiting, check_barrier(b);
    if (t->state != State::done) return false;
    warp.alive &= ~bit;
    if (--b.alive == 0) return true;
    for (unsigned rest = warp.waiting; rest && error.empty(); rest &= rest - 1) {
        const int waiting = t->rank / 32 * 32 + __builtin_ctz(rest);
        if (warp.waiting >> waiting % 32 & 1) check_warp(b, waiting, b.threads[waiting]->mask);
    }
    if (error.empty()) check_barrier(b);
    return false;
}

std::vector<size_t> block_order(size_t blocks) {
    std::vector<size_t> order(blocks);
    std::iota(order.begin(), order.end(), 0);
    if (device.seed == 1) std::reverse(order.begin(), order.end());
    if (device.seed > 1) std::shuffle(order.begin(), order.end(), rng);
    return order;
}

// Throws the error, with the places where the threads of the first blocks stand.
[[noreturn]] void report(const std::vector<std::unique_ptr<Block>>& live) {
    if (error.empty()) error = "deadlock";
    constexpr size_t most = 4;
    for (size_t i = 0; i < live.size(); ++i) {
        const auto& threads = live[i]->threads;
        idle.insert(idle.end(), threads.begin(), threads.end());
        if (i >= most) continue;
        std::map<std::pair<std::string, int>, std::pair<const Thread*, int>> places;
        for (const Thread* t : threads)
            if (t->state != State::done) {
                auto& place = places.try_emplace({t->file, t->line}, t, 0).first->second;
                ++place.second;
            }
        for (const auto& [_, place] : places)
            error += "\n  " + std::to_string(place.second) +
                     " waiting, the first: " + where(*place.first);
    }
    if (live.size() > most)
        error += "\n  and " + std::to_string(live.size() - most) + " more blocks";
    throw std::runtime_error("emulated launch: " + error);
}

void run(const cudaLaunchConfig_t& config, size_t limit) {
    gridDim = config.gridDim, blockDim = config.blockDim;
    error.clear(), ready.clear(), changed(), ++device.launches;
    rng.seed(device.seed), tick = 0;
    const auto order = block_order(size_t(gridDim.x) * gridDim.y * gridDim.z);
    home.remember();
    release(&launch_begin);

    Untracked here;
    std::vector<std::unique_ptr<Block>> live;
    for (size_t next = 0; error.empty();) {
        while (live.size() < limit && next < order.size())
            live.push_back(start_block(order[next++], config.dynamicSmemBytes));
        if (ready.empty()) break;
        if (stalled > 1000 + 100 * ready.size()) {
            error = "every thread spins or waits";
            break;
        }
        std::pop_heap(ready.begin(), ready.end(), later);
        Thread* t = ready.back();
        ready.pop_back();
        resume(t);
        if (!error.empty() || !stopped(t)) continue;
        Block* b = t->block;
        idle.insert(idle.end(), b->threads.rbegin(), b->threads.rend());
        live.erase(std::find_if(live.begin(), live.end(), [&](auto& p) { return p.get() == b; }));
    }
    acquire(&launch_end);
    if (!live.empty() || !error.empty()) report(live);
}

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*call)(void*),
                   void* arguments) {
    static std::mutex one_at_a_time;
    std::lock_guard<std::mutex> lock(one_at_a_time);
    if (cudaError_t refused = check(config, kernel)) return refused;
    if (device.dry) return cudaSuccess;
    const dim3 g = config.gridDim, b = config.blockDim;
    const size_t fit =
        size_t(device.sms) * occupancy(size_t(b.x) * b.y * b.z, config.dynamicSmemBytes);
    const size_t limit = cooperative(config) ? size_t(g.x) * g.y * g.z
                         : device.resident   ? device.resident
                                             : fit;
    body = call, body_arguments = arguments;
    run(config, limit);
    return cudaSuccess;
}

}  // namespace emulation
