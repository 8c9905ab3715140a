#if defined(__x86_64__)
#define T2L_ISA_LEVEL 3
#define T2L_WIDE_PANELS 1
#include "all_kernels.h"
#endif
