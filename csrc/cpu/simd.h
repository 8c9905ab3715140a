// SIMD primitives of the instruction set T2L_ISA_LEVEL.  Include once per translation unit, after all standard headers: the
// target pragma below holds to the end of the unit.
//
// Code after this header must not instantiate standard templates (hence min below): the linker keeps one out-of-line copy
// for the whole library, which might be one compiled for an instruction set the machine lacks.
#pragma once
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>

#include "t2l/kernels.h"

#define T2L_GENERIC 0
#define T2L_AVX2 1
#define T2L_AVX512 2
#define T2L_AVX512_BF16 3
// Of AArch64: below zero, so that no comparison with a level of x86 takes them in.
#define T2L_NEON -1
#define T2L_NEON_BF16 -2

// Beside the vectors, matrix tiles (tiles.h): none, those of AMX, or the same in plain C++.
#define T2L_TILES_AMX 1
#define T2L_TILES_MODEL 2
#ifndef T2L_TILES
#define T2L_TILES 0
#endif
// 1: the panels of panel.h hold float32 also where the instruction set has a dot product of bfloat16.
#ifndef T2L_WIDE_PANELS
#define T2L_WIDE_PANELS 0
#endif

#if T2L_TILES == T2L_TILES_MODEL
#define T2L_ISA_NAMESPACE amx_model
#elif T2L_WIDE_PANELS
#define T2L_ISA_NAMESPACE avx512_bf16_wide
#define T2L_TARGET "avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"
#elif T2L_ISA_LEVEL == T2L_GENERIC
#define T2L_ISA_NAMESPACE generic
#elif T2L_ISA_LEVEL == T2L_AVX2
#define T2L_ISA_NAMESPACE avx2
#define T2L_TARGET "avx2,fma"
#elif T2L_ISA_LEVEL == T2L_AVX512
#define T2L_ISA_NAMESPACE avx512
#define T2L_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"
#elif T2L_TILES == T2L_TILES_AMX
#define T2L_ISA_NAMESPACE amx
#define T2L_TARGET "amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"
#elif T2L_ISA_LEVEL == T2L_NEON
#define T2L_ISA_NAMESPACE neon
#elif T2L_ISA_LEVEL == T2L_NEON_BF16
#define T2L_ISA_NAMESPACE neon_bf16
#define T2L_TARGET "arch=armv8.2-a+bf16+fp16"  // what GCC 12's header asks for, and its code for constants
#else
#define T2L_ISA_NAMESPACE avx512_bf16
#define T2L_TARGET "avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"
#endif

#if T2L_ISA_LEVEL > T2L_GENERIC
#include <immintrin.h>
#elif T2L_ISA_LEVEL < T2L_GENERIC
#include <arm_neon.h>
#endif
#if defined(T2L_TARGET)
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
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
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

constexpr int64_t kCacheLine = 64;  // bytes

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// The cache lines of [p, p + bytes), which may end anywhere: a prefetch does not fault.
inline void prefetch_bytes(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kCacheLine) __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
}

#if T2L_ISA_LEVEL >= T2L_AVX512
constexpr int kLanes = 16;
using Vec = __m512;
inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec broadcast(float v) { return _mm512_set1_ps(v); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
inline Vec load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vec load(const float* p, int n) { return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p); }
inline Vec load(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p)); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec multiply(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline float sum(Vec v) { return _mm512_reduce_add_ps(v); }
#elif T2L_ISA_LEVEL == T2L_AVX2
constexpr int kLanes = 8;
using Vec = __m256;
inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec broadcast(float v) { return _mm256_set1_ps(v); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const bf16* p) {
  const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
}
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec multiply(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline float sum(Vec v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
#elif T2L_ISA_LEVEL <= T2L_NEON
constexpr int kLanes = 4;
using Vec = float32x4_t;
inline Vec zero() { return vdupq_n_f32(0.0f); }
inline Vec broadcast(float v) { return vdupq_n_f32(v); }
inline Vec load(const float* p) { return vld1q_f32(p); }
inline Vec load(const bf16* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16)); }
inline Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
inline Vec multiply(Vec a, Vec b) { return vmulq_f32(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
inline void store(float* p, Vec v) { vst1q_f32(p, v); }
inline float sum(Vec v) { return vaddvq_f32(v); }  // (v[0] + v[1]) + (v[2] + v[3])
#else
constexpr int kLanes = 4;
using Vec = float __attribute__((vector_size(16)));  // SSE2, NEON: in every baseline
inline Vec broadcast(float v) { return Vec{v, v, v, v}; }
inline Vec zero() { return broadcast(0.0f); }
inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec load(const bf16* p) { return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec multiply(Vec a, Vec b) { return a * b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline float sum(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
#endif

// Horizontal sums of four vectors, in the summation order of `sum`.
#if T2L_ISA_LEVEL >= T2L_AVX512
inline Vec add_halves(Vec a, Vec b) {  // eight partial sums of each
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
}
inline void sum4(const Vec* v, float* out) {
  const Vec ab = add_halves(v[0], v[1]), cd = add_halves(v[2], v[3]);
  const Vec four = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  const Vec two = _mm512_add_ps(four, _mm512_permute_ps(four, 0x4e));
  const Vec one = _mm512_add_ps(two, _mm512_permute_ps(two, 0xb1));
  const Vec first = _mm512_maskz_compress_ps(0x1111, one);
  _mm_storeu_ps(out, _mm512_castps512_ps128(first));
}
#elif T2L_ISA_LEVEL <= T2L_NEON
inline void sum4(const Vec* v, float* out) { vst1q_f32(out, vpaddq_f32(vpaddq_f32(v[0], v[1]), vpaddq_f32(v[2], v[3]))); }
#else
inline void sum4(const Vec* v, float* out) {
  for (int i = 0; i < 4; ++i) out[i] = sum(v[i]);
}
#endif

#if T2L_ISA_LEVEL < T2L_AVX512
// Masked load: the first n lanes, zeros beyond; does not read past p[n - 1].
template <class T>
inline Vec load(const T* p, int n) {
  float padded[kLanes] = {};
  for (int i = 0; i < n; ++i) padded[i] = to_float(p[i]);
  return load(padded);
}
#endif

template <class T>
inline Vec load_up_to(const T* p, int n) {
  return n == kLanes ? load(p) : load(p, n);
}

// Stores the first n lanes, rounded to T.
template <class T>
inline void store_as(T* p, Vec v, int n) {
  float lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < n; ++i) from_float(lanes[i], p + i);
}
inline void store_as(float* p, Vec v, int n) {
  if (n == kLanes) {
    store(p, v);
    return;
  }
  float lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, n * sizeof(float));
}
#if T2L_ISA_LEVEL == T2L_AVX512_BF16
inline void store_as(bf16* p, Vec v, int n) {
  const __m256i narrow = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), narrow);
}
#elif T2L_ISA_LEVEL == T2L_AVX512
inline void store_as(bf16* p, Vec v, int n) {
  const __m512i u = _mm512_castps_si512(v), high = _mm512_srli_epi32(u, 16);
  const __m512i even = _mm512_add_epi32(_mm512_and_si512(high, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(u, even), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i bits = _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40));
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), _mm512_cvtepi32_epi16(bits));
}
#elif T2L_ISA_LEVEL == T2L_AVX2
inline __m256i rounded_to_bf16(Vec v) {  // in the upper half of every dword; the lower half is anything
  const __m256i u = _mm256_castps_si256(v), last = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff)));
  const Vec quiet = _mm256_or_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(0x400000)));
  return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), quiet, _mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
}
inline void store_as(bf16* p, Vec v, int n) {
  const __m256i bits = _mm256_srli_epi32(rounded_to_bf16(v), 16);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
  if (n == kLanes)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  else
    std::memcpy(p, &packed, n * sizeof(bf16));
}
#elif T2L_ISA_LEVEL <= T2L_NEON
#if T2L_ISA_LEVEL == T2L_NEON_BF16
inline uint16x4_t bf16_bits(Vec v) { return vreinterpret_u16_bf16(vcvt_bf16_f32(v)); }
#else
inline uint16x4_t bf16_bits(Vec v) {
  const uint32x4_t u = vreinterpretq_u32_f32(v), high = vshrq_n_u32(u, 16);
  const uint32x4_t even = vaddq_u32(vandq_u32(high, vdupq_n_u32(1)), vdupq_n_u32(0x7fff));
  const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(u, even), 16);
  return vmovn_u32(vbslq_u32(vceqq_f32(v, v), rounded, vorrq_u32(high, vdupq_n_u32(0x40))));  // v == v: not NaN
}
#endif
inline void store_as(bf16* p, Vec v, int n) {
  const uint16x4_t narrow = bf16_bits(v);
  if (n == kLanes)
    vst1_u16(&p->bits, narrow);
  else
    std::memcpy(p, &narrow, n * sizeof(bf16));
}
#endif

// Stores past the caches: a whole cache line, or two, at an address that is_line.  end_streams: before other threads may
// read them.
#if T2L_ISA_LEVEL >= T2L_AVX512
constexpr bool kCanStream = true;
inline void stream_pair(float* p, Vec a, Vec b) {
  _mm512_stream_ps(p, a);
  _mm512_stream_ps(p + kLanes, b);
}
inline void stream_pair(bf16* p, Vec a, Vec b) {
#if T2L_ISA_LEVEL == T2L_AVX512_BF16
  const __m512i line = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
#else
  alignas(kCacheLine) bf16 both[2 * kLanes];
  store_as(both, a, kLanes);
  store_as(both + kLanes, b, kLanes);
  const __m512i line = _mm512_load_si512(both);
#endif
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), line);
}
inline void end_streams() { _mm_sfence(); }
#elif T2L_ISA_LEVEL == T2L_AVX2
constexpr bool kCanStream = true;
inline void stream_pair(float* p, Vec a, Vec b) {
  _mm256_stream_ps(p, a);
  _mm256_stream_ps(p + kLanes, b);
}
inline void stream_pair(bf16* p, Vec a, Vec b) {  // half a line: the next call's half joins it
  alignas(kCacheLine) bf16 both[2 * kLanes];
  store_as(both, a, kLanes);
  store_as(both + kLanes, b, kLanes);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm256_load_si256(reinterpret_cast<const __m256i*>(both)));
}
inline void end_streams() { _mm_sfence(); }
#else
constexpr bool kCanStream = false;
template <class T>
inline void stream_pair(T* p, Vec a, Vec b) {
  store_as(p, a, kLanes);
  store_as(p + kLanes, b, kLanes);
}
inline void end_streams() {}
#endif
inline bool is_line(const void* p) { return reinterpret_cast<uintptr_t>(p) % kCacheLine == 0; }

// Stores n floats, rounded to T.
template <class T>
inline void store_row(const float* x, int64_t n, T* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int left = static_cast<int>(min(kLanes, n - i));
    store_as(out + i, load_up_to(x + i, left), left);
  }
}

// Steps of a dot product over kStep elements, one for each of kParts operands that hold them; the horizontal sum of the
// accumulator is the result.
template <class XT, class WT>
struct Dot {
  static constexpr int kStep = kLanes, kParts = 1;
  using Operand = Vec;
  template <class T>
  static Operand load_operand(const T* p, int n, int) {
    return load_up_to(p, n);
  }
  static Vec step(Operand x, Operand w, Vec acc) { return fma(x, w, acc); }
};
#if T2L_ISA_LEVEL == T2L_AVX512_BF16
template <>
struct Dot<bf16, bf16> {
  static constexpr int kStep = 32, kParts = 1;
  using Operand = __m512bh;
  static Operand load_operand(const bf16* p, int n, int) {
    const __mmask32 mask = n == kStep ? ~0u : (1u << n) - 1;
    return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(mask, p));
  }
  static Vec step(Operand x, Operand w, Vec acc) { return _mm512_dpbf16_ps(acc, x, w); }
};
#elif T2L_ISA_LEVEL == T2L_AVX2
template <>
struct Dot<bf16, bf16> {  // the even elements, then the odd ones: they widen without a shuffle
  static constexpr int kStep = 16, kParts = 2;
  using Operand = Vec;
  static Operand load_operand(const bf16* p, int n, int part) {
    bf16 padded[kStep] = {};
    if (n < kStep) p = static_cast<const bf16*>(std::memcpy(padded, p, n * sizeof(bf16)));
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm256_castsi256_ps(part ? _mm256_and_si256(both, _mm256_set1_epi32(-65536)) : _mm256_slli_epi32(both, 16));
  }
  static Vec step(Operand x, Operand w, Vec acc) { return fma(x, w, acc); }
};
#elif T2L_ISA_LEVEL == T2L_NEON_BF16
template <>
struct Dot<bf16, bf16> {
  static constexpr int kStep = 8, kParts = 1;
  using Operand = bfloat16x8_t;
  static Operand load_operand(const bf16* p, int n, int) {
    uint16x8_t bits = vdupq_n_u16(0);
    std::memcpy(&bits, p, n * sizeof(bf16));
    return vreinterpretq_bf16_u16(bits);
  }
  static Vec step(Operand x, Operand w, Vec acc) { return vbfdotq_f32(acc, x, w); }
};
#endif

// Heap buffer aligned to a cache line: aligned vectors in it do not straddle two.
template <class T>
struct Scratch {
  explicit Scratch(int64_t n)
      : data(n > 0 ? static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(kCacheLine))) : nullptr) {}
  ~Scratch() { ::operator delete(data, std::align_val_t(kCacheLine)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data;
};

template <class F>
inline void for_range(ParallelFor parallel, int64_t count, int64_t grain, F& body) {
  parallel.run(
      parallel.pool, count, grain,
      [](int64_t begin, int64_t end, void* context) {
        if (begin < end) (*static_cast<F*>(context))(begin, end);
      },
      &body);
}

}  // namespace T2L_ISA_NAMESPACE
}  // namespace t2l
