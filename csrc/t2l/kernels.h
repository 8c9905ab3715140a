// Entry points of the CPU kernels.  Plain C++: no torch, no Python, no global state.  Where memory is
// lacking they throw std::bad_alloc, also from a body that a pool runs.
#pragma once
#include <cstdint>

#include "t2l/params.h"

namespace t2l {

enum class Isa : int32_t { generic = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };
constexpr int kNumIsas = 4;

// Name as in T2L_ISA: "generic", "avx2", "avx512", "avx512_bf16".
const char* isa_name(Isa isa);
// Best instruction set of this CPU.
Isa detected_isa();
// The one in use: detected, lowered by the environment variable T2L_ISA.  A name that is none of the four, or asks for
// more than the CPU has, is an error: the returned message is not null and `isa` is untouched.
const char* chosen_isa(Isa* isa);

// How a kernel gets its threads: run(pool, count, grain, body, context) calls body(begin, end, context) over [0, count) in
// any partition, possibly on several threads, and returns when all of it is done; `grain` is the least number of items
// worth a thread.  `pool` is the caller's own.
using RangeBody = void (*)(int64_t begin, int64_t end, void* context);
struct ParallelFor {
  void (*run)(void* pool, int64_t count, int64_t grain, RangeBody body, void* context);
  void* pool;
};

// `isa` must not exceed detected_isa().
// `members`: linears that read the same x with the same segments, each with its own y, a, b and ranks; their y may be
// column slices of one tensor, which must not overlap.
void lora(const LoraParams* members, int64_t count, Isa isa, ParallelFor parallel);
void lora_backward(const LoraBackwardParams& params, Isa isa, ParallelFor parallel);
void hypernet_trunk(const TrunkParams& params, Isa isa, ParallelFor parallel);
void hypernet_head(const HeadParams& params, Isa isa, ParallelFor parallel);

// For memory fresh from the system that a kernel will write whole: asks for large pages where the system leaves the choice
// to programs, and takes the page faults on all threads, each page by one of them.  What the memory held is lost.
void touch_output(void* data, int64_t bytes, ParallelFor parallel);

}  // namespace t2l
