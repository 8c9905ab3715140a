// Shared memory of the running block: allocations with redzones in between, reset and poisoned for every block.
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>

#include "emulator.h"

#if defined(T2L_EMU_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace t2l::emu {

class SharedArena {
 public:
  void reset(int64_t capacity) {
    allow_access();
    capacity_ = capacity;
    used_ = 0;
    count_ = 0;
    end_ = memory_;
    add_redzone();
  }
  // Allocation `index` of the block: made by the first thread that gets here, returned to the others.
  T2L_EMU_NO_TSAN char* allocate(int index, int64_t bytes) {
    if (index == count_) {
      allocate_next(bytes);
    } else if (allocations_[index].bytes != bytes) {
      fail("takes %lld bytes of shared memory where another thread of the block takes %lld", bytes,
           allocations_[index].bytes);
    }
    return allocations_[index].begin;
  }
  // The allocation that holds these bytes, or -1.
  T2L_EMU_NO_TSAN int find(const char* begin, int64_t bytes) const {
    for (int i = 0; i < count_; ++i)
      if (begin >= allocations_[i].begin && begin + bytes <= allocations_[i].begin + allocations_[i].bytes) return i;
    return -1;
  }
  // The bytes of this block at the place of `mine`, which allocation `index` of block `other` holds; null if this block has
  // not made that allocation.
  T2L_EMU_NO_TSAN char* same_place(int index, const SharedArena& other, const char* mine) const {
    return index < count_ ? allocations_[index].begin + (mine - other.allocations_[index].begin) : nullptr;
  }
  // An overwritten byte of a redzone: the allocation next to it, and the offset from its begin.
  struct Overrun {
    int allocation;
    int64_t offset;
  };
  std::optional<Overrun> find_overrun() {
    allow_access();
    for (int i = 0; count_ && i <= count_; ++i) {
      const int owner = i ? i - 1 : 0;
      const char* until = i < count_ ? allocations_[i].begin : end_;
      for (const char* p = i ? allocations_[owner].begin + allocations_[owner].bytes : memory_; p < until; ++p)
        if (static_cast<unsigned char>(*p) != kCanary) return Overrun{owner, p - allocations_[owner].begin};
    }
    return {};
  }

 private:
  static constexpr unsigned char kPoison = 0xff;  // NaN as float32, bf16 and f16
  static constexpr unsigned char kCanary = 0xb5;
  static constexpr int kMaxAllocations = 64;
  static constexpr int64_t kRedzoneBytes = 256;
  struct Allocation {
    char* begin;
    int64_t bytes;
  };

  // Not memset, which TSan intercepts: the allocating thread's write would race with accesses of the others.
  T2L_EMU_NO_TSAN static void fill(void* begin, unsigned char value, int64_t bytes) {
    asm volatile("rep stosb" : "+D"(begin), "+c"(bytes) : "a"(value) : "memory");
  }
  T2L_EMU_NO_TSAN void add_redzone() {
    const uintptr_t used = static_cast<uintptr_t>(end_ - memory_);
    char* next = memory_ + (used + 15) / 16 * 16 + kRedzoneBytes;
    fill(end_, kCanary, next - end_);
#if defined(T2L_EMU_ASAN)
    __asan_poison_memory_region(end_, static_cast<size_t>(next - end_));
#endif
    end_ = next;
  }
  T2L_EMU_NO_TSAN void allocate_next(int64_t bytes) {
    if (count_ == kMaxAllocations) fail("takes more than %lld allocations of shared memory", kMaxAllocations);
    if (bytes < 0 || bytes > kMaxSharedBytes) fail("takes an allocation of %lld bytes of shared memory", bytes);
    used_ += (bytes + 15) / 16 * 16;
    if (used_ > capacity_) fail("takes %lld bytes of shared memory, launched with %lld", used_, capacity_);
    allocations_[count_] = Allocation{end_, bytes};
    ++count_;
    fill(end_, kPoison, bytes);
    end_ += bytes;
    add_redzone();
  }
  void allow_access() {
#if defined(T2L_EMU_ASAN)
    __asan_unpoison_memory_region(memory_, sizeof(memory_));
#endif
  }

  int64_t capacity_ = 0, used_ = 0;
  int count_ = 0;
  char* end_ = nullptr;
  Allocation allocations_[kMaxAllocations];
  alignas(16) char memory_[kMaxSharedBytes + (kMaxAllocations + 1) * (kRedzoneBytes + 16)];
};

}  // namespace t2l::emu
