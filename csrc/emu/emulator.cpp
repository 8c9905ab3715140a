// Scheduler of the emulator.  Every OS thread that launches kernels has a Machine, which runs its clusters of blocks (most
// of one block) one after the other.
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
#include "random.h"
#include "settings.h"
#include "shared_arena.h"

namespace t2l::emu {

__thread Running* running __attribute__((tls_model("initial-exec"))) = nullptr;

namespace {

constexpr int kMaxThreads = 1024;  // of a block
constexpr int kMaxCluster = 16;
constexpr int kMaxFibers = 4096;  // threads of all blocks of a cluster
constexpr int kMaxWarps = kMaxFibers / kLanes;
constexpr int kCopyBytes = 16;

uint32_t bit_of(int fiber) { return 1u << fiber % kLanes; }

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
  bool waited = true;        // for earlier launches
  bool arrived = false;      // at a cluster barrier, for which it has not waited yet
  int arrived_at = 0;        // which of two
};

// Lane masks by state; a lane in none of them is running.
struct Warp {
  uint32_t ready, at_barrier, at_cluster_barrier, at_exchange, exited;
  int bytes;   // per lane, of the exchange in progress
  int buffer;  // of that exchange
};

// Double-buffered: a lane may deposit for the next exchange before another has read the last one.
struct ExchangeBuffer {
  Slot slots[kLanes];
  Operands operands;
};

// What the threads of a block share.
struct Block {
  SharedArena shared;
  int at_barrier = 0, exited = 0;
  // Two tokens: a thread may arrive at the next barrier before all have left this one.
  char barrier_tokens[2] = {};
  int barrier = 0;
};

class Machine : public Running {
 public:
  // nullptr, or why a driver would refuse the launch.
  const char* check_launch(const Launch& launch);
  const char* run(const Launch& launch, const Schedule& schedule, uint64_t seed, void (*body)(void*), void* argument);

  // Called by the running thread.
  T2L_EMU_NO_TSAN Thread& current() { return *threads_[fiber_]; }
  T2L_EMU_NO_TSAN SharedArena& shared() { return block().shared; }
  T2L_EMU_NO_TSAN bool eager() const { return schedule_.eager; }
  void wait_at_barrier();
  void wait_for_earlier_launches();
  int peek(const int* p) const;
  void arrive_at_cluster_barrier();
  void wait_at_cluster_barrier();
  char* map_to_block(char* mine, int64_t bytes, int index);
  Exchange exchange_slots(const Slot& mine, int bytes);
  [[noreturn]] void abort_launch();

  // Formats the error of the launch.
  __attribute__((format(printf, 2, 3))) const char* describe(const char* format, ...);

 private:
  static void thread_main(Context* from);
  const char* run_cluster(int64_t index);
  T2L_EMU_NO_TSAN Block& block() { return *blocks_[fiber_ / launch_.threads]; }
  void set_current(int fiber);
  void exit_thread();
  void run_next();
  int next_thread();
  void release_barrier();
  void release_cluster_barrier();
  void describe_deadlock();
  void recover();

  Context host_;
  std::vector<std::unique_ptr<Thread>> owned_;
  Thread* threads_[kMaxFibers];  // the same as raw pointers: unique_ptr's accessors are instrumented
  std::vector<std::unique_ptr<Block>> owned_blocks_;
  Block* blocks_[kMaxCluster];
  int fiber_ = 0;                         // the running one, counted over the blocks of the cluster
  int fiber_count_ = 0, warp_count_ = 0;  // of the cluster
  int at_cluster_barrier_ = 0, exited_ = 0;
  Warp warps_[kMaxWarps];
  ExchangeBuffer exchange_buffers_[kMaxWarps][2];

  Schedule schedule_;
  Random random_{0};
  uint16_t order_[kMaxFibers];  // shuffled schedules: order of this pass
  int place_ = 0;               // position in it

  Launch launch_{};
  int64_t first_x_ = 0;  // block of the cluster
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
  bool failed_ = false;
  char text_[512];

  char begin_token_ = 0, end_token_ = 0, cluster_tokens_[2] = {};
  int cluster_barrier_ = 0;
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
  if (launch.cluster < 1 || launch.cluster > max_cluster() || launch.cluster > kMaxCluster ||
      launch.cluster * launch.threads > kMaxFibers || launch.grid_x % launch.cluster)
    return describe("launch of %lld blocks along x in clusters of %d, the device has clusters of %d",
                    static_cast<long long>(launch.grid_x), launch.cluster, max_cluster());
  if (launch.shared_bytes < 0 || launch.shared_bytes > emu::shared_bytes())
    return describe("launch with %lld bytes of shared memory, a block has %d", static_cast<long long>(launch.shared_bytes),
                    emu::shared_bytes());
  if (launch.stream != current_stream())
    return describe("launched on stream %p, the current one is %p", launch.stream, current_stream());
  if (current_device() != memory_device())
    return describe("launched on device %d with memory of device %d", current_device(), memory_device());
  return nullptr;
}

const char* Machine::run(const Launch& launch, const Schedule& schedule, uint64_t seed, void (*body)(void*),
                         void* argument) {
  fiber_count_ = launch.threads * launch.cluster;
  while (owned_.size() < static_cast<size_t>(fiber_count_)) {
    const size_t index = owned_.size();
    owned_.push_back(std::make_unique<Thread>(thread_main, static_cast<int>(index)));
    threads_[index] = owned_[index].get();
  }
  while (owned_blocks_.size() < static_cast<size_t>(launch.cluster)) {
    owned_blocks_.push_back(std::make_unique<Block>());
    blocks_[owned_blocks_.size() - 1] = owned_blocks_.back().get();
  }
  host_ = current_context();
  launch_ = launch;
  schedule_ = schedule;
  body_ = body;
  argument_ = argument;
  warp_count_ = fiber_count_ / kLanes;
  counters = Counters{};
  failed_ = false;
  random_ = Random(seed);
  for (int i = 0; i < fiber_count_; ++i) order_[i] = static_cast<uint16_t>(i);
  place_ = fiber_count_;
  const int64_t clusters = launch.grid_x / launch.cluster * launch.grid_y;
  std::vector<int64_t> shuffled;
  if (schedule.seed) {
    for (int64_t i = 0; i < clusters; ++i) shuffled.push_back(i);
    random_.shuffle(shuffled.data(), clusters);
  }
  for (int64_t i = 0; i < clusters; ++i)
    if (const char* error = run_cluster(schedule.seed ? shuffled[i] : schedule.reverse ? clusters - 1 - i : i)) return error;
  return nullptr;
}

const char* Machine::run_cluster(int64_t index) {
  const int64_t clusters_x = launch_.grid_x / launch_.cluster;
  first_x_ = index % clusters_x * launch_.cluster;
  block_y = static_cast<int>(index / clusters_x);
  at_cluster_barrier_ = exited_ = 0;
  for (int i = 0; i < fiber_count_; ++i) threads_[i]->waited = !launch_.early;
  for (int w = 0; w < warp_count_; ++w) warps_[w] = Warp{~0u, 0, 0, 0, 0, 0, 0};
  for (int b = 0; b < launch_.cluster; ++b) {
    blocks_[b]->at_barrier = blocks_[b]->exited = 0;
    blocks_[b]->shared.reset(launch_.shared_bytes);
  }
  release(&begin_token_);
  set_current(next_thread());
  switch_to(&host_, &current().fiber.context);
  acquire(&end_token_);
  if (failed_) {
    recover();
    return text_;
  }
  for (int b = 0; b < launch_.cluster; ++b)
    if (const auto overrun = blocks_[b]->shared.find_overrun())
      return describe("a thread of block (%lld, %d) wrote outside its allocation %d of shared memory, at byte %lld",
                      static_cast<long long>(first_x_ + b), block_y, overrun->allocation,
                      static_cast<long long>(overrun->offset));
  return nullptr;
}

// After a failure, threads are suspended inside the kernel: restart them.
void Machine::recover() {
  for (auto& thread : owned_) {
    thread->fiber.release_from_outside(&end_token_);
    acquire(&end_token_);
    thread->fiber.restart();
    thread->copies.clear();
    thread->arrived = false;
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
  Warp& warp = warps_[fiber_ / kLanes];
  if (!me.copies.empty()) fail("exits with %lld copies in flight", static_cast<int64_t>(me.copies.size()));
  if (!me.waited) fail("exits without having waited for earlier launches");
  if (me.arrived) fail("exits without having waited at a cluster barrier");
  if (warp.at_exchange) fail("exits while %lld lanes of its warp wait at an exchange", __builtin_popcount(warp.at_exchange));
  release(&end_token_);
  warp.exited |= bit_of(fiber_);
  ++block().exited;
  if (++exited_ == fiber_count_) {
    switch_to(&me.fiber.context, &host_);
  } else {
    if (block().at_barrier + block().exited == launch_.threads) release_barrier();
    if (at_cluster_barrier_ + exited_ == fiber_count_) release_cluster_barrier();
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
  set_current(next);
  switch_to(&me.fiber.context, &current().fiber.context);
}

T2L_EMU_NO_TSAN void Machine::set_current(int fiber) {
  warps_[fiber / kLanes].ready &= ~bit_of(fiber);
  fiber_ = fiber;
  thread = fiber % launch_.threads;
  block_x = first_x_ + fiber / launch_.threads;
  may_access = threads_[fiber]->waited;
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
    while (place_ < fiber_count_) {
      const int next = order_[place_++];
      if (warps_[next / kLanes].ready & bit_of(next)) return next;
    }
    random_.shuffle(order_, fiber_count_);
    place_ = 0;
  }
  return -1;
}

T2L_EMU_NO_TSAN void Machine::wait_at_barrier() {
  Block& mine = block();
  void* token = &mine.barrier_tokens[mine.barrier];
  release(token);
  if (mine.at_barrier + 1 + mine.exited == launch_.threads) {
    release_barrier();
  } else {
    ++mine.at_barrier;
    warps_[fiber_ / kLanes].at_barrier |= bit_of(fiber_);
    run_next();
  }
  acquire(token);
}

// Of the running thread's block.  Exited threads count as arrived, as on a device.
T2L_EMU_NO_TSAN void Machine::release_barrier() {
  const int warps = launch_.threads / kLanes, first = fiber_ / launch_.threads * warps;
  for (int w = first; w < first + warps; ++w) {
    warps_[w].ready |= warps_[w].at_barrier;
    warps_[w].at_barrier = 0;
  }
  block().at_barrier = 0;
  block().barrier ^= 1;
}

T2L_EMU_NO_TSAN void Machine::wait_for_earlier_launches() { may_access = current().waited = true; }

T2L_EMU_NO_TSAN int Machine::peek(const int* p) const {
  constexpr int kNone = 0x5a5a5a5a;
  return may_access || (schedule_.seed == 0 && !schedule_.reverse) ? *p : kNone;
}

T2L_EMU_NO_TSAN void Machine::arrive_at_cluster_barrier() {
  Thread& me = current();
  if (me.arrived) fail("arrives again at a cluster barrier, without having waited");
  me.arrived = true;
  me.arrived_at = cluster_barrier_;
  release(&cluster_tokens_[me.arrived_at]);
  if (++at_cluster_barrier_ + exited_ == fiber_count_) release_cluster_barrier();
}

T2L_EMU_NO_TSAN void Machine::wait_at_cluster_barrier() {
  Thread& me = current();
  if (!me.arrived) fail("waits at a cluster barrier, without having arrived");
  me.arrived = false;
  if (me.arrived_at == cluster_barrier_) {  // not all are there
    warps_[fiber_ / kLanes].at_cluster_barrier |= bit_of(fiber_);
    run_next();
  }
  acquire(&cluster_tokens_[me.arrived_at]);
}

T2L_EMU_NO_TSAN void Machine::release_cluster_barrier() {
  for (int w = 0; w < warp_count_; ++w) {
    warps_[w].ready |= warps_[w].at_cluster_barrier;
    warps_[w].at_cluster_barrier = 0;
  }
  at_cluster_barrier_ = 0;
  cluster_barrier_ ^= 1;
}

T2L_EMU_NO_TSAN char* Machine::map_to_block(char* mine, int64_t bytes, int index) {
  if (index < 0 || index >= launch_.cluster)
    fail("shared memory of block %lld of a cluster of %lld", index, launch_.cluster);
  const int allocation = shared().find(mine, bytes);
  if (allocation < 0) fail("maps %lld bytes outside the allocations of shared memory", bytes);
  Block& other = *blocks_[index];
  char* there = other.shared.same_place(allocation, shared(), mine);
  if (there == nullptr || other.exited == launch_.threads)
    fail(there ? "shared memory of block %lld of the cluster, which has exited"
               : "shared memory of block %lld of the cluster, which has not allocated it yet",
         index);
  return there;
}

T2L_EMU_NO_TSAN Exchange Machine::exchange_slots(const Slot& mine, int bytes) {
  Warp& warp = warps_[fiber_ / kLanes];
  const uint32_t me = bit_of(fiber_);
  if (warp.exited) fail("warp exchange: %lld lanes of the warp have exited", __builtin_popcount(warp.exited));
  if (warp.at_exchange && warp.bytes != bytes)
    fail("divergent exchange: deposits %lld bytes where other lanes of the warp deposit %lld", bytes, warp.bytes);
  ExchangeBuffer& buffer = exchange_buffers_[fiber_ / kLanes][warp.buffer];
  buffer.slots[fiber_ % kLanes] = mine;
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
  const auto add = [&](int count, const std::string& what) {
    if (count) waiting += (waiting.empty() ? "" : ", ") + std::to_string(count) + what;
  };
  int at_barrier = 0;
  for (int b = 0; b < launch_.cluster; ++b) at_barrier += blocks_[b]->at_barrier;
  add(at_barrier, " threads at a barrier");
  add(at_cluster_barrier_, " threads at a cluster barrier");
  for (int w = 0; w < warp_count_; ++w)
    add(__builtin_popcount(warps_[w].at_exchange), " lanes of warp " + std::to_string(w) + " at an exchange");
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
  return machine().shared().allocate(cursor->next++, bytes);
}

void block_barrier() { machine().wait_at_barrier(); }
void wait_for_earlier_launches() { machine().wait_for_earlier_launches(); }
int peek(const int* p) { return machine().peek(p); }
void cluster_arrive() { machine().arrive_at_cluster_barrier(); }
void cluster_wait() { machine().wait_at_cluster_barrier(); }
void* map_to_block(void* mine, int64_t bytes, int block) {
  return machine().map_to_block(static_cast<char*>(mine), bytes, block);
}

void copy_async(void* target, const void* global, int bytes, int valid) {
  Machine& m = machine();
  char* begin = static_cast<char*>(target);
  const char* source = static_cast<const char*>(global);
  if (bytes != kCopyBytes || valid < 0 || valid > bytes)
    fail("asynchronous copy of %lld bytes, %lld of them from the source", bytes, valid);
  for (const char* address : {static_cast<const char*>(begin), source})
    if (reinterpret_cast<uintptr_t>(address) % kCopyBytes)
      fail("asynchronous copy of %lld bytes at an address that is not a multiple of %lld", bytes, kCopyBytes);
  if (m.shared().find(begin, bytes) < 0) fail("asynchronous copy to an address outside the allocations of shared memory");
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
