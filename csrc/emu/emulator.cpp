// Scheduler of the emulator.  Every OS thread that launches kernels has a Machine, which runs its blocks one after the
// other.
//
// Bookkeeping that threads of a block share without a barrier (wait states, slots, counters) is only accessed in functions
// without TSan instrumentation.  All else is ordered by tokens: the host releases one before a block and acquires another
// after it.
#include "emulator.h"

#include <cstdarg>
#include <cstdio>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "fiber.h"
#include "settings.h"
#include "shared_arena.h"

namespace t2l::emu {

__thread Running* running __attribute__((tls_model("initial-exec"))) = nullptr;

namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / kLanes;
constexpr int kCopyBytes = 16;

uint32_t bit_of(int thread) { return 1u << thread % kLanes; }

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  template <class T>
  T2L_EMU_NO_TSAN void shuffle(T* values, int64_t count) {
    for (int64_t i = count - 1; i > 0; --i) {
      const int64_t j = static_cast<int64_t>(next() % static_cast<uint64_t>(i + 1));
      const T value = values[i];
      values[i] = values[j];
      values[j] = value;
    }
  }

 private:
  T2L_EMU_NO_TSAN uint64_t next() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  uint64_t state_;
};

struct Copy {
  char* target;
  const char* source;
  int valid, group;
};
// Written as one object: TSan does not intercept a memset this small.
struct alignas(kCopyBytes) CopyUnit {
  uint64_t word[2];
};
static_assert(sizeof(CopyUnit) == kCopyBytes);
void write_unit(char* target, const CopyUnit& unit) { reinterpret_cast<AnyType<CopyUnit>*>(target)->value = unit; }
void land(const Copy& copy) {
  CopyUnit unit{};
  std::memcpy(&unit, copy.source, copy.valid);
  write_unit(copy.target, unit);
}

struct Thread {
  Thread(Fiber::Entry entry, int index) : fiber(entry, index) {}
  Fiber fiber;
  std::vector<Copy> copies;  // in flight
  int groups = 0;            // committed so far
};

// Lane masks by state; a lane in none of them is running.
struct Warp {
  uint32_t ready, at_barrier, at_exchange, exited;
  int bytes;   // per lane, of the exchange in progress
  int buffer;  // of that exchange
};

// Double-buffered: a lane may deposit for the next exchange before another has read the last one.
struct ExchangeBuffer {
  Slot slots[kLanes];
  Operands operands;
};

class Machine : public Running {
 public:
  // nullptr, or why a driver would refuse the launch.
  const char* check_launch(const Launch& launch);
  const char* run(const Launch& launch, const Schedule& schedule, uint64_t seed, void (*body)(void*), void* argument);

  // Called by the running thread.
  T2L_EMU_NO_TSAN Thread& current() { return *threads_[thread]; }
  T2L_EMU_NO_TSAN bool eager() const { return schedule_.eager; }
  void wait_at_barrier();
  Exchange exchange_slots(const Slot& mine, int bytes);
  [[noreturn]] void abort_launch();

  // Formats the error of the launch.
  __attribute__((format(printf, 2, 3))) const char* describe(const char* format, ...);

  SharedArena shared;

 private:
  static void thread_main(Context* from);
  const char* run_block(int64_t index);
  void exit_thread();
  void run_next();
  int next_thread();
  void release_barrier();
  void describe_deadlock();
  void recover();

  Context host_;
  std::vector<std::unique_ptr<Thread>> owned_;
  Thread* threads_[kMaxThreads];  // the same as raw pointers: unique_ptr's accessors are instrumented
  int thread_count_ = 0, warp_count_ = 0;
  int at_barrier_ = 0, exited_ = 0;
  Warp warps_[kMaxWarps];
  ExchangeBuffer exchange_buffers_[kMaxWarps][2];

  Schedule schedule_;
  Random random_{0};
  uint16_t order_[kMaxThreads];  // shuffled schedules: order of this pass
  int place_ = 0;                // position in it

  Launch launch_{};
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
  bool failed_ = false;
  char text_[512];

  // Two tokens of barriers: a thread may arrive at the next one before all have left this one.
  char begin_token_ = 0, end_token_ = 0, barrier_tokens_[2] = {};
  int barrier_ = 0;
};

T2L_EMU_NO_TSAN Machine& machine() { return *static_cast<Machine*>(running); }

const char* Machine::describe(const char* format, ...) {
  va_list values;
  va_start(values, format);
  std::vsnprintf(text_, sizeof(text_), format, values);
  va_end(values);
  return text_;
}

const char* Machine::check_launch(const Launch& launch) {
  if (launch.grid_x < 1 || launch.grid_x > 0x7fffffff || launch.grid_y < 1 || launch.grid_y > 0xffff)
    return describe("launch of %lld x %d blocks", static_cast<long long>(launch.grid_x), launch.grid_y);
  if (launch.threads < 1 || launch.threads > kMaxThreads || launch.threads % kLanes)
    return describe("launch of blocks of %d threads", launch.threads);
  if (launch.shared_bytes < 0 || launch.shared_bytes > kMaxSharedBytes)
    return describe("launch with %lld bytes of shared memory, a block has %lld", static_cast<long long>(launch.shared_bytes),
                    static_cast<long long>(kMaxSharedBytes));
  if (launch.stream != current_stream())
    return describe("launched on stream %p, the current one is %p", launch.stream, current_stream());
  if (current_device() != memory_device())
    return describe("launched on device %d with memory of device %d", current_device(), memory_device());
  return nullptr;
}

const char* Machine::run(const Launch& launch, const Schedule& schedule, uint64_t seed, void (*body)(void*),
                         void* argument) {
  while (owned_.size() < static_cast<size_t>(launch.threads)) {
    const size_t index = owned_.size();
    owned_.push_back(std::make_unique<Thread>(thread_main, static_cast<int>(index)));
    threads_[index] = owned_[index].get();
  }
  host_ = current_context();
  launch_ = launch;
  schedule_ = schedule;
  body_ = body;
  argument_ = argument;
  thread_count_ = launch.threads;
  warp_count_ = launch.threads / kLanes;
  counters = Counters{};
  failed_ = false;
  random_ = Random(seed);
  for (int i = 0; i < thread_count_; ++i) order_[i] = static_cast<uint16_t>(i);
  place_ = thread_count_;
  const int64_t blocks = launch.grid_x * launch.grid_y;
  std::vector<int64_t> shuffled;
  if (schedule.seed) {
    for (int64_t i = 0; i < blocks; ++i) shuffled.push_back(i);
    random_.shuffle(shuffled.data(), blocks);
  }
  for (int64_t i = 0; i < blocks; ++i)
    if (const char* error = run_block(schedule.seed ? shuffled[i] : schedule.reverse ? blocks - 1 - i : i)) return error;
  return nullptr;
}

const char* Machine::run_block(int64_t index) {
  block_x = index % launch_.grid_x;
  block_y = static_cast<int>(index / launch_.grid_x);
  at_barrier_ = exited_ = 0;
  for (int w = 0; w < warp_count_; ++w) warps_[w] = Warp{~0u, 0, 0, 0, 0, 0};
  shared.reset(launch_.shared_bytes);
  release(&begin_token_);
  thread = next_thread();
  warps_[thread / kLanes].ready &= ~bit_of(thread);
  switch_to(&host_, &current().fiber.context);
  acquire(&end_token_);
  if (failed_) {
    recover();
    return text_;
  }
  const auto overrun = shared.find_overrun();
  if (!overrun) return nullptr;
  return describe("a thread of block (%lld, %d) wrote outside its allocation %d of shared memory, at byte %lld",
                  static_cast<long long>(block_x), block_y, overrun->allocation, static_cast<long long>(overrun->offset));
}

// After a failure, threads are suspended inside the kernel: restart them.
void Machine::recover() {
  for (auto& thread : owned_) {
    thread->fiber.release_from_outside(&end_token_);
    acquire(&end_token_);
    thread->fiber.restart();
    thread->copies.clear();
  }
}

// ---- threads

void Machine::thread_main(Context* from) {
  Machine& m = machine();
  acquire(&m.begin_token_);
  finish_switch(&m.current().fiber.context, from);
  for (;;) {
    m.body_(m.argument_);
    m.exit_thread();
  }
}

// Returns when the next block begins.
T2L_EMU_NO_TSAN void Machine::exit_thread() {
  Thread& me = current();
  Warp& warp = warps_[thread / kLanes];
  if (!me.copies.empty()) fail("exits with %lld copies in flight", static_cast<int64_t>(me.copies.size()));
  if (warp.at_exchange) fail("exits while %lld lanes of its warp wait at an exchange", __builtin_popcount(warp.at_exchange));
  release(&end_token_);
  warp.exited |= bit_of(thread);
  if (++exited_ == thread_count_) {
    switch_to(&me.fiber.context, &host_);
  } else {
    if (at_barrier_ + exited_ == thread_count_) release_barrier();
    run_next();
  }
  acquire(&begin_token_);
}

T2L_EMU_NO_TSAN void Machine::abort_launch() {
  failed_ = true;
  release(&end_token_);
  switch_to(&current().fiber.context, &host_);
  __builtin_unreachable();
}

// Suspends this thread until another one makes it ready.
T2L_EMU_NO_TSAN void Machine::run_next() {
  const int next = next_thread();
  if (next < 0) {
    describe_deadlock();
    abort_launch();
  }
  Thread& me = current();
  warps_[next / kLanes].ready &= ~bit_of(next);
  thread = next;
  switch_to(&me.fiber.context, &current().fiber.context);
}

// The next thread of the schedule, or -1 if none is ready.
T2L_EMU_NO_TSAN int Machine::next_thread() {
  if (schedule_.seed == 0) {
    for (int i = 0; i < warp_count_; ++i) {
      const int w = schedule_.reverse ? warp_count_ - 1 - i : i;
      const uint32_t ready = warps_[w].ready;
      if (ready) return w * kLanes + (schedule_.reverse ? 31 - __builtin_clz(ready) : __builtin_ctz(ready));
    }
    return -1;
  }
  for (int pass = 0; pass < 2; ++pass) {  // the rest of this pass, then a new one
    while (place_ < thread_count_) {
      const int next = order_[place_++];
      if (warps_[next / kLanes].ready & bit_of(next)) return next;
    }
    random_.shuffle(order_, thread_count_);
    place_ = 0;
  }
  return -1;
}

T2L_EMU_NO_TSAN void Machine::wait_at_barrier() {
  void* token = &barrier_tokens_[barrier_];
  release(token);
  if (at_barrier_ + 1 + exited_ == thread_count_) {
    release_barrier();
  } else {
    ++at_barrier_;
    warps_[thread / kLanes].at_barrier |= bit_of(thread);
    run_next();
  }
  acquire(token);
}

// Exited threads count as arrived, as on a device.
T2L_EMU_NO_TSAN void Machine::release_barrier() {
  for (int w = 0; w < warp_count_; ++w) {
    warps_[w].ready |= warps_[w].at_barrier;
    warps_[w].at_barrier = 0;
  }
  at_barrier_ = 0;
  barrier_ ^= 1;
}

T2L_EMU_NO_TSAN Exchange Machine::exchange_slots(const Slot& mine, int bytes) {
  Warp& warp = warps_[thread / kLanes];
  const uint32_t me = bit_of(thread);
  if (warp.exited) fail("warp exchange: %lld lanes of the warp have exited", __builtin_popcount(warp.exited));
  if (warp.at_exchange && warp.bytes != bytes)
    fail("divergent exchange: deposits %lld bytes where other lanes of the warp deposit %lld", bytes, warp.bytes);
  ExchangeBuffer& buffer = exchange_buffers_[thread / kLanes][warp.buffer];
  buffer.slots[thread % kLanes] = mine;
  warp.bytes = bytes;
  const bool last = (warp.at_exchange | me) == ~0u;
  if (last) {
    warp.ready |= warp.at_exchange;
    warp.at_exchange = 0;
    warp.buffer ^= 1;
  } else {
    warp.at_exchange |= me;
    run_next();
  }
  return Exchange{buffer.slots, &buffer.operands, last};
}

T2L_EMU_NO_TSAN void Machine::describe_deadlock() {
  std::string waiting;
  if (at_barrier_) waiting = std::to_string(at_barrier_) + " threads at a barrier";
  for (int w = 0; w < warp_count_; ++w)
    if (const uint32_t lanes = warps_[w].at_exchange)
      waiting += (waiting.empty() ? "" : ", ") + std::to_string(__builtin_popcount(lanes)) + " lanes of warp " +
                 std::to_string(w) + " at an exchange";
  describe("deadlock: %s (block %lld, %d)", waiting.c_str(), static_cast<long long>(block_x), block_y);
}

}  // namespace

// ---- emulator.h

const char* run(const Launch& launch, void (*body)(void*), void* argument) {
  thread_local std::unique_ptr<Machine> mine;
  if (!mine) mine = std::make_unique<Machine>();
  running = mine.get();
  Settings& all = settings();
  if (!all.error.empty()) return all.error.c_str();
  if (const char* error = mine->check_launch(launch)) return error;
  Schedule schedule;
  uint64_t seed;
  {
    const std::lock_guard<std::mutex> lock(all.mutex);
    schedule = all.schedule;
    seed = schedule.seed * 0x10001 + ++all.launches;
    all.last = LaunchRecord{current_device(), launch};
  }
  const char* error = mine->run(launch, schedule, seed, body, argument);
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.counters.read += mine->counters.read;
  all.counters.written += mine->counters.written;
  all.counters.flops += mine->counters.flops;
  ++all.counters.launches;
  return error;
}

void fail(const char* what) {
  Machine& m = machine();
  m.describe("%s (block %lld, %d, thread %d)", what, static_cast<long long>(m.block_x), m.block_y, thread_index());
  m.abort_launch();
}
void fail(const char* format, int64_t first, int64_t second) {
  char what[256];
  std::snprintf(what, sizeof(what), format, static_cast<long long>(first), static_cast<long long>(second));
  fail(what);
}

T2L_EMU_NO_TSAN void* take_shared(SharedCursor* cursor, int64_t bytes) {
  return machine().shared.allocate(cursor->next++, bytes);
}

void block_barrier() { machine().wait_at_barrier(); }

void copy_async(void* target, const void* global, int bytes, int valid) {
  Machine& m = machine();
  char* begin = static_cast<char*>(target);
  const char* source = static_cast<const char*>(global);
  if (bytes != kCopyBytes || valid < 0 || valid > bytes)
    fail("asynchronous copy of %lld bytes, %lld of them from the source", bytes, valid);
  for (const char* address : {static_cast<const char*>(begin), source})
    if (reinterpret_cast<uintptr_t>(address) % kCopyBytes)
      fail("asynchronous copy of %lld bytes at an address that is not a multiple of %lld", bytes, kCopyBytes);
  if (!m.shared.holds(begin, bytes)) fail("asynchronous copy to an address outside the allocations of shared memory");
  count_read(valid);
  Thread& me = m.current();
  const Copy copy{begin, source, valid, me.groups};
  if (m.eager()) return land(copy);
  write_unit(begin, CopyUnit{{~uint64_t{0}, ~uint64_t{0}}});
  me.copies.push_back(copy);
}

void commit_copies() { ++machine().current().groups; }

void wait_for_copies(int pending) {
  Thread& me = machine().current();
  size_t landed = 0;
  for (; landed < me.copies.size() && me.copies[landed].group < me.groups - pending; ++landed) land(me.copies[landed]);
  me.copies.erase(me.copies.begin(), me.copies.begin() + static_cast<std::ptrdiff_t>(landed));
}

Exchange exchange_slots(const Slot& mine, int bytes) { return machine().exchange_slots(mine, bytes); }

}  // namespace t2l::emu
