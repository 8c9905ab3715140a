// Emulator of a CUDA device on the CPU, to test kernels without a GPU.
//
// Every thread of a block is a fiber; one OS thread runs one block at a time, or the blocks of one cluster.  A launch that
// would hang, fail or return undefined results on a device fails with an error: barriers and warp exchanges that not all
// threads reach, shared memory beyond the launch's size, misaligned accesses, a wrong stream.  Schedules change the order of
// threads and blocks, and when asynchronous copies land.  Under ASan, allocations of shared memory have redzones; under
// TSan, only barriers order the threads of a block, so that a missing one is a data race.
//
// Compile with -fno-strict-aliasing, as nvcc does in effect: kernels read the same bytes as several types.
#pragma once
#if !defined(__x86_64__) || !defined(__GNUC__)
#error "csrc/emu switches stacks in x86-64 assembly, for GCC and Clang"
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__SANITIZE_ADDRESS__)
#define T2L_EMU_ASAN 1
#elif defined(__SANITIZE_THREAD__)
#define T2L_EMU_TSAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define T2L_EMU_ASAN 1
#elif __has_feature(thread_sanitizer)
#define T2L_EMU_TSAN 1
#endif
#endif

// For the emulator's own bookkeeping, which threads of a block share without a barrier: not instrumented by TSan, and not
// inlined into instrumented code.
#if defined(T2L_EMU_TSAN)
#define T2L_EMU_NO_TSAN __attribute__((no_sanitize("thread"), noinline))
#else
#define T2L_EMU_NO_TSAN
#endif

namespace t2l::emu {

// ---- host side

struct Launch {
  int64_t grid_x;
  int grid_y;
  int threads;
  int64_t shared_bytes;
  void* stream;
  int cluster = 1;   // blocks, neighbours along x, that run together
  bool pdl = false;  // may begin before the launch before it has ended
};

// Runs `body` for every thread of every block; checks what a driver checks, and that the stream is the current one.
// Returns nullptr, or an error that is valid until this OS thread launches again.
const char* run(const Launch& launch, void (*body)(void*), void* argument);
template <class Body>
const char* launch(const Launch& launch, Body&& body) {
  using Plain = std::remove_reference_t<Body>;
  return run(
      launch, [](void* argument) { (*static_cast<Plain*>(argument))(); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// `seed` 0: runs the first ready thread, or the last if `reverse`; blocks likewise.  Else a pseudo-random order, another for
// every pass over the ready threads and for every launch.  Asynchronous copies land at their wait or, if `eager`, at once.
struct Schedule {
  uint64_t seed = 0;
  bool reverse = false;
  bool eager = false;
};
void set_schedule(const Schedule& schedule);
// "forward", "reverse" or "seed=7", each also with "+eager"; returns false, without effect, for any other text.
bool set_schedule(const char* text);

// Of a block, what any device has.
constexpr int kMaxSharedBytes = 227 * 1024;

// What a block may have on this device: by default 227 KiB, as on an H100.  Not more than kMaxSharedBytes.
int shared_bytes();
void set_shared_bytes(int bytes);

// SMs of a device: by default 132, as an H100.  Launch configurations depend on it.
int num_sms();
void set_num_sms(int count);

// Blocks of the largest cluster: by default 8, as every card of compute capability 9.0 has; 1 for one without clusters.
int max_cluster();
void set_max_cluster(int count);

// Per OS thread: the current device, and the current stream of every device, which is not null.  A launch must be on the
// current stream, and on the device that owns its memory.
int memory_device();
void set_memory_device(int device);
int current_device();
void set_current_device(int device);
void* current_stream();
void set_current_stream(void* stream);

// Totals of all OS threads since the last reset: bytes of load, store and copy_async, FLOPs of tensor cores, accepted
// launches.
struct Counters {
  int64_t read, written, flops, launches;
};
Counters counters();
void reset_counters();

// The latest accepted launch of any OS thread.
struct LaunchRecord {
  int device;
  Launch launch;
};
LaunchRecord last_launch();

// ---- device side

// The running thread, its block, and the counters of the launch.
struct Running {
  int thread = 0;
  bool may_access = true;  // memory: of a PDL launch, once the thread has waited for earlier ones
  int block_y = 0;
  int64_t block_x = 0;
  Counters counters{};
};
extern __thread Running* running __attribute__((tls_model("initial-exec")));

T2L_EMU_NO_TSAN inline int thread_index() { return running->thread; }
T2L_EMU_NO_TSAN inline int64_t block_index_x() { return running->block_x; }
T2L_EMU_NO_TSAN inline int block_index_y() { return running->block_y; }

// Ends the launch with an error, which also names block and thread.
[[noreturn]] void fail(const char* what);
// The same, formatting two numbers with %lld.
[[noreturn]] void fail(const char* format, int64_t first, int64_t second = 0);

// Index of a thread's next allocation of shared memory.
struct SharedCursor {
  int next = 0;
};
void* take_shared(SharedCursor* cursor, int64_t bytes);

// In a PDL launch, memory may be accessed after it.
void wait_for_earlier_launches();
// The value at `p` or, in a PDL launch that has not waited and under other schedules than "forward", what it may have
// been: no id.
int peek(const int* p);

void block_barrier();
// The two ways to a barrier of `threads` threads of the block, with which they all name it: to arrive and wait until all
// have, and to arrive and go on.
constexpr int kNamedBarriers = 16;  // 0 is block_barrier's
void named_barrier(int name, int threads);
void named_arrive(int name, int threads);
void cluster_arrive();
void cluster_wait();
// Where block `block` of the cluster has the `bytes` bytes of shared memory that are this block's at `mine`.  Fails if that
// block has not allocated them yet, or has exited: what a cluster barrier is missing for.
void* map_to_block(void* mine, int64_t bytes, int block);

template <class T>
inline void require_aligned(const void* address, const char* format) {
  constexpr int64_t kAlignment = alignof(T);
  if (reinterpret_cast<uintptr_t>(address) % kAlignment) fail(format, sizeof(T), kAlignment);
}

inline void atomic_add(int* target, int value) {
  require_aligned<int>(target, "atomic add of %lld bytes at an address that is not a multiple of %lld");
  __atomic_fetch_add(target, value, __ATOMIC_RELAXED);
}

T2L_EMU_NO_TSAN inline void require_access() {
  if (!running->may_access) fail("accesses memory without having waited for earlier launches");
}
T2L_EMU_NO_TSAN inline void count_read(int64_t bytes) {
  require_access();
  running->counters.read += bytes;
}
T2L_EMU_NO_TSAN inline void count_written(int64_t bytes) {
  require_access();
  running->counters.written += bytes;
}
T2L_EMU_NO_TSAN inline void count_flops(int64_t flops) { running->counters.flops += flops; }

// Typed access to memory of any type.
template <class T>
struct __attribute__((may_alias)) AnyType {
  T value;
};

template <class T>
inline T load(const void* address) {
  require_aligned<T>(address, "load of %lld bytes at an address that is not a multiple of %lld");
  count_read(sizeof(T));
  return static_cast<const AnyType<T>*>(address)->value;
}
template <class T>
inline void store(void* address, T value) {
  require_aligned<T>(address, "store of %lld bytes at an address that is not a multiple of %lld");
  count_written(sizeof(T));
  static_cast<AnyType<T>*>(address)->value = value;
}

// To shared memory, also of another block.
template <class T>
inline void store_shared(void* address, T value) {
  require_aligned<T>(address, "store of %lld bytes at an address that is not a multiple of %lld");
  static_cast<AnyType<T>*>(address)->value = value;
}

void copy_async(void* shared, const void* global, int bytes, int valid);
void commit_copies();
void wait_for_copies(int pending);

// ---- warp exchanges: all 32 lanes deposit words, synchronise, and read each other's

constexpr int kLanes = 32;

struct alignas(16) Slot {
  uint32_t word[12];
};
// Of an MMA: the fragments of all lanes.
struct Operands {
  float a[16][16];  // [row][k]
  alignas(32) float b[16][8];
  alignas(32) float d[16][8];
};
struct Exchange {
  const Slot* slots;   // of all lanes
  Operands* operands;  // that the last lane gathers from them, with their product
  bool last;           // to arrive: it continues first, so it may multiply
};
// Both stay valid until the lane's next exchange.  Different sizes within a warp are an error: divergent calls.
Exchange exchange_slots(const Slot& mine, int bytes);

template <class T>
class WarpExchange {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(Slot));

 public:
  explicit WarpExchange(const T& value) {
    Slot mine{};
    std::memcpy(&mine, &value, sizeof(T));
    slots_ = exchange_slots(mine, sizeof(T)).slots;
  }
  // Only before the warp's next exchange.
  T2L_EMU_NO_TSAN T of(int lane) const {
    if (lane < 0 || lane >= kLanes) fail("warp exchange: there is no lane %lld", lane);
    T value;
    __builtin_memcpy(&value, &slots_[lane], sizeof(T));
    return value;
  }

 private:
  const Slot* slots_;
};

// ---- conversions and arithmetic

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From) && std::is_trivially_copyable_v<To> && std::is_trivially_copyable_v<From>);
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// Branch-free, so that loops over it vectorise.
inline float half_to_float(uint16_t half) {
  const uint32_t magnitude = (half & 0x7fffu) << 13;
  const float finite = bit_cast<float>(magnitude) * 0x1p112f;  // rebias, also of subnormals
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0;
  return bit_cast<float>(bit_cast<uint32_t>(finite) | special | (half & 0x8000u) << 16);
}

// Round to nearest even.
inline uint16_t float_to_half(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffffu, sign = bits >> 16 & 0x8000u;
  uint32_t half;
  if (magnitude > 0x7f800000u)
    half = 0x7e00;  // NaN
  else if (magnitude >= 0x477ff000u)
    half = 0x7c00;  // from 65520 on: infinity
  else if (magnitude < 0x38800000u)
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;  // subnormal: same ulp as 0.5f
  else
    half = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000u) >> 13;
  return static_cast<uint16_t>(sign | half);
}

inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN stays NaN
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// 10 explicit mantissa bits; round to nearest, ties away from zero.
inline float float_to_tf32(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return bit_cast<float>((bits & ~0x1fffu) | 0x400000u);
  if (magnitude == 0x7f800000u) return value;
  return bit_cast<float>((bits + 0x1000u) & ~0x1fffu);
}

inline float exponential(float x) { return std::exp(x); }
inline float fast_divide(float a, float b) { return a / b; }
inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }
inline float power(float base, float exponent) { return std::pow(base, exponent); }
inline void cos_sin(float x, float* c, float* s) {
  *c = std::cos(x);
  *s = std::sin(x);
}

// ---- tensor cores: one exchange per MMA, in which the last lane to arrive multiplies for all

// A and B of m16n8k16 from the fragments of all lanes.
template <class Convert>
T2L_EMU_NO_TSAN inline void gather_16bit(const Slot* slots, Convert convert, Operands& out) {
  constexpr int kWords = 6;
  float low[kLanes][kWords], high[kLanes][kWords];
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < kWords; ++i) {
      low[lane][i] = convert(slots[lane].word[i] & 0xffffu);
      high[lane][i] = convert(slots[lane].word[i] >> 16);
    }
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) {
      float* a = &out.a[g + r % 2 * 8][2 * t + r / 2 * 8];
      a[0] = low[lane][r];
      a[1] = high[lane][r];
    }
    for (int r = 0; r < 2; ++r) {
      out.b[2 * t + r * 8][g] = low[lane][4 + r];
      out.b[2 * t + r * 8 + 1][g] = high[lane][4 + r];
    }
  }
}

// What a lane deposits: 24 bytes of A and B, 16 of D.
constexpr int kFragmentBytes = 40;
T2L_EMU_NO_TSAN inline Slot fragments(const void* a, const void* b, const float (&d)[4]) {
  Slot slot{};
  __builtin_memcpy(&slot.word[0], a, 16);
  __builtin_memcpy(&slot.word[4], b, 8);
  __builtin_memcpy(&slot.word[6], d, 16);
  return slot;
}
// D of the slots plus A B over `depth`, 8 or 16, summed as tensor cores do: every addend, D's among them, is aligned to the
// largest exponent and cut one bit below a float's last, the sum is exact, and cut to a float.  Devices that keep more bits,
// or sum fewer addends at a time, are no worse. Source: Fasi et al. 2021, Numerical behavior of NVIDIA tensor cores.
void multiply(const Slot* slots, int depth, Operands& operands);
// This lane's fragment of the result.
void take_product(const Operands& operands, int depth, float (&d)[4]);

// `convert`: 16 bits to float.
template <class Convert>
T2L_EMU_NO_TSAN inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Convert convert) {
  const Exchange exchange = exchange_slots(fragments(a, b, d), kFragmentBytes);
  if (exchange.last) {
    gather_16bit(exchange.slots, convert, *exchange.operands);
    multiply(exchange.slots, 16, *exchange.operands);
  }
  take_product(*exchange.operands, 16, d);
}
void mma_16x8x8(float (&d)[4], const float (&a)[4], const float (&b)[2]);

}  // namespace t2l::emu
