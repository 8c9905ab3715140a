// Roofline probes for benchmarks: memory bandwidth of one thread.
#pragma once
#include <cstdint>

#include "t2l/kernels.h"

namespace t2l {

// Reads [data, data + bytes) `repeats` times with vector loads; whole cache lines only.
void probe_read(const void* data, int64_t bytes, int64_t repeats, Isa isa);
// Copies `bytes` from source to target `repeats` times; whole cache lines only.
void probe_copy(void* target, const void* source, int64_t bytes, int64_t repeats, Isa isa);

}  // namespace t2l
