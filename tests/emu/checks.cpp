// What the emulator computes, counts and orders, against plain code.
#include "checks.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "cuda/arithmetic.cuh"

namespace {

using namespace t2l::device;
namespace emu = t2l::emu;

template <class Body>
const char* launch(int64_t blocks, int threads, Body body) {
  return emu::launch(emu::Launch{blocks, 1, threads, 0, emu::current_stream()}, body);
}

// ---- products: fragments as the PTX ISA tells which element a lane's register holds

// Small integers, so that every sum is exact.
struct Matrices {
  int a[16][16], b[16][8], d[16][8];
};
Matrices make_matrices() {
  Matrices m;
  unsigned state = 1;
  const auto next = [&] { return static_cast<int>((state = state * 1664525 + 1013904223) >> 24) % 17 - 8; };
  for (auto& row : m.a)
    for (int& v : row) v = next();
  for (auto& row : m.b)
    for (int& v : row) v = next();
  for (auto& row : m.d)
    for (int& v : row) v = next();
  return m;
}

struct Place {
  int row, column;
};
Place place_in_d(int lane, int i) { return Place{i < 2 ? lane / 4 : lane / 4 + 8, lane % 4 * 2 + (i & 1)}; }

// Lanes' results after `multiply(lane, d)` against d + a b over `depth`.
template <class Multiply>
std::string check_product(const Matrices& m, int depth, Multiply multiply) {
  float results[16][8];
  const char* error = launch(1, 32, [&] {
    float d[4];
    for (int i = 0; i < 4; ++i) {
      const Place p = place_in_d(lane_index(), i);
      d[i] = static_cast<float>(m.d[p.row][p.column]);
    }
    multiply(lane_index(), d);
    for (int i = 0; i < 4; ++i) {
      const Place p = place_in_d(lane_index(), i);
      results[p.row][p.column] = d[i];
    }
  });
  EXPECT(error == nullptr);
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      int expected = m.d[row][column];
      for (int k = 0; k < depth; ++k) expected += m.a[row][k] * m.b[k][column];
      EXPECT(results[row][column] == static_cast<float>(expected), row * 8 + column);
    }
  return "";
}

// m16n8k16: eight elements of A and four of B a lane, two to a register.
template <class T>
std::string check_16bit_product() {
  const Matrices m = make_matrices();
  const auto put = [](uint32_t* registers, int i, int value) {
    T number;
    from_float(static_cast<float>(value), &number);
    registers[i / 2] |= static_cast<uint32_t>(number.bits) << (i % 2 * 16);
  };
  return check_product(m, 16, [&](int lane, float (&d)[4]) {
    const int group = lane >> 2, in_group = lane & 3;
    uint32_t a[4] = {}, b[2] = {};
    for (int i = 0; i < 8; ++i) {
      const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
      const int column = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
      put(a, i, m.a[row][column]);
    }
    for (int i = 0; i < 4; ++i) put(b, i, m.b[in_group * 2 + (i & 1) + (i < 2 ? 0 : 8)][group]);
    mma_16x8x16(d, a, b, T());
  });
}

// m16n8k8: four elements of A and two of B a lane.
std::string check_tf32_product() {
  const Matrices m = make_matrices();
  const auto with_low_bits = [](int value) { return bits_to_float(float_to_bits(static_cast<float>(value)) | 0x1fff); };
  return check_product(m, 8, [&](int lane, float (&d)[4]) {
    const int group = lane >> 2, in_group = lane & 3;
    float a[4], b[2];
    for (int i = 0; i < 4; ++i)
      a[i] = with_low_bits(m.a[i == 0 || i == 2 ? group : group + 8][i < 2 ? in_group : in_group + 4]);
    for (int i = 0; i < 2; ++i) b[i] = with_low_bits(m.b[i == 0 ? in_group : in_group + 4][group]);
    mma_16x8x8(d, a, b);
  });
}

// Addends are cut to 24 bits behind the first of the largest one, and the sum to a float.
std::string check_cut_sums() {
  const auto sum = [](float first, float rest, float before) {
    float result = 0;
    const char* error = launch(1, 32, [&] {
      const int lane = lane_index();
      float d[4] = {before, before, before, before};
      // Row 0 of A: `first`, then `rest`; B: ones.
      const auto pair = [&](int k) {
        bf16 low, high;
        from_float(lane / 4 ? 0.0f : k ? rest : first, &low);
        from_float(lane / 4 ? 0.0f : rest, &high);
        return low.bits | static_cast<uint32_t>(high.bits) << 16;
      };
      const uint32_t ones = 0x3f803f80u, a[4] = {pair(lane % 4 * 2), 0, pair(8 + lane % 4 * 2), 0}, b[2] = {ones, ones};
      mma_16x8x16(d, a, b, bf16());
      if (lane == 0) result = d[0];
    });
    return error ? -1.0f : result;
  };
  EXPECT(sum(1.0f, std::ldexp(1.0f, -25), 0.0f) == 1.0f);  // exactly, 1 + 15/4 units in the last place
  EXPECT(sum(1.0f, std::ldexp(1.0f, -24), 0.0f) == 1.0f + 7 * std::ldexp(1.0f, -23));
  EXPECT(sum(-1.0f, std::ldexp(-1.0f, -24), 0.0f) == -1.0f - 7 * std::ldexp(1.0f, -23));  // toward zero
  EXPECT(sum(std::ldexp(1.0f, -25), std::ldexp(1.0f, -25), 1.0f) == 1.0f);                // d is an addend like the others
  EXPECT(sum(1.0f, 1.0f, -16.0f) == 0.0f && sum(0.0f, 0.0f, 0.0f) == 0.0f);
  EXPECT(sum(1.0f, 1.0f, std::numeric_limits<float>::infinity()) == std::numeric_limits<float>::infinity());
  EXPECT(std::isnan(sum(std::numeric_limits<float>::quiet_NaN(), 1.0f, 0.0f)));
  return "";
}

// ---- conversions

constexpr float kInfinity = std::numeric_limits<float>::infinity();
float above(float v) { return std::nextafter(v, kInfinity); }
float below(float v) { return std::nextafter(v, -kInfinity); }

// The number that 16 bits stand for, from its definition.
double value_of(uint16_t bits, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits & 0x7fff) >> mantissa_bits, mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return mantissa ? std::nan("") : sign * kInfinity;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

// All 65536 patterns, and around the middle of each two that are next to each other.
template <class T>
std::string check_16bit_conversions(int exponent_bits) {
  const auto rounded = [](float v) {
    T number;
    from_float(v, &number);
    return number.bits;
  };
  const uint16_t infinity = static_cast<uint16_t>(((1 << exponent_bits) - 1) << (15 - exponent_bits));
  for (int bits = 0; bits < 0x10000; ++bits) {
    const uint16_t pattern = static_cast<uint16_t>(bits);
    const double value = value_of(pattern, exponent_bits);
    const float converted = to_float(T{pattern});
    if (std::isnan(value)) {
      EXPECT(std::isnan(converted), bits);
      EXPECT(std::isnan(to_float(T{rounded(converted)})), bits);
      continue;
    }
    EXPECT(converted == value && std::signbit(converted) == std::signbit(value), bits);
    EXPECT(rounded(converted) == pattern, bits);
    if ((pattern & 0x7fff) >= infinity) continue;
    // The next one away from zero; what would be past the largest rounds to infinity.
    const uint16_t next = static_cast<uint16_t>(pattern + 1), even = pattern & 1 ? next : pattern;
    const double beyond = (next & 0x7fff) == infinity
                              ? 2 * value - value_of(static_cast<uint16_t>(pattern - 1), exponent_bits)
                              : value_of(next, exponent_bits);
    const float middle = static_cast<float>((value + beyond) / 2);
    EXPECT(rounded(middle) == even, bits);
    EXPECT(rounded(above(middle)) == (value_of(next, exponent_bits) > value ? next : pattern), bits);
    EXPECT(rounded(below(middle)) == (value_of(next, exponent_bits) > value ? pattern : next), bits);
  }
  return "";
}

// Every number of 11 significant bits, and around the middle to the next one, which ties round to.
std::string check_tf32_conversions() {
  constexpr uint32_t kStep = 1u << 13, kFirstInfinity = 0x7f800000;
  for (const uint32_t sign : {0u, 0x80000000u})
    for (uint32_t bits = 0; bits < kFirstInfinity; bits += kStep) {
      const auto rounded = [&](uint32_t magnitude) { return float_to_bits(to_tf32(bits_to_float(sign | magnitude))); };
      EXPECT(rounded(bits) == (sign | bits), bits);
      EXPECT(rounded(bits + kStep / 2 - 1) == (sign | bits), bits);
      EXPECT(rounded(bits + kStep / 2) == (sign | (bits + kStep)), bits);
      EXPECT(rounded(bits + kStep / 2 + 1) == (sign | (bits + kStep)), bits);
    }
  EXPECT(to_tf32(kInfinity) == kInfinity && to_tf32(-kInfinity) == -kInfinity);
  EXPECT(std::isnan(to_tf32(bits_to_float(0x7f800001))));  // whose bits of 11 are those of infinity
  EXPECT(std::isnan(to_tf32(bits_to_float(0xffffffff))));
  return "";
}

// ---- exchanges

std::string check_exchanges() {
  for (int amount = 1; amount < 32; ++amount) {
    int across[32], up[32], turned[32];
    uint32_t where[32];
    double wide[32];
    const char* error = launch(1, 32, [&] {
      const int lane = lane_index();
      across[lane] = shuffle_xor(100 + lane, amount);
      up[lane] = shuffle_up(100 + lane, amount);
      turned[lane] = shuffle(100 + lane, (lane + amount) % 32);
      where[lane] = lanes_where(lane % 3 == amount % 3);
      wide[lane] = shuffle_xor(lane + 0.5, amount);
    });
    EXPECT(error == nullptr);
    for (int lane = 0; lane < 32; ++lane) {
      EXPECT(across[lane] == 100 + (lane ^ amount), lane);
      EXPECT(up[lane] == 100 + (lane < amount ? lane : lane - amount), lane);
      EXPECT(turned[lane] == 100 + (lane + amount) % 32, lane);
      EXPECT((where[lane] >> lane & 1) == (lane % 3 == amount % 3) && where[lane] == where[0], lane);
      EXPECT(wide[lane] == (lane ^ amount) + 0.5, lane);
    }
  }
  return "";
}

// Of an asynchronous copy the first bytes are the source's, the rest zeros.
std::string check_copies() {
  const std::vector<uint8_t> source(16, 0x5a);
  for (int valid = 0; valid <= 16; ++valid) {
    alignas(16) uint8_t copied[16];
    // Reads of more than `valid` bytes would be outside of this.
    const std::vector<uint8_t> exact(source.begin(), source.begin() + valid);
    const char* error = emu::launch(emu::Launch{1, 1, 32, 16, emu::current_stream()}, [&] {
      SharedMemory shared;
      uint8_t* target = shared.take<uint8_t>(16);
      if (thread_index() != 0) return;
      copy_async(target, valid ? exact.data() : source.data(), valid);
      commit_copies();
      wait_for_copies<0>();
      std::memcpy(copied, target, 16);
    });
    EXPECT(error == nullptr, valid);
    for (int i = 0; i < 16; ++i) EXPECT(copied[i] == (i < valid ? 0x5a : 0), valid);
  }
  return "";
}

// ---- launches

std::string check_counters() {
  std::vector<float> x(64, 1.0f), y(128);
  const auto kernel = [&] {
    SharedMemory shared;
    float* row = shared.take<float>(64);
    if (thread_index() < 16) copy_async(row + 4 * thread_index(), x.data() + 4 * thread_index(), 12);
    commit_copies();
    wait_for_copies<0>();
    float d[4] = {};
    const uint32_t a[4] = {}, b[2] = {};
    mma_16x8x16(d, a, b, bf16());
    const float tf32_a[4] = {}, tf32_b[2] = {};
    mma_16x8x8(d, tf32_a, tf32_b);
    const int64_t i = block_index() * 64 + thread_index();
    store_one(&y[i], load_one(&x[thread_index()]));
  };
  emu::reset_counters();
  emu::Launch shape{2, 1, 64, 256, emu::current_stream()};
  EXPECT(emu::launch(shape, kernel) == nullptr);
  shape.stream = nullptr;
  EXPECT(emu::launch(shape, kernel) != nullptr);
  EXPECT(emu::counters().read == 2 * (64 * 4 + 16 * 12));
  EXPECT(emu::counters().written == 2 * 64 * 4);
  EXPECT(emu::counters().flops == 2 * 2 * 2 * 16 * 8 * (16 + 8));
  EXPECT(emu::counters().launches == 1);
  const emu::LaunchRecord last = emu::last_launch();
  EXPECT(last.device == 0 && last.launch.grid_x == 2 && last.launch.threads == 64 && last.launch.shared_bytes == 256);
  emu::reset_counters();
  EXPECT(emu::counters().read == 0 && emu::counters().launches == 0);
  return "";
}

// Every thread of a grid of the largest blocks runs once, and knows where it is.
std::string check_grid() {
  constexpr int kThreads = 1024, kColumns = 3, kRows = 2;
  std::vector<int> seen(kColumns * kRows * kThreads);
  const char* error = emu::launch(emu::Launch{kColumns, kRows, kThreads, 4 * kThreads, emu::current_stream()}, [&] {
    SharedMemory shared;
    int* partners = shared.take<int>(kThreads);
    const int64_t block = emu::block_index_y() * kColumns + block_index();
    partners[thread_index()] = static_cast<int>(block) * kThreads + thread_index();
    block_barrier();
    const int partner = partners[kThreads - 1 - thread_index()];
    atomic_add(&seen[partner], 1 + partner);
  });
  EXPECT(error == nullptr);
  for (int i = 0; i < static_cast<int>(seen.size()); ++i) EXPECT(seen[i] == 1 + i, i);
  return "";
}

// Every block of every cluster tells every other one of its cluster who it is.
std::string check_clusters() {
  constexpr int kThreads = 64, kCluster = 4, kColumns = 8, kRows = 3;
  std::vector<float> told(kColumns * kRows * kCluster);
  const char* error =
      emu::launch(emu::Launch{kColumns, kRows, kThreads, 16 * kCluster, emu::current_stream(), kCluster}, [&] {
        SharedMemory shared;
        float* names = shared.take<float>(4 * kCluster);
        const int64_t block = emu::block_index_y() * kColumns + block_index(), place = block % kCluster;
        cluster_barrier();
        const Vec16 name{{float_to_bits(static_cast<float>(1 + block)), 0, 0, 0}};
        if (thread_index() < kCluster) OfBlock(names + 4 * place, sizeof(Vec16), thread_index()).store(0, name);
        cluster_barrier();
        if (thread_index() < kCluster) told[block * kCluster + thread_index()] = names[4 * thread_index()];
      });
  EXPECT(error == nullptr);
  for (int block = 0; block < kColumns * kRows; ++block)
    for (int other = 0; other < kCluster; ++other)
      EXPECT(told[block * kCluster + other] == static_cast<float>(1 + block / kCluster * kCluster + other), block);
  EXPECT(emu::last_launch().launch.cluster == kCluster);
  return "";
}

// Two groups of a block, with a barrier each: neither waits for the other, nor for one that has exited.
std::string check_groups() {
  constexpr int kThreads = 128, kGroup = 64, kTurns = 5;
  std::vector<float> sums(kThreads);
  const char* error = emu::launch(emu::Launch{1, 1, kThreads, 4 * kThreads, emu::current_stream()}, [&] {
    SharedMemory shared;
    float* row = shared.take<float>(kThreads);
    const int group = thread_index() / kGroup, turns = group ? kTurns : 1;
    float sum = 0;
    for (int i = 0; i < turns; ++i) {
      row[thread_index()] = static_cast<float>(i + 1);
      named_barrier<kGroup>(1 + group);
      sum += row[group * kGroup + (thread_index() + 1) % kGroup];
      named_barrier<kGroup>(1 + group);
    }
    sums[thread_index()] = sum;
  });
  EXPECT(error == nullptr);
  for (int i = 0; i < kThreads; ++i) EXPECT(sums[i] == (i < kGroup ? 1.0f : 15.0f), i);
  for (const int name : {0, emu::kNamedBarriers}) {
    const char* refused = emu::launch(emu::Launch{1, 1, 32, 0, emu::current_stream()}, [&] { named_barrier<32>(name); });
    EXPECT(refused && std::strstr(refused, "there is no name"), name);
  }
  return "";
}

std::string check_refused_launches() {
  void* stream = emu::current_stream();
  for (const emu::Launch& shape :
       {emu::Launch{0, 1, 32, 0, stream}, emu::Launch{int64_t{1} << 31, 1, 32, 0, stream}, emu::Launch{1, 0, 32, 0, stream},
        emu::Launch{1, 1 << 16, 32, 0, stream}, emu::Launch{1, 1, 0, 0, stream}, emu::Launch{1, 1, 48, 0, stream},
        emu::Launch{1, 1, 1056, 0, stream}, emu::Launch{1, 1, 32, 227 * 1024 + 1, stream}, emu::Launch{1, 1, 32, -1, stream},
        emu::Launch{6, 1, 32, 0, stream, 4}, emu::Launch{16, 1, 32, 0, stream, 16}, emu::Launch{8, 1, 1024, 0, stream, 8},
        emu::Launch{1, 1, 32, 0, stream, 0}}) {
    bool ran = false;
    const char* error = emu::launch(shape, [&] { ran = true; });
    EXPECT(error && std::strncmp(error, "launch ", 7) == 0 && !ran);
  }
  return "";
}

std::string check_streams() {
  void* first = emu::current_stream();
  emu::set_current_device(1);
  void* second = emu::current_stream();
  EXPECT(first && second && first != second);
  int there = -1;
  void* elsewhere = nullptr;
  int own;
  emu::set_current_stream(&own);
  std::thread([&] {
    there = emu::current_device();
    elsewhere = emu::current_stream();
  }).join();
  EXPECT(there == 0 && elsewhere == first);
  EXPECT(emu::current_stream() == &own);
  emu::set_memory_device(1);
  EXPECT(launch(1, 32, [] {}) == nullptr);
  EXPECT(emu::last_launch().device == 1 && emu::last_launch().launch.stream == &own);
  emu::set_current_device(0);
  EXPECT(emu::current_stream() == first);
  return "";
}

// The order in which the threads of three blocks pass, twice each with a barrier between.
std::vector<int> order_of_threads() {
  constexpr int kThreads = 64, kBlocks = 3;
  std::vector<int> order;
  const char* error = launch(kBlocks, kThreads, [&] {
    order.push_back(static_cast<int>(block_index()) * kThreads + thread_index());
    block_barrier();
    order.push_back(static_cast<int>(block_index()) * kThreads + thread_index());
  });
  if (error || order.size() != 2 * kThreads * kBlocks) order.clear();
  return order;
}

std::string check_schedules() {
  for (const char* text :
       {"", "sideways", "forward+", "+eager", "seed", "seed=", "seed=0", "seed=-1", "seed=7x", "seed=7+late"})
    EXPECT(!emu::set_schedule(text));
  for (const char* text : {"forward+eager", "reverse+eager", "seed=7+eager", "reverse"}) EXPECT(emu::set_schedule(text));
  const std::vector<int> reverse = order_of_threads();
  EXPECT(emu::set_schedule("forward"));
  const std::vector<int> forward = order_of_threads();
  EXPECT(forward.size() == 384 && reverse.size() == 384);
  for (int i = 0; i < 64; ++i) {
    EXPECT(forward[i] == i, i);
    EXPECT(reverse[i] == 2 * 64 + 63 - i, i);
  }
  EXPECT(forward[128] == 64 && reverse[128] == 127);
  std::vector<std::vector<int>> seen{forward, reverse};
  for (const char* text : {"seed=1", "seed=2"})
    for (int repeat = 0; repeat < 2; ++repeat) {
      if (repeat == 0) EXPECT(emu::set_schedule(text));
      const std::vector<int> order = order_of_threads();
      EXPECT(std::find(seen.begin(), seen.end(), order) == seen.end());
      EXPECT(std::is_permutation(order.begin(), order.end(), forward.begin(), forward.end()));
      EXPECT(!std::equal(order.begin(), order.begin() + 64, order.begin() + 64));  // the next pass is another one
      seen.push_back(order);
    }
  EXPECT(emu::set_schedule("seed=1"));
  EXPECT(order_of_threads() == seen[2]);  // the same again
  return "";
}

const Check kChecks[] = {
    {"bf16_product", check_16bit_product<bf16>},
    {"f16_product", check_16bit_product<f16>},
    {"tf32_product", check_tf32_product},
    {"cut_sums", check_cut_sums},
    {"clusters", check_clusters},
    {"groups", check_groups},
    {"bf16_conversions", [] { return check_16bit_conversions<bf16>(8); }},
    {"f16_conversions", [] { return check_16bit_conversions<f16>(5); }},
    {"tf32_conversions", check_tf32_conversions},
    {"exchanges", check_exchanges},
    {"copies", check_copies},
    {"counters", check_counters},
    {"grid", check_grid},
    {"refused_launches", check_refused_launches},
    {"streams", check_streams},
    {"schedules", check_schedules},
};

}  // namespace

int main(int argc, char** argv) { return run_check(kChecks, argc, argv); }
