// Barriers, exchanges, PDL launches: where a thread waits for others, and what it lets go on.
#include "machine.h"

namespace t2l::emu {

T2L_EMU_NO_TSAN void Machine::wait_at_barrier() {
  Block& mine = block();
  Barrier& barrier = mine.barriers[0];
  void* token = &barrier.tokens[barrier.turn];
  release(token);
  if (++barrier.arrived + mine.exited == launch_.threads) {
    release_barrier();
  } else {
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
  block().barriers[0].next_turn();
}

T2L_EMU_NO_TSAN void Machine::arrive_at_named_barrier(int name, int threads, bool waits) {
  if (name < 1 || name >= kNamedBarriers)
    fail("named barrier: there is no name %lld, they are 1 to %lld", name, kNamedBarriers - 1);
  if (threads % kLanes || threads < kLanes || threads > launch_.threads)
    fail("named barrier of %lld threads in a block of %lld", threads, launch_.threads);
  Warp& warp = warps_[fiber_ / kLanes];
  Barrier& barrier = block().barriers[name];
  if (waits && warp.at_named && warp.name != name)
    fail("waits at barrier %lld where lanes of its warp wait at barrier %lld", name, warp.name);
  if (barrier.arrived && barrier.expected != threads)
    fail("named barrier of %lld threads, which others call with %lld", threads, barrier.expected);
  barrier.expected = threads;
  void* token = &barrier.tokens[barrier.turn];
  release(token);
  const int warps = launch_.threads / kLanes, first = fiber_ / launch_.threads * warps;
  barrier.lanes[fiber_ / kLanes - first] |= bit_of(fiber_);
  if (++barrier.arrived == threads) {
    for (int w = first; w < first + warps; ++w) {
      uint32_t& lanes = barrier.lanes[w - first];
      if (lanes != 0 && lanes != ~0u)
        fail("named barrier: %lld lanes of warp %lld arrived, not all", __builtin_popcount(lanes), w);
      lanes = 0;
      if (warps_[w].name != name) continue;
      warps_[w].ready |= warps_[w].at_named;
      warps_[w].at_named = 0;
    }
    barrier.next_turn();
  } else if (waits) {
    warp.at_named |= bit_of(fiber_);
    warp.name = name;
    run_next();
  }
  if (waits) acquire(token);
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

}  // namespace t2l::emu
