// Tensor-core MMAs of the emulator.
#include <cmath>

#include "emulator.h"

namespace t2l::emu {

T2L_EMU_NO_TSAN Tile multiply(const Operands& operands, int depth) {
  Tile out{};
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < depth; ++k)
      for (int column = 0; column < 8; ++column)
        out.value[row][column] += static_cast<double>(operands.a[row][k]) * static_cast<double>(operands.b[k][column]);
  count_flops(int64_t{2} * 16 * 8 * depth);
  return out;
}

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

T2L_EMU_NO_TSAN void accumulate_tile(float (&d)[4], const Tile& tile) {
  const int lane = thread_index() % kLanes, g = lane / 4, t = lane % 4;
  for (int r = 0; r < 4; ++r) d[r] = truncate_to_float(d[r] + tile.value[g + r / 2 * 8][2 * t + r % 2]);
}

T2L_EMU_NO_TSAN void mma_16x8x8(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  const Exchange exchange = exchange_slots(fragments(a, b), 24);
  if (exchange.last) *exchange.tile = multiply(gather_tf32(exchange.slots), 8);
  accumulate_tile(d, *exchange.tile);
}

}  // namespace t2l::emu
