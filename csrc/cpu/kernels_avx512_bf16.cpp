#if defined(__x86_64__)
#define T2L_ISA_LEVEL 3
#include "all_kernels.h"
#endif
