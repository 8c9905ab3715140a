// GEMM on panels: the small operand is packed feature-major, so that one vector is one feature of several rows.  Products
// need no horizontal sums, and a row's result does not depend on other rows.  Weights are streamed once in memory order and
// broadcast as scalars (or pairs of bfloat16): they need no packed copy.
#pragma once
#include "transpose.h"
#if T2L_TILES
#include "tiles.h"
#endif

namespace t2l {
namespace T2L_ISA_NAMESPACE {

// Register tile: kPanelCols * kPanelVecs accumulators.  NEON has as many registers as AVX-512, a quarter as long: with more
// vectors a weight that is loaded serves as many rows as with AVX2.
#if T2L_TILES
constexpr int kPanelVecs = 32 / kLanes;  // two tiles wide
constexpr int kPanelCols = kLanes == 16 ? 12 : 6;
#elif T2L_ISA_LEVEL <= T2L_NEON
constexpr int kPanelVecs = 4;
constexpr int kPanelCols = 4;
#else
constexpr int kPanelVecs = 2;
constexpr int kPanelCols = kLanes == 16 ? 12 : 6;
#endif
constexpr int kPanelRows = kPanelVecs * kLanes;

// Packed format of the inputs of matrices of type WT: kPack features of one row share an Element; the features of a panel
// are padded with zeros to a multiple of kStep.  `Weight` is the type the micro-kernel reads: WT itself, or float where the
// instruction set has no dot product of WT.
template <class WT>
struct PanelOf {
  using Element = float;
  using Weight = float;
  static constexpr int kPack = 1, kStep = 1;
  using Operand = Vec;
  static Operand load_rows(const Element* p) { return load(p); }
  static Operand broadcast_weight(const Weight* w) { return broadcast(*w); }
  static Vec step(Operand x, Operand w, Vec acc) { return fma(x, w, acc); }
};
#if T2L_TILES
template <>
struct PanelOf<bf16> {
  using Element = uint32_t;  // two consecutive features: a panel is a column of pairs of tiles
  using Weight = bf16;
  static constexpr int kPack = 2, kStep = kTileFeatures;
};
#elif T2L_ISA_LEVEL == T2L_AVX512_BF16 && !T2L_WIDE_PANELS
template <>
struct PanelOf<bf16> {
  using Element = uint32_t;  // two consecutive features
  using Weight = bf16;
  static constexpr int kPack = 2, kStep = 2;
  using Operand = __m512bh;
  static Operand load_rows(const Element* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }
  static Operand broadcast_weight(const Weight* w) {
    int pair;
    std::memcpy(&pair, w, sizeof pair);
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
  }
  static Operand broadcast_last_weight(const Weight* w) { return reinterpret_cast<__m512bh>(_mm512_set1_epi32(w->bits)); }
  static Vec step(Operand x, Operand w, Vec acc) { return _mm512_dpbf16_ps(acc, x, w); }
};
#elif T2L_ISA_LEVEL == T2L_NEON_BF16
template <>
struct PanelOf<bf16> {
  using Element = uint32_t;  // two consecutive features
  using Weight = bf16;
  static constexpr int kPack = 2, kStep = 2;
  using Operand = bfloat16x8_t;
  static Operand load_rows(const Element* p) { return vreinterpretq_bf16_u32(vld1q_u32(p)); }
  static bfloat16x4_t broadcast_weight(const Weight* w) {  // one pair: the instruction broadcasts it
    uint32_t pair;
    std::memcpy(&pair, w, sizeof pair);
    return vreinterpret_bf16_u32(vdup_n_u32(pair));
  }
  static bfloat16x4_t broadcast_last_weight(const Weight* w) { return vreinterpret_bf16_u32(vdup_n_u32(w->bits)); }
  static Vec step(Operand x, bfloat16x4_t w, Vec acc) { return vbfdotq_lane_f32(acc, x, w, 0); }
};
#endif

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Number of elements of a panel of `depth` features.
template <class WT>
inline int64_t panel_size(int64_t depth) {
  return round_up(depth, PanelOf<WT>::kStep) / PanelOf<WT>::kPack * kPanelRows;
}

// Feature-major float32 to a panel, rounded to WT.
inline void round_to_panel(const float* x, int64_t depth, float* panel, float) {
  std::memcpy(panel, x, depth * kPanelRows * sizeof(float));
}
inline void round_to_panel(const float* x, int64_t depth, float* panel, bf16) {
  bf16 rounded[kPanelRows];
  for (int64_t k = 0; k < depth; ++k) {
    store_row(x + k * kPanelRows, kPanelRows, rounded);
    for (int64_t i = 0; i < kPanelRows; ++i) panel[k * kPanelRows + i] = to_float(rounded[i]);
  }
}
#if T2L_ISA_LEVEL == T2L_AVX512_BF16
inline __m512i bf16_bits(Vec v) { return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v))); }
inline void store_pairs(Vec even, Vec odd, uint32_t* out) {
  _mm512_storeu_si512(out, _mm512_or_si512(bf16_bits(even), _mm512_slli_epi32(bf16_bits(odd), 16)));
}
#elif T2L_ISA_LEVEL == T2L_NEON_BF16
inline void store_pairs(Vec even, Vec odd, uint32_t* out) {
  vst1q_u32(out, vorrq_u32(vmovl_u16(bf16_bits(even)), vshll_n_u16(bf16_bits(odd), 16)));
}
#elif T2L_TILES
inline void store_pairs(Vec even, Vec odd, uint32_t* out) {
  bf16 low[kLanes], high[kLanes];
  store_as(low, even, kLanes);
  store_as(high, odd, kLanes);
  for (int i = 0; i < kLanes; ++i) out[i] = low[i].bits | static_cast<uint32_t>(high[i].bits) << 16;
}
#endif
#if T2L_ISA_LEVEL == T2L_AVX512_BF16 || T2L_ISA_LEVEL == T2L_NEON_BF16 || T2L_TILES
inline void round_to_panel(const float* x, int64_t depth, uint32_t* panel, bf16) {
  const int64_t padded = round_up(depth, PanelOf<bf16>::kStep);
  for (int64_t k = 0; k < padded; k += 2)
    for (int v = 0; v < kPanelVecs; ++v) {
      const float* low = x + k * kPanelRows + v * kLanes;
      store_pairs(k < depth ? load(low) : zero(), k + 1 < depth ? load(low + kPanelRows) : zero(),
                  panel + k / 2 * kPanelRows + v * kLanes);
    }
}
#endif

// n features of a row as kLanes elements of a panel, zero-padded.
inline void load_chunk(const float* row, int64_t n, float* chunk, float) {
  std::memset(chunk, 0, kLanes * sizeof(float));
  std::memcpy(chunk, row, n * sizeof(float));
}
inline void load_chunk(const bf16* row, int64_t n, float* chunk, float) {
  store(chunk, load_up_to(row, static_cast<int>(n)));
}
inline void load_chunk(const bf16* row, int64_t n, float* chunk, bf16) {
  std::memset(chunk, 0, kLanes * sizeof(float));
  std::memcpy(chunk, row, n * sizeof(bf16));
}

// Whether memory holds WT as the elements of a panel hold it.
template <class WT>
constexpr bool kAsStored = PanelOf<WT>::kPack * sizeof(WT) == sizeof(typename PanelOf<WT>::Element);

// Packs a panel from row-major memory; row(i) points to the features of row i.
template <class WT, class F>
inline void pack_panel(const F& row, int64_t depth, typename PanelOf<WT>::Element* panel) {
  using P = PanelOf<WT>;
  constexpr int64_t kChunk = kLanes * P::kPack;
  alignas(kCacheLine) float chunk[kLanes * kLanes], transposed[kLanes * kLanes];
  const int64_t padded = round_up(depth, P::kStep);
  for (int64_t k = 0; k < padded; k += kChunk) {
    const int64_t begin = min(k, depth), n = min(kChunk, depth - begin), elements = min(kChunk, padded - k) / P::kPack;
    for (int v = 0; v < kPanelVecs; ++v) {
      float* out = reinterpret_cast<float*>(panel + k / P::kPack * kPanelRows + v * kLanes);
      if (kAsStored<WT> && n == kChunk) {
        transpose_block([&](int64_t i) -> const void* { return row(v * kLanes + i) + k; }, out, kPanelRows);
        continue;
      }
      for (int i = 0; i < kLanes; ++i) load_chunk(row(v * kLanes + i) + begin, n, chunk + i * kLanes, typename P::Weight());
      transpose_block([&](int64_t i) -> const void* { return chunk + i * kLanes; }, transposed, kLanes);
      for (int64_t e = 0; e < elements; ++e)
        std::memcpy(out + e * kPanelRows, transposed + e * kLanes, kLanes * sizeof(float));
    }
  }
}

// Whether the micro-kernel reads weights that need no widening in place.  With AVX2 the rows of a tile, often a power of two
// apart, would take each other's place in L1, which a panel fills: copies took 12 to 20 % less time (Zen 3).
constexpr bool kInPlace = T2L_ISA_LEVEL != T2L_AVX2;

// Micro-kernel: c[j, i] = dot(panel row i, w[j]), j < C, feature-major.  The C rows of weights after these are prefetched,
// also past the end: a prefetch does not fault.
template <int C, class P, class WT>
inline void panel_tile(const typename P::Element* x, const WT* w, int64_t depth, float* c) {
  constexpr int64_t kLine = kCacheLine / sizeof(WT);
  Vec acc[C][kPanelVecs];
  for (int j = 0; j < C; ++j)
    for (int v = 0; v < kPanelVecs; ++v) acc[j][v] = zero();
  const auto prefetch = [&](int64_t line) {
    for (int j = 0; j < C; ++j) __builtin_prefetch(w + (C + j) * depth + line, 0, 2);
  };
  const auto step = [&](int64_t k, const typename P::Weight* rows, int64_t stride) {  // of an Element, from feature k on
    typename P::Operand xv[kPanelVecs];
    for (int v = 0; v < kPanelVecs; ++v) xv[v] = P::load_rows(x + k / P::kPack * kPanelRows + v * kLanes);
    for (int j = 0; j < C; ++j) {
      const auto wv = P::broadcast_weight(rows + j * stride);
      for (int v = 0; v < kPanelVecs; ++v) acc[j][v] = P::step(xv[v], wv, acc[j][v]);
    }
  };
  if constexpr (std::is_same_v<WT, typename P::Weight> && kInPlace) {
    const int64_t whole = depth / P::kPack * P::kPack;
    for (int64_t line = 0; line < whole; line += kLine) {
      prefetch(line);
      const int64_t end = min(whole, line + kLine);
      for (int64_t k = line; k < end; k += P::kPack) step(k, w + k, depth);
    }
    if constexpr (P::kPack > 1) {  // tail: an odd last feature
      for (int j = 0; j < C && whole < depth; ++j)
        for (int v = 0; v < kPanelVecs; ++v)
          acc[j][v] = P::step(P::load_rows(x + whole / P::kPack * kPanelRows + v * kLanes),
                              P::broadcast_last_weight(w + j * depth + whole), acc[j][v]);
    }
  } else {  // weights are copied a vector ahead of their products, with which that overlaps
    alignas(kCacheLine) typename P::Weight copies[2][C][kLanes];
    const int64_t whole = depth / kLanes * kLanes;
    const auto copy = [&](int64_t k) {
      for (int j = 0; j < C; ++j) store(copies[k / kLanes % 2][j], load(w + j * depth + k));
    };
    if (whole) copy(0);
    for (int64_t k = 0; k < whole; k += kLanes) {
      if (k % kLine == 0) prefetch(k);
      copy(min(k + kLanes, whole - kLanes));
      for (int i = 0; i < kLanes; ++i) step(k + i, copies[k / kLanes % 2][0] + i, kLanes);
    }
    for (int j = 0; j < C && whole < depth; ++j)
      store(copies[0][j], load(w + j * depth + whole, static_cast<int>(depth - whole)));
    for (int64_t k = whole; k < depth; ++k) step(k, copies[0][0] + k - whole, kLanes);
  }
  for (int j = 0; j < C; ++j)
    for (int v = 0; v < kPanelVecs; ++v) store(c + j * kPanelRows + v * kLanes, acc[j][v]);
}

// What the products of a thread need for as long as this lives: nothing, or tiles and the weights to come.
template <class WT>
struct MatmulScope {
  explicit MatmulScope(int64_t) {}  // most features of a product
  void expect(const void*) {}
};

// Which operand of a product the next products use again: the panel, while weights come from memory, or the weights.
enum class Keep { panel, weights };

// c[cols, kPanelRows] = w[cols, depth] times the panel.
template <Keep, class WT>
inline void matmul_panel(MatmulScope<WT>&, const typename PanelOf<WT>::Element* x, const WT* w, int64_t cols, int64_t depth,
                         float* c) {
  using P = PanelOf<WT>;
  constexpr int kTwoThirds = kPanelCols * 2 / 3, kThird = kPanelCols / 3;
  for (int64_t j = 0; j < cols;) {
    const int64_t left = cols - j;
    const int n = left >= kPanelCols ? kPanelCols : left >= kTwoThirds ? kTwoThirds : left >= kThird ? kThird : 1;
    const WT* tile = w + j * depth;
    float* out = c + j * kPanelRows;
    if (n == kPanelCols)
      panel_tile<kPanelCols, P>(x, tile, depth, out);
    else if (n == kTwoThirds)
      panel_tile<kTwoThirds, P>(x, tile, depth, out);
    else if (n == kThird)
      panel_tile<kThird, P>(x, tile, depth, out);
    else
      panel_tile<1, P>(x, tile, depth, out);
    j += n;
  }
}

#if T2L_TILES
template <>
struct MatmulScope<bf16> {
  explicit MatmulScope(int64_t depth) : rows(kTileSide * depth) {}
  // Weights are read in this order of memory from `p` on, which may be null for none or end anywhere.
  void expect(const void* p) { ahead = static_cast<const char*>(p); }
  // To be called after each product.
  void prefetch() {
    constexpr int64_t kLines = 8;  // what a product reads of weights, on average
    if (!ahead) return;
    prefetch_bytes(ahead, kLines * kCacheLine);
    ahead += kLines * kCacheLine;
  }
  Tiles tiles;
  Scratch<bf16> rows;  // of a tile that has fewer
  const char* ahead = nullptr;
};

template <int N, bool kOnce>
inline void tile_load(Tiles& tiles, const void* p, int64_t stride) {
  if constexpr (kOnce)
    tiles.load_once<N>(p, stride);
  else
    tiles.load<N>(p, stride);
}

// c[j, i] = dot(w row j, panel row i) for 16 rows of weights from `w` and, with kTwo, d for 16 more from `v`.  Prefetches
// are spread over the products: a burst would take all buffers that loads need.
template <bool kTwo, Keep kKeep>
inline void tile_product(MatmulScope<bf16>& scope, const uint32_t* x, const bf16* w, const bf16* v, int64_t depth, float* c,
                         float* d) {
  constexpr int64_t kRow = kPanelRows * sizeof(uint32_t);
  Tiles& tiles = scope.tiles;
  tiles.zero<4>();
  tiles.zero<5>();
  if (kTwo) {
    tiles.zero<6>();
    tiles.zero<7>();
  }
  const auto step = [&](const void* a, const void* b, int64_t stride) {
    tile_load<2, kKeep != Keep::panel>(tiles, x, kRow);
    tile_load<0, kKeep == Keep::panel>(tiles, a, stride);
    tiles.dot<4, 0, 2>();
    scope.prefetch();
    tile_load<3, kKeep != Keep::panel>(tiles, x + kTileSide, kRow);
    tiles.dot<5, 0, 3>();
    scope.prefetch();
    if (kTwo) {
      tile_load<1, kKeep == Keep::panel>(tiles, b, stride);
      tiles.dot<6, 1, 2>();
      scope.prefetch();
      tiles.dot<7, 1, 3>();
      scope.prefetch();
    }
    x += kTileSide * kPanelRows;
  };
  int64_t k = 0;
  for (; k + kTileFeatures <= depth; k += kTileFeatures) step(w + k, v + k, depth * sizeof(bf16));
  if (k < depth) {  // the last features, with zeros: what lies behind them may be NaN
    alignas(kCacheLine) bf16 rest[2][kTileSide][kTileFeatures] = {};
    for (int i = 0; i < kTileSide; ++i) {
      std::memcpy(rest[0][i], w + i * depth + k, (depth - k) * sizeof(bf16));
      if (kTwo) std::memcpy(rest[1][i], v + i * depth + k, (depth - k) * sizeof(bf16));
    }
    step(rest[0], rest[1], kCacheLine);
  }
  tiles.store<4>(c, kRow);
  tiles.store<5>(c + kTileSide, kRow);
  if (kTwo) {
    tiles.store<6>(d, kRow);
    tiles.store<7>(d + kTileSide, kRow);
  }
}

// Fewer rows than a tile are copied; else the last tiles end with the last row, and give some results twice.
template <Keep kKeep>
inline void matmul_panel(MatmulScope<bf16>& scope, const uint32_t* x, const bf16* w, int64_t cols, int64_t depth, float* c) {
  if (cols < kTileSide) {
    alignas(kCacheLine) float block[kTileSide * kPanelRows];
    bf16* rows = scope.rows.data;
    std::memcpy(rows, w, cols * depth * sizeof(bf16));
    std::memset(rows + cols * depth, 0, (kTileSide - cols) * depth * sizeof(bf16));
    tile_product<false, kKeep>(scope, x, rows, rows, depth, block, nullptr);
    std::memcpy(c, block, cols * kPanelRows * sizeof(float));
    return;
  }
  const int64_t last = cols - kTileSide;
  for (int64_t j = 0; j < cols; j += 2 * kTileSide) {
    const int64_t first = min(j, last), second = min(j + kTileSide, last);
    const bf16 *a = w + first * depth, *b = w + second * depth;
    float *out = c + first * kPanelRows, *more = c + second * kPanelRows;
    if (second > first)
      tile_product<true, kKeep>(scope, x, a, b, depth, out, more);
    else
      tile_product<false, kKeep>(scope, x, a, a, depth, out, nullptr);
  }
}
#endif

}  // namespace T2L_ISA_NAMESPACE
}  // namespace t2l
