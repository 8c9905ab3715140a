// Device primitives: threads, synchronisation, memory.  All intrinsics and inline PTX of the project are here and in
// arithmetic.cuh; each has a second body for the emulator (csrc/emu), which runs the same kernel source on a CPU.
//
// Conventions: grids and blocks are one-dimensional; warp-wide calls are made by all 32 lanes.  Tensors are accessed through
// load_* and store_*, so that the emulator counts their bytes; ids, ranks and segments through read_index.
#pragma once
#include <cstdint>

#ifdef T2L_EMULATOR
#include "emu/emulator.h"
#define T2L_DEVICE inline
#define T2L_KERNEL(threads, blocks_per_sm) inline void
#define T2L_ARGUMENT(type) const type
#else
#define T2L_DEVICE __device__ __forceinline__
#define T2L_KERNEL(threads, blocks_per_sm) __global__ void __launch_bounds__(threads, blocks_per_sm)
#define T2L_ARGUMENT(type) const __grid_constant__ type  // in constant memory even if indexed dynamically
#endif

namespace t2l::device {

// Storage types; arithmetic is in float32 or on tensor cores.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// 128-bit vector load or store.
struct alignas(16) Vec16 {
  uint32_t word[4];
};
T2L_DEVICE Vec16 zero_vec16() { return Vec16{{0, 0, 0, 0}}; }
// 64-bit vector load or store.
struct alignas(8) Pair {
  uint32_t word[2];
};

// ---- thread indices

T2L_DEVICE int thread_index() {
#ifdef T2L_EMULATOR
  return emu::thread_index();
#else
  return static_cast<int>(threadIdx.x);
#endif
}
T2L_DEVICE int lane_index() { return thread_index() & 31; }
T2L_DEVICE int warp_index() { return thread_index() >> 5; }
T2L_DEVICE int64_t block_index() {
#ifdef T2L_EMULATOR
  return emu::block_index_x();
#else
  return blockIdx.x;
#endif
}

// ---- dynamic shared memory: a bump allocator; all threads make the same allocations in the same order

class SharedMemory {
 public:
  T2L_DEVICE SharedMemory();
  // 16-byte aligned; sizes are rounded up to 16 bytes (align16 in config.h).
  template <class T>
  T2L_DEVICE T* take(int64_t count) {
#ifdef T2L_EMULATOR
    return static_cast<T*>(emu::take_shared(&used_, count * static_cast<int64_t>(sizeof(T))));
#else
    T* p = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return p;
#endif
  }

 private:
#ifdef T2L_EMULATOR
  emu::SharedCursor used_;
#else
  char* base_;
  int64_t used_ = 0;
#endif
};
#ifdef T2L_EMULATOR
inline SharedMemory::SharedMemory() = default;
#else
T2L_DEVICE SharedMemory::SharedMemory() {
  extern __shared__ __align__(16) char t2l_shared_bytes[];
  base_ = t2l_shared_bytes;
}
#endif

// ---- synchronisation

// Barrier of the block, with visibility of all its writes.
T2L_DEVICE void block_barrier() {
#ifdef T2L_EMULATOR
  emu::block_barrier();
#else
  __syncthreads();
#endif
}

// Barrier `name`, 1 to 15, of `kThreads` threads of the block, whole warps, which all name it so: of those that wait, with
// visibility of the writes before it of all that arrive.
template <int kThreads>
T2L_DEVICE void named_barrier(int name) {
#ifdef T2L_EMULATOR
  emu::named_barrier(name, kThreads);
#else
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(name), "n"(kThreads) : "memory");
#endif
}
// Arrives there without waiting.
template <int kThreads>
T2L_DEVICE void named_arrive(int name) {
#ifdef T2L_EMULATOR
  emu::named_arrive(name, kThreads);
#else
  asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(name), "n"(kThreads) : "memory");
#endif
}

// ---- PDL (programmatic dependent launch): blocks may begin while the launch before them in the stream still runs (compute
// capability 9.0 and later)

#if defined(T2L_EMULATOR)
constexpr bool kPdl = true;
#elif defined(__CUDA_ARCH__)
constexpr bool kPdl = __CUDA_ARCH__ >= 900;
#else
constexpr bool kPdl = false;  // host code
#endif

// Lets a PDL launch behind this one begin, once all blocks have called it or exited.
T2L_DEVICE void let_next_launch_begin() {
#if !defined(T2L_EMULATOR) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Waits until all launches before this one have ended, with visibility of their writes.  Every thread of a PDL launch
// calls it, before it reads or writes memory: only peek() and prefetch() may come before.
T2L_DEVICE void wait_for_earlier_launches() {
#if defined(T2L_EMULATOR)
  emu::wait_for_earlier_launches();
#elif __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// An integer that an earlier launch may still write: a guess, for prefetch() alone.  It is read from L2, so that no cache of
// this SM keeps it.
T2L_DEVICE int peek(const int* p) {
#ifdef T2L_EMULATOR
  return emu::peek(p);
#else
  int value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(p));
  return value;
#endif
}

// ---- clusters: blocks, neighbours along x, that run together and write to each other's shared memory (compute capability
// 9.0 and later; before, a launch has clusters of one block)

// Of this block among the `size` blocks of its cluster.
T2L_DEVICE int index_in_cluster([[maybe_unused]] int size) {
#if defined(T2L_EMULATOR)
  return static_cast<int>(emu::block_index_x() % size);
#elif __CUDA_ARCH__ >= 900
  int index;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(index));
  return index;
#else
  return 0;
#endif
}
// The two halves of a barrier of all blocks of the cluster, with visibility of all writes to shared memory before the first
// to all that is after the second.  Every thread makes both calls, in turn.
T2L_DEVICE void cluster_arrive() {
#if defined(T2L_EMULATOR)
  emu::cluster_arrive();
#elif __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
#endif
}
// To say that this block has begun, and nothing of what it has read or written.
T2L_DEVICE void cluster_arrive_relaxed() {
#if defined(T2L_EMULATOR)
  emu::cluster_arrive();
#elif __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
T2L_DEVICE void cluster_wait() {
#if defined(T2L_EMULATOR)
  emu::cluster_wait();
#elif __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}
T2L_DEVICE void cluster_barrier() {
  cluster_arrive();
  cluster_wait();
}
// The `bytes` bytes of shared memory of block `block` of the cluster that are this block's at `mine`; for stores.  That
// block must have begun, and may not exit, which a cluster barrier before and one after ensure.
class OfBlock {
 public:
  T2L_DEVICE OfBlock(void* mine, int64_t bytes, int block);
  T2L_DEVICE void store(int offset, uint32_t word) const;
  T2L_DEVICE void store(int offset, Pair two) const;
  T2L_DEVICE void store(int offset, Vec16 q) const;

 private:
#ifdef T2L_EMULATOR
  char* data_;
#else
  uint32_t data_;
#endif
};
#if defined(T2L_EMULATOR)
inline OfBlock::OfBlock(void* mine, int64_t bytes, int block)
    : data_(static_cast<char*>(emu::map_to_block(mine, bytes, block))) {}
inline void OfBlock::store(int offset, uint32_t word) const { emu::store_shared(data_ + offset, word); }
inline void OfBlock::store(int offset, Pair two) const { emu::store_shared(data_ + offset, two); }
inline void OfBlock::store(int offset, Vec16 q) const { emu::store_shared(data_ + offset, q); }
#else
T2L_DEVICE OfBlock::OfBlock(void* mine, int64_t, int block) : data_(static_cast<uint32_t>(__cvta_generic_to_shared(mine))) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(data_) : "r"(block));
#else
  (void)block;  // 0: there are no clusters
#endif
}
#if __CUDA_ARCH__ >= 900
#define T2L_STORE_SHARED "st.shared::cluster"
#else
#define T2L_STORE_SHARED "st.shared"
#endif
T2L_DEVICE void OfBlock::store(int offset, uint32_t word) const {
  asm volatile(T2L_STORE_SHARED ".b32 [%0], %1;" ::"r"(data_ + offset), "r"(word) : "memory");
}
T2L_DEVICE void OfBlock::store(int offset, Pair two) const {
  asm volatile(T2L_STORE_SHARED ".v2.b32 [%0], {%1, %2};" ::"r"(data_ + offset), "r"(two.word[0]), "r"(two.word[1])
               : "memory");
}
T2L_DEVICE void OfBlock::store(int offset, Vec16 q) const {
  asm volatile(T2L_STORE_SHARED ".v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(data_ + offset), "r"(q.word[0]), "r"(q.word[1]),
               "r"(q.word[2]), "r"(q.word[3])
               : "memory");
}
#undef T2L_STORE_SHARED
#endif

// The value of lane `lane`, which may be another in every lane.
template <class T>
T2L_DEVICE T shuffle(T value, int lane) {
#ifdef T2L_EMULATOR
  const emu::WarpExchange<T> all(value);
  return all.of(lane);
#else
  return __shfl_sync(0xffffffffu, value, lane);
#endif
}
// The lanes where it holds: bit i of lane i.
T2L_DEVICE uint32_t lanes_where(bool holds) {
#ifdef T2L_EMULATOR
  const emu::WarpExchange<bool> all(holds);
  uint32_t lanes = 0;
  for (int lane = 0; lane < 32; ++lane) lanes |= static_cast<uint32_t>(all.of(lane)) << lane;
  return lanes;
#else
  return __ballot_sync(0xffffffffu, holds);
#endif
}
T2L_DEVICE int count_bits(uint32_t bits) {
#ifdef T2L_EMULATOR
  return __builtin_popcount(bits);
#else
  return __popc(bits);
#endif
}
// The value of lane `lane ^ mask`.
template <class T>
T2L_DEVICE T shuffle_xor(T value, int mask) {
#ifdef T2L_EMULATOR
  const emu::WarpExchange<T> all(value);
  return all.of(lane_index() ^ mask);
#else
  return __shfl_xor_sync(0xffffffffu, value, mask);
#endif
}
// The value of the lane `distance` below; lanes without one keep their own.
template <class T>
T2L_DEVICE T shuffle_up(T value, int distance) {
#ifdef T2L_EMULATOR
  const emu::WarpExchange<T> all(value);
  return all.of(lane_index() >= distance ? lane_index() - distance : lane_index());
#else
  return __shfl_up_sync(0xffffffffu, value, distance);
#endif
}

// On shared memory.  Integers only, whose sum does not depend on the order.
T2L_DEVICE void atomic_add(int* target, int value) {
#ifdef T2L_EMULATOR
  emu::atomic_add(target, value);
#else
  atomicAdd(target, value);
#endif
}

// Device-side assertion on argument values.  Failure traps and ends the context, as torch's index checks do.
T2L_DEVICE void require(bool holds, const char* what) {
#ifdef T2L_EMULATOR
  if (!holds) emu::fail(what);
#else
  (void)what;  // printf would need a stack frame
  if (!holds) __trap();
#endif
}

// ---- global memory

// 128-bit load through the read-only path; 16-byte aligned.
T2L_DEVICE Vec16 load_vec16(const void* p) {
#ifdef T2L_EMULATOR
  return emu::load<Vec16>(p);
#else
  const uint4 v = __ldg(static_cast<const uint4*>(p));
  return Vec16{{v.x, v.y, v.z, v.w}};
#endif
}
// An id, a rank, a bound of a segment or a scaling, which are not counted as bytes.
template <class T>
T2L_DEVICE T read_index(const T* p) {
#ifdef T2L_EMULATOR
  emu::require_access();
#endif
  return *p;
}
template <class T>
T2L_DEVICE T load_one(const T* p) {
#ifdef T2L_EMULATOR
  return emu::load<T>(p);
#else
  return *p;
#endif
}
// 128-bit load of memory that this launch also writes: not through the read-only path.
T2L_DEVICE Vec16 load_vec16_mutable(const void* p) {
#ifdef T2L_EMULATOR
  return emu::load<Vec16>(p);
#else
  const uint4 v = *static_cast<const uint4*>(p);
  return Vec16{{v.x, v.y, v.z, v.w}};
#endif
}
T2L_DEVICE void store_vec16(void* p, Vec16 q) {
#ifdef T2L_EMULATOR
  emu::store<Vec16>(p, q);
#else
  *static_cast<uint4*>(p) = make_uint4(q.word[0], q.word[1], q.word[2], q.word[3]);
#endif
}
template <class T>
T2L_DEVICE void store_one(T* p, T value) {
#ifdef T2L_EMULATOR
  emu::store<T>(p, value);
#else
  *p = value;
#endif
}

// Prefetches the 128-byte line of an address into L2; does not block.
T2L_DEVICE void prefetch(const void* p) {
#ifdef T2L_EMULATOR
  (void)p;
#else
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// cp.async of 16 bytes from global to shared memory, both 16-byte aligned: reads the first `valid` bytes and fills the rest
// with zeros.  Asynchronous until its group is waited for.
T2L_DEVICE void copy_async(void* shared, const void* global, int valid) {
#ifdef T2L_EMULATOR
  emu::copy_async(shared, global, 16, valid);
#else
  const uint32_t target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global), "r"(valid) : "memory");
#endif
}
// Commits this thread's copies since the last commit as one group.
T2L_DEVICE void commit_copies() {
#ifdef T2L_EMULATOR
  emu::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most kPending of this thread's latest groups are in flight.  Other threads see the data after a barrier.
template <int kPending>
T2L_DEVICE void wait_for_copies() {
#ifdef T2L_EMULATOR
  emu::wait_for_copies(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace t2l::device
