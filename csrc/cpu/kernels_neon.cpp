#if defined(__aarch64__)
#define T2L_ISA_LEVEL -1
#include "hypernet_head.h"
#include "hypernet_trunk.h"
#include "lora_backward.h"
#include "lora_impl.h"
#include "probe_impl.h"
#endif
