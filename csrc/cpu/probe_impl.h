// Probes of one thread: memory bandwidth, for benchmarks, and the rates by which dispatch.cpp chooses between two
// instruction sets.  Empty asm statements keep the compiler from eliminating the work.
#pragma once
#include "simd.h"

namespace t2l {
namespace T2L_ISA_NAMESPACE {

#if defined(__x86_64__)
#define T2L_VECTOR_REGISTER "x"
#elif defined(__aarch64__)
#define T2L_VECTOR_REGISTER "w"
#else
#define T2L_VECTOR_REGISTER "m"
#endif

constexpr int kProbeStreams = 12;  // independent accumulators: hide the latency of FMA

void probe_read(const void* data, int64_t bytes, int64_t repeats) {
  const float* p = static_cast<const float*>(data);
  const int64_t count = bytes / kCacheLine * (kCacheLine / sizeof(float));
  for (int64_t r = 0; r < repeats; ++r) {
    Vec sums[4] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + 4 * kLanes <= count; i += 4 * kLanes)
      for (int k = 0; k < 4; ++k) sums[k] = add(sums[k], load(p + i + k * kLanes));
    for (; i < count; i += kLanes) sums[0] = add(sums[0], load(p + i));
    for (Vec& s : sums) asm volatile("" : : T2L_VECTOR_REGISTER(s) : "memory");
  }
}

void probe_copy(void* target, const void* source, int64_t bytes, int64_t repeats) {
  float* out = static_cast<float*>(target);
  const float* in = static_cast<const float*>(source);
  const int64_t count = bytes / kCacheLine * (kCacheLine / sizeof(float));
  for (int64_t r = 0; r < repeats; ++r) {
    for (int64_t i = 0; i < count; i += kLanes) store(out + i, load(in + i));
    asm volatile("" : : : "memory");
  }
}

#if T2L_ISA_LEVEL == T2L_AVX512_BF16 && !T2L_TILES && !T2L_WIDE_PANELS
// Products of T accumulated in float32, as in the kernels.
template <class T>
inline int64_t probe_steps(int64_t iterations) {
  using D = Dot<T, T>;
  T values[D::kStep];
  for (T& v : values) from_float(0.5f, &v);
  const typename D::Operand x = D::load_operand(values, D::kStep, 0);
  Vec sums[kProbeStreams];
  for (Vec& s : sums) s = zero();
  for (int64_t i = 0; i < iterations; ++i)
    for (int k = 0; k < kProbeStreams; ++k) sums[k] = D::step(x, x, sums[k]);
  for (Vec& s : sums) asm volatile("" : : T2L_VECTOR_REGISTER(s));
  return iterations * kProbeStreams * D::kStep * 2;
}

int64_t probe_multiply_adds(DType type, int64_t iterations) {
  return type == DType::bf16 ? probe_steps<bf16>(iterations) : probe_steps<float>(iterations);
}
#endif

}  // namespace T2L_ISA_NAMESPACE
}  // namespace t2l
