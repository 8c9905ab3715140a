// Conversions, arithmetic and tensor cores: the other half of primitives.cuh.
#pragma once
#include "primitives.cuh"
#ifndef T2L_EMULATOR
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace t2l::device {

// ---- conversions and arithmetic

T2L_DEVICE float bits_to_float(uint32_t bits) {
#ifdef T2L_EMULATOR
  return emu::bit_cast<float>(bits);
#else
  return __uint_as_float(bits);
#endif
}
T2L_DEVICE uint32_t float_to_bits(float value) {
#ifdef T2L_EMULATOR
  return emu::bit_cast<uint32_t>(value);
#else
  return __float_as_uint(value);
#endif
}
T2L_DEVICE float to_float(float v) { return v; }
T2L_DEVICE float to_float(bf16 v) { return bits_to_float(static_cast<uint32_t>(v.bits) << 16); }
T2L_DEVICE float to_float(f16 v) {
#ifdef T2L_EMULATOR
  return emu::half_to_float(v.bits);
#else
  return __half2float(__ushort_as_half(v.bits));
#endif
}
// Round to nearest even.
T2L_DEVICE void from_float(float v, float* out) { *out = v; }
T2L_DEVICE void from_float(float v, bf16* out) {
#ifdef T2L_EMULATOR
  out->bits = emu::float_to_bf16(v);
#else
  out->bits = __bfloat16_as_ushort(__float2bfloat16_rn(v));
#endif
}
T2L_DEVICE void from_float(float v, f16* out) {
#ifdef T2L_EMULATOR
  out->bits = emu::float_to_half(v);
#else
  out->bits = __half_as_ushort(__float2half_rn(v));
#endif
}
// Rounds to TF32 (11 significant bits), ties away from zero.  The instruction leaves the low bits undefined, which may turn
// NaN into infinity: both are fixed here.
T2L_DEVICE float to_tf32(float v) {
#ifdef T2L_EMULATOR
  return emu::float_to_tf32(v);
#else
  uint32_t out;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out) : "f"(v));
  return __uint_as_float(v != v ? 0x7fffe000u : out & 0xffffe000u);
#endif
}
// e^x to 2 ulp, independent of compiler flags.
T2L_DEVICE float exponential(float x) {
#ifdef T2L_EMULATOR
  return emu::exponential(x);
#else
  return expf(x);
#endif
}
// a / b to 2 ulp for |b| < 2^126, zero beyond; exact division would call a subroutine.
T2L_DEVICE float fast_divide(float a, float b) {
#ifdef T2L_EMULATOR
  return emu::fast_divide(a, b);
#else
  return __fdividef(a, b);
#endif
}
T2L_DEVICE float rsqrt(float x) {
#ifdef T2L_EMULATOR
  return emu::rsqrt(x);
#else
  return __frcp_rn(__fsqrt_rn(x));
#endif
}
T2L_DEVICE float power(float base, float exponent) {
#ifdef T2L_EMULATOR
  return emu::power(base, exponent);
#else
  return powf(base, exponent);
#endif
}
// *c = cos(x), *s = sin(x), absolute error 2^-21 for |x| < 2^15; cosf() would need a table in local memory.
T2L_DEVICE void cos_sin(float x, float* c, float* s) {
#ifdef T2L_EMULATOR
  emu::cos_sin(x, c, s);
#else
  const float turns = rintf(x * 0.15915494f);                                                            // 1 / (2 pi)
  const float rest = __fmaf_rn(turns, 1.74845553e-7f, __fmaf_rn(turns, -6.28318548f, x)) * 0.31830989f;  // 1 / pi
  *c = cospif(rest);
  *s = sinpif(rest);
#endif
}

// ---- tensor cores.  volatile: where only a branch uses a product, a compiler might move it there, where not all lanes of
// the warp are.  d (16 x 8, float32) += a (16 x k) b (k x 8).  Fragment layout of the PTX ISA: with g = lane / 4 and t =
// lane % 4, d holds (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).

// m16n8k16, two elements per register: a holds (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..); b holds (2t..,
// g), (2t + 8.., g).
T2L_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16) {
#ifdef T2L_EMULATOR
  emu::mma_16x8x16(d, a, b, [](uint32_t bits) { return emu::bit_cast<float>(bits << 16); });
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
T2L_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], f16) {
#ifdef T2L_EMULATOR
  emu::mma_16x8x16(d, a, b, [](uint32_t bits) { return emu::half_to_float(static_cast<uint16_t>(bits)); });
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
// m16n8k8, TF32 operands (low bits are ignored): a holds (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); b holds (t, g),
// (t + 4, g).
T2L_DEVICE void mma_16x8x8(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
#ifdef T2L_EMULATOR
  emu::mma_16x8x8(d, a, b);
#else
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
                 "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
#endif
}

}  // namespace t2l::device
