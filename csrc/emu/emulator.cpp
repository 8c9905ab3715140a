// Scheduler of the emulator, and its functions.  Every OS thread that launches kernels has a Machine, which runs its
// clusters of blocks (most of one block) one after the other.
#include "emulator.h"

#include <algorithm>
#include <mutex>

#include "machine.h"
#include "settings.h"

namespace t2l::emu {

__thread Running* running __attribute__((tls_model("initial-exec"))) = nullptr;

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
  const int most = std::min(emu::shared_bytes(), kMaxSharedBytes);
  if (launch.shared_bytes < 0 || launch.shared_bytes > most)
    return describe("launch with %lld bytes of shared memory, a block has %d", static_cast<long long>(launch.shared_bytes),
                    most);
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
  for (int i = 0; i < fiber_count_; ++i) threads_[i]->waited = !launch_.pdl;
  for (int w = 0; w < warp_count_; ++w) warps_[w] = Warp{~0u, 0, 0, 0, 0, 0, 0, 0, 0};
  for (int b = 0; b < launch_.cluster; ++b) {
    blocks_[b]->exited = 0;
    for (Barrier& barrier : blocks_[b]->barriers) barrier = Barrier{};
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
    for (int name = 1; name < kNamedBarriers; ++name)
      if (const Barrier& barrier = blocks_[b]->barriers[name]; barrier.arrived)
        return describe("%d of %d threads have arrived at barrier %d at the end of block (%lld, %d)", barrier.arrived,
                        barrier.expected, name, static_cast<long long>(first_x_ + b), block_y);
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
    if (block().barriers[0].arrived + block().exited == launch_.threads) release_barrier();
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

T2L_EMU_NO_TSAN void Machine::describe_deadlock() {
  std::string waiting;
  const auto add = [&](int count, const std::string& what) {
    if (count) waiting += (waiting.empty() ? "" : ", ") + std::to_string(count) + what;
  };
  int at_barrier = 0;
  for (int b = 0; b < launch_.cluster; ++b) at_barrier += blocks_[b]->barriers[0].arrived;
  add(at_barrier, " threads at a barrier");
  add(at_cluster_barrier_, " threads at a cluster barrier");
  for (int w = 0; w < warp_count_; ++w) {
    const std::string lanes = " lanes of warp " + std::to_string(w);
    add(__builtin_popcount(warps_[w].at_named), lanes + " at barrier " + std::to_string(warps_[w].name));
    add(__builtin_popcount(warps_[w].at_exchange), lanes + " at an exchange");
  }
  describe("deadlock: %s (block %lld, %d)", waiting.c_str(), static_cast<long long>(block_x), block_y);
}

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
void named_barrier(int name, int threads) { machine().arrive_at_named_barrier(name, threads, true); }
void named_arrive(int name, int threads) { machine().arrive_at_named_barrier(name, threads, false); }
void wait_for_earlier_launches() { machine().wait_for_earlier_launches(); }
int peek(const int* p) { return machine().peek(p); }
void cluster_arrive() { machine().arrive_at_cluster_barrier(); }
void cluster_wait() { machine().wait_at_cluster_barrier(); }
void* map_to_block(void* mine, int64_t bytes, int block) {
  return machine().map_to_block(static_cast<char*>(mine), bytes, block);
}

namespace {

constexpr int kCopyBytes = 16;
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

}  // namespace

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
