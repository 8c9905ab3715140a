// The example's own threads, as t2l_parallel asks for them.
#pragma once
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "t2l/t2l.h"

class Pool {
 public:
  // `threads`: with the one that calls.
  explicit Pool(int threads) {
    try {
      for (int i = 1; i < threads; ++i) threads_.emplace_back([this] { work(); });
    } catch (...) {  // no more threads are to be had
      join();
      throw;
    }
  }
  ~Pool() { join(); }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  t2l_parallel parallel() { return {run, this}; }

  // Calls body on ranges of at least `grain` items that cover [0, count); returns when all of them are done, or throws what
  // one of them has thrown.
  static void run(void* pool, int64_t count, int64_t grain, t2l_range_body body, void* context) {
    static_cast<Pool*>(pool)->run(count, grain, body, context);
  }

 private:
  void join() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void run(int64_t count, int64_t grain, t2l_range_body body, void* context) {
    if (count <= 0) return;
    if (threads_.empty() || count <= grain) return body(0, count, context);  // nobody is worth waking
    const std::lock_guard<std::mutex> turn(turn_);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const int64_t size = static_cast<int64_t>(threads_.size()) + 1;
      count_ = count;
      step_ = std::max(grain, (count + size - 1) / size);
      body_ = body;
      context_ = context;
      next_ = 0;
      busy_ = threads_.size();
      failure_ = nullptr;
      ++job_;
    }
    wake_.notify_all();
    take();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
    if (failure_) std::rethrow_exception(failure_);
  }

  // An exception waits until no thread uses the caller's memory any more.
  void take() {
    try {
      for (int64_t begin = next_.fetch_add(step_); begin < count_; begin = next_.fetch_add(step_))
        body_(begin, std::min(begin + step_, count_), context_);
    } catch (...) {
      next_ = count_;  // what is left is not begun
      const std::lock_guard<std::mutex> lock(mutex_);
      failure_ = std::current_exception();
    }
  }

  void work() {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return stop_ || job_ != seen; });
      if (stop_) return;
      seen = job_;
      lock.unlock();
      take();
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_;   // one job at a time
  std::mutex mutex_;  // of everything below
  std::condition_variable wake_, done_;
  int64_t count_ = 0, step_ = 1;
  t2l_range_body body_ = nullptr;
  void* context_ = nullptr;
  std::exception_ptr failure_;
  std::atomic<int64_t> next_{0};
  size_t busy_ = 0;
  uint64_t job_ = 0;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};
