// Matrix tiles of 16 x 64 bytes: products of pairs of bfloat16, accumulated in float32.  Two bodies with the same bits:
// AMX instructions (TDPBF16PS), and plain C++, with which the kernels on tiles run on any machine, sanitizers included.
//
// Of an element of the result, features 0, 2, 4, ... of a step of 32 are summed by FMA from zero, so are 1, 3, 5, ..., then
// both sums are added to each other and to what was there.  Every denormal input and result is zero, whatever the caller's
// rounding mode (Intel SDM, TDPBF16PS).  So bits differ from those of AVX512-BF16, whose products go into one sum.
#pragma once
#include "simd.h"

namespace t2l {
namespace T2L_ISA_NAMESPACE {

constexpr int kTileSide = 16;      // rows of a tile, and columns of float32 or of pairs of bfloat16
constexpr int kTileFeatures = 32;  // of a step: a row of bfloat16
constexpr int kTileBytes = kTileSide * kCacheLine;

#if T2L_TILES == T2L_TILES_AMX
// The tile registers, numbered 0 to 7, all of one shape.  What other code of this thread has configured is put back at the
// end: libraries keep track of their own configuration only.  No code that may use tiles may run in between.
class Tiles {
 public:
  Tiles() {
    asm volatile("sttilecfg %0" : "=m"(before_));
    Configuration ours{};
    ours.palette = 1;
    for (int i = 0; i < 8; ++i) {
      ours.row_bytes[i] = kCacheLine;
      ours.rows[i] = kTileSide;
    }
    asm volatile("ldtilecfg %0" : : "m"(ours));
  }
  ~Tiles() { asm volatile("ldtilecfg %0" : : "m"(before_)); }  // of none: releases the registers
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int N>
  void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(N));
  }
  // Rows `stride` bytes apart.
  template <int N>
  void load(const void* p, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(N), "r"(p), "r"(stride) : "memory");
  }
  // Of what is not loaded again soon: leaves the nearest cache to the rest.
  template <int N>
  void load_once(const void* p, int64_t stride) {
    asm volatile("tileloaddt1 (%1,%2,1), %%tmm%c0" : : "i"(N), "r"(p), "r"(stride) : "memory");
  }
  template <int N>
  void store(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(N), "r"(p), "r"(stride) : "memory");
  }
  // C[i, j] += sum over pairs k of A[i, k] . B[k, j]
  template <int C, int A, int B>
  void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }

 private:
  struct Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Configuration) == 64, "as LDTILECFG reads it");
  Configuration before_;
};
#else
class Tiles {
 public:
  template <int N>
  void zero() {
    std::memset(data_[N], 0, kTileBytes);
  }
  template <int N>
  void load(const void* p, int64_t stride) {
    for (int i = 0; i < kTileSide; ++i) std::memcpy(data_[N][i], static_cast<const char*>(p) + i * stride, kCacheLine);
  }
  template <int N>
  void load_once(const void* p, int64_t stride) {
    load<N>(p, stride);
  }
  template <int N>
  void store(void* p, int64_t stride) {
    for (int i = 0; i < kTileSide; ++i) std::memcpy(static_cast<char*>(p) + i * stride, data_[N][i], kCacheLine);
  }
  template <int C, int A, int B>
  void dot() {
    float a[kTileSide][kTileFeatures], b[kTileFeatures][kTileSide];
    bool moderate = true;  // every product is a normal number, which float32 holds exactly: then FMA is product and sum
    for (int i = 0; i < kTileSide; ++i)
      for (int k = 0; k < kTileFeatures; ++k) {
        a[i][k] = element(A, i, k);
        b[i * 2 + k % 2][k / 2] = element(B, i, k);
        moderate = moderate && is_moderate(a[i][k]) && is_moderate(b[i * 2 + k % 2][k / 2]);
      }
    for (int i = 0; i < kTileSide; ++i) {
      float sums[2][kTileSide] = {}, total[kTileSide];
      for (int k = 0; k < kTileFeatures; ++k) {
        float* sum = sums[k % 2];
        if (moderate)
          for (int j = 0; j < kTileSide; ++j) sum[j] = flushed(a[i][k] * b[k][j] + sum[j]);
        else
          for (int j = 0; j < kTileSide; ++j) sum[j] = flushed(__builtin_fmaf(a[i][k], b[k][j], sum[j]));
      }
      std::memcpy(total, data_[C][i], kCacheLine);
      for (int j = 0; j < kTileSide; ++j) total[j] = flushed(flushed(total[j]) + flushed(sums[0][j] + sums[1][j]));
      std::memcpy(data_[C][i], total, kCacheLine);
    }
  }

 private:
  static float flushed(float v) { return v > -kSmallest && v < kSmallest ? __builtin_copysignf(0.0f, v) : v; }
  static bool is_moderate(float v) {
    const float size = v < 0 ? -v : v;
    return size == 0 || (size > 1e-18f && size < 1e18f);
  }
  float element(int tile, int row, int column) const {
    bf16 v;
    std::memcpy(&v, data_[tile][row] + 2 * column, sizeof v);
    return flushed(to_float(v));
  }

  static constexpr float kSmallest = 1.17549435e-38f;  // 2^-126, the smallest normal float32
  unsigned char data_[8][kTileSide][kCacheLine];
};
#endif

}  // namespace T2L_ISA_NAMESPACE
}  // namespace t2l
