// Pre-faults freshly allocated outputs.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "t2l/kernels.h"

namespace t2l {

void touch_output(void* data, int64_t bytes, ParallelFor parallel) {
#if defined(__linux__)
  constexpr uintptr_t kLargePage = uintptr_t{2} << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (start + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t end = (start + static_cast<uintptr_t>(bytes)) / kLargePage * kLargePage;
  // If madvise fails, the kernel faults in small pages one by one, as it would have without this call.
  if (end <= first || madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE) != 0) return;
  const RangeBody touch = [](int64_t begin, int64_t stop, void* context) {
    for (int64_t page = begin; page < stop; ++page) static_cast<volatile char*>(context)[page * kLargePage] = 0;
  };
  parallel.run(parallel.pool, static_cast<int64_t>((end - first) / kLargePage), 1, touch, reinterpret_cast<void*>(first));
#else
  (void)data, (void)bytes, (void)parallel;
#endif
}

}  // namespace t2l
