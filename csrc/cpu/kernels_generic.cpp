#define T2L_ISA_LEVEL 0
#include "all_kernels.h"
