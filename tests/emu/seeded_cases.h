// What seeded bugs share: small launches, and the case of a bug and its twin.
#pragma once
#include <cstdint>
#include <functional>
#include <iterator>
#include <vector>

#include "cuda/arithmetic.cuh"

namespace seeded {

using namespace t2l::device;
namespace emu = t2l::emu;

constexpr int kThreads = 64, kBlocks = 2;
constexpr int64_t kRowBytes = kThreads * sizeof(float);

template <class Body>
const char* launch(int64_t shared_bytes, Body body, int cluster = 1, bool early = false) {
  return emu::launch(emu::Launch{kBlocks, 1, kThreads, shared_bytes, emu::current_stream(), cluster, early}, body);
}
inline int element() { return static_cast<int>(block_index()) * kThreads + thread_index(); }

inline float* take_row() {
  SharedMemory shared;
  return shared.take<float>(kThreads);
}

// A quarter of the threads copy 16 bytes each.
inline void copy_row(float* target, const float* row) {
  if (thread_index() < kThreads / 4) copy_async(target + 4 * thread_index(), row + 4 * thread_index(), 16);
  commit_copies();
}

// Sends this block's part of x to the row of the other block.
inline void send_row(float* row, const float* x) {
  if (thread_index() < kThreads / 4)
    OfBlock(row + 4 * thread_index(), sizeof(Vec16), 1 - static_cast<int>(block_index()))
        .store(0, load_vec16(x + block_index() * kThreads + 4 * thread_index()));
}

// A case reads x[i] = i + 1 and writes y, both of kBlocks * kThreads floats.
struct Case {
  const char* name;
  std::function<const char*(bool fixed, const float* x, float* y)> run;
  float (*expected)(int block, int thread);
};

using Expected = decltype(Case::expected);

// The case of one launch of `body(fixed, x, y)`.
template <class Body>
Case kernel(const char* name, int64_t shared_bytes, Expected expected, Body body, int cluster = 1, bool early = false) {
  const auto run = [=](bool fixed, const float* x, float* y) {
    return launch(shared_bytes, [=] { body(fixed, x, y); }, cluster, early);
  };
  return {name, run, expected};
}
// Both blocks as one cluster, with a row of shared memory each.
template <class Body>
Case cluster_kernel(const char* name, Expected expected, Body body) {
  return kernel(name, kRowBytes, expected, body, kBlocks);
}
template <class Body>
Case early_kernel(const char* name, Expected expected, Body body) {
  return kernel(name, 0, expected, body, 1, true);
}

inline float input(int block, int thread) { return static_cast<float>(block * kThreads + thread + 1); }
inline float reversed(int block, int thread) { return input(block, kThreads - 1 - thread); }
inline float of_other_block(int block, int thread) { return input(1 - block, thread); }
inline float warp_sum(int block, int thread) {
  float sum = 0;
  for (int lane = 0; lane < 32; ++lane) sum += input(block, thread / 32 * 32 + lane);
  return sum;
}

// A ring of two slots takes a row at a time.
constexpr int kSteps = 4, kStep = 16;

inline float sum_over_warp(float value) {
  for (int mask = 16; mask; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// Cases of one bug each, in the thread's block and beyond it.
std::vector<Case> block_cases();
std::vector<Case> cluster_cases();

}  // namespace seeded
