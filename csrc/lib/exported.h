// Included ahead of the files that define what kernels.h declares: a shared library shows that, and hides the rest of them.
#pragma once
#pragma GCC visibility push(default)
#include "t2l/kernels.h"
#pragma GCC visibility pop
