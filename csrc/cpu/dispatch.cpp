// Run-time dispatch over instruction sets.
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <string>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "t2l/kernels.h"
#include "t2l/probe.h"

namespace t2l {

#define T2L_DECLARE(ns)                                       \
  namespace ns {                                              \
  void lora(const LoraParams*, int64_t, bool, ParallelFor);   \
  void lora_backward(const LoraBackwardParams&, ParallelFor); \
  void hypernet_trunk(const TrunkParams&, ParallelFor);       \
  void hypernet_head(const HeadParams&, ParallelFor);         \
  void probe_read(const void*, int64_t, int64_t);             \
  void probe_copy(void*, const void*, int64_t, int64_t);      \
  }
T2L_DECLARE(generic)
#if defined(__x86_64__)
T2L_DECLARE(avx2)
T2L_DECLARE(avx512)
T2L_DECLARE(avx512_bf16)
namespace avx512_bf16 {
int64_t probe_multiply_adds(DType, int64_t);
}
T2L_DECLARE(avx512_bf16_wide)
T2L_DECLARE(amx)
#elif defined(__aarch64__)
T2L_DECLARE(neon)
T2L_DECLARE(neon_bf16)
#endif
T2L_DECLARE(amx_model)

namespace {

struct Kernels {
  void (*lora)(const LoraParams*, int64_t, bool, ParallelFor);
  void (*lora_backward)(const LoraBackwardParams&, ParallelFor);
  void (*hypernet_trunk)(const TrunkParams&, ParallelFor);
  void (*hypernet_head)(const HeadParams&, ParallelFor);
  void (*probe_read)(const void*, int64_t, int64_t);
  void (*probe_copy)(void*, const void*, int64_t, int64_t);
};

// LoRA uses neither matrix tiles nor panels: instruction sets that differ in those alone share its kernels.
#define T2L_KERNELS(ns, lora_ns) \
  {lora_ns::lora, lora_ns::lora_backward, ns::hypernet_trunk, ns::hypernet_head, ns::probe_read, ns::probe_copy}
constexpr Kernels kNone{};  // of another architecture, or not in this build
#if defined(__x86_64__)
#define T2L_X86_KERNELS(ns, lora_ns) T2L_KERNELS(ns, lora_ns)
#else
#define T2L_X86_KERNELS(ns, lora_ns) kNone
#endif
#if defined(__aarch64__)
#define T2L_ARM_KERNELS(ns) T2L_KERNELS(ns, ns)
#else
#define T2L_ARM_KERNELS(ns) kNone
#endif
#if defined(T2L_AMX_MODEL)
#define T2L_MODEL_KERNELS T2L_KERNELS(amx_model, generic)
#else
#define T2L_MODEL_KERNELS kNone
#endif
constexpr Kernels kKernels[kNumIsas] = {
    T2L_KERNELS(generic, generic),
    T2L_X86_KERNELS(avx2, avx2),
    T2L_X86_KERNELS(avx512, avx512),
    T2L_X86_KERNELS(avx512_bf16, avx512_bf16),
    T2L_X86_KERNELS(amx, avx512_bf16),
    T2L_MODEL_KERNELS,
    T2L_ARM_KERNELS(neon),
    T2L_ARM_KERNELS(neon_bf16),
    T2L_X86_KERNELS(avx512_bf16_wide, avx512_bf16),
};
constexpr const char* kNames[kNumIsas] = {"generic",   "avx2", "avx512",    "avx512_bf16",     "amx",
                                          "amx_model", "neon", "neon_bf16", "avx512_bf16_wide"};

const Kernels& kernels(Isa isa) { return kKernels[static_cast<int>(isa)]; }

enum class Tiles { none, refused, granted };

// Asks whether this process may use matrix tiles.  Systems save their registers for those alone that have asked, once and
// for all threads; many sandboxes and older systems show the flags of the CPU, but refuse.
Tiles ask_for_tiles() {
#if defined(__x86_64__) && defined(__linux__) && defined(SYS_arch_prctl)
  constexpr unsigned kNeeded = 1u << 24 | 1u << 22;  // CPUID 7.0 EDX: AMX-TILE, AMX-BF16
  constexpr long kAsk = 0x1023, kData = 18;          // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kNeeded) != kNeeded) return Tiles::none;
  return syscall(SYS_arch_prctl, kAsk, kData) == 0 ? Tiles::granted : Tiles::refused;
#else
  return Tiles::none;
#endif
}

#if defined(__x86_64__)
// Whether a thread does fewer multiply-adds a second of bfloat16 pairs than of float32.  CPUID does not say: some
// CPUs do nearly twice as many, those with matrix tiles half.  Some 0.2 ms, in turns, of each the best: a thread may be
// interrupted.
bool slow_pairs() {
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kIterations = 2048;
  double best[2] = {};  // of float32, of bfloat16
  for (int i = 0; i < 16; ++i) {
    const Clock::time_point start = Clock::now();
    const int64_t done = avx512_bf16::probe_multiply_adds(i % 2 ? DType::bf16 : DType::f32, kIterations);
    const double rate = static_cast<double>(done) / static_cast<double>((Clock::now() - start).count() + 1);
    if (rate > best[i % 2]) best[i % 2] = rate;
  }
  return best[1] < best[0];
}
#endif

#if defined(__aarch64__)
// With the half precision that its kernels are compiled for, too; no CPU with one and without the other is known.
bool has_bf16() {
#if defined(__linux__)
  constexpr unsigned long kHalf = 1ul << 10, kBf16 = 1ul << 14;  // HWCAP_ASIMDHP, HWCAP2_BF16: older headers lack them
  return (getauxval(AT_HWCAP) & kHalf) != 0 && (getauxval(AT_HWCAP2) & kBf16) != 0;
#elif defined(__APPLE__)
  for (const char* name : {"hw.optional.arm.FEAT_FP16", "hw.optional.arm.FEAT_BF16"}) {
    int has = 0;
    size_t size = sizeof has;
    if (sysctlbyname(name, &has, &size, nullptr, 0) != 0 || has == 0) return false;
  }
  return true;
#else
  return false;
#endif
}
#endif

struct Available {
  Available() {
    at(Isa::generic) = true;
    at(Isa::amx_model) = kernels(Isa::amx_model).lora != nullptr;
#if defined(__x86_64__)
    __builtin_cpu_init();
    at(Isa::avx2) = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    at(Isa::avx512) = at(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    at(Isa::avx512_bf16) = at(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
    at(Isa::avx512_bf16_wide) = at(Isa::avx512_bf16);
#endif
#if defined(__aarch64__)
    at(Isa::neon) = true;
    at(Isa::neon_bf16) = has_bf16();
#endif
  }
  bool& at(Isa isa) { return has[static_cast<int>(isa)]; }
  bool has[kNumIsas] = {};  // amx: of no account, see tiles()
};

const Available& available() {
  static const Available once;
  return once;
}

// A process that names another instruction set never asks: what is granted stays, and makes signal stacks need more room.
Tiles tiles() {
  static const Tiles once = has_isa(Isa::avx512_bf16) ? ask_for_tiles() : Tiles::none;
  return once;
}

// Whether avx512_bf16_wide is faster than avx512_bf16, where that is the best.
bool prefers_wide() {
#if defined(__x86_64__)
  static const bool once = has_isa(Isa::avx512_bf16) && !has_isa(Isa::amx) && slow_pairs();
  return once;
#else
  return false;
#endif
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool has_isa(Isa isa) { return isa == Isa::amx ? tiles() == Tiles::granted : available().has[static_cast<int>(isa)]; }

Isa detected_isa() {
  Isa best = Isa::generic;
  for (const Isa isa : {Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx, Isa::neon, Isa::neon_bf16})
    if (has_isa(isa)) best = isa;
  return prefers_wide() ? Isa::avx512_bf16_wide : best;
}

const char* detected_why() {
  switch (tiles()) {
    case Tiles::granted:
      return "matrix tiles for bfloat16 weights";
    case Tiles::refused:
      return prefers_wide() ? "this CPU has amx, but the system does not let this process use it, and its dot products of "
                              "bfloat16 are slower than products of float32"
                            : "this CPU has amx, but the system does not let this process use it";
    default:
      return prefers_wide() ? "its dot products of bfloat16 are slower than products of float32" : "the newest of this CPU";
  }
}

const char* chosen_isa(Isa* isa) {
  const char* wanted = std::getenv("T2L_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    *isa = detected_isa();
    return nullptr;
  }
  for (int i = 0; i < kNumIsas; ++i)
    if (std::strcmp(wanted, kNames[i]) == 0) {
      if (!has_isa(static_cast<Isa>(i))) return "T2L_ISA: this CPU, process or build lacks the instruction set it names";
      *isa = static_cast<Isa>(i);
      return nullptr;
    }
  constexpr const char* kExpected =
      "T2L_ISA: expected generic, avx2, avx512, avx512_bf16, avx512_bf16_wide, amx, amx_model, neon or neon_bf16, got ";
  thread_local std::string unknown;
  unknown = kExpected + ("'" + std::string(wanted) + "'");
  return unknown.c_str();
}

void lora(const LoraParams* problems, int64_t count, Isa isa, ParallelFor parallel) {
  const bool prefetches = isa == Isa::amx || isa == Isa::amx_model;  // no gain on CPUs without AMX (docs/design/kernels.md)
  kernels(isa).lora(problems, count, prefetches, parallel);
}
void lora_backward(const LoraBackwardParams& p, Isa isa, ParallelFor parallel) { kernels(isa).lora_backward(p, parallel); }
void hypernet_trunk(const TrunkParams& p, Isa isa, ParallelFor parallel) { kernels(isa).hypernet_trunk(p, parallel); }
void hypernet_head(const HeadParams& p, Isa isa, ParallelFor parallel) { kernels(isa).hypernet_head(p, parallel); }

void probe_read(const void* data, int64_t bytes, int64_t repeats, Isa isa) { kernels(isa).probe_read(data, bytes, repeats); }
void probe_copy(void* target, const void* source, int64_t bytes, int64_t repeats, Isa isa) {
  kernels(isa).probe_copy(target, source, bytes, repeats);
}

}  // namespace t2l
