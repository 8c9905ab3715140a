#if defined(__x86_64__)
#define T2L_ISA_LEVEL 1
// The standard headers come first: what simd.h's target pragma covers must be this unit's own code alone.
#include <cmath>

#include "hypernet_head.h"
#include "hypernet_trunk.h"
#include "lora_backward.h"
#include "lora_impl.h"
#include "probe_impl.h"

T2L_POP_TARGET
#endif
