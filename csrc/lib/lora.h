// Batched LoRA on the caller's buffers: every check, then the kernel.
#pragma once
#include "t2l/kernels.h"
#include "t2l/t2l.h"

namespace t2l::lib {

// Of a t2l_isa; throws Error: T2L_INVALID_ARGUMENT, or T2L_UNSUPPORTED where this CPU lacks it.
Isa isa_of(int32_t isa);

// Of a t2l_dtype, the argument `name`; throws Error: T2L_INVALID_ARGUMENT.
DType type_of(const char* name, int32_t type);

// As t2l_lora_add.  Throws Error and std::bad_alloc.
void lora_add(const t2l_lora& lora, const t2l_parallel* parallel);

}  // namespace t2l::lib
