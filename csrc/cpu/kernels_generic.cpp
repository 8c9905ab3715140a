#define T2L_ISA_LEVEL 0
#include "hypernet_impl.h"
#include "lora_impl.h"
