// Entry points of the CUDA kernels: the arithmetic of kernels.h on the current device, in the order of a stream
// (cudaStream_t).  No torch, no CUDA headers.  Pointers are of the device; nothing is allocated, copied or waited for, so
// that calls can be captured in graphs.  Each returns null, or what went wrong: a text that lives until the thread's next
// call.
#pragma once
#include <cstdint>

#include "t2l/params.h"

namespace t2l::cuda {

constexpr int64_t kMaxGroup = 8;  // linears or modules of one launch; more take several

// Largest rank of lora, and trunk width of hypernet_trunk, that shared memory holds; what is larger is refused.
constexpr int64_t kMaxRank = 1024;
constexpr int64_t kMaxTrunkWidth = 4096;

// As t2l::lora.  An adapter id, rank or segment out of range makes the launch fail (ids are not read on the host).
const char* lora(const LoraParams* members, int64_t count, void* stream);
const char* hypernet_trunk(const TrunkParams& params, void* stream);
// Modules of one hypernetwork: the same h, tasks, sides, ranks, layers and dtypes.
const char* hypernet_head(const HeadParams* modules, int64_t count, void* stream);

}  // namespace t2l::cuda
