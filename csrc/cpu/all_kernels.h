// All kernels for the instruction set that T2L_ISA_LEVEL, T2L_TILES and T2L_WIDE_PANELS name together (simd.h): every
// kernels_<isa>.cpp compiles them once.
// Standard headers first: the target pragma of simd.h must not cover them.
#include <cmath>

#include "hypernet_head.h"
#include "hypernet_trunk.h"
#include "probe_impl.h"
#if !T2L_TILES && !T2L_WIDE_PANELS  // else those without tiles and wide panels serve (dispatch.cpp)
#include "lora_backward.h"
#include "lora_impl.h"
#endif

#ifdef T2L_POP_TARGET
T2L_POP_TARGET
#endif
