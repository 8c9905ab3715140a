// Tensor-core MMAs of the emulator.
#include <cmath>

#include "emulator.h"

namespace t2l::emu {

T2L_EMU_NO_TSAN Operands gather_tf32(const Slot* slots) {
  const auto number = [](uint32_t word) { return bit_cast<float>(word & ~0x1fffu); };
  Operands out{};
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) out.a[g + r % 2 * 8][t + r / 2 * 4] = number(slots[lane].word[r]);
    for (int r = 0; r < 2; ++r) out.b[t + r * 4][g] = number(slots[lane].word[4 + r]);
  }
  return out;
}

// Rounds toward zero; overflow gives infinity.
T2L_EMU_NO_TSAN inline float truncate_to_float(double value) {
  const float nearest = static_cast<float>(value);
  const bool beyond = std::fabs(static_cast<double>(nearest)) > std::fabs(value) && std::isfinite(nearest);
  return bit_cast<float>(bit_cast<uint32_t>(nearest) - (beyond ? 1 : 0));
}

T2L_EMU_NO_TSAN inline double power_of_two(int exponent) {
  return bit_cast<double>(static_cast<uint64_t>(exponent + 1023) << 52);
}

// The sum of addends whose largest magnitude is `largest` and whose plain sum is `plain`, as accumulate() says.  Most of the
// time of the emulator's tests is spent here, so there are no calls of the C library.
template <int kCount>
T2L_EMU_NO_TSAN inline float sum_aligned(const double (&addends)[kCount][4], int r, double largest, double plain) {
  constexpr int kKeptBits = 24;  // of the largest addend behind its first
  if (largest == 0 || !std::isfinite(plain)) return static_cast<float>(plain);
  // Of floats and of products of two, no exponent is near the ends of double's range.
  const int exponent = static_cast<int>(bit_cast<uint64_t>(largest) >> 52) - 1023 - kKeptBits;
  const double per_unit = power_of_two(-exponent);
  int32_t units = 0;                                                                         // at most 17 times 2^25
  for (int i = 0; i < kCount; ++i) units += static_cast<int32_t>(addends[i][r] * per_unit);  // cut toward zero
  return truncate_to_float(units * power_of_two(exponent));
}

template <int kDepth>
T2L_EMU_NO_TSAN inline void accumulate_depth(float (&d)[4], const Operands& operands) {
  const int lane = thread_index() % kLanes, g = lane / 4, t = lane % 4;
  double addends[kDepth + 1][4], largest[4] = {}, plain[4] = {};
  for (int k = 0; k < kDepth; ++k)
    for (int r = 0; r < 4; ++r) {
      const float a = operands.a[g + r / 2 * 8][k], b = operands.b[k][2 * t + r % 2];
      addends[k][r] = static_cast<double>(a) * static_cast<double>(b);
    }
  for (int r = 0; r < 4; ++r) addends[kDepth][r] = d[r];
  for (int i = 0; i <= kDepth; ++i)
    for (int r = 0; r < 4; ++r) {
      const double size = std::fabs(addends[i][r]);
      largest[r] = size > largest[r] ? size : largest[r];
      plain[r] += addends[i][r];
    }
  for (int r = 0; r < 4; ++r) d[r] = sum_aligned(addends, r, largest[r], plain[r]);
  count_flops(int64_t{2} * 4 * kDepth);
}

T2L_EMU_NO_TSAN void accumulate(float (&d)[4], const Operands& operands, int depth) {
  depth == 8 ? accumulate_depth<8>(d, operands) : accumulate_depth<16>(d, operands);
}

T2L_EMU_NO_TSAN void mma_16x8x8(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  const Exchange exchange = exchange_slots(fragments(a, b), 24);
  if (exchange.last) *exchange.operands = gather_tf32(exchange.slots);
  accumulate(d, *exchange.operands, 8);
}

}  // namespace t2l::emu
