#if defined(__aarch64__)
#define T2L_ISA_LEVEL -1
#include "all_kernels.h"
#endif
