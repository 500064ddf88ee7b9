// A fiber: a stack and where it stopped. The switch is a few instructions on x86-64, ucontext (nine
// times slower) elsewhere. ASan and TSan are told of switches where they are loaded.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <new>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define EMULATION_WEAK extern "C" __attribute__((weak))
EMULATION_WEAK void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
EMULATION_WEAK void __sanitizer_finish_switch_fiber(void* save, const void** bottom, size_t* size);
EMULATION_WEAK void __asan_unpoison_memory_region(const volatile void* p, size_t size);
EMULATION_WEAK void* __tsan_get_current_fiber();
EMULATION_WEAK void* __tsan_create_fiber(unsigned flags);
EMULATION_WEAK void __tsan_destroy_fiber(void* fiber);
EMULATION_WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
EMULATION_WEAK void __tsan_acquire(void* p);
EMULATION_WEAK void __tsan_release(void* p);
EMULATION_WEAK void AnnotateIgnoreWritesBegin(const char* file, int line);
EMULATION_WEAK void AnnotateIgnoreWritesEnd(const char* file, int line);

namespace emulation {

#if defined(__x86_64__)
struct Context {
    void* stack_pointer;
};
__attribute__((naked, noinline)) inline void swap_stack(void** /*save*/, void* /*load*/) {
    asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
        "movq %rsp, (%rdi); movq %rsi, %rsp\n"
        "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}
inline void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + size) - 8;  // six registers, entry, no caller
    std::fill(top, top + 8, nullptr);
    top[6] = reinterpret_cast<void*>(entry);
    context.stack_pointer = top;
}
inline void swap(Context& from, Context& to) {
    swap_stack(&from.stack_pointer, to.stack_pointer);
}
#else
using Context = ucontext_t;
inline void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack, context.uc_stack.ss_size = size;
    makecontext(&context, entry, 0);
}
inline void swap(Context& from, Context& to) {
    swapcontext(&from, &to);
}
#endif

struct Fiber {
    static constexpr size_t kStack = 256 << 10, kGuard = 4 << 10;  // the pages come when touched

    Fiber() {
        void* p = mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED || mprotect(p, kGuard, PROT_NONE)) throw std::bad_alloc();
        stack = static_cast<char*>(p) + kGuard;
    }
    Fiber(const Fiber&) = delete;  // lives as long as the process: its stack is used again

    // Begins anew at `entry`, also where it stopped half way.
    void start_at(void (*entry)()) {
        if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(stack, kStack);
        if (unfinished && tsan) __tsan_destroy_fiber(tsan), tsan = nullptr;
        if (!tsan && __tsan_create_fiber) tsan = __tsan_create_fiber(0);
        unfinished = true;
        prepare(context, stack, kStack, entry);
    }

    Context context;
    char* stack;
    void* tsan = nullptr;
    void* asan = nullptr;
    bool unfinished = false;
};

// The stack of the thread that launched, to which every fiber returns.
struct Home {
    void remember() {
        if (__tsan_get_current_fiber) tsan = __tsan_get_current_fiber();
    }
    void enter(Fiber& fiber) {
        if (__sanitizer_start_switch_fiber)
            __sanitizer_start_switch_fiber(&asan, fiber.stack, Fiber::kStack);
        if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(fiber.tsan, 1);
        swap(context, fiber.context);
        if (__sanitizer_finish_switch_fiber)
            __sanitizer_finish_switch_fiber(asan, nullptr, nullptr);
    }
    void arrived() {  // the first thing that a fiber does
        if (__sanitizer_finish_switch_fiber)
            __sanitizer_finish_switch_fiber(nullptr, &stack, &size);
    }
    void leave(Fiber& fiber, bool finished) {
        if (__sanitizer_start_switch_fiber)
            __sanitizer_start_switch_fiber(finished ? nullptr : &fiber.asan, stack, size);
        if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(tsan, 1);
        fiber.unfinished = !finished;
        swap(fiber.context, context);
        if (__sanitizer_finish_switch_fiber)
            __sanitizer_finish_switch_fiber(fiber.asan, nullptr, nullptr);
    }

    Context context;
    const void* stack = nullptr;
    size_t size = 0;
    void *asan = nullptr, *tsan = nullptr;
};

// TSan takes no note of what the engine allocates and frees meanwhile.
struct Untracked {
    Untracked() {
        if (AnnotateIgnoreWritesBegin) AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    }
    ~Untracked() {
        if (AnnotateIgnoreWritesEnd) AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    }
};

}  // namespace emulation
