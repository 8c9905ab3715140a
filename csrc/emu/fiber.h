// Fibers (user-mode stacks with cooperative switches), registered with ASan and TSan.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#include "emulator.h"

#if defined(T2L_EMU_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#elif defined(T2L_EMU_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

namespace t2l::emu {

// Saved state of a suspended stack.
struct Context {
  void* sp = nullptr;
#if defined(T2L_EMU_ASAN)
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* fake_stack = nullptr;
#elif defined(T2L_EMU_TSAN)
  void* fiber = nullptr;
#endif
};
static_assert(offsetof(Context, sp) == 0, "switch_stack reads it there");

// Saves the current stack in `from` and resumes `to`, where `from` is the return value, or the argument of an entry
// function. Jumps instead of returning, which would mispredict: calls and returns do not pair up here.
__attribute__((naked, noinline)) T2L_EMU_NO_TSAN inline Context* switch_stack(Context* /*from*/, Context* /*to*/) {
  asm("pushq %rbp\n\t"
      "pushq %rbx\n\t"
      "pushq %r12\n\t"
      "pushq %r13\n\t"
      "pushq %r14\n\t"
      "pushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq (%rsi), %rsp\n\t"
      "popq %r15\n\t"
      "popq %r14\n\t"
      "popq %r13\n\t"
      "popq %r12\n\t"
      "popq %rbx\n\t"
      "popq %rbp\n\t"
      "popq %rcx\n\t"
      "movq %rdi, %rax\n\t"
      "jmp *%rcx");
}

// Must be called first after a switch to `me`.
T2L_EMU_NO_TSAN inline void finish_switch([[maybe_unused]] Context* me, [[maybe_unused]] Context* from) {
#if defined(T2L_EMU_ASAN)
  __sanitizer_finish_switch_fiber(me->fake_stack, &from->bottom, &from->bytes);
#endif
}

T2L_EMU_NO_TSAN inline void switch_to(Context* me, Context* to) {
#if defined(T2L_EMU_ASAN)
  __sanitizer_start_switch_fiber(&me->fake_stack, to->bottom, to->bytes);
#elif defined(T2L_EMU_TSAN)
  __tsan_switch_to_fiber(to->fiber, __tsan_switch_to_fiber_no_sync);
#endif
  finish_switch(me, switch_stack(me, to));
}

// TSan happens-before: release of a token before acquire.
T2L_EMU_NO_TSAN inline void release([[maybe_unused]] void* token) {
#if defined(T2L_EMU_TSAN)
  __tsan_release(token);
#endif
}
T2L_EMU_NO_TSAN inline void acquire([[maybe_unused]] void* token) {
#if defined(T2L_EMU_TSAN)
  __tsan_acquire(token);
#endif
}

// Context of the running stack, before the first switch from it.
inline Context current_context() {
  Context context;
#if defined(T2L_EMU_TSAN)
  context.fiber = __tsan_get_current_fiber();
#endif
  return context;
}

class Fiber {
 public:
  using Entry = void (*)(Context* from);

  // `index` staggers the tops of stacks over the sets of L1.
  Fiber(Entry entry, int index) : entry_(entry), top_offset_(index % 16 * 256) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stack_ = static_cast<char*>(memory);
    mprotect(stack_, kGuardBytes, PROT_NONE);
    begin();
  }
  ~Fiber() {
    end();
    munmap(stack_, kStackBytes);
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Called from another stack: the next switch to this fiber calls the entry again.
  void restart() {
    end();
    begin();
  }
  // Releases the token on behalf of the fiber.
  void release_from_outside([[maybe_unused]] void* token) {
#if defined(T2L_EMU_TSAN)
    void* me = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(context.fiber, __tsan_switch_to_fiber_no_sync);
    release(token);
    __tsan_switch_to_fiber(me, __tsan_switch_to_fiber_no_sync);
#endif
  }

  Context context;

 private:
#if defined(T2L_EMU_ASAN) || defined(T2L_EMU_TSAN)
  static constexpr size_t kStackBytes = 512 * 1024;
#else
  static constexpr size_t kStackBytes = 128 * 1024;
#endif
  static constexpr size_t kGuardBytes = 4096;

  void begin() {
    context = Context{};
    // From the top: a null return address (entries never return), the entry, six saved registers.
    constexpr int kWords = 8, kEntry = 6;
    uintptr_t* words = reinterpret_cast<uintptr_t*>(stack_ + kStackBytes - top_offset_) - kWords;
    for (int i = 0; i < kWords; ++i) words[i] = 0;
    words[kEntry] = reinterpret_cast<uintptr_t>(entry_);
    context.sp = words;
#if defined(T2L_EMU_ASAN)
    context.bottom = stack_ + kGuardBytes;
    context.bytes = kStackBytes - kGuardBytes;
#elif defined(T2L_EMU_TSAN)
    context.fiber = __tsan_create_fiber(0);
#endif
  }
  void end() {
#if defined(T2L_EMU_ASAN)
    __asan_unpoison_memory_region(stack_, kStackBytes);
#elif defined(T2L_EMU_TSAN)
    __tsan_destroy_fiber(context.fiber);
#endif
  }

  Entry entry_;
  size_t top_offset_;
  char* stack_ = nullptr;
};

}  // namespace t2l::emu
