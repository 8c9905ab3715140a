// The machine behind emulator.h.  Every OS thread that launches has one, and runs its blocks in turn.
//
// What the threads of a block share without a barrier (who waits for what, slots, counters) is touched in functions that
// TSan does not look at; all else is ordered by tokens: the host releases one before a block and acquires another after it.
#include "emulator.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "fiber.h"
#include "shared_arena.h"

namespace t2l::emu {

__thread Running* running __attribute__((tls_model("initial-exec"))) = nullptr;

namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / kLanes;
constexpr int kCopyBytes = 16;

uint32_t bit_of(int thread) { return 1u << thread % kLanes; }

// ---- settings and counters of all OS threads

std::optional<Schedule> parse_schedule(std::string text) {
  static const std::string kEager = "+eager", kSeed = "seed=";
  Schedule schedule;
  if (text.size() > kEager.size() && text.compare(text.size() - kEager.size(), kEager.size(), kEager) == 0) {
    schedule.eager = true;
    text.resize(text.size() - kEager.size());
  }
  if (text == "forward") return schedule;
  schedule.reverse = text == "reverse";
  if (schedule.reverse) return schedule;
  const std::string digits = text.compare(0, kSeed.size(), kSeed) == 0 ? text.substr(kSeed.size()) : "";
  if (digits.empty() || digits.size() > 18 || digits.find_first_not_of("0123456789") != std::string::npos) return {};
  schedule.seed = std::strtoull(digits.c_str(), nullptr, 10);
  if (schedule.seed == 0) return {};
  return schedule;
}

struct Settings {
  Settings() {
    if (const char* text = std::getenv("T2L_EMU_MULTIPROCESSORS")) {
      multiprocessors = std::atoi(text);
      if (multiprocessors < 1) error = std::string("T2L_EMU_MULTIPROCESSORS is not a number from 1 on: ") + text;
    }
    if (const char* text = std::getenv("T2L_EMU_SCHEDULE")) {
      const auto parsed = parse_schedule(text);
      if (parsed)
        schedule = *parsed;
      else
        error = std::string("T2L_EMU_SCHEDULE is not a schedule: ") + text;
    }
  }

  std::mutex mutex;  // of all that follows, but for the error
  Schedule schedule;
  int multiprocessors = 132;
  uint64_t launches = 0;  // under this schedule
  Counters counters{};
  LaunchRecord last{};
  std::string error;
};

Settings& settings() {
  static Settings instance;
  return instance;
}

thread_local int device = 0, device_of_memory = 0;
thread_local std::vector<void*> streams;  // of each device

// ---- one block at a time

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  template <class T>
  T2L_EMU_UNSEEN void shuffle(T* values, int64_t count) {
    for (int64_t i = count - 1; i > 0; --i) {
      const int64_t j = static_cast<int64_t>(next() % static_cast<uint64_t>(i + 1));
      const T value = values[i];
      values[i] = values[j];
      values[j] = value;
    }
  }

 private:
  T2L_EMU_UNSEEN uint64_t next() {  // splitmix64
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
// As one write, which TSan looks at; memset of so few bytes it would not see.
struct alignas(kCopyBytes) CopyUnit {
  uint64_t word[2];
};
static_assert(sizeof(CopyUnit) == kCopyBytes);
void write_unit(char* target, const CopyUnit& unit) { reinterpret_cast<Untyped<CopyUnit>*>(target)->value = unit; }
void land(const Copy& copy) {
  CopyUnit unit{};
  std::memcpy(&unit, copy.source, copy.valid);
  write_unit(copy.target, unit);
}

struct Thread {
  Thread(Fiber::Entry entry, int index) : fiber(entry, index) {}
  Fiber fiber;
  std::vector<Copy> copies;  // under way
  int groups = 0;            // closed so far
};

// Lanes that are at none of these run now.
struct Warp {
  uint32_t ready, at_barrier, at_exchange, exited;
  int bytes;  // deposited at the exchange that lanes wait at
  int table;  // of that exchange
};

// Two a warp: a lane may deposit for the next exchange before another has read what it came for.
struct Table {
  Slot slots[kLanes];
  Tile tile;
};

class Machine : public Running {
 public:
  // nullptr, or why a driver would refuse the launch.
  const char* refuse(const Launch& launch);
  const char* run(const Launch& launch, const Schedule& schedule, uint64_t seed, void (*body)(void*), void* argument);

  // For the thread that runs.
  T2L_EMU_UNSEEN Thread& current() { return *threads_[thread]; }
  T2L_EMU_UNSEEN bool eager() const { return schedule_.eager; }
  void meet_block();
  Meeting meet_warp(const Slot& mine, int bytes);
  [[noreturn]] void stop();

  // The text of a failure.
  __attribute__((format(printf, 2, 3))) const char* describe(const char* format, ...);

  SharedArena shared;

 private:
  static void thread_main(Context* from);
  const char* run_block(int64_t index);
  void leave();
  void give_way();
  int next_thread();
  void open_barrier();
  void describe_deadlock();
  void recover();

  Context host_;
  std::vector<std::unique_ptr<Thread>> owned_;
  Thread* threads_[kMaxThreads];  // the same, without a class between that TSan looks at
  int thread_count_ = 0, warp_count_ = 0;
  int at_barrier_ = 0, exited_ = 0;
  Warp warps_[kMaxWarps];
  Table tables_[kMaxWarps][2];

  Schedule schedule_;
  Random random_{0};
  uint16_t order_[kMaxThreads];  // under a seed: of this pass
  int place_ = 0;                // in it

  Launch launch_{};
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
  bool failed_ = false;
  char text_[512];

  // Two for barriers: a thread may be at the next one before all have left this one.
  char begin_token_ = 0, end_token_ = 0, barrier_tokens_[2] = {};
  int barrier_ = 0;
};

T2L_EMU_UNSEEN Machine& machine() { return *static_cast<Machine*>(running); }

const char* Machine::describe(const char* format, ...) {
  va_list values;
  va_start(values, format);
  std::vsnprintf(text_, sizeof(text_), format, values);
  va_end(values);
  return text_;
}

const char* Machine::refuse(const Launch& launch) {
  if (launch.grid_x < 1 || launch.grid_x > 0x7fffffff || launch.grid_y < 1 || launch.grid_y > 0xffff)
    return describe("launch of %lld x %d blocks", static_cast<long long>(launch.grid_x), launch.grid_y);
  if (launch.threads < 1 || launch.threads > kMaxThreads || launch.threads % kLanes)
    return describe("launch of blocks of %d threads", launch.threads);
  if (launch.shared_bytes < 0 || launch.shared_bytes > kMaxSharedBytes)
    return describe("launch with %lld bytes of shared memory, a block has %lld", static_cast<long long>(launch.shared_bytes),
                    static_cast<long long>(kMaxSharedBytes));
  if (launch.stream != current_stream())
    return describe("launched on stream %p, the current one is %p", launch.stream, current_stream());
  if (device != device_of_memory)
    return describe("launched on device %d with memory of device %d", device, device_of_memory);
  return nullptr;
}

const char* Machine::run(const Launch& launch, const Schedule& schedule, uint64_t seed, void (*body)(void*),
                         void* argument) {
  while (owned_.size() < static_cast<size_t>(launch.threads)) {
    const size_t index = owned_.size();
    owned_.push_back(std::make_unique<Thread>(thread_main, static_cast<int>(index)));
    threads_[index] = owned_[index].get();
  }
  host_ = this_stack();
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
  change(&host_, &current().fiber.context);
  acquire(&end_token_);
  if (failed_) {
    recover();
    return text_;
  }
  const auto damage = shared.find_damage();
  if (!damage) return nullptr;
  return describe("a thread of block (%lld, %d) wrote outside its piece %d of shared memory, at its byte %lld",
                  static_cast<long long>(block_x), block_y, damage->piece, static_cast<long long>(damage->offset));
}

// After a failure the threads are somewhere in the kernel: they start afresh.
void Machine::recover() {
  for (auto& thread : owned_) {
    thread->fiber.release_from_outside(&end_token_);
    acquire(&end_token_);
    thread->fiber.restart();
    thread->copies.clear();
  }
}

// ---- what a thread does

void Machine::thread_main(Context* from) {
  Machine& m = machine();
  acquire(&m.begin_token_);
  arrive(&m.current().fiber.context, from);
  for (;;) {
    m.body_(m.argument_);
    m.leave();
  }
}

// Until the next block begins.
T2L_EMU_UNSEEN void Machine::leave() {
  Thread& me = current();
  Warp& warp = warps_[thread / kLanes];
  if (!me.copies.empty()) fail("exits with %lld copies under way", static_cast<int64_t>(me.copies.size()));
  if (warp.at_exchange) fail("exits while %lld lanes of its warp wait at an exchange", __builtin_popcount(warp.at_exchange));
  release(&end_token_);
  warp.exited |= bit_of(thread);
  if (++exited_ == thread_count_) {
    change(&me.fiber.context, &host_);
  } else {
    if (at_barrier_ + exited_ == thread_count_) open_barrier();
    give_way();
  }
  acquire(&begin_token_);
}

T2L_EMU_UNSEEN void Machine::stop() {
  failed_ = true;
  release(&end_token_);
  change(&current().fiber.context, &host_);
  __builtin_unreachable();
}

// Another thread goes on, until somebody makes this one ready.
T2L_EMU_UNSEEN void Machine::give_way() {
  const int next = next_thread();
  if (next < 0) {
    describe_deadlock();
    stop();
  }
  Thread& me = current();
  warps_[next / kLanes].ready &= ~bit_of(next);
  thread = next;
  change(&me.fiber.context, &current().fiber.context);
}

// -1: nobody is ready.
T2L_EMU_UNSEEN int Machine::next_thread() {
  if (schedule_.seed == 0) {
    for (int i = 0; i < warp_count_; ++i) {
      const int w = schedule_.reverse ? warp_count_ - 1 - i : i;
      const uint32_t ready = warps_[w].ready;
      if (ready) return w * kLanes + (schedule_.reverse ? 31 - __builtin_clz(ready) : __builtin_ctz(ready));
    }
    return -1;
  }
  for (int pass = 0; pass < 2; ++pass) {  // the rest of this one, and a whole one
    while (place_ < thread_count_) {
      const int next = order_[place_++];
      if (warps_[next / kLanes].ready & bit_of(next)) return next;
    }
    random_.shuffle(order_, thread_count_);
    place_ = 0;
  }
  return -1;
}

T2L_EMU_UNSEEN void Machine::meet_block() {
  void* token = &barrier_tokens_[barrier_];
  release(token);
  if (at_barrier_ + 1 + exited_ == thread_count_) {
    open_barrier();
  } else {
    ++at_barrier_;
    warps_[thread / kLanes].at_barrier |= bit_of(thread);
    give_way();
  }
  acquire(token);
}

// Whoever has exited counts as arrived, as on a device.
T2L_EMU_UNSEEN void Machine::open_barrier() {
  for (int w = 0; w < warp_count_; ++w) {
    warps_[w].ready |= warps_[w].at_barrier;
    warps_[w].at_barrier = 0;
  }
  at_barrier_ = 0;
  barrier_ ^= 1;
}

T2L_EMU_UNSEEN Meeting Machine::meet_warp(const Slot& mine, int bytes) {
  Warp& warp = warps_[thread / kLanes];
  const uint32_t me = bit_of(thread);
  if (warp.exited) fail("warp exchange: %lld lanes of the warp have exited", __builtin_popcount(warp.exited));
  if (warp.at_exchange && warp.bytes != bytes)
    fail("divergent exchange: deposits %lld bytes where other lanes of the warp deposit %lld", bytes, warp.bytes);
  Table& table = tables_[thread / kLanes][warp.table];
  table.slots[thread % kLanes] = mine;
  warp.bytes = bytes;
  const bool last = (warp.at_exchange | me) == ~0u;
  if (last) {
    warp.ready |= warp.at_exchange;
    warp.at_exchange = 0;
    warp.table ^= 1;
  } else {
    warp.at_exchange |= me;
    give_way();
  }
  return Meeting{table.slots, &table.tile, last};
}

T2L_EMU_UNSEEN void Machine::describe_deadlock() {
  std::string waiting;
  if (at_barrier_) waiting = std::to_string(at_barrier_) + " threads at a barrier";
  for (int w = 0; w < warp_count_; ++w)
    if (const uint32_t lanes = warps_[w].at_exchange)
      waiting += (waiting.empty() ? "" : ", ") + std::to_string(__builtin_popcount(lanes)) + " lanes of warp " +
                 std::to_string(w) + " at an exchange";
  describe("deadlock: %s (block %lld, %d)", waiting.c_str(), static_cast<long long>(block_x), block_y);
}

}  // namespace

// ---- what emulator.h declares

const char* run(const Launch& launch, void (*body)(void*), void* argument) {
  thread_local std::unique_ptr<Machine> mine;
  if (!mine) mine = std::make_unique<Machine>();
  running = mine.get();
  Settings& all = settings();
  if (!all.error.empty()) return all.error.c_str();
  if (const char* error = mine->refuse(launch)) return error;
  Schedule schedule;
  uint64_t seed;
  {
    const std::lock_guard<std::mutex> lock(all.mutex);
    schedule = all.schedule;
    seed = schedule.seed * 0x10001 + ++all.launches;
    all.last = LaunchRecord{device, launch};
  }
  const char* error = mine->run(launch, schedule, seed, body, argument);
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.counters.read += mine->counters.read;
  all.counters.written += mine->counters.written;
  all.counters.flops += mine->counters.flops;
  ++all.counters.launches;
  return error;
}

void set_schedule(const Schedule& schedule) {
  Settings& all = settings();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.schedule = schedule;
  all.launches = 0;
}

bool set_schedule(const char* text) {
  const auto schedule = parse_schedule(text);
  if (schedule) set_schedule(*schedule);
  return schedule.has_value();
}

int multiprocessors() {
  Settings& all = settings();
  const std::lock_guard<std::mutex> lock(all.mutex);
  return all.multiprocessors;
}
void set_multiprocessors(int count) {
  Settings& all = settings();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.multiprocessors = count;
}

int memory_device() { return device_of_memory; }
void set_memory_device(int index) { device_of_memory = index; }
int current_device() { return device; }
void set_current_device(int index) { device = index; }

void* current_stream() {
  while (streams.size() <= static_cast<size_t>(device))
    streams.push_back(reinterpret_cast<void*>((streams.size() + 1) << 12));
  return streams[device];
}
void set_current_stream(void* stream) {
  current_stream();
  streams[device] = stream;
}

Counters counters() {
  Settings& all = settings();
  const std::lock_guard<std::mutex> lock(all.mutex);
  return all.counters;
}
void reset_counters() {
  Settings& all = settings();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.counters = Counters{};
}
LaunchRecord last_launch() {
  Settings& all = settings();
  const std::lock_guard<std::mutex> lock(all.mutex);
  return all.last;
}

void fail(const char* what) {
  Machine& m = machine();
  m.describe("%s (block %lld, %d, thread %d)", what, static_cast<long long>(m.block_x), m.block_y, thread_index());
  m.stop();
}
void fail(const char* format, int64_t first, int64_t second) {
  char what[256];
  std::snprintf(what, sizeof(what), format, static_cast<long long>(first), static_cast<long long>(second));
  fail(what);
}

T2L_EMU_UNSEEN void* take_shared(SharedCursor* cursor, int64_t bytes) {
  return machine().shared.piece(cursor->next++, bytes);
}

void block_barrier() { machine().meet_block(); }

void copy_async(void* target, const void* global, int bytes, int valid) {
  Machine& m = machine();
  char* begin = static_cast<char*>(target);
  const char* source = static_cast<const char*>(global);
  if (bytes != kCopyBytes || valid < 0 || valid > bytes)
    fail("asynchronous copy of %lld bytes, %lld of them from the source", bytes, valid);
  for (const char* address : {static_cast<const char*>(begin), source})
    if (reinterpret_cast<uintptr_t>(address) % kCopyBytes)
      fail("asynchronous copy of %lld bytes at an address that is not a multiple of %lld", bytes, kCopyBytes);
  if (!m.shared.holds(begin, bytes)) fail("asynchronous copy to what is not a piece of shared memory");
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

Meeting meet_warp(const Slot& mine, int bytes) { return machine().meet_warp(mine, bytes); }

}  // namespace t2l::emu
