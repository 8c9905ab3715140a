// Fibers: stacks that one OS thread changes between, known to ASan and TSan.  The emulator's threads are made of them.
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

// What is kept of a stack while another one runs.
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
static_assert(offsetof(Context, sp) == 0, "change_stack reads it there");

// Puts the stack of `from` away and goes on with that of `to`.  Where that goes on, `from` is the result, or the argument of
// a function that begins.  A jump and not a return: the processor predicts returns from calls, which do not match here.
__attribute__((naked, noinline)) T2L_EMU_UNSEEN inline Context* change_stack(Context* /*from*/, Context* /*to*/) {
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

// First thing after a change to `me`.
T2L_EMU_UNSEEN inline void arrive([[maybe_unused]] Context* me, [[maybe_unused]] Context* from) {
#if defined(T2L_EMU_ASAN)
  __sanitizer_finish_switch_fiber(me->fake_stack, &from->bottom, &from->bytes);
#endif
}

T2L_EMU_UNSEEN inline void change(Context* me, Context* to) {
#if defined(T2L_EMU_ASAN)
  __sanitizer_start_switch_fiber(&me->fake_stack, to->bottom, to->bytes);
#elif defined(T2L_EMU_TSAN)
  __tsan_switch_to_fiber(to->fiber, __tsan_switch_to_fiber_no_sync);
#endif
  arrive(me, change_stack(me, to));
}

// Under TSan: what came before any release of a token comes before what follows an acquire.
T2L_EMU_UNSEEN inline void release([[maybe_unused]] void* token) {
#if defined(T2L_EMU_TSAN)
  __tsan_release(token);
#endif
}
T2L_EMU_UNSEEN inline void acquire([[maybe_unused]] void* token) {
#if defined(T2L_EMU_TSAN)
  __tsan_acquire(token);
#endif
}

// The context of the stack that runs now, before any change from it.
inline Context this_stack() {
  Context context;
#if defined(T2L_EMU_TSAN)
  context.fiber = __tsan_get_current_fiber();
#endif
  return context;
}

class Fiber {
 public:
  using Entry = void (*)(Context* from);

  // Tops of stacks whose `index` differs lie in different sets of the first-level cache.
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

  // From another stack: drops what it was at; the next change to it calls the entry again.
  void restart() {
    end();
    begin();
  }
  // As if the fiber itself had released the token.
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
    // From the top: a return address for an entry that never returns, the entry, six registers.
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
