#if defined(__aarch64__)
#define T2L_ISA_LEVEL -2
// Standard headers first: the target pragma of simd.h must not cover them.
#include <cmath>

#include "hypernet_head.h"
#include "hypernet_trunk.h"
#include "lora_backward.h"
#include "lora_impl.h"
#include "probe_impl.h"

T2L_POP_TARGET
#endif
