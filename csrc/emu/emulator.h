// Runs kernels on the CPU, so that they are tested without a GPU.
//
// Every thread of a block is a fiber; one OS thread runs one block at a time.  A launch that a device would hang on, refuse
// or answer with rubbish fails with a text: barriers and exchanges that not everyone reaches, shared memory beyond what was
// asked for, misaligned accesses, a wrong stream.  Schedules change the order of threads and blocks and when asynchronous
// copies land.  Under ASan pieces of shared memory have guarded ends; under TSan the threads of a block are ordered by
// barriers alone, so that a missing one is a data race.
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

// The emulator's own book-keeping: threads of a block share it without a barrier, so TSan must not look at it.  Not inlined,
// since a copy inside other code would be looked at.
#if defined(T2L_EMU_TSAN)
#define T2L_EMU_UNSEEN __attribute__((no_sanitize("thread"), noinline))
#else
#define T2L_EMU_UNSEEN
#endif

namespace t2l::emu {

// ---- host side

struct Launch {
  int64_t grid_x;
  int grid_y;
  int threads;
  int64_t shared_bytes;
  void* stream;
};

// Runs `body` for every thread of every block; checks what a driver checks, and that the stream is the current one.
// nullptr or the reason of the failure, which is valid until this OS thread launches again.
const char* run(const Launch& launch, void (*body)(void*), void* argument);
template <class Body>
const char* launch(const Launch& launch, Body&& body) {
  using Plain = std::remove_reference_t<Body>;
  return run(
      launch, [](void* argument) { (*static_cast<Plain*>(argument))(); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// `seed` 0: the first runnable thread goes on, or the last if `reverse`; blocks likewise.  Else an order that changes with
// every pass over the runnable threads, and with every launch.  Asynchronous copies land at the wait, or when they are
// issued if `eager`.
struct Schedule {
  uint64_t seed = 0;
  bool reverse = false;
  bool eager = false;
};
void set_schedule(const Schedule& schedule);
// "forward", "reverse" or "seed=7", each also with "+eager"; false for another text, which changes nothing.
bool set_schedule(const char* text);

constexpr int kMaxSharedBytes = 227 * 1024;  // of a block, as on an H100

// Of a device: 132 at first, as an H100 has.  Kernels cut their work by it.
int multiprocessors();
void set_multiprocessors(int count);

// Device and stream of this OS thread; every device has a current stream of its own, which is not null.  A launch must be on
// the current stream, and on the device whose memory it is given.
int memory_device();
void set_memory_device(int device);
int current_device();
void set_current_device(int device);
void* current_stream();
void set_current_stream(void* stream);

// Of all OS threads since the last reset: bytes through load, store and copy_async, operations of tensor cores, launches
// that a driver would have accepted.
struct Counters {
  int64_t read, written, flops, launches;
};
Counters counters();
void reset_counters();

// The latest launch of any OS thread that a driver would have accepted.
struct LaunchRecord {
  int device;
  Launch launch;
};
LaunchRecord last_launch();

// ---- what a kernel asks for

// The thread that runs now, its block, and what the launch has counted so far.
struct Running {
  int thread = 0;
  int block_y = 0;
  int64_t block_x = 0;
  Counters counters{};
};
extern __thread Running* running __attribute__((tls_model("initial-exec")));

T2L_EMU_UNSEEN inline int thread_index() { return running->thread; }
T2L_EMU_UNSEEN inline int64_t block_index_x() { return running->block_x; }
T2L_EMU_UNSEEN inline int block_index_y() { return running->block_y; }

// Ends the launch; the text also names block and thread.
[[noreturn]] void fail(const char* what);
// The same with two numbers for a printf format of %lld.
[[noreturn]] void fail(const char* format, int64_t first, int64_t second = 0);

// Which piece of shared memory a thread takes next.
struct SharedCursor {
  int next = 0;
};
void* take_shared(SharedCursor* cursor, int64_t bytes);

void block_barrier();

template <class T>
inline void require_aligned(const void* address, const char* format) {
  constexpr int64_t kAlignment = alignof(T);
  if (reinterpret_cast<uintptr_t>(address) % kAlignment) fail(format, sizeof(T), kAlignment);
}

inline void atomic_add(int* target, int value) {
  require_aligned<int>(target, "atomic add of %lld bytes at an address that is not a multiple of %lld");
  __atomic_fetch_add(target, value, __ATOMIC_RELAXED);
}

T2L_EMU_UNSEEN inline void count_read(int64_t bytes) { running->counters.read += bytes; }
T2L_EMU_UNSEEN inline void count_written(int64_t bytes) { running->counters.written += bytes; }
T2L_EMU_UNSEEN inline void count_flops(int64_t flops) { running->counters.flops += flops; }

// Memory of any type, as a device sees it.
template <class T>
struct __attribute__((may_alias)) Untyped {
  T value;
};

template <class T>
inline T load(const void* address) {
  require_aligned<T>(address, "load of %lld bytes at an address that is not a multiple of %lld");
  count_read(sizeof(T));
  return static_cast<const Untyped<T>*>(address)->value;
}
template <class T>
inline void store(void* address, T value) {
  require_aligned<T>(address, "store of %lld bytes at an address that is not a multiple of %lld");
  count_written(sizeof(T));
  static_cast<Untyped<T>*>(address)->value = value;
}

void copy_async(void* shared, const void* global, int bytes, int valid);
void commit_copies();
void wait_for_copies(int pending);

// ---- warps: all 32 lanes deposit words, meet, and read each other's

constexpr int kLanes = 32;

struct alignas(16) Slot {
  uint32_t word[8];
};
struct Tile {
  alignas(64) double value[16][8];
};
struct Meeting {
  const Slot* slots;  // of all lanes
  Tile* tile;         // room for what the last lane makes of them
  bool last;          // to arrive; it goes on first, so it may fill the tile
};
// Both stay valid until the lane's next meeting.  Lanes that do not deposit equally much are not at the same call.
Meeting meet_warp(const Slot& mine, int bytes);

template <class T>
class WarpExchange {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(Slot));

 public:
  explicit WarpExchange(const T& value) {
    Slot mine{};
    std::memcpy(&mine, &value, sizeof(T));
    slots_ = meet_warp(mine, sizeof(T)).slots;
  }
  // Before the warp's next exchange.
  T2L_EMU_UNSEEN T of(int lane) const {
    if (lane < 0 || lane >= kLanes) fail("warp exchange: there is no lane %lld", lane);
    T value;
    __builtin_memcpy(&value, &slots_[lane], sizeof(T));
    return value;
  }

 private:
  const Slot* slots_;
};

// ---- numbers

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From) && std::is_trivially_copyable_v<To> && std::is_trivially_copyable_v<From>);
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// Without branches, so that loops of it become vector code.
inline float half_to_float(uint16_t half) {
  const uint32_t magnitude = (half & 0x7fffu) << 13;
  const float finite = bit_cast<float>(magnitude) * 0x1p112f;  // moves the exponent's bias, of subnormals too
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0;
  return bit_cast<float>(bit_cast<uint32_t>(finite) | special | (half & 0x8000u) << 16);
}

// To nearest, ties to even.
inline uint16_t float_to_half(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffffu, sign = bits >> 16 & 0x8000u;
  uint32_t half;
  if (magnitude > 0x7f800000u)
    half = 0x7e00;  // NaN
  else if (magnitude >= 0x477ff000u)
    half = 0x7c00;  // from 65520 on: infinity
  else if (magnitude < 0x38800000u)
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;  // subnormal: 0.5 has the same last place
  else
    half = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000u) >> 13;
  return static_cast<uint16_t>(sign | half);
}

inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN stays NaN
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// 10 explicit bits of mantissa; to nearest, ties away from zero.
inline float float_to_tf32(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return bit_cast<float>((bits & ~0x1fffu) | 0x400000u);
  if (magnitude == 0x7f800000u) return value;
  return bit_cast<float>((bits + 0x1000u) & ~0x1fffu);
}

inline float exponential(float x) { return std::exp(x); }
inline float quotient(float a, float b) { return a / b; }
inline float reciprocal_root(float x) { return 1.0f / std::sqrt(x); }
inline float power(float base, float exponent) { return std::pow(base, exponent); }
inline void cos_sin(float x, float* c, float* s) {
  *c = std::cos(x);
  *s = std::sin(x);
}

// ---- tensor cores: the lanes meet once, the last to come computes the product for all

struct Operands {
  float a[16][16];  // [row][k]
  alignas(32) float b[16][8];
};
// Exact products, summed in float64.
Tile multiply(const Operands& operands, int depth);

// Register r of a lane holds rows g (+ 8 for odd r) and from column `step` on for the upper registers.
template <class Convert>
T2L_EMU_UNSEEN inline Operands gather_16bit(const Slot* slots, Convert convert) {
  constexpr int kWords = sizeof(Slot) / sizeof(uint32_t);
  float low[kLanes][kWords], high[kLanes][kWords];
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < kWords; ++i) {
      low[lane][i] = convert(slots[lane].word[i] & 0xffffu);
      high[lane][i] = convert(slots[lane].word[i] >> 16);
    }
  Operands out;
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
  return out;
}
Operands gather_tf32(const Slot* slots);

T2L_EMU_UNSEEN inline Slot fragments(const void* a, const void* b) {
  Slot slot{};
  __builtin_memcpy(&slot.word[0], a, 16);
  __builtin_memcpy(&slot.word[4], b, 8);
  return slot;
}
// d += this lane's part of the tile, cut and not rounded: devices differ, and this is what the worst ones do.
void add_tile(float (&d)[4], const Tile& tile);

// `convert` makes the float of 16 bits.
template <class Convert>
T2L_EMU_UNSEEN inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Convert convert) {
  const Meeting meeting = meet_warp(fragments(a, b), 24);
  if (meeting.last) *meeting.tile = multiply(gather_16bit(meeting.slots, convert), 16);
  add_tile(d, *meeting.tile);
}
void mma_16x8x8(float (&d)[4], const float (&a)[4], const float (&b)[2]);

}  // namespace t2l::emu
