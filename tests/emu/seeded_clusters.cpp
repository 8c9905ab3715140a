// Seeded bugs of clusters and of PDL launches.
#include "seeded_cases.h"

namespace seeded {
namespace {

const Case kCases[] = {
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
           OfBlock(row + 4 * thread_index(), sizeof(Vec16), fixed ? 0 : 1)
               .store(0, load_vec16(x + block_index() * kThreads + 4 * thread_index()));
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
};

}  // namespace

std::vector<Case> cluster_cases() { return {std::begin(kCases), std::end(kCases)}; }

}  // namespace seeded
