#if defined(__x86_64__)
#define T2L_ISA_LEVEL 3
#define T2L_WIDE_PANELS 1
// Standard headers first: the target pragma of simd.h must not cover them.
#include <cmath>

#include "hypernet_head.h"
#include "hypernet_trunk.h"
#include "lora_backward.h"
#include "lora_impl.h"
#include "probe_impl.h"

T2L_POP_TARGET
#endif
