// x w^T for few rows: the shrink of LoRA, and products too small for the packed panels of panel.h.
#pragma once
#include "simd.h"

namespace t2l {
namespace T2L_ISA_NAMESPACE {

constexpr int kDotRows = 16;  // rows of x of one call, at most
constexpr int kDotCols = 8;   // rows of w per block of accumulators
// Register tile: kTileRows * kTileCols accumulators.  Row strides of many models are multiples of 4 KiB, so all rows map to
// the same L1 sets: with AVX-512 a tile touches 10 rows, below the 12 ways of L1 (Zen 5, Ice Lake and later).
constexpr int kTileRows = 2;
constexpr int kTileCols = kLanes == 16 ? 8 : 4;
constexpr bool kPrefetchesRows = T2L_ISA_LEVEL != T2L_AVX2;  // there loads bind, and the hardware sees two rows by itself
constexpr int64_t kDotBytes = 4096;  // k-block: bytes of every row, so that the operands of a tile stay in L1

// Micro-kernel: acc[i * kDotCols + j] += dot(x[i], w[j]) over features [begin, end), i < R, j < C; begin == 0 starts from
// zero. The order of summation does not depend on R and C.  `next`: the R rows of x of the next tile, prefetched; or null;
// `ahead`: as of dot_rows.
template <int R, int C, class XT, class WT>
inline void dot_tile(const XT* const* x, const XT* const* next, const WT* w, int64_t ldw, int64_t begin, int64_t end,
                     Vec* acc, const WT* ahead = nullptr) {
  using D = Dot<XT, WT>;
  Vec sums[R][C];
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < C; ++j) sums[i][j] = begin ? acc[i * kDotCols + j] : zero();
  int64_t k = begin;
  const auto step = [&](int n) {
    for (int part = 0; part < D::kParts; ++part) {
      typename D::Operand xv[R];
      for (int i = 0; i < R; ++i) xv[i] = D::load_operand(x[i] + k, n, part);
      for (int j = 0; j < C; ++j) {
        const typename D::Operand wv = D::load_operand(w + j * ldw + k, n, part);
        for (int i = 0; i < R; ++i) sums[i][j] = D::step(xv[i], wv, sums[i][j]);
      }
    }
  };
  for (; ahead && k + D::kStep <= end; k += D::kStep) {
    prefetch_bytes(ahead + C * k, C * D::kStep * sizeof(WT));
    step(D::kStep);
  }
  for (; k + D::kStep <= end; k += D::kStep) {
    if (kPrefetchesRows && next)
      for (int i = 0; i < R; ++i) __builtin_prefetch(next[i] + k, 0, 2);
    step(D::kStep);
  }
  if (k < end) step(static_cast<int>(end - k));
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < C; ++j) acc[i * kDotCols + j] = sums[i][j];
}

template <int C, class XT, class WT>
inline void dot_column(const XT* const* x, int rows, const WT* w, int64_t ldw, int64_t begin, int64_t end, Vec* acc) {
  int i = 0;
  for (; i + kTileRows <= rows; i += kTileRows)
    dot_tile<kTileRows, C>(x + i, i + 2 * kTileRows <= rows ? x + i + kTileRows : nullptr, w, ldw, begin, end,
                           acc + i * kDotCols);
  for (; i < rows; ++i) dot_tile<1, C, XT>(x + i, nullptr, w, ldw, begin, end, acc + i * kDotCols);
}

// out[i * ldo + j] = dot(x[i], w[j]) for up to kDotRows gathered rows of x; w is read from memory once.  `ahead`: as many
// contiguous values as w has, prefetched meanwhile by a call of one row; or null.
template <class XT, class WT>
inline void dot_rows(const XT* const* x, int rows, const WT* w, int64_t ldw, int64_t cols, int64_t depth, float* out,
                     int64_t ldo, const WT* ahead = nullptr) {
  constexpr int64_t kFeatures = kDotBytes / (sizeof(XT) > sizeof(WT) ? sizeof(XT) : sizeof(WT));
  const int64_t block = rows == 1 ? depth : kFeatures;
  Vec acc[kDotRows * kDotCols];
  for (int64_t j = 0; j < cols; j += kDotCols) {
    const int n = static_cast<int>(min(kDotCols, cols - j));
    const WT* first = w + j * ldw;
    int64_t begin = 0;
    do {
      const int64_t end = min(depth, begin + block);
      if (rows == 1 && n == kDotCols) {
        dot_tile<1, kDotCols, XT>(x, nullptr, first, ldw, begin, end, acc, ahead ? ahead + j * depth : nullptr);
      } else {
        int c = 0;
        for (; c + kTileCols <= n; c += kTileCols) dot_column<kTileCols>(x, rows, first + c * ldw, ldw, begin, end, acc + c);
        for (; c < n; ++c) dot_column<1>(x, rows, first + c * ldw, ldw, begin, end, acc + c);
      }
      begin = end;
    } while (begin < depth);
    for (int i = 0; i < rows; ++i) {
      int c = 0;
      for (; c + 4 <= n; c += 4) sum4(acc + i * kDotCols + c, out + i * ldo + j + c);
      for (; c < n; ++c) out[i * ldo + j + c] = sum(acc[i * kDotCols + c]);
    }
  }
}

}  // namespace T2L_ISA_NAMESPACE
}  // namespace t2l
