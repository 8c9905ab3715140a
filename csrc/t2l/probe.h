// Roofline probes: peak memory bandwidth and FLOP/s of one thread, for benchmarks; dispatch.cpp chooses by one of them
// between two instruction sets.
#pragma once
#include <cstdint>

#include "t2l/kernels.h"

namespace t2l {

// Reads [data, data + bytes) `repeats` times with vector loads; whole cache lines only.
void probe_read(const void* data, int64_t bytes, int64_t repeats, Isa isa);
// Copies `bytes` from source to target `repeats` times; whole cache lines only.
void probe_copy(void* target, const void* source, int64_t bytes, int64_t repeats, Isa isa);
// `iterations` rounds of register-only FMAs, with products of `type` accumulated in float32.  Returns the FLOPs done, two
// per FMA.
int64_t probe_multiply_adds(DType type, int64_t iterations, Isa isa);

}  // namespace t2l
