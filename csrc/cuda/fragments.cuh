// Tensor-core products a b^T (both operands K-major), one k-block of 64 bytes of every row at a time.
//
// A lane (g = lane / 4, t = lane % 4) loads 16 bytes: vec t of the k-block of its rows.  The assignment of features to
// operand registers is free as long as A and B agree, so one 128-bit load gives the fragments of two MMAs, without ldmatrix
// or shuffles.
//
// float32 operands use 3xTF32 (x = high + low, 11 bits each): relative error at most 3 * 2^-22.  Tensor cores truncate when
// accumulating, a bias that would exceed float32 bounds over a large K: multiply_vec16 of float32 accumulates one k-block on
// tensor cores, and adds k-blocks with rounding.
#pragma once
#include "arithmetic.cuh"
#include "t2l/params.h"

namespace t2l::device {

template <class T>
struct TypeOf;
template <>
struct TypeOf<bf16> {
  static constexpr DType kType = DType::bf16;
};
template <>
struct TypeOf<f16> {
  static constexpr DType kType = DType::f16;
};
template <>
struct TypeOf<float> {
  static constexpr DType kType = DType::f32;
};
template <class T>
struct Traits : TypeOf<T> {
  static constexpr int kPerVec16 = 16 / static_cast<int>(sizeof(T));
  static constexpr int kPerKBlock = 4 * kPerVec16;  // features of a k-block (64 bytes)
};

struct Split {
  float high, low;
};

T2L_DEVICE bool is_finite(float v) { return (float_to_bits(v) & 0x7f800000u) != 0x7f800000u; }
// Infinities and NaN stay in `high` alone: times a zero in the `low` of the other operand they would give NaN.
T2L_DEVICE Split split(float v) {
  const float high = to_tf32(v);
  return Split{high, is_finite(high) ? to_tf32(v - high) : 0.0f};
}
T2L_DEVICE float finite_or_zero(float v) { return is_finite(v) ? v : 0.0f; }

// d (16 x 8) += a b^T over one k-block; low_rows, high_rows: vec t of rows g and g + 8 of a; b: vec t of row g of b.
template <class T>
T2L_DEVICE void multiply_vec16(float (&d)[4], const Vec16& low_rows, const Vec16& high_rows, const Vec16& b, T type) {
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    const uint32_t left[4] = {low_rows.word[2 * step], high_rows.word[2 * step], low_rows.word[2 * step + 1],
                              high_rows.word[2 * step + 1]};
    const uint32_t right[2] = {b.word[2 * step], b.word[2 * step + 1]};
    mma_16x8x16(d, left, right, type);
  }
}

// 3xTF32: d += left * right, the small terms first.  kRightIsExact: right.low is zero, so two MMAs suffice.
template <bool kRightIsExact>
T2L_DEVICE void multiply_split(float (&d)[4], const Split (&left)[4], const Split (&right)[2]) {
  const float right_high[2] = {right[0].high, right[1].high};
  const float left_high[4] = {left[0].high, left[1].high, left[2].high, left[3].high};
  const float left_low[4] = {left[0].low, left[1].low, left[2].low, left[3].low};
  const float finite_right[2] = {finite_or_zero(right[0].high), finite_or_zero(right[1].high)};
  mma_16x8x8(d, left_low, finite_right);
  if (!kRightIsExact) {
    const float right_low[2] = {right[0].low, right[1].low};
    const float finite_left[4] = {finite_or_zero(left[0].high), finite_or_zero(left[1].high), finite_or_zero(left[2].high),
                                  finite_or_zero(left[3].high)};
    mma_16x8x8(d, finite_left, right_low);
  }
  mma_16x8x8(d, left_high, right_high);
}

T2L_DEVICE void multiply_vec16(float (&d)[4], const Vec16& low_rows, const Vec16& high_rows, const Vec16& b, float) {
  float sum[4] = {};
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    const Split left[4] = {split(bits_to_float(low_rows.word[2 * step])), split(bits_to_float(high_rows.word[2 * step])),
                           split(bits_to_float(low_rows.word[2 * step + 1])),
                           split(bits_to_float(high_rows.word[2 * step + 1]))};
    const Split right[2] = {split(bits_to_float(b.word[2 * step])), split(bits_to_float(b.word[2 * step + 1]))};
    multiply_split<false>(sum, left, right);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] += sum[i];
}

// ---- loads, stores and conversions

T2L_DEVICE float load_float(const void* p, int64_t index, DType type) {
  if (type == DType::bf16) return to_float(load_one(static_cast<const bf16*>(p) + index));
  if (type == DType::f16) return to_float(load_one(static_cast<const f16*>(p) + index));
  return load_one(static_cast<const float*>(p) + index);
}
T2L_DEVICE void store_float(void* p, int64_t index, DType type, float value) {
  if (type == DType::bf16) {
    bf16 v;
    from_float(value, &v);
    return store_one(static_cast<bf16*>(p) + index, v);
  }
  if (type == DType::f16) {
    f16 v;
    from_float(value, &v);
    return store_one(static_cast<f16*>(p) + index, v);
  }
  store_one(static_cast<float*>(p) + index, value);
}

T2L_DEVICE void unpack_two(uint32_t word, bf16, float* first, float* second) {
  *first = bits_to_float(word << 16);
  *second = bits_to_float(word & 0xffff0000u);
}
T2L_DEVICE void unpack_two(uint32_t word, f16, float* first, float* second) {
  *first = to_float(f16{static_cast<uint16_t>(word)});
  *second = to_float(f16{static_cast<uint16_t>(word >> 16)});
}
template <class T>
T2L_DEVICE void unpack_pair(const Pair& pair, T type, float* out) {
  unpack_two(pair.word[0], type, &out[0], &out[1]);
  unpack_two(pair.word[1], type, &out[2], &out[3]);
}
template <class T>
T2L_DEVICE void unpack(const Vec16& q, T type, float* out) {
#pragma unroll
  for (int i = 0; i < 4; ++i) unpack_two(q.word[i], type, &out[2 * i], &out[2 * i + 1]);
}
T2L_DEVICE void unpack(const Vec16& q, float, float* out) {
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = bits_to_float(q.word[i]);
}
template <class T>
T2L_DEVICE uint32_t pack_two(float first, float second, T) {
  T low, high;
  from_float(first, &low);
  from_float(second, &high);
  return static_cast<uint32_t>(low.bits) | static_cast<uint32_t>(high.bits) << 16;
}
template <class T>
T2L_DEVICE Vec16 pack(const float* v, T type) {
  Vec16 q;
#pragma unroll
  for (int i = 0; i < 4; ++i) q.word[i] = pack_two(v[2 * i], v[2 * i + 1], type);
  return q;
}
T2L_DEVICE Vec16 pack(const float* v, float) {
  Vec16 q;
#pragma unroll
  for (int i = 0; i < 4; ++i) q.word[i] = float_to_bits(v[i]);
  return q;
}
T2L_DEVICE void set_element(Vec16* q, int i, bf16 v) { q->word[i / 2] |= static_cast<uint32_t>(v.bits) << (i % 2 * 16); }
T2L_DEVICE void set_element(Vec16* q, int i, f16 v) { q->word[i / 2] |= static_cast<uint32_t>(v.bits) << (i % 2 * 16); }
T2L_DEVICE void set_element(Vec16* q, int i, float v) { q->word[i] = float_to_bits(v); }

// 16 bytes of a row of `size` features, from feature k on, zero beyond the end.  `aligned`: the row is 16-byte aligned.
template <class T>
T2L_DEVICE Vec16 load_features(const T* row, int64_t k, int64_t size, bool aligned) {
  constexpr int n = Traits<T>::kPerVec16;
  if (aligned && k + n <= size) return load_vec16(row + k);
  Vec16 q = zero_vec16();
#pragma unroll
  for (int i = 0; i < n; ++i)
    if (k + i < size) set_element(&q, i, load_one(row + k + i));
  return q;
}

}  // namespace t2l::device
