#define T2L_ISA_LEVEL 0
#define T2L_TILES 2
#include "all_kernels.h"
