#define T2L_ISA_LEVEL 0
#define T2L_TILES 2
#include "hypernet_head.h"
#include "hypernet_trunk.h"
#include "lora_backward.h"
#include "lora_impl.h"
#include "probe_impl.h"
