// Shared memory of the block that runs: pieces with guarded gaps between them, anew for every block.
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
  void reset(int64_t asked) {
    allow_access();
    asked_ = asked;
    taken_ = 0;
    count_ = 0;
    end_ = memory_;
    add_gap();
  }
  // Piece `index` of the block, which the first thread that asks for it makes.
  T2L_EMU_UNSEEN char* piece(int index, int64_t bytes) {
    if (index == count_) {
      make_piece(bytes);
    } else if (pieces_[index].bytes != bytes) {
      fail("takes %lld bytes of shared memory where another thread of the block takes %lld", bytes, pieces_[index].bytes);
    }
    return pieces_[index].begin;
  }
  T2L_EMU_UNSEEN bool holds(const char* begin, int64_t bytes) const {
    for (int i = 0; i < count_; ++i)
      if (begin >= pieces_[i].begin && begin + bytes <= pieces_[i].begin + pieces_[i].bytes) return true;
    return false;
  }
  // The byte of a gap that was written: its distance from the begin of a piece.
  struct Damage {
    int piece;
    int64_t offset;
  };
  std::optional<Damage> find_damage() {
    allow_access();
    for (int i = 0; count_ && i <= count_; ++i) {
      const int owner = i ? i - 1 : 0;
      const char* until = i < count_ ? pieces_[i].begin : end_;
      for (const char* p = i ? pieces_[owner].begin + pieces_[owner].bytes : memory_; p < until; ++p)
        if (static_cast<unsigned char>(*p) != kCanary) return Damage{owner, p - pieces_[owner].begin};
    }
    return {};
  }

 private:
  static constexpr unsigned char kPoison = 0xff;  // NaN as float32, bf16 and f16
  static constexpr unsigned char kCanary = 0xb5;
  static constexpr int kMaxPieces = 64;
  static constexpr int64_t kGapBytes = 256;
  struct Piece {
    char* begin;
    int64_t bytes;
  };

  // Unlike memset, not looked at: the thread that makes a piece does not write it in the eyes of the others.
  T2L_EMU_UNSEEN static void fill(void* begin, unsigned char value, int64_t bytes) {
    asm volatile("rep stosb" : "+D"(begin), "+c"(bytes) : "a"(value) : "memory");
  }
  T2L_EMU_UNSEEN void add_gap() {
    const uintptr_t used = static_cast<uintptr_t>(end_ - memory_);
    char* next = memory_ + (used + 15) / 16 * 16 + kGapBytes;
    fill(end_, kCanary, next - end_);
#if defined(T2L_EMU_ASAN)
    __asan_poison_memory_region(end_, static_cast<size_t>(next - end_));
#endif
    end_ = next;
  }
  T2L_EMU_UNSEEN void make_piece(int64_t bytes) {
    if (count_ == kMaxPieces) fail("takes more than %lld pieces of shared memory", kMaxPieces);
    if (bytes < 0 || bytes > kMaxSharedBytes) fail("takes a piece of %lld bytes of shared memory", bytes);
    taken_ += (bytes + 15) / 16 * 16;
    if (taken_ > asked_) fail("takes %lld bytes of shared memory, %lld asked for", taken_, asked_);
    pieces_[count_] = Piece{end_, bytes};
    ++count_;
    fill(end_, kPoison, bytes);
    end_ += bytes;
    add_gap();
  }
  void allow_access() {
#if defined(T2L_EMU_ASAN)
    __asan_unpoison_memory_region(memory_, sizeof(memory_));
#endif
  }

  int64_t asked_ = 0, taken_ = 0;
  int count_ = 0;
  char* end_ = nullptr;
  Piece pieces_[kMaxPieces];
  alignas(16) char memory_[kMaxSharedBytes + (kMaxPieces + 1) * (kGapBytes + 16)];
};

}  // namespace t2l::emu
