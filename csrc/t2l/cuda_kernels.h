// Entry points of the CUDA kernels: the ops of kernels.h on the current device, asynchronous on a stream (cudaStream_t).  No
// torch, no CUDA headers.  Pointers are device pointers.  Calls do not allocate, copy or synchronise, so they can be
// captured in CUDA graphs.  Each returns null or an error message, valid until the thread's next call.
#pragma once
#include <cstdint>

#include "t2l/params.h"

namespace t2l::cuda {

constexpr int64_t kMaxGroup = 8;  // linears or modules per launch; more take several launches

// Largest rank of lora, which fits any shared memory; a larger one is an error.
constexpr int64_t kMaxRank = 1024;
// Above it the torch op takes the reference.  What fits depends on dtype and device: hypernet_trunk says what does not.
constexpr int64_t kMaxTrunkWidth = 4096;

// As t2l::lora.  Ids, ranks and the ends of segments are validated on the device: out of range, the launch fails (ids:
// unless bad_ids of the problems, the same for all, is set).
const char* lora(const LoraParams* problems, int64_t count, void* stream);
// As t2l::lora_backward, in two launches.  b: [rank, out] storage (b_stride_out 1); workspace: 2 * tokens * rank floats.
const char* lora_backward(const LoraBackwardParams& params, float* workspace, void* stream);
const char* hypernet_trunk(const TrunkParams& params, void* stream);
// Modules must have the same h, tasks, rank, sides, ranks, layers and dtypes.
const char* hypernet_head(const HeadParams* modules, int64_t count, void* stream);

}  // namespace t2l::cuda
