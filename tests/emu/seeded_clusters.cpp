// Seeded bugs of clusters and of PDL launches.
#include "seeded_cases.h"

namespace seeded {
namespace {

const Case kCases[] = {
    // Before what another block sent is read.
    cluster_kernel("missing_cluster_barrier", of_other_block,
                   [](bool fixed, const float* x, float* y) {
                     float* row = take_row();
                     cluster_barrier();
                     send_row(row, x);
                     if (fixed)
                       cluster_barrier();
                     else
                       block_barrier();
                     store_one(y + element(), row[thread_index()]);
                     cluster_barrier();
                   }),

    // The other block may begin later.
    cluster_kernel("block_not_begun", of_other_block,
                   [](bool fixed, const float* x, float* y) {
                     float* row = take_row();
                     if (fixed) cluster_barrier();
                     send_row(row, x);
                     cluster_barrier();
                     store_one(y + element(), row[thread_index()]);
                   }),

    // Nobody reads what is sent there, but its memory may be another block's.
    cluster_kernel("block_exited", input,
                   [](bool fixed, const float* x, float* y) {
                     float* row = take_row();
                     cluster_barrier();
                     store_one(y + element(), load_one(x + element()));
                     if (!fixed && block_index() == 0) return;
                     send_row(row, x);
                     if (fixed) cluster_barrier();
                   }),

    // What others wait for is what came before.
    cluster_kernel("sent_after_arriving", of_other_block,
                   [](bool fixed, const float* x, float* y) {
                     float* row = take_row();
                     cluster_barrier();
                     if (!fixed) cluster_arrive();
                     send_row(row, x);
                     if (fixed) cluster_arrive();
                     cluster_wait();
                     store_one(y + element(), row[thread_index()]);
                     cluster_barrier();
                   }),

    cluster_kernel("abandoned_cluster_barrier", input,
                   [](bool fixed, const float* x, float* y) {
                     store_one(y + element(), load_one(x + element()));
                     cluster_arrive();
                     if (fixed) cluster_wait();
                   }),

    // Half of each block's last warp is elsewhere.
    cluster_kernel("divergent_cluster_barrier", warp_sum,
                   [](bool fixed, const float* x, float* y) {
                     if (fixed || thread_index() < kThreads - 16) cluster_barrier();
                     store_one(y + element(), sum_over_warp(load_one(x + element())));
                   }),

    // Of one block.
    kernel("outside_the_cluster", kRowBytes, input,
           [](bool fixed, const float* x, float* y) {
             float* row = take_row();
             if (thread_index() < kThreads / 4)
               OfBlock(row + 4 * thread_index(), sizeof(Vec16), fixed ? 0 : 1)
                   .store(0, load_vec16(x + block_index() * kThreads + 4 * thread_index()));
             block_barrier();
             store_one(y + element(), row[thread_index()]);
           }),

    // What an earlier launch may still write.
    early_kernel("read_before_waiting", input,
                 [](bool fixed, const float* x, float* y) {
                   if (fixed) wait_for_earlier_launches();
                   const float value = load_one(x + element());
                   if (!fixed) wait_for_earlier_launches();
                   store_one(y + element(), value);
                 }),

    // Its launch could end before earlier ones, and later launches would not wait for those.
    early_kernel("never_waits", input,
                 [](bool fixed, const float* x, float* y) {
                   if (!fixed && thread_index() == 5) return;
                   wait_for_earlier_launches();
                   store_one(y + element(), load_one(x + element()));
                 }),

    // Under schedules that say what may have been there.
    early_kernel("trusts_a_guess", input,
                 [](bool fixed, const float* x, float* y) {
                   static const int first = kBlocks * kThreads - 1;
                   const int guess = peek(&first);
                   wait_for_earlier_launches();
                   store_one(y + element(), load_one(x + ((fixed ? first : guess) + 1 + element()) % (kBlocks * kThreads)));
                 }),
};

}  // namespace

std::vector<Case> cluster_cases() { return {std::begin(kCases), std::end(kCases)}; }

}  // namespace seeded
