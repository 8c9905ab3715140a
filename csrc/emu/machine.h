// The machine that runs a launch: its threads, warps and blocks, and their waiting for each other.
//
// Bookkeeping that threads of a block share without a barrier (wait states, slots, counters) is only accessed in functions
// without TSan instrumentation.  All else is ordered by tokens: the host releases one before a block and acquires another
// after it.
#pragma once
#include <cstdarg>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "emulator.h"
#include "fiber.h"
#include "random.h"
#include "shared_arena.h"

namespace t2l::emu {

constexpr int kMaxThreads = 1024;  // of a block
constexpr int kMaxCluster = 16;
constexpr int kMaxFibers = 4096;  // threads of all blocks of a cluster
constexpr int kMaxWarps = kMaxFibers / kLanes;

inline uint32_t bit_of(int fiber) { return 1u << fiber % kLanes; }

struct Copy {
  char* target;
  const char* source;
  int valid, group;
};
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
  uint32_t ready, at_barrier, at_named, at_cluster_barrier, at_exchange, exited;
  int name;    // of the barrier of those in at_named
  int bytes;   // per lane, of the exchange in progress
  int buffer;  // of that exchange
};

// Double-buffered: a lane may deposit for the next exchange before another has read the last one.
struct ExchangeBuffer {
  Slot slots[kLanes];
  Operands operands;
};

// Two tokens: a thread may arrive at the next barrier before all have left this one.
struct Barrier {
  char tokens[2] = {};
  int turn = 0;
  int arrived = 0, expected = 0;              // threads of this turn: so far, in all
  uint32_t lanes[kMaxThreads / kLanes] = {};  // of each warp of the block that have arrived

  T2L_EMU_NO_TSAN void next_turn() {
    arrived = 0;
    turn ^= 1;
  }
};

// What the threads of a block share.
struct Block {
  SharedArena shared;
  int exited = 0;
  Barrier barriers[kNamedBarriers];  // by name; the first is block_barrier's
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
  void arrive_at_named_barrier(int name, int threads, bool waits);
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

T2L_EMU_NO_TSAN inline Machine& machine() { return *static_cast<Machine*>(running); }

}  // namespace t2l::emu
