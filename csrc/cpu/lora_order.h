// Tokens of a batch sorted by adapter, so that tokens of one adapter share blocks wherever they are in the batch.
#pragma once
#include "simd.h"

namespace t2l {
namespace T2L_ISA_NAMESPACE {

// Buffer on the stack up to N values, else on the heap.
template <class T, int64_t N>
struct SmallScratch {
  explicit SmallScratch(int64_t n) : heap(n > N ? n : 0), data(n > N ? heap.data : small) {}
  SmallScratch(const SmallScratch&) = delete;
  SmallScratch& operator=(const SmallScratch&) = delete;
  alignas(kCacheLine) T small[N];
  Scratch<T> heap;
  T* data;
};

constexpr int64_t kFewTokens = 256;  // no heap allocation up to this many

// Stable counting sort of tokens by adapter.  A run is all tokens of one adapter; blocks of up to kDotRows tokens of a run
// are numbered consecutively.  Tokens of adapter -1 are left out when `accumulate`: they are no-ops.
struct TokenOrder {
  explicit TokenOrder(const LoraParams& p) : sorted(p.tokens), run_end(p.segments), run_adapter(p.segments) {
    const int64_t adapters = adapters_used(p);
    SmallScratch<int32_t, kFewTokens + 1> next(adapters + 1);  // where the next token of adapter i - 1 goes
    for (int64_t i = 0; i <= adapters; ++i) next.data[i] = 0;
    for (int64_t s = 0; s < p.segments; ++s)
      next.data[int64_t{p.seg_adapters[s]} + 1] += p.seg_indptr[s + 1] - p.seg_indptr[s];
    if (p.accumulate) next.data[0] = 0;
    int32_t end = 0;
    for (int64_t i = 0; i <= adapters; ++i) {
      const int64_t tokens = next.data[i];
      next.data[i] = end;
      if (tokens == 0) continue;
      end += static_cast<int32_t>(tokens);
      run_end.data[runs] = end;
      run_adapter.data[runs++] = static_cast<int32_t>(i) - 1;
      blocks += (tokens + kDotRows - 1) / kDotRows;
    }
    for (int64_t s = 0; s < p.segments; ++s) {
      if (p.accumulate && p.seg_adapters[s] < 0) continue;
      int32_t& place = next.data[int64_t{p.seg_adapters[s]} + 1];
      for (int32_t t = p.seg_indptr[s]; t < p.seg_indptr[s + 1]; ++t) sorted.data[place++] = t;
    }
  }

  static int64_t adapters_used(const LoraParams& p) {
    int64_t most = 0;
    for (int64_t s = 0; s < p.segments; ++s) most = p.seg_adapters[s] >= most ? int64_t{p.seg_adapters[s]} + 1 : most;
    return most;
  }

  int32_t run_begin(int64_t run) const { return run ? run_end.data[run - 1] : 0; }

  // Iterates over blocks [start, last), up to `most` of one run at a time.
  struct BlockIterator {
    BlockIterator(const TokenOrder& order, int64_t start, int64_t last, int64_t most)
        : o(order), block(start), last(last), most(most) {
      int64_t before = 0;
      for (;; ++run) {
        const int64_t begin = o.run_begin(run);
        const int64_t mine = (o.run_end.data[run] - begin + kDotRows - 1) / kDotRows;
        if (start < before + mine) {
          first = static_cast<int32_t>(begin + (start - before) * kDotRows);
          return;
        }
        before += mine;
      }
    }
    bool more() const { return block < last; }
    void next() {
      const int tokens = count();
      first += tokens;
      block += (tokens + kDotRows - 1) / kDotRows;
      if (first == o.run_end.data[run]) ++run;
    }
    int64_t adapter() const { return o.run_adapter.data[run]; }
    int64_t next_adapter() const { return block + 1 < last && run + 1 < o.runs ? o.run_adapter.data[run + 1] : -1; }
    const int32_t* tokens() const { return o.sorted.data + first; }
    int count() const { return static_cast<int>(min(kDotRows * min(most, last - block), o.run_end.data[run] - first)); }

    const TokenOrder& o;
    int64_t block, last, most, run = 0;
    int32_t first = 0;
  };

  SmallScratch<int32_t, kFewTokens> sorted, run_end, run_adapter;
  int64_t runs = 0, blocks = 0;
};

}  // namespace T2L_ISA_NAMESPACE
}  // namespace t2l
