// Entry points of the CPU kernels.  Plain C++: no torch, no Python, no global state but this CPU's instruction sets, which
// the first call finds.  They may throw std::bad_alloc, also from a body that runs on a pool's thread.
#pragma once
#include <cstdint>

#include "t2l/params.h"

namespace t2l {

// Names in T2L_ISA.  amx_model: the kernels of amx in plain C++, for any CPU, in builds with T2L_TESTS alone.
// avx512_bf16_wide: avx512_bf16, but weights of the hypernetwork are widened to float32.
enum class Isa : int32_t {
  generic = 0,
  avx2 = 1,
  avx512 = 2,
  avx512_bf16 = 3,
  amx = 4,
  amx_model = 5,
  neon = 6,
  neon_bf16 = 7,
  avx512_bf16_wide = 8
};
constexpr int kNumIsas = 9;

// Its name.
const char* isa_name(Isa isa);
// Whether this CPU has it and, for amx, the system lets this process use it, for which the first call asks.
bool has_isa(Isa isa);
// The fastest instruction set of this CPU, and why it is that one, in words.
Isa detected_isa();
const char* detected_why();
// The instruction set in use: the detected one, or the one that the environment variable T2L_ISA names.  Returns null, or an
// error message (and leaves `isa` as it is) if T2L_ISA is none of the names, or one of which has_isa is false.  It is valid
// until the thread's next call.
const char* chosen_isa(Isa* isa);

// Parallel for over the caller's thread pool: run(pool, count, grain, body, context) calls body(begin, end, context) for any
// partition of [0, count), possibly on several threads, and returns when all calls have.  `grain`: minimum items per thread.
using RangeBody = void (*)(int64_t begin, int64_t end, void* context);
struct ParallelFor {
  void (*run)(void* pool, int64_t count, int64_t grain, RangeBody body, void* context);
  void* pool;
};

// `isa`: one of which has_isa is true.
// `problems`: linears that share x, segments, dtypes and `accumulate`, each with its own y, a, b and ranks.  Their y may be
// disjoint column slices of one tensor.
void lora(const LoraParams* problems, int64_t count, Isa isa, ParallelFor parallel);
void lora_backward(const LoraBackwardParams& params, Isa isa, ParallelFor parallel);
void hypernet_trunk(const TrunkParams& params, Isa isa, ParallelFor parallel);
void hypernet_head(const HeadParams& params, Isa isa, ParallelFor parallel);

// Pre-faults freshly allocated memory before a kernel overwrites it: requests transparent huge pages (madvise) and takes the
// page faults on all threads.  The contents are lost.
void touch_output(void* data, int64_t bytes, ParallelFor parallel);

}  // namespace t2l
