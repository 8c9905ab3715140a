// Pre-faults freshly allocated outputs.
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "t2l/kernels.h"

namespace t2l {

void touch_output(void* data, int64_t bytes, ParallelFor parallel) {
#if defined(__linux__)
  static const uintptr_t kPage = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));  // 64 KiB on some AArch64 systems
  constexpr uintptr_t kLargePage = uintptr_t{2} << 20;
  constexpr int64_t kChunk = 256 << 10;
  constexpr int kPopulate = 23;  // MADV_POPULATE_WRITE, of Linux 5.14: no fault for each page
  const uintptr_t start = reinterpret_cast<uintptr_t>(data), stop = start + static_cast<uintptr_t>(bytes);
  const auto up = [](uintptr_t address, uintptr_t page) { return (address + page - 1) / page * page; };
  const uintptr_t large = up(start, kLargePage), end = stop / kPage * kPage;
  struct Pages {
    uintptr_t first, end;
  } pages{up(start, kPage), end};
  if (pages.first >= end) return;
  // Advice: where it is refused, pages are small.
  if (large < end) madvise(reinterpret_cast<void*>(large), end - large, MADV_HUGEPAGE);
  const RangeBody touch = [](int64_t begin, int64_t past, void* context) {
    const Pages& p = *static_cast<const Pages*>(context);
    const uintptr_t from = p.first + static_cast<uintptr_t>(begin * kChunk);
    const uintptr_t to = p.first + static_cast<uintptr_t>(past * kChunk) < p.end ? p.first + past * kChunk : p.end;
    if (madvise(reinterpret_cast<void*>(from), to - from, kPopulate) == 0) return;
    for (uintptr_t page = from; page < to; page += kPage) *reinterpret_cast<volatile char*>(page) = 0;
  };
  const int64_t chunks = (static_cast<int64_t>(end - pages.first) + kChunk - 1) / kChunk;
  parallel.run(parallel.pool, chunks, 1, touch, &pages);
#else
  (void)data, (void)bytes, (void)parallel;
#endif
}

}  // namespace t2l
