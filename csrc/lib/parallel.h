// The caller's threads as the kernels use them.
#pragma once
#include <atomic>
#include <new>

#include "error.h"
#include "t2l/kernels.h"

namespace t2l::lib {

// A body that throws (the kernels do, where memory is lacking) must not unwind through the caller's pool: its failure is
// kept, and thrown again on the thread that called the library once the pool has returned.
class Parallel {
 public:
  // `caller`: null for no threads but the calling one; it must outlive this.
  explicit Parallel(const t2l_parallel* caller) : caller_(caller) {
    if (caller != nullptr && caller->run == nullptr) invalid("parallel", "a function in run", "NULL");
  }
  ParallelFor get() { return {run, this}; }

 private:
  struct Call {
    RangeBody body;
    void* context;
    int64_t count;
    std::atomic<int64_t> done;
    std::atomic<uint64_t> place;  // of the ranges done: the sum of end^2 - begin^2, count^2 where each item was done once
    std::atomic<bool> failed;
  };

  static void run(void* self, int64_t count, int64_t grain, RangeBody body, void* context) {
    const t2l_parallel* caller = static_cast<Parallel*>(self)->caller_;
    if (count <= 0) return;
    if (caller == nullptr) return body(0, count, context);
    Call call{body, context, count, {0}, {0}, {false}};
    caller->run(caller->pool, count, grain, guarded, &call);
    if (call.failed) throw std::bad_alloc();
    if (call.done != count || call.place != squared(count))
      throw Error(T2L_INTERNAL, "parallel: expected run to cover " + std::to_string(count) + " items once, got ranges of " +
                                    std::to_string(call.done) + " in all");
  }

  static uint64_t squared(int64_t i) { return static_cast<uint64_t>(i) * static_cast<uint64_t>(i); }

  static void guarded(int64_t begin, int64_t end, void* context) {
    Call& call = *static_cast<Call*>(context);
    if (begin < 0 || end > call.count || begin >= end) return;  // what is left out, or done twice, is missed at the end
    try {
      call.body(begin, end, call.context);
    } catch (...) {
      call.failed = true;
    }
    call.done += end - begin;
    call.place += squared(end) - squared(begin);
  }

  const t2l_parallel* const caller_;
};

}  // namespace t2l::lib
