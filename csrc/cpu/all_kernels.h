// All kernels for the instruction set that T2L_ISA_LEVEL, T2L_TILES and T2L_WIDE_PANELS name together (simd.h): every
// kernels_<isa>.cpp compiles them once.
// Standard headers first: the target pragma of simd.h must not cover them.
#include <cmath>

#include "hypernet_head.h"
#include "hypernet_trunk.h"
#include "lora_backward.h"
#include "lora_impl.h"
#include "probe_impl.h"

#ifdef T2L_POP_TARGET
T2L_POP_TARGET
#endif
