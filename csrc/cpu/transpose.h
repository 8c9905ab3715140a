// Transposes in registers: blocks of 4-byte values, of pairs of bytes, and of rows that are widened on the way.
#pragma once
#include "simd.h"

namespace t2l {
namespace T2L_ISA_NAMESPACE {

// Transpose of a kLanes x kLanes block of 4-byte values; row(i) points to row i of the source.
#if T2L_ISA_LEVEL >= T2L_AVX512
inline __m512 low_pairs(__m512 x, __m512 y) {
  return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
}
inline __m512 high_pairs(__m512 x, __m512 y) {
  return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
}
template <class Row>
inline void transpose_block(const Row& row, float* dst, int64_t ldd) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(row(i));
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {  // a[4 i + c]: columns c, c + 4, c + 8, c + 12 of rows 4 i to 4 i + 3, one per 128-bit lane
    a[4 * i] = low_pairs(b[4 * i], b[4 * i + 2]);
    a[4 * i + 1] = high_pairs(b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = low_pairs(b[4 * i + 1], b[4 * i + 3]);
    a[4 * i + 3] = high_pairs(b[4 * i + 1], b[4 * i + 3]);
  }
  for (int c = 0; c < 4; ++c) {
    const __m512 even0 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88), odd0 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd);
    const __m512 even1 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88),
                 odd1 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd);
    _mm512_storeu_ps(dst + c * ldd, _mm512_shuffle_f32x4(even0, even1, 0x88));
    _mm512_storeu_ps(dst + (4 + c) * ldd, _mm512_shuffle_f32x4(odd0, odd1, 0x88));
    _mm512_storeu_ps(dst + (8 + c) * ldd, _mm512_shuffle_f32x4(even0, even1, 0xdd));
    _mm512_storeu_ps(dst + (12 + c) * ldd, _mm512_shuffle_f32x4(odd0, odd1, 0xdd));
  }
}
#elif T2L_ISA_LEVEL == T2L_AVX2
template <class Row>
inline void transpose_block(const Row& row, float* dst, int64_t ldd) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(static_cast<const float*>(row(i)));
  for (int i = 0; i < 4; ++i) {
    b[2 * i] = _mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {  // a[4 i + c]: columns c and c + 4 of rows 4 i to 4 i + 3, one per 128-bit lane
    a[4 * i] = _mm256_shuffle_ps(b[4 * i], b[4 * i + 2], 0x44);
    a[4 * i + 1] = _mm256_shuffle_ps(b[4 * i], b[4 * i + 2], 0xee);
    a[4 * i + 2] = _mm256_shuffle_ps(b[4 * i + 1], b[4 * i + 3], 0x44);
    a[4 * i + 3] = _mm256_shuffle_ps(b[4 * i + 1], b[4 * i + 3], 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    _mm256_storeu_ps(dst + c * ldd, _mm256_permute2f128_ps(a[c], a[4 + c], 0x20));
    _mm256_storeu_ps(dst + (4 + c) * ldd, _mm256_permute2f128_ps(a[c], a[4 + c], 0x31));
  }
}
#elif T2L_ISA_LEVEL <= T2L_NEON
template <class Row>
inline void transpose_block(const Row& row, float* dst, int64_t ldd) {
  uint32x4_t a[4];
  for (int i = 0; i < 4; ++i) a[i] = vreinterpretq_u32_u8(vld1q_u8(static_cast<const uint8_t*>(row(i))));
  const uint64x2_t low0 = vreinterpretq_u64_u32(vzip1q_u32(a[0], a[1])),
                   high0 = vreinterpretq_u64_u32(vzip2q_u32(a[0], a[1]));
  const uint64x2_t low1 = vreinterpretq_u64_u32(vzip1q_u32(a[2], a[3])),
                   high1 = vreinterpretq_u64_u32(vzip2q_u32(a[2], a[3]));
  store(dst, vreinterpretq_f32_u64(vzip1q_u64(low0, low1)));
  store(dst + ldd, vreinterpretq_f32_u64(vzip2q_u64(low0, low1)));
  store(dst + 2 * ldd, vreinterpretq_f32_u64(vzip1q_u64(high0, high1)));
  store(dst + 3 * ldd, vreinterpretq_f32_u64(vzip2q_u64(high0, high1)));
}
#else
template <class Row>
inline void transpose_block(const Row& row, float* dst, int64_t ldd) {
  for (int i = 0; i < kLanes; ++i)
    for (int c = 0; c < kLanes; ++c) std::memcpy(dst + c * ldd + i, static_cast<const char*>(row(i)) + 4 * c, 4);
}
#endif

#if T2L_ISA_LEVEL >= T2L_AVX512
// Transpose of 32 x 32 values of 2 bytes.
inline void transpose_pairs(const __m512i* rows, __m512i* out) {
  __m512i eight[32];  // [8 g + t]: columns t, 8 + t, 16 + t and 24 + t of rows 8 g to 8 g + 7, one per 128-bit lane
  for (int g = 0; g < 32; g += 8) {
    __m512i two[8], four[8];
    for (int i = 0; i < 4; ++i) {
      two[i] = _mm512_unpacklo_epi16(rows[g + 2 * i], rows[g + 2 * i + 1]);
      two[4 + i] = _mm512_unpackhi_epi16(rows[g + 2 * i], rows[g + 2 * i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      four[i] = _mm512_unpacklo_epi32(two[i], two[i + 1]);
      four[i + 1] = _mm512_unpackhi_epi32(two[i], two[i + 1]);
      four[i + 2] = _mm512_unpacklo_epi32(two[i + 2], two[i + 3]);
      four[i + 3] = _mm512_unpackhi_epi32(two[i + 2], two[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      const __m512i low = four[i / 2 * 4 + i % 2], high = four[i / 2 * 4 + 2 + i % 2];
      eight[g + 2 * i] = _mm512_unpacklo_epi64(low, high);
      eight[g + 2 * i + 1] = _mm512_unpackhi_epi64(low, high);
    }
  }
  for (int t = 0; t < 8; ++t) {
    const __m512i even0 = _mm512_shuffle_i32x4(eight[t], eight[8 + t], 0x88),
                  odd0 = _mm512_shuffle_i32x4(eight[t], eight[8 + t], 0xdd);
    const __m512i even1 = _mm512_shuffle_i32x4(eight[16 + t], eight[24 + t], 0x88),
                  odd1 = _mm512_shuffle_i32x4(eight[16 + t], eight[24 + t], 0xdd);
    out[t] = _mm512_shuffle_i32x4(even0, even1, 0x88);
    out[8 + t] = _mm512_shuffle_i32x4(odd0, odd1, 0x88);
    out[16 + t] = _mm512_shuffle_i32x4(even0, even1, 0xdd);
    out[24 + t] = _mm512_shuffle_i32x4(odd0, odd1, 0xdd);
  }
}
#endif

// dst[c * ldd + i] = src[i * lds + c] for i < rows, c < cols.
inline void transpose(const float* src, int64_t lds, int64_t rows, int64_t cols, float* dst, int64_t ldd) {
  const int64_t whole_rows = rows / kLanes * kLanes, whole_cols = cols / kLanes * kLanes;
  for (int64_t i = 0; i < whole_rows; i += kLanes)
    for (int64_t c = 0; c < whole_cols; c += kLanes)
      transpose_block([&](int64_t r) -> const void* { return src + (i + r) * lds + c; }, dst + c * ldd + i, ldd);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = i < whole_rows ? whole_cols : 0; c < cols; ++c) dst[c * ldd + i] = src[i * lds + c];
}

// transpose_vec16: lane i of out[j] = element j of row i, widened, for 16 bytes of each of kLanes rows.
#if T2L_ISA_LEVEL != T2L_GENERIC
#if T2L_ISA_LEVEL >= T2L_AVX512
using IntVec = __m512i;
inline IntVec load_every_fourth_row(const void* p, int64_t ld) {  // 16 bytes of rows 0, 4, 8 and 12
  const char* row = static_cast<const char*>(p);
  const auto part = [row, ld](int i) { return reinterpret_cast<const __m128i*>(row + 4 * i * ld); };
  __m512i v = _mm512_castsi128_si512(_mm_loadu_si128(part(0)));
  v = _mm512_inserti32x4(v, _mm_loadu_si128(part(1)), 1);
  v = _mm512_inserti32x4(v, _mm_loadu_si128(part(2)), 2);
  return _mm512_inserti32x4(v, _mm_loadu_si128(part(3)), 3);
}
inline IntVec low_dwords(IntVec a, IntVec b) { return _mm512_unpacklo_epi32(a, b); }
inline IntVec high_dwords(IntVec a, IntVec b) { return _mm512_unpackhi_epi32(a, b); }
inline IntVec low_qwords(IntVec a, IntVec b) { return _mm512_unpacklo_epi64(a, b); }
inline IntVec high_qwords(IntVec a, IntVec b) { return _mm512_unpackhi_epi64(a, b); }
inline Vec as_floats(IntVec v) { return _mm512_castsi512_ps(v); }
// The first and the second bfloat16 of every dword, widened.
inline Vec first_bf16(IntVec v) { return as_floats(_mm512_slli_epi32(v, 16)); }
inline Vec second_bf16(IntVec v) { return as_floats(_mm512_and_si512(v, _mm512_set1_epi32(-65536))); }
#elif T2L_ISA_LEVEL <= T2L_NEON
using IntVec = uint32x4_t;
inline IntVec load_every_fourth_row(const void* p, int64_t) {  // 16 bytes of row 0
  return vreinterpretq_u32_u8(vld1q_u8(static_cast<const uint8_t*>(p)));
}
inline IntVec low_dwords(IntVec a, IntVec b) { return vzip1q_u32(a, b); }
inline IntVec high_dwords(IntVec a, IntVec b) { return vzip2q_u32(a, b); }
inline IntVec low_qwords(IntVec a, IntVec b) {
  return vreinterpretq_u32_u64(vzip1q_u64(vreinterpretq_u64_u32(a), vreinterpretq_u64_u32(b)));
}
inline IntVec high_qwords(IntVec a, IntVec b) {
  return vreinterpretq_u32_u64(vzip2q_u64(vreinterpretq_u64_u32(a), vreinterpretq_u64_u32(b)));
}
inline Vec as_floats(IntVec v) { return vreinterpretq_f32_u32(v); }
// The first and the second bfloat16 of every dword, widened.
inline Vec first_bf16(IntVec v) { return as_floats(vshlq_n_u32(v, 16)); }
inline Vec second_bf16(IntVec v) { return as_floats(vandq_u32(v, vdupq_n_u32(0xffff0000u))); }
#else
using IntVec = __m256i;
inline IntVec load_every_fourth_row(const void* p, int64_t ld) {  // 16 bytes of rows 0 and 4
  const char* row = static_cast<const char*>(p);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row))),
                                 _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 4 * ld)), 1);
}
inline IntVec low_dwords(IntVec a, IntVec b) { return _mm256_unpacklo_epi32(a, b); }
inline IntVec high_dwords(IntVec a, IntVec b) { return _mm256_unpackhi_epi32(a, b); }
inline IntVec low_qwords(IntVec a, IntVec b) { return _mm256_unpacklo_epi64(a, b); }
inline IntVec high_qwords(IntVec a, IntVec b) { return _mm256_unpackhi_epi64(a, b); }
inline Vec as_floats(IntVec v) { return _mm256_castsi256_ps(v); }
// The first and the second bfloat16 of every dword, widened.
inline Vec first_bf16(IntVec v) { return as_floats(_mm256_slli_epi32(v, 16)); }
inline Vec second_bf16(IntVec v) { return as_floats(_mm256_and_si256(v, _mm256_set1_epi32(-65536))); }
#endif
inline void transpose_dwords(const void* rows, int64_t ld, IntVec* out) {  // ld in bytes; out[k]: dword k of every row
  const char* p = static_cast<const char*>(rows);
  const IntVec a = load_every_fourth_row(p, ld), b = load_every_fourth_row(p + ld, ld),
               c = load_every_fourth_row(p + 2 * ld, ld), d = load_every_fourth_row(p + 3 * ld, ld);
  const IntVec ab0 = low_dwords(a, b), ab1 = high_dwords(a, b), cd0 = low_dwords(c, d), cd1 = high_dwords(c, d);
  out[0] = low_qwords(ab0, cd0);
  out[1] = high_qwords(ab0, cd0);
  out[2] = low_qwords(ab1, cd1);
  out[3] = high_qwords(ab1, cd1);
}
inline void transpose_vec16(const float* rows, int64_t ld, Vec* out) {
  IntVec v[4];
  transpose_dwords(rows, ld * 4, v);
  for (int k = 0; k < 4; ++k) out[k] = as_floats(v[k]);
}
inline void transpose_vec16(const bf16* rows, int64_t ld, Vec* out) {
  IntVec v[4];
  transpose_dwords(rows, ld * 2, v);
  for (int k = 0; k < 4; ++k) {
    out[2 * k] = first_bf16(v[k]);
    out[2 * k + 1] = second_bf16(v[k]);
  }
}
#else
template <class T>
inline void transpose_vec16(const T* rows, int64_t ld, Vec* out) {
  for (int64_t j = 0; j < static_cast<int64_t>(16 / sizeof(T)); ++j) {
    float lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = to_float(rows[i * ld + j]);
    out[j] = load(lanes);
  }
}
#endif

}  // namespace T2L_ISA_NAMESPACE
}  // namespace t2l
