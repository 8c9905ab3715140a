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

// The sum of `addends`, as accumulate() says.
T2L_EMU_NO_TSAN inline float sum_aligned(const double* addends, int count) {
  constexpr int kKeptBits = 24;  // of the largest addend behind its first
  double largest = 0, plain = 0;
  for (int i = 0; i < count; ++i) {
    largest = std::fmax(largest, std::fabs(addends[i]));
    plain += addends[i];
  }
  if (largest == 0 || !std::isfinite(plain)) return static_cast<float>(plain);
  const double unit = std::ldexp(1.0, std::ilogb(largest) - kKeptBits), per_unit = 1 / unit;
  double units = 0;  // whole ones, fewer than 2^53: exact
  for (int i = 0; i < count; ++i) units += std::trunc(addends[i] * per_unit);
  return truncate_to_float(units * unit);
}

T2L_EMU_NO_TSAN void accumulate(float (&d)[4], const Operands& operands, int depth) {
  const int lane = thread_index() % kLanes, g = lane / 4, t = lane % 4;
  for (int r = 0; r < 4; ++r) {
    const int row = g + r / 2 * 8, column = 2 * t + r % 2;
    double addends[17];
    for (int k = 0; k < depth; ++k)
      addends[k] = static_cast<double>(operands.a[row][k]) * static_cast<double>(operands.b[k][column]);
    addends[depth] = d[r];
    d[r] = sum_aligned(addends, depth + 1);
  }
  count_flops(int64_t{2} * 4 * depth);
}

T2L_EMU_NO_TSAN void mma_16x8x8(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  const Exchange exchange = exchange_slots(fragments(a, b), 24);
  if (exchange.last) *exchange.operands = gather_tf32(exchange.slots);
  accumulate(d, *exchange.operands, 8);
}

}  // namespace t2l::emu
