// Pseudo-random orders of schedules.
#pragma once
#include <cstdint>

#include "emulator.h"

namespace t2l::emu {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  template <class T>
  T2L_EMU_NO_TSAN void shuffle(T* values, int64_t count) {
    for (int64_t i = count - 1; i > 0; --i) {
      const int64_t j = static_cast<int64_t>(next() % static_cast<uint64_t>(i + 1));
      const T value = values[i];
      values[i] = values[j];
      values[j] = value;
    }
  }

 private:
  T2L_EMU_NO_TSAN uint64_t next() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  uint64_t state_;
};

}  // namespace t2l::emu
