// Token tiles of batched LoRA: up to 16 MT tokens of one adapter.  For a few single tokens, one block per token reads its id
// in place.  Otherwise every block runs the counting sort of tokens by adapter for its own token tile: no workspace and no
// extra launch.
#pragma once
#include "config.h"
#include "primitives.cuh"
#include "t2l/params.h"

namespace t2l::device {

using cuda::kSortBins;
using cuda::kThreads;
using cuda::kWarps;

// Exclusive prefix sum over the threads of the block; *total is the sum of all.
T2L_DEVICE int scan_block(int value, int* scratch, int* total) {
  int sum = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int below = shuffle_up(sum, distance);
    if (lane_index() >= distance) sum += below;
  }
  if (lane_index() == 31) scratch[warp_index()] = sum;
  block_barrier();
  int before = sum - value, all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp_index()) before += scratch[w];
    all += scratch[w];
  }
  block_barrier();  // scratch may be reused
  *total = all;
  return before;
}

T2L_DEVICE bool is_id(const LoraParams& p, int adapter) { return adapter >= -1 && adapter < p.adapters; }
// The adapter of segment s: an id out of range ends the launch or, with bad_ids, is -1.
T2L_DEVICE int adapter_of(const LoraParams& p, int64_t s) {
  const int adapter = read_index(p.seg_adapters + s);
  const bool known = is_id(p, adapter);
  if (p.bad_ids == nullptr) require(known, "seg_adapters: an id out of range");
  return known ? adapter : -1;
}

// Number of tokens of segment s if it uses `adapter`, else 0.
T2L_DEVICE int tokens_of(const LoraParams& p, int64_t s, int adapter) {
  return s < p.segments && adapter_of(p, s) == adapter ? read_index(p.seg_indptr + s + 1) - read_index(p.seg_indptr + s) : 0;
}

// Adds the number of ids out of range to *bad_ids.  For one warp of the launch.
template <bool kDecode>
T2L_DEVICE void count_bad_ids(const LoraParams& p) {
  const auto is_bad = [&](int64_t s) { return s < p.segments && !is_id(p, read_index(p.seg_adapters + s)); };
  int count = 0;
  if (kDecode) {
    static_assert(cuda::kMaxOneTokenBlocks == 64, "two segments a lane");
    const bool first = is_bad(lane_index()), second = is_bad(lane_index() + 32);
    count = count_bits(lanes_where(first)) + count_bits(lanes_where(second));
  } else {
    for (int64_t s = lane_index(); s < p.segments; s += 32) count += is_bad(s);
#pragma unroll
    for (int mask = 16; mask; mask /= 2) count += shuffle_xor(count, mask);
  }
  if (lane_index() == 0 && count) *p.bad_ids += count;  // a counter serves one stream
}

// Histogram of tokens over the bins [first, first + kSortBins); adapter i is bin i + 1.  Also validates segments.
T2L_DEVICE void count_tokens(const LoraParams& p, int64_t first, int* bins) {
  for (int i = thread_index(); i < kSortBins; i += kThreads) bins[i] = 0;
  block_barrier();
  for (int64_t s = thread_index(); s < p.segments; s += kThreads) {
    const int adapter = adapter_of(p, s), begin = read_index(p.seg_indptr + s), end = read_index(p.seg_indptr + s + 1);
    require(begin <= end && (s > 0 || begin == 0) && (s + 1 < p.segments ? end <= p.tokens : end == p.tokens),
            "seg_indptr: not rising from 0 to the number of tokens");
    require(end - begin <= p.max_seg_len, "seg_indptr: a segment of more than max_seg_len tokens");
    const int64_t bin = int64_t{adapter} + 1 - first;
    if (bin >= 0 && bin < kSortBins && !(adapter < 0 && p.accumulate)) atomic_add(&bins[bin], end - begin);
  }
  block_barrier();
}

struct TokenTile {
  int adapter, count;
};

// The tokens of a token tile: in shared memory or, in a decode step, one.
template <bool kDecode>
struct Tokens {
  int* many;
  int one;
  T2L_DEVICE int operator[](int i) const { return kDecode ? one : many[i]; }
};

// Token tile `index` of the batch and its tokens, or count 0 if there are fewer token tiles.  Token tiles are ordered by
// adapter, then token.
T2L_DEVICE TokenTile find_token_tile(const LoraParams& p, int64_t index, int size, int* scratch, int* bins, int* tokens) {
  constexpr int kPerThread = kSortBins / kThreads;
  int* found = scratch + kWarps;  // adapter, index of the token tile within it, tokens of the adapter
  int64_t before = 0;             // token tiles of bins below `first`
  for (int64_t first = 0;; first += kSortBins) {
    if (first > p.adapters) return TokenTile{-1, 0};
    count_tokens(p, first, bins);
    int token_tiles[kPerThread], mine = 0, total;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      token_tiles[i] = (bins[thread_index() * kPerThread + i] + size - 1) / size;
      mine += token_tiles[i];
    }
    int64_t place = before + scan_block(mine, scratch, &total);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (index >= place && index < place + token_tiles[i]) {
        const int bin = thread_index() * kPerThread + i;
        found[0] = static_cast<int>(first + bin) - 1;
        found[1] = static_cast<int>(index - place);
        found[2] = bins[bin];
      }
      place += token_tiles[i];
    }
    before += total;
    block_barrier();  // found is visible; bins may be reused
    if (index < before) break;
  }
  const int adapter = found[0], start = found[1] * size;
  const int count = static_cast<int>(cuda::min(size, found[2] - start));
  int seen = 0;  // tokens of this adapter in earlier segments
  for (int64_t s = 0; seen < start + count; s += kThreads) {
    require(s < p.segments, "seg_adapters: changed since its tokens were counted");  // or the loop would not end
    int total;
    const int length = tokens_of(p, s + thread_index(), adapter);
    const int place = seen + scan_block(length, scratch, &total);
    const int from = place > start ? place : start, until = place + length < start + count ? place + length : start + count;
    for (int i = from; i < until; ++i) tokens[i - start] = read_index(p.seg_indptr + s + thread_index()) + (i - place);
    seen += total;
  }
  block_barrier();
  return TokenTile{adapter, count};
}

}  // namespace t2l::device
