// Whether the elements of a strided output lie apart.
#pragma once
#include <cstdint>

namespace t2l {

// What is wrong with the strides of an output: `dimension` -1: nothing.  `span`: elements that dimensions of smaller strides
// cover; `overlaps`: the stride lies within them, else with this dimension they would cover more than 2^60.
struct StrideFault {
  int dimension = -1;
  int64_t span = 1;
  bool overlaps = false;
};

// Of the dimension of the smallest stride that is at fault; those of size 0 and 1 may have any.
template <int kDims>
StrideFault find_stride_fault(const int64_t (&strides)[kDims], const int64_t (&sizes)[kDims]) {
  StrideFault fault;
  bool done[kDims] = {};
  for (;;) {
    int next = -1;
    for (int i = 0; i < kDims; ++i)
      if (!done[i] && sizes[i] > 1 && (next < 0 || strides[i] < strides[next])) next = i;
    if (next < 0) return fault;
    done[next] = true;
    int64_t more = 0, span = 0;
    fault.overlaps = strides[next] < fault.span;
    if (fault.overlaps || __builtin_mul_overflow(strides[next], sizes[next] - 1, &more) ||
        __builtin_add_overflow(fault.span, more, &span) || span > (int64_t{1} << 60)) {
      fault.dimension = next;
      return fault;
    }
    fault.span = span;
  }
}

}  // namespace t2l
