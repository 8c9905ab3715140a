// Run-time dispatch over instruction sets.
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

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
T2L_DECLARE(amx)
#endif
T2L_DECLARE(amx_model)

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
constexpr Kernels kNone{};
#if defined(__x86_64__)
#define T2L_X86_KERNELS(ns) T2L_KERNELS(ns)
#else
#define T2L_X86_KERNELS(ns) kNone
#endif
// By Isa.
constexpr Kernels kKernels[kNumIsas] = {
    T2L_KERNELS(generic),         T2L_X86_KERNELS(avx2), T2L_X86_KERNELS(avx512),
    T2L_X86_KERNELS(avx512_bf16), T2L_X86_KERNELS(amx),  T2L_KERNELS(amx_model),
};
constexpr const char* kNames[kNumIsas] = {"generic", "avx2", "avx512", "avx512_bf16", "amx", "amx_model"};

const Kernels& kernels(Isa isa) { return kKernels[static_cast<int>(isa)]; }

#if defined(__x86_64__)
bool made_by_intel() {
  unsigned largest = 0, name[3] = {};
  return __get_cpuid(0, &largest, &name[0], &name[2], &name[1]) && std::memcmp(name, "GenuineIntel", 12) == 0;
}
#endif

// Whether this process may use matrix tiles.  Systems save their registers for those alone that have asked, once and for all
// threads; many sandboxes and older systems know the flags of the CPU, but refuse.
bool tiles_granted() {
#if defined(__x86_64__) && defined(__linux__) && defined(SYS_arch_prctl)
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22, kSaved = 1u << 27;  // CPUID 7.0 EDX; CPUID 1 ECX: OSXSAVE
  constexpr long kAsk = 0x1023, kData = 18;                                  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kSaved)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kTile | kBf16)) != (kTile | kBf16)) return false;
  return syscall(SYS_arch_prctl, kAsk, kData) == 0;
#else
  return false;
#endif
}

struct Available {
  Available() {
    has[static_cast<int>(Isa::generic)] = has[static_cast<int>(Isa::amx_model)] = true;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    has[static_cast<int>(Isa::avx2)] = avx2;
    has[static_cast<int>(Isa::avx512)] = avx512;
    has[static_cast<int>(Isa::avx512_bf16)] = bf16;
    has[static_cast<int>(Isa::amx)] = bf16 && tiles_granted();
#endif
  }
  bool has[kNumIsas] = {};
};

const Available& available() {
  static const Available once;
  return once;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool has_isa(Isa isa) { return available().has[static_cast<int>(isa)]; }

Isa detected_isa() {
  for (const Isa isa : {Isa::amx, Isa::avx512_bf16, Isa::avx512, Isa::avx2})
    if (has_isa(isa)) return isa;
  return Isa::generic;
}

const char* chosen_isa(Isa* isa) {
  const char* wanted = std::getenv("T2L_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    *isa = detected_isa();
    return nullptr;
  }
  for (int i = 0; i < kNumIsas; ++i)
    if (std::strcmp(wanted, kNames[i]) == 0) {
      if (!has_isa(static_cast<Isa>(i))) return "T2L_ISA: this CPU lacks the instruction set it names";
      *isa = static_cast<Isa>(i);
      return nullptr;
    }
  return "T2L_ISA: expected generic, avx2, avx512, avx512_bf16, amx or amx_model";
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
