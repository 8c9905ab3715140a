// Tensor-core MMAs of the emulator.  Most of the time of its tests is spent here: a row of results at a time, in loops over
// its eight columns that compilers turn into vectors, and no calls of the C library.
#include <cmath>

#include "emulator.h"

namespace t2l::emu {
namespace {

constexpr int kColumns = 8;

T2L_EMU_NO_TSAN inline void gather_tf32(const Slot* slots, Operands& out) {
  const auto number = [](uint32_t word) { return bit_cast<float>(word & ~0x1fffu); };
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) out.a[g + r % 2 * 8][t + r / 2 * 4] = number(slots[lane].word[r]);
    for (int r = 0; r < 2; ++r) out.b[t + r * 4][g] = number(slots[lane].word[4 + r]);
  }
}

// Rounds toward zero; overflow gives infinity.
T2L_EMU_NO_TSAN inline float truncate_to_float(double value) {
  const float nearest = static_cast<float>(value);
  const bool beyond = std::fabs(static_cast<double>(nearest)) > std::fabs(value) && std::isfinite(nearest);
  return bit_cast<float>(bit_cast<uint32_t>(nearest) - (beyond ? 1 : 0));
}

// d += a b of one row; see multiply().
template <int kDepth>
T2L_EMU_NO_TSAN inline void multiply_row(const float* a, const float (*b)[kColumns], float* d) {
  constexpr uint64_t kKeptBits = 24, kBias = 1023;  // kept: of the largest addend behind its first
  double addends[kDepth + 1][kColumns], largest[kColumns], plain[kColumns], unit[kColumns], per_unit[kColumns];
  for (int c = 0; c < kColumns; ++c) {
    addends[kDepth][c] = d[c];
    largest[c] = std::fabs(addends[kDepth][c]);
    plain[c] = 0.0 + addends[kDepth][c];  // of zeros alone: +0
  }
  for (int k = 0; k < kDepth; ++k)
    for (int c = 0; c < kColumns; ++c) {
      const double addend = static_cast<double>(a[k]) * static_cast<double>(b[k][c]), size = std::fabs(addend);
      addends[k][c] = addend;
      largest[c] = size > largest[c] ? size : largest[c];
      plain[c] += addend;
    }
  // A sum of zeros, or one that is no number, is the plain one.
  bool is_plain[kColumns], some_plain = false;
  for (int c = 0; c < kColumns; ++c) {
    is_plain[c] = largest[c] == 0 || !std::isfinite(plain[c]);
    some_plain |= is_plain[c];
    // Powers of two.  Of floats and of products of two, no exponent is near the ends of double's range.
    const uint64_t exponent = bit_cast<uint64_t>(largest[c]) >> 52;
    unit[c] = bit_cast<double>((exponent - kKeptBits) << 52);
    per_unit[c] = bit_cast<double>((2 * kBias + kKeptBits - exponent) << 52);
  }
  for (int c = 0; some_plain && c < kColumns; ++c)
    for (int k = 0; is_plain[c] && k <= kDepth; ++k) addends[k][c] = 0;
  int32_t units[kColumns] = {};  // 17 of at most 2^25 each, cut toward zero
  for (int k = 0; k <= kDepth; ++k)
    for (int c = 0; c < kColumns; ++c) units[c] += static_cast<int32_t>(addends[k][c] * per_unit[c]);
  for (int c = 0; c < kColumns; ++c)
    d[c] = is_plain[c] ? static_cast<float>(plain[c]) : truncate_to_float(units[c] * unit[c]);
}

}  // namespace

T2L_EMU_NO_TSAN void multiply(const Slot* slots, int depth, Operands& operands) {
  for (int lane = 0; lane < kLanes; ++lane)
    for (int r = 0; r < 4; ++r)
      operands.d[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2] = bit_cast<float>(slots[lane].word[6 + r]);
  for (int row = 0; row < 16; ++row)
    depth == 8 ? multiply_row<8>(operands.a[row], operands.b, operands.d[row])
               : multiply_row<16>(operands.a[row], operands.b, operands.d[row]);
}

T2L_EMU_NO_TSAN void take_product(const Operands& operands, int depth, float (&d)[4]) {
  const int lane = thread_index() % kLanes;
  for (int r = 0; r < 4; ++r) d[r] = operands.d[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2];
  count_flops(int64_t{2} * 4 * depth);
}

T2L_EMU_NO_TSAN void mma_16x8x8(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  const Exchange exchange = exchange_slots(fragments(a, b, d), kFragmentBytes);
  if (exchange.last) {
    gather_tf32(exchange.slots, *exchange.operands);
    multiply(exchange.slots, 8, *exchange.operands);
  }
  take_product(*exchange.operands, 8, d);
}

}  // namespace t2l::emu
