// Seeded bugs of blocks, of their shared memory and copies, and of launches.
#include <sys/mman.h>

#include "seeded_cases.h"

namespace seeded {
namespace {

const Case kCases[] = {
    kernel("missing_barrier", kRowBytes, reversed,
           [](bool fixed, const float* x, float* y) {
             float* row = take_row();
             row[thread_index()] = load_one(x + element());
             if (fixed) block_barrier();
             store_one(y + element(), row[kThreads - 1 - thread_index()]);
           }),

    // Before the row is written again.
    kernel(
        "missing_barrier_after", kRowBytes, [](int block, int thread) { return 3 * reversed(block, thread); },
        [](bool fixed, const float* x, float* y) {
          float* row = take_row();
          float sum = 0;
          for (int i = 0; i < 2; ++i) {
            row[thread_index()] = static_cast<float>(i + 1) * load_one(x + element());
            block_barrier();
            sum += row[kThreads - 1 - thread_index()];
            if (fixed) block_barrier();
          }
          store_one(y + element(), sum);
        }),

    // Waits for all groups but one.
    kernel("missing_wait", kRowBytes, reversed,
           [](bool fixed, const float* x, float* y) {
             float* row = take_row();
             copy_row(row, x + block_index() * kThreads);
             if (fixed)
               wait_for_copies<0>();
             else
               wait_for_copies<1>();
             block_barrier();
             store_one(y + element(), row[kThreads - 1 - thread_index()]);
             block_barrier();
             wait_for_copies<0>();
           }),

    kernel("abandoned_copies", kRowBytes, input,
           [](bool fixed, const float* x, float* y) {
             copy_row(take_row(), x + block_index() * kThreads);
             store_one(y + element(), load_one(x + element()));
             if (fixed) wait_for_copies<0>();
           }),

    // Of a slot that others still read.
    kernel(
        "early_overwrite", 2 * kRowBytes,
        [](int, int thread) {
          float sum = 0;
          for (int i = 0; i < kSteps; ++i) sum += reversed(0, thread) + static_cast<float>(i * kStep);
          return sum;
        },
        [](bool fixed, const float* x, float* y) {
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
        }),

    kernel("shared_overrun", 2 * kRowBytes, input,
           [](bool fixed, const float* x, float* y) {
             SharedMemory shared;
             shared.take<float>(kThreads);
             float* row = shared.take<float>(kThreads);
             row[thread_index() + (fixed ? 0 : 1)] = load_one(x + element());
             store_one(y + element(), load_one(x + element()));
           }),

    kernel(
        "global_overrun", 0, input,
        [](bool fixed, const float* x, float* y) { store_one(y + element(), load_one(x + element() + (fixed ? 0 : 1))); }),

    kernel("misaligned_load", 0, input,
           [](bool fixed, const float* x, float* y) {
             const int first = element() / 4 * 4;
             const Vec16 quad = load_vec16(x + (fixed || first < 4 ? first : first - 1));
             store_one(y + element(), bits_to_float(quad.word[element() % 4]));
           }),

    kernel("misaligned_copy", kRowBytes, input,
           [](bool fixed, const float* x, float* y) {
             float* row = take_row();
             copy_row(row, x + block_index() * (kThreads - (fixed ? 0 : 1)));
             wait_for_copies<0>();
             block_barrier();
             store_one(y + element(), row[thread_index()]);
           }),

    kernel("copy_to_global", kRowBytes, input,
           [](bool fixed, const float* x, float* y) {
             float* row = take_row();
             copy_row(fixed ? row : y, x + block_index() * kThreads);
             wait_for_copies<0>();
             block_barrier();
             store_one(y + element(), row[thread_index()]);
           }),

    // Half a warp at one, half at another.
    kernel(
        "divergent_exchange", 0, [](int block, int thread) { return input(block, thread ^ 1); },
        [](bool fixed, const float* x, float* y) {
          const float value = load_one(x + element());
          if (fixed || lane_index() < 16)
            store_one(y + element(), shuffle_xor(value, 1));
          else
            store_one(y + element(), static_cast<float>(shuffle_xor(static_cast<double>(value), 1)));
        }),

    // Half of the last warp is elsewhere.
    kernel("divergent_barrier", 0, warp_sum,
           [](bool fixed, const float* x, float* y) {
             if (fixed || thread_index() < kThreads - 16) block_barrier();
             store_one(y + element(), sum_over_warp(load_one(x + element())));
           }),

    // Of the second warp, which reads what the first has written.
    kernel(
        "missing_turn", kRowBytes, [](int block, int thread) { return input(block, thread < 32 ? thread : 63 - thread); },
        [](bool fixed, const float* x, float* y) {
          float* row = take_row();
          const int warp = warp_index(), first = lane_index();
          if (warp == 0) {
            row[first] = load_one(x + element());
            if (fixed) named_arrive<kThreads>(3);
          } else if (fixed) {
            named_barrier<kThreads>(3);
          }
          store_one(y + element(), warp == 0 ? load_one(x + element()) : row[31 - first]);
        }),

    // One warp calls it with as many threads as it has, one with all.
    kernel("barrier_of_others", 0, input,
           [](bool fixed, const float* x, float* y) {
             if (fixed || warp_index() == 1)
               named_barrier<kThreads>(3);
             else
               named_barrier<kThreads / 2>(3);
             store_one(y + element(), load_one(x + element()));
           }),

    // A device counts whole warps.
    kernel("part_of_a_warp", 0, input,
           [](bool fixed, const float* x, float* y) {
             if (fixed)
               named_barrier<kThreads>(3);
             else if (lane_index() < 16)
               named_barrier<32>(3);
             store_one(y + element(), load_one(x + element()));
           }),

    // The next kernel's barrier would count it.
    kernel("arrives_once_more", 0, input,
           [](bool fixed, const float* x, float* y) {
             named_barrier<kThreads>(3);
             if (!fixed && warp_index() == 1) named_arrive<kThreads>(3);
             store_one(y + element(), load_one(x + element()));
           }),

    // A whole warp may exit, and counts as arrived at barriers.
    kernel(
        "exited_lane", 0, [](int block, int thread) { return thread < 32 ? warp_sum(block, thread) : input(block, thread); },
        [](bool fixed, const float* x, float* y) {
          const float value = load_one(x + element());
          store_one(y + element(), value);
          if (fixed ? warp_index() == 1 : lane_index() == 0) return;
          store_one(y + element(), sum_over_warp(value));
          block_barrier();
        }),

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

    kernel("different_allocations", kRowBytes, input,
           [](bool fixed, const float* x, float* y) {
             SharedMemory shared;
             shared.take<float>(fixed || thread_index() % 2 ? kThreads : kThreads / 2);
             store_one(y + element(), load_one(x + element()));
           }),

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

    kernel("failed_requirement", 0, input,
           [](bool fixed, const float* x, float* y) {
             require(fixed || element() != 70, "an id out of range");
             store_one(y + element(), load_one(x + element()));
           }),
};

}  // namespace

std::vector<Case> block_cases() { return {std::begin(kCases), std::end(kCases)}; }

}  // namespace seeded
