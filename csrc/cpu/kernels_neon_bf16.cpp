#if defined(__aarch64__)
#define T2L_ISA_LEVEL -2
#include "all_kernels.h"
#endif
