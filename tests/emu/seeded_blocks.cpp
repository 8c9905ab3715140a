// Seeded bugs of blocks, of their shared memory and copies, and of launches.
#include <sys/mman.h>

#include "seeded_cases.h"

namespace seeded {
namespace {

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
         const Vec16 quad = load_vec16(x + (fixed || first < 4 ? first : first - 1));
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

    {"missing_turn",  // of the second warp, which reads what the first has written
     [](bool fixed, const float* x, float* y) {
       return launch(kRowBytes, [=] {
         SharedMemory shared;
         float* row = shared.take<float>(kThreads);
         const int warp = warp_index(), first = lane_index();
         if (warp == 0) {
           row[first] = load_one(x + element());
           if (fixed) named_arrive<kThreads>(3);
         } else if (fixed) {
           named_barrier<kThreads>(3);
         }
         store_one(y + element(), warp == 0 ? load_one(x + element()) : row[31 - first]);
       });
     },
     [](int block, int thread) { return input(block, thread < 32 ? thread : 63 - thread); }},

    {"barrier_of_others",  // one warp calls it with as many threads as it has, one with all
     [](bool fixed, const float* x, float* y) {
       return launch(0, [=] {
         if (fixed || warp_index() == 1)
           named_barrier<kThreads>(3);
         else
           named_barrier<kThreads / 2>(3);
         store_one(y + element(), load_one(x + element()));
       });
     },
     input},

    {"part_of_a_warp",  // a device counts whole warps
     [](bool fixed, const float* x, float* y) {
       return launch(0, [=] {
         if (fixed)
           named_barrier<kThreads>(3);
         else if (lane_index() < 16)
           named_barrier<32>(3);
         store_one(y + element(), load_one(x + element()));
       });
     },
     input},

    {"arrives_once_more",  // the next kernel's barrier would count it
     [](bool fixed, const float* x, float* y) {
       return launch(0, [=] {
         named_barrier<kThreads>(3);
         if (!fixed && warp_index() == 1) named_arrive<kThreads>(3);
         store_one(y + element(), load_one(x + element()));
       });
     },
     input},

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

}  // namespace

std::vector<Case> block_cases() { return {std::begin(kCases), std::end(kCases)}; }

}  // namespace seeded
