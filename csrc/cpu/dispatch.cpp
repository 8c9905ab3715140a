// Run-time dispatch over instruction sets.
#include <cstdlib>
#include <cstring>

#include "t2l/kernels.h"
#include "t2l/probe.h"

namespace t2l {

#define T2L_DECLARE(ns)                                       \
  namespace ns {                                              \
  void lora(const LoraParams*, int64_t, ParallelFor);         \
  void lora_backward(const LoraBackwardParams&, ParallelFor); \
  void hypernet_trunk(const TrunkParams&, ParallelFor);       \
  void hypernet_head(const HeadParams&, ParallelFor);         \
  void probe_read(const void*, int64_t, int64_t);             \
  void probe_copy(void*, const void*, int64_t, int64_t);      \
  int64_t probe_multiply_adds(DType, int64_t);                \
  }
T2L_DECLARE(generic)
#if defined(__x86_64__)
T2L_DECLARE(avx2)
T2L_DECLARE(avx512)
T2L_DECLARE(avx512_bf16)
#endif

namespace {

struct Kernels {
  void (*lora)(const LoraParams*, int64_t, ParallelFor);
  void (*lora_backward)(const LoraBackwardParams&, ParallelFor);
  void (*hypernet_trunk)(const TrunkParams&, ParallelFor);
  void (*hypernet_head)(const HeadParams&, ParallelFor);
  void (*probe_read)(const void*, int64_t, int64_t);
  void (*probe_copy)(void*, const void*, int64_t, int64_t);
  int64_t (*probe_multiply_adds)(DType, int64_t);
};

#define T2L_KERNELS(ns)                                                          \
  {ns::lora,       ns::lora_backward, ns::hypernet_trunk,     ns::hypernet_head, \
   ns::probe_read, ns::probe_copy,    ns::probe_multiply_adds}
constexpr Kernels kKernels[] = {
    T2L_KERNELS(generic),
#if defined(__x86_64__)
    T2L_KERNELS(avx2),
    T2L_KERNELS(avx512),
    T2L_KERNELS(avx512_bf16),
#endif
};

const Kernels& kernels(Isa isa) { return kKernels[static_cast<int>(isa)]; }

constexpr const char* kNames[kNumIsas] = {"generic", "avx2", "avx512", "avx512_bf16"};

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa detected_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::generic;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
      !__builtin_cpu_supports("avx512dq"))
    return Isa::avx2;
  return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
#else
  return Isa::generic;
#endif
}

const char* chosen_isa(Isa* isa) {
  const Isa best = detected_isa();
  const char* wanted = std::getenv("T2L_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    *isa = best;
    return nullptr;
  }
  for (int i = 0; i < kNumIsas; ++i)
    if (std::strcmp(wanted, kNames[i]) == 0) {
      if (i > static_cast<int>(best)) return "T2L_ISA: this CPU lacks the instruction set it names";
      *isa = static_cast<Isa>(i);
      return nullptr;
    }
  return "T2L_ISA: expected generic, avx2, avx512 or avx512_bf16";
}

void lora(const LoraParams* members, int64_t count, Isa isa, ParallelFor parallel) {
  kernels(isa).lora(members, count, parallel);
}
void lora_backward(const LoraBackwardParams& p, Isa isa, ParallelFor parallel) { kernels(isa).lora_backward(p, parallel); }
void hypernet_trunk(const TrunkParams& p, Isa isa, ParallelFor parallel) { kernels(isa).hypernet_trunk(p, parallel); }
void hypernet_head(const HeadParams& p, Isa isa, ParallelFor parallel) { kernels(isa).hypernet_head(p, parallel); }

void probe_read(const void* data, int64_t bytes, int64_t repeats, Isa isa) { kernels(isa).probe_read(data, bytes, repeats); }
void probe_copy(void* target, const void* source, int64_t bytes, int64_t repeats, Isa isa) {
  kernels(isa).probe_copy(target, source, bytes, repeats);
}
int64_t probe_multiply_adds(DType type, int64_t iterations, Isa isa) {
  return kernels(isa).probe_multiply_adds(type, iterations);
}

}  // namespace t2l
