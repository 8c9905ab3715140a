// Small kernels with one bug each, and their correct twins: the emulator has to tell them apart.
//
//   seeded_bugs <name>    the kernel with its bug; after a failed launch also its twin, on the same machine
//   seeded_bugs --fixed   every twin, and then all of them on two OS threads at once
//
// Prints what came of each.  Exits with 0 if all is right, 1 if a launch failed, 3 if only its results are wrong, 4 if a
// twin did not work after a failure, 2 if it was called wrongly.
#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "cuda/primitives.cuh"

namespace {

using namespace t2l::device;
namespace emu = t2l::emu;

constexpr int kThreads = 64, kBlocks = 2;
constexpr int64_t kRowBytes = kThreads * sizeof(float);

template <class Body>
const char* launch(int64_t shared_bytes, Body body, int cluster = 1) {
  return emu::launch(emu::Launch{kBlocks, 1, kThreads, shared_bytes, emu::current_stream(), cluster}, body);
}
// Both blocks as one cluster, with a row of shared memory each.
template <class Body>
const char* launch_cluster(Body body) {
  return launch(kRowBytes, body, kBlocks);
}

template <class Body>
const char* launch_early(Body body) {
  return emu::launch(emu::Launch{kBlocks, 1, kThreads, 0, emu::current_stream(), 1, true}, body);
}

int element() { return static_cast<int>(block_index()) * kThreads + thread_index(); }

// A quarter of the threads copy 16 bytes each.
void copy_row(float* target, const float* row) {
  if (thread_index() < kThreads / 4) copy_async(target + 4 * thread_index(), row + 4 * thread_index(), 16);
  commit_copies();
}

// Sends this block's part of x to the row of the other block.
void send_row(float* row, const float* x) {
  if (thread_index() < kThreads / 4)
    OfBlock(row + 4 * thread_index(), sizeof(Quad), 1 - static_cast<int>(block_index()))
        .store(0, load_quad(x + block_index() * kThreads + 4 * thread_index()));
}

// A case reads x[i] = i + 1 and writes y, both of kBlocks * kThreads floats.
struct Case {
  const char* name;
  const char* (*run)(bool fixed, const float* x, float* y);
  float (*expected)(int block, int thread);
};

float input(int block, int thread) { return static_cast<float>(block * kThreads + thread + 1); }
float reversed(int block, int thread) { return input(block, kThreads - 1 - thread); }
float of_other_block(int block, int thread) { return input(1 - block, thread); }
float warp_sum(int block, int thread) {
  float sum = 0;
  for (int lane = 0; lane < 32; ++lane) sum += input(block, thread / 32 * 32 + lane);
  return sum;
}

// A ring of two slots takes a row at a time.
constexpr int kSteps = 4, kStep = 16;

float sum_over_warp(float value) {
  for (int mask = 16; mask; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

const Case kCases[] = {
    {"missing_barrier",
     [](bool fixed, const float* x, float* y) {
       return launch(kRowBytes, [=] {
         SharedMemory shared;
         float* row = shared.take<float>(kThreads);
         row[thread_index()] = load_one(x + element());
         if (fixed) block_barrier();
         store_one(y + element(), row[kThreads - 1 - thread_index()]);
       });
     },
     reversed},

    {"missing_barrier_after",  // before the row is written again
     [](bool fixed, const float* x, float* y) {
       return launch(kRowBytes, [=] {
         SharedMemory shared;
         float* row = shared.take<float>(kThreads);
         float sum = 0;
         for (int i = 0; i < 2; ++i) {
           row[thread_index()] = static_cast<float>(i + 1) * load_one(x + element());
           block_barrier();
           sum += row[kThreads - 1 - thread_index()];
           if (fixed) block_barrier();
         }
         store_one(y + element(), sum);
       });
     },
     [](int block, int thread) { return 3 * reversed(block, thread); }},

    {"missing_wait",  // waits for all groups but one
     [](bool fixed, const float* x, float* y) {
       return launch(kRowBytes, [=] {
         SharedMemory shared;
         float* row = shared.take<float>(kThreads);
         copy_row(row, x + block_index() * kThreads);
         if (fixed)
           wait_for_copies<0>();
         else
           wait_for_copies<1>();
         block_barrier();
         store_one(y + element(), row[kThreads - 1 - thread_index()]);
         block_barrier();
         wait_for_copies<0>();
       });
     },
     reversed},

    {"abandoned_copies",
     [](bool fixed, const float* x, float* y) {
       return launch(kRowBytes, [=] {
         SharedMemory shared;
         copy_row(shared.take<float>(kThreads), x + block_index() * kThreads);
         store_one(y + element(), load_one(x + element()));
         if (fixed) wait_for_copies<0>();
       });
     },
     input},

    {"early_overwrite",  // of a slot that others still read
     [](bool fixed, const float* x, float* y) {
       return launch(2 * kRowBytes, [=] {
         SharedMemory shared;
         float* slots = shared.take<float>(2 * kThreads);
         float sum = 0;
         copy_row(slots, x);
         for (int i = 0; i < kSteps; ++i) {
           if (i + 1 < kSteps)
             copy_row(slots + (i + 1) % 2 * kThreads, x + (i + 1) * kStep);
           else
             commit_copies();
           wait_for_copies<1>();
           block_barrier();
           sum += slots[i % 2 * kThreads + kThreads - 1 - thread_index()];
           if (fixed) block_barrier();
         }
         store_one(y + element(), sum);
       });
     },
     [](int, int thread) {
       float sum = 0;
       for (int i = 0; i < kSteps; ++i) sum += reversed(0, thread) + static_cast<float>(i * kStep);
       return sum;
     }},

    {"shared_overrun",
     [](bool fixed, const float* x, float* y) {
       return launch(2 * kRowBytes, [=] {
         SharedMemory shared;
         shared.take<float>(kThreads);
         float* row = shared.take<float>(kThreads);
         row[thread_index() + (fixed ? 0 : 1)] = load_one(x + element());
         store_one(y + element(), load_one(x + element()));
       });
     },
     input},

    {"global_overrun",
     [](bool fixed, const float* x, float* y) {
       return launch(0, [=] { store_one(y + element(), load_one(x + element() + (fixed ? 0 : 1))); });
     },
     input},

    {"misaligned_load",
     [](bool fixed, const float* x, float* y) {
       return launch(0, [=] {
         const int first = element() / 4 * 4;
         const Quad quad = load_quad(x + (fixed || first < 4 ? first : first - 1));
         store_one(y + element(), bits_to_float(quad.word[element() % 4]));
       });
     },
     input},

    {"misaligned_copy",
     [](bool fixed, const float* x, float* y) {
       return launch(kRowBytes, [=] {
         SharedMemory shared;
         float* row = shared.take<float>(kThreads);
         copy_row(row, x + block_index() * (kThreads - (fixed ? 0 : 1)));
         wait_for_copies<0>();
         block_barrier();
         store_one(y + element(), row[thread_index()]);
       });
     },
     input},

    {"copy_to_global",
     [](bool fixed, const float* x, float* y) {
       return launch(kRowBytes, [=] {
         SharedMemory shared;
         float* row = shared.take<float>(kThreads);
         copy_row(fixed ? row : y, x + block_index() * kThreads);
         wait_for_copies<0>();
         block_barrier();
         store_one(y + element(), row[thread_index()]);
       });
     },
     input},

    {"divergent_exchange",  // half a warp at one, half at another
     [](bool fixed, const float* x, float* y) {
       return launch(0, [=] {
         const float value = load_one(x + element());
         if (fixed || lane_index() < 16)
           store_one(y + element(), shuffle_xor(value, 1));
         else
           store_one(y + element(), static_cast<float>(shuffle_xor(static_cast<double>(value), 1)));
       });
     },
     [](int block, int thread) { return input(block, thread ^ 1); }},

    {"divergent_barrier",  // half of the last warp is elsewhere
     [](bool fixed, const float* x, float* y) {
       return launch(0, [=] {
         if (fixed || thread_index() < kThreads - 16) block_barrier();
         store_one(y + element(), sum_over_warp(load_one(x + element())));
       });
     },
     warp_sum},

    {"exited_lane",  // a whole warp may exit, and counts as arrived at barriers
     [](bool fixed, const float* x, float* y) {
       return launch(0, [=] {
         const float value = load_one(x + element());
         store_one(y + element(), value);
         if (fixed ? warp_index() == 1 : lane_index() == 0) return;
         store_one(y + element(), sum_over_warp(value));
         block_barrier();
       });
     },
     [](int block, int thread) { return thread < 32 ? warp_sum(block, thread) : input(block, thread); }},

    {"missing_cluster_barrier",  // before what another block sent is read
     [](bool fixed, const float* x, float* y) {
       return launch_cluster([=] {
         SharedMemory shared;
         float* row = shared.take<float>(kThreads);
         cluster_barrier();
         send_row(row, x);
         if (fixed)
           cluster_barrier();
         else
           block_barrier();
         store_one(y + element(), row[thread_index()]);
         cluster_barrier();
       });
     },
     of_other_block},

    {"block_not_begun",  // the other block may begin later
     [](bool fixed, const float* x, float* y) {
       return launch_cluster([=] {
         SharedMemory shared;
         float* row = shared.take<float>(kThreads);
         if (fixed) cluster_barrier();
         send_row(row, x);
         cluster_barrier();
         store_one(y + element(), row[thread_index()]);
       });
     },
     of_other_block},

    {"block_exited",  // nobody reads what is sent there, but its memory may be another block's
     [](bool fixed, const float* x, float* y) {
       return launch_cluster([=] {
         SharedMemory shared;
         float* row = shared.take<float>(kThreads);
         cluster_barrier();
         store_one(y + element(), load_one(x + element()));
         if (!fixed && block_index() == 0) return;
         send_row(row, x);
         if (fixed) cluster_barrier();
       });
     },
     input},

    {"sent_after_arriving",  // what others wait for is what came before
     [](bool fixed, const float* x, float* y) {
       return launch_cluster([=] {
         SharedMemory shared;
         float* row = shared.take<float>(kThreads);
         cluster_barrier();
         if (!fixed) cluster_arrive();
         send_row(row, x);
         if (fixed) cluster_arrive();
         cluster_wait();
         store_one(y + element(), row[thread_index()]);
         cluster_barrier();
       });
     },
     of_other_block},

    {"abandoned_cluster_barrier",
     [](bool fixed, const float* x, float* y) {
       return launch_cluster([=] {
         store_one(y + element(), load_one(x + element()));
         cluster_arrive();
         if (fixed) cluster_wait();
       });
     },
     input},

    {"divergent_cluster_barrier",  // half of each block's last warp is elsewhere
     [](bool fixed, const float* x, float* y) {
       return launch_cluster([=] {
         if (fixed || thread_index() < kThreads - 16) cluster_barrier();
         store_one(y + element(), sum_over_warp(load_one(x + element())));
       });
     },
     warp_sum},

    {"outside_the_cluster",  // of one block
     [](bool fixed, const float* x, float* y) {
       return launch(kRowBytes, [=] {
         SharedMemory shared;
         float* row = shared.take<float>(kThreads);
         if (thread_index() < kThreads / 4)
           OfBlock(row + 4 * thread_index(), sizeof(Quad), fixed ? 0 : 1)
               .store(0, load_quad(x + block_index() * kThreads + 4 * thread_index()));
         block_barrier();
         store_one(y + element(), row[thread_index()]);
       });
     },
     input},

    {"read_before_waiting",  // what an earlier launch may still write
     [](bool fixed, const float* x, float* y) {
       return launch_early([=] {
         if (fixed) wait_for_earlier_launches();
         const float value = load_one(x + element());
         if (!fixed) wait_for_earlier_launches();
         store_one(y + element(), value);
       });
     },
     input},

    {"never_waits",  // its launch could end before earlier ones, and later launches would not wait for those
     [](bool fixed, const float* x, float* y) {
       return launch_early([=] {
         if (!fixed && thread_index() == 5) return;
         wait_for_earlier_launches();
         store_one(y + element(), load_one(x + element()));
       });
     },
     input},

    {"trusts_a_guess",  // under schedules that say what may have been there
     [](bool fixed, const float* x, float* y) {
       static const int first = kBlocks * kThreads - 1;
       return launch_early([=] {
         const int guess = peek(&first);
         wait_for_earlier_launches();
         store_one(y + element(), load_one(x + ((fixed ? first : guess) + 1 + element()) % (kBlocks * kThreads)));
       });
     },
     input},

    {"wrong_stream",
     [](bool fixed, const float* x, float* y) {
       void* created = y;
       void* before = emu::current_stream();
       emu::set_current_stream(created);
       const char* error = emu::launch(emu::Launch{kBlocks, 1, kThreads, 0, fixed ? created : before},
                                       [=] { store_one(y + element(), load_one(x + element())); });
       emu::set_current_stream(before);
       return error;
     },
     input},

    {"wrong_device",  // another one than the memory's
     [](bool fixed, const float* x, float* y) {
       emu::set_current_device(1);
       emu::set_memory_device(fixed ? 1 : 0);
       const char* error = launch(0, [=] { store_one(y + element(), load_one(x + element())); });
       emu::set_current_device(0);
       emu::set_memory_device(0);
       return error;
     },
     input},

    {"too_much_shared",  // allocations are rounded up to 16 bytes
     [](bool fixed, const float* x, float* y) {
       return launch(kRowBytes + (fixed ? 16 : 4), [=] {
         SharedMemory shared;
         shared.take<float>(kThreads);
         shared.take<char>(1);
         store_one(y + element(), load_one(x + element()));
       });
     },
     input},

    {"more_shared_than_there_is",
     [](bool fixed, const float* x, float* y) {
       return launch(227 * 1024 + (fixed ? 0 : 16), [=] { store_one(y + element(), load_one(x + element())); });
     },
     input},

    {"different_allocations",
     [](bool fixed, const float* x, float* y) {
       return launch(kRowBytes, [=] {
         SharedMemory shared;
         shared.take<float>(fixed || thread_index() % 2 ? kThreads : kThreads / 2);
         store_one(y + element(), load_one(x + element()));
       });
     },
     input},

    {"int32_offset",
     [](bool fixed, const float* x, float* y) {
       constexpr size_t kBytes = (size_t{1} << 31) + 4096;
       void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
       if (memory == MAP_FAILED) return "no address space";
       char* bytes = static_cast<char*>(memory);
       const char* error = launch(0, [=] {
         const int row = static_cast<int>(load_one(x)) << 16, stride = 1 << 15;
         char* target = bytes + (fixed ? int64_t{row} * stride : row * stride);
         store_one(reinterpret_cast<float*>(target) + element(), load_one(x + element()));
         store_one(y + element(), load_one(reinterpret_cast<float*>(target) + element()));
       });
       munmap(memory, kBytes);
       return error;
     },
     input},

    {"failed_requirement",
     [](bool fixed, const float* x, float* y) {
       return launch(0, [=] {
         require(fixed || element() != 70, "an id out of range");
         store_one(y + element(), load_one(x + element()));
       });
     },
     input},
};

struct Outcome {
  int code;
  std::string text;
};

Outcome try_case(const Case& c, bool fixed) {
  constexpr int kCount = kBlocks * kThreads;
  const auto x = std::make_unique<float[]>(kCount), y = std::make_unique<float[]>(kCount);
  for (int i = 0; i < kCount; ++i) x[i] = static_cast<float>(i + 1);
  if (const char* error = c.run(fixed, x.get(), y.get())) return Outcome{1, error};
  for (int i = 0; i < kCount; ++i) {
    const float expected = c.expected(i / kThreads, i % kThreads);
    if (y[i] != expected)
      return Outcome{
          3, "wrong: y[" + std::to_string(i) + "] = " + std::to_string(y[i]) + ", expected " + std::to_string(expected)};
  }
  return Outcome{0, "ok"};
}

int run_twins() {
  int code = 0;
  for (const Case& c : kCases) {
    const Outcome outcome = try_case(c, true);
    std::printf("%s: %s\n", c.name, outcome.text.c_str());
    if (outcome.code) code = outcome.code;
  }
  return code;
}

int run_bug(const Case& c) {
  const Outcome outcome = try_case(c, false);
  std::printf("%s\n", outcome.text.c_str());
  std::fflush(stdout);
  if (outcome.code == 1) {
    const Outcome after = try_case(c, true);
    if (after.code) {
      std::printf("afterwards, its twin: %s\n", after.text.c_str());
      return 4;
    }
  }
  return outcome.code;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  if (std::strcmp(argv[1], "--fixed") == 0) {
    int codes[3] = {run_twins(), 0, 0};
    std::thread first([&] { codes[1] = run_twins(); }), second([&] { codes[2] = run_twins(); });
    first.join();
    second.join();
    return codes[0] ? codes[0] : codes[1] ? codes[1] : codes[2];
  }
  for (const Case& c : kCases)
    if (std::strcmp(argv[1], c.name) == 0) return run_bug(c);
  return 2;
}
