// Vector primitives of the instruction set that T2L_ISA_LEVEL names.  Included once per translation unit, inside no
// namespace, after all standard headers: the target pragma below holds to the end of the unit.
//
// Code behind this header must not instantiate standard templates: their out-of-line copies would be shared by the whole
// library, and the linker could keep one that was compiled for an instruction set the machine lacks.
#pragma once
#include <cstdint>
#include <cstring>

#include "t2l/kernels.h"

#define T2L_GENERIC 0
#define T2L_AVX2 1
#define T2L_AVX512 2
#define T2L_AVX512_BF16 3

#if T2L_ISA_LEVEL == T2L_GENERIC
#define T2L_ISA_NAMESPACE generic
#elif T2L_ISA_LEVEL == T2L_AVX2
#define T2L_ISA_NAMESPACE avx2
#define T2L_TARGET "avx2,fma"
#elif T2L_ISA_LEVEL == T2L_AVX512
#define T2L_ISA_NAMESPACE avx512
#define T2L_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"
#else
#define T2L_ISA_NAMESPACE avx512_bf16
#define T2L_TARGET "avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"
#endif

#if T2L_ISA_LEVEL != T2L_GENERIC
#include <immintrin.h>
#define T2L_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define T2L_PUSH_TARGET(t) T2L_PRAGMA(clang attribute push(__attribute__((target(t))), apply_to = function))
#define T2L_POP_TARGET T2L_PRAGMA(clang attribute pop)
#else
#define T2L_POP_TARGET  // gcc: to the end of the unit, so that template instantiations are covered
#define T2L_PUSH_TARGET(t) T2L_PRAGMA(GCC target(t))
#endif
T2L_PUSH_TARGET(T2L_TARGET)
#endif

namespace t2l {
namespace T2L_ISA_NAMESPACE {

struct bf16 {
  uint16_t bits;
};

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) {
  const uint32_t wide = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &wide, sizeof f);
  return f;
}

// Round to nearest even; NaN stays NaN.
inline void from_float(float v, float* out) { *out = v; }
inline void from_float(float v, bf16* out) {
  uint32_t u;
  std::memcpy(&u, &v, sizeof u);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded);
}

inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

#if T2L_ISA_LEVEL >= T2L_AVX512
constexpr int kLanes = 16;
constexpr int kTileRows = 4, kTileCols = 4;
using Vec = __m512;
inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec broadcast(float v) { return _mm512_set1_ps(v); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
inline Vec load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vec load(const float* p, int n) { return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p); }
inline Vec load(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p)); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline float sum(Vec v) { return _mm512_reduce_add_ps(v); }
#elif T2L_ISA_LEVEL == T2L_AVX2
constexpr int kLanes = 8;
constexpr int kTileRows = 2, kTileCols = 4;
using Vec = __m256;
inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec broadcast(float v) { return _mm256_set1_ps(v); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const bf16* p) {
  const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
}
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline float sum(Vec v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
#else
constexpr int kLanes = 8;
constexpr int kTileRows = 2, kTileCols = 2;
struct Vec {
  float lane[kLanes];
};
inline Vec broadcast(float v) {
  Vec r;
  for (float& lane : r.lane) lane = v;
  return r;
}
inline Vec zero() { return broadcast(0.0f); }
template <class T>
inline Vec load(const T* p) {
  Vec r;
  for (int i = 0; i < kLanes; ++i) r.lane[i] = to_float(p[i]);
  return r;
}
inline Vec add(Vec a, Vec b) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] += b.lane[i];
  return a;
}
inline Vec fma(Vec a, Vec b, Vec c) {
  for (int i = 0; i < kLanes; ++i) c.lane[i] += a.lane[i] * b.lane[i];
  return c;
}
inline void store(float* p, Vec v) { std::memcpy(p, v.lane, sizeof v.lane); }
inline float sum(Vec v) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v.lane[i] += v.lane[i + half];
  return v.lane[0];
}
#endif

#if T2L_ISA_LEVEL < T2L_AVX512
// The first n lanes from memory, zeros beyond; nothing past p[n - 1] is read.
template <class T>
inline Vec load(const T* p, int n) {
  float padded[kLanes] = {};
  for (int i = 0; i < n; ++i) padded[i] = to_float(p[i]);
  return load(padded);
}
#endif

// Full or partial vector to memory, rounded to T.
template <class T>
inline void store_as(T* p, Vec v, int n) {
  float wide[kLanes];
  store(wide, v);
  for (int i = 0; i < n; ++i) from_float(wide[i], p + i);
}
inline void store_as(float* p, Vec v, int n) {
  if (n == kLanes) {
    store(p, v);
    return;
  }
  float wide[kLanes];
  store(wide, v);
  std::memcpy(p, wide, n * sizeof(float));
}
#if T2L_ISA_LEVEL == T2L_AVX512_BF16
inline void store_as(bf16* p, Vec v, int n) {
  const __m256i narrow = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), narrow);
}
#endif

// n floats to contiguous memory, rounded to T.
template <class T>
inline void store_row(const float* x, int64_t n, T* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int left = static_cast<int>(lesser(kLanes, n - i));
    store_as(out + i, left == kLanes ? load(x + i) : load(x + i, left), left);
  }
}

// One step of a dot product: a vector of x times a vector of w added to an accumulator.  Step is how many elements of a
// row it takes; the accumulator's lanes add up to the dot product.
template <class XT, class WT>
struct Dot {
  static constexpr int kStep = kLanes;
  using Operand = Vec;
  template <class T>
  static Operand load_operand(const T* p, int n) {
    return n == kStep ? load(p) : load(p, n);
  }
  static Vec step(Operand x, Operand w, Vec acc) { return fma(x, w, acc); }
};
#if T2L_ISA_LEVEL == T2L_AVX512_BF16
template <>
struct Dot<bf16, bf16> {
  static constexpr int kStep = 32;
  using Operand = __m512bh;
  static Operand load_operand(const bf16* p, int n) {
    const __mmask32 mask = n == kStep ? ~0u : (1u << n) - 1;
    return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(mask, p));
  }
  static Vec step(Operand x, Operand w, Vec acc) { return _mm512_dpbf16_ps(acc, x, w); }
};
#endif

// c[i * ldc + j] = dot(x row i, w row j), i < R, j < C.  Every result is summed in the same order whatever R and C are.
template <int R, int C, class XT, class WT>
inline void dot_tile(const XT* x, int64_t ldx, const WT* w, int64_t ldw, int64_t depth, float* c, int64_t ldc) {
  using D = Dot<XT, WT>;
  Vec acc[R][C];
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < C; ++j) acc[i][j] = zero();
  for (int64_t k = 0; k < depth; k += D::kStep) {
    const int n = static_cast<int>(lesser(D::kStep, depth - k));
    typename D::Operand wv[C];
    for (int j = 0; j < C; ++j) wv[j] = D::load_operand(w + j * ldw + k, n);
    for (int i = 0; i < R; ++i) {
      const typename D::Operand xv = D::load_operand(x + i * ldx + k, n);
      for (int j = 0; j < C; ++j) acc[i][j] = D::step(xv, wv[j], acc[i][j]);
    }
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < C; ++j) c[i * ldc + j] = sum(acc[i][j]);
}

// c[rows, cols] = x[rows, depth] w[cols, depth]^T in float32; w rows are the outer loop, so w is read once.
template <class XT, class WT>
inline void matmul_nt(const XT* x, int64_t ldx, int64_t rows, const WT* w, int64_t ldw, int64_t cols, int64_t depth,
                      float* c, int64_t ldc) {
  constexpr int R = kTileRows, C = kTileCols;
  int64_t j = 0;
  for (; j + C <= cols; j += C) {
    int64_t i = 0;
    for (; i + R <= rows; i += R) dot_tile<R, C>(x + i * ldx, ldx, w + j * ldw, ldw, depth, c + i * ldc + j, ldc);
    for (; i < rows; ++i) dot_tile<1, C>(x + i * ldx, ldx, w + j * ldw, ldw, depth, c + i * ldc + j, ldc);
  }
  for (; j < cols; ++j)
    for (int64_t i = 0; i < rows; ++i) dot_tile<1, 1>(x + i * ldx, ldx, w + j * ldw, ldw, depth, c + i * ldc + j, ldc);
}

// --- panels: 16 rows side by side -----------------------------------------------------------------------------------
// A panel holds kPanelRows rows feature-major, so one vector is one feature of all rows: products need no horizontal sums,
// and a row's result depends on no other row.

constexpr int kPanelRows = 16;
constexpr int kPanelVecs = kPanelRows / kLanes;
constexpr int kPanelCols = kLanes == 16 ? 12 : 6;  // accumulators a tile keeps in registers: kPanelCols * kPanelVecs

// How a panel of inputs for matrices of type WT is stored: kPack features of one row share an Element.
template <class WT>
struct PanelOf {
  using Element = float;
  static constexpr int kPack = 1;
  static Element make(const float* feature, int64_t, int64_t row) {
    WT rounded;
    from_float(feature[row], &rounded);
    return to_float(rounded);
  }
  using Operand = Vec;
  static Operand load_rows(const Element* p) { return load(p); }
  static Operand spread(const WT* w, int64_t) { return broadcast(to_float(*w)); }
  static Vec step(Operand x, Operand w, Vec acc) { return fma(x, w, acc); }
};
#if T2L_ISA_LEVEL == T2L_AVX512_BF16
template <>
struct PanelOf<bf16> {
  using Element = uint32_t;  // two consecutive features as bfloat16
  static constexpr int kPack = 2;
  static Element make(const float* feature, int64_t left, int64_t row) {
    bf16 low, high = {0};
    from_float(feature[row], &low);
    if (left > 1) from_float(feature[kPanelRows + row], &high);
    return low.bits | static_cast<uint32_t>(high.bits) << 16;
  }
  using Operand = __m512bh;
  static Operand load_rows(const Element* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }
  static Operand spread(const bf16* w, int64_t left) {
    uint32_t pair = w->bits;
    if (left > 1) std::memcpy(&pair, w, sizeof pair);
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(pair)));
  }
  static Vec step(Operand x, Operand w, Vec acc) { return _mm512_dpbf16_ps(acc, x, w); }
};
#endif

// Elements of a panel of `depth` features.
template <class WT>
inline int64_t panel_size(int64_t depth) {
  constexpr int kPack = PanelOf<WT>::kPack;
  return (depth + kPack - 1) / kPack * kPanelRows;
}

// Feature-major float32 rows to a panel of inputs, rounded to WT.
template <class WT>
inline void make_panel(const float* x, int64_t depth, typename PanelOf<WT>::Element* panel) {
  using P = PanelOf<WT>;
  for (int64_t k = 0; k < depth; k += P::kPack)
    for (int64_t i = 0; i < kPanelRows; ++i)
      panel[k / P::kPack * kPanelRows + i] = P::make(x + k * kPanelRows, depth - k, i);
}

// c[j, i] = dot(row i of the panel, w row j), j < C, feature-major.
template <int C, class WT>
inline void panel_tile(const typename PanelOf<WT>::Element* x, const WT* w, int64_t ldw, int64_t depth, float* c) {
  using P = PanelOf<WT>;
  Vec acc[C][kPanelVecs];
  for (int j = 0; j < C; ++j)
    for (int v = 0; v < kPanelVecs; ++v) acc[j][v] = zero();
  for (int64_t k = 0; k < depth; k += P::kPack) {
    typename P::Operand xv[kPanelVecs];
    for (int v = 0; v < kPanelVecs; ++v) xv[v] = P::load_rows(x + k / P::kPack * kPanelRows + v * kLanes);
    for (int j = 0; j < C; ++j) {
      const typename P::Operand wv = P::spread(w + j * ldw + k, depth - k);
      for (int v = 0; v < kPanelVecs; ++v) acc[j][v] = P::step(xv[v], wv, acc[j][v]);
    }
  }
  for (int j = 0; j < C; ++j)
    for (int v = 0; v < kPanelVecs; ++v) store(c + j * kPanelRows + v * kLanes, acc[j][v]);
}

// c[cols, kPanelRows] = w[cols, depth] times the panel.
template <class WT>
inline void matmul_panel(const typename PanelOf<WT>::Element* x, const WT* w, int64_t ldw, int64_t cols, int64_t depth,
                         float* c) {
  int64_t j = 0;
  for (; j + kPanelCols <= cols; j += kPanelCols) panel_tile<kPanelCols>(x, w + j * ldw, ldw, depth, c + j * kPanelRows);
  for (; j < cols; ++j) panel_tile<1>(x, w + j * ldw, ldw, depth, c + j * kPanelRows);
}

// A heap buffer for one thread's tile.
template <class T>
struct Scratch {
  explicit Scratch(int64_t n) : data(new T[n > 0 ? n : 1]) {}
  ~Scratch() { delete[] data; }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data;
};

template <class F>
inline void for_range(ParallelFor parallel, int64_t count, int64_t grain, F& body) {
  parallel(count, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<F*>(context))(begin, end); }, &body);
}

}  // namespace T2L_ISA_NAMESPACE
}  // namespace t2l
