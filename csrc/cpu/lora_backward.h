// Gradients of batched LoRA, without gathering A and B per token.  Blocks of tokens give the rank vectors v = s A x and
// w = s g B and the gradient of x; then each adapter's columns of A and B accumulate w x and g v over its tokens, in order.
#pragma once
#include "lora_impl.h"

namespace t2l {
namespace T2L_ISA_NAMESPACE {

constexpr int64_t kGradCols = 128;     // columns of one adapter's gradient per work item
constexpr int64_t kOuterPrefetch = 8;  // tokens ahead; rows of x are apart, and perhaps in any order

// The rank vectors of all tokens, in the order of TokenOrder; within a run the stride is the rank of its adapter.
struct RankVectors {
  RankVectors(int64_t tokens, int64_t rank) : v(tokens * rank), w(tokens * rank) {}
  Scratch<float> v, w;
};

// w[i] = g[i] b for a block of tokens.
template <class T, class WT>
inline void project_grad(const LoraParams& p, const T* const* g, int count, const WT* b, int64_t rank, float* b_transposed,
                         float* w) {
  if (p.b_stride_out == 1) {
    dot_rows(g, count, b, p.b_stride_rank, rank, p.out, w, rank);
    return;
  }
  for (int64_t i = 0; i < count * rank; ++i) w[i] = 0.0f;
  SmallScratch<float, kDotRows * 128> part(count * rank);
  for (int64_t o = 0; o < p.out; o += kChunk) {
    const int64_t cols = min(kChunk, p.out - o);
    transpose_chunk<float>(b + o * p.b_stride_out, p.b_stride_out, p.b_stride_rank, cols, rank, b_transposed);
    const T* at[kDotRows];
    for (int i = 0; i < count; ++i) at[i] = g[i] + o;
    dot_rows(at, count, b_transposed, kChunkStride, rank, cols, part.data, rank);
    for (int64_t i = 0; i < count * rank; ++i) w[i] += part.data[i];
  }
}

// Rank vectors of one block of tokens, and what it adds to grad_x.
template <class T, class WT>
inline void backward_block(const LoraBackwardParams& q, int64_t adapter, const int32_t* tokens, int count,
                           float* b_transposed, float* v, float* w) {
  const LoraParams& p = q.lora;
  const T *x[kDotRows], *g[kDotRows];
  T* grad_x[kDotRows];
  for (int i = 0; i < count; ++i) {
    x[i] = static_cast<const T*>(p.x) + tokens[i] * p.x_stride;
    g[i] = static_cast<const T*>(q.grad) + tokens[i] * q.grad_stride;
    grad_x[i] = static_cast<T*>(q.grad_x) + tokens[i] * p.in;
  }
  const int64_t rank = rank_of(p, adapter);
  if (rank == 0) return;
  const WT* a = static_cast<const WT*>(p.a) + adapter * p.a_stride_adapter;
  const WT* b = static_cast<const WT*>(p.b) + adapter * p.b_stride_adapter;
  dot_rows(x, count, a, p.a_stride_rank, rank, p.in, v, rank);
  project_grad(p, g, count, b, rank, b_transposed, w);
  const float scaling = p.scaling[adapter];
  for (int64_t i = 0; i < count * rank; ++i) v[i] *= scaling, w[i] *= scaling;
  expand_whole<true>(grad_x, count, w, rank, a, p.a_stride_rank, p.in);
}

// Micro-kernel: out[j, c] = sum over tokens of factors[t, j] * x[t, c] for C ranks and V vectors of columns, or, with V = 0,
// for the first `lanes` columns of one.
template <int C, int V, class T, class WT>
inline void outer_tile(const T* x, int64_t x_stride, const int32_t* tokens, int64_t count, const float* factors,
                       int64_t rank, int lanes, WT* out, int64_t out_rank, int64_t out_col) {
  constexpr int kVectors = V ? V : 1;
  Vec acc[C][kVectors];
  for (int j = 0; j < C; ++j)
    for (int k = 0; k < kVectors; ++k) acc[j][k] = zero();
  for (int64_t t = 0; t < count; ++t) {
    const T* row = x + tokens[t] * x_stride;
    if (t + kOuterPrefetch < count) __builtin_prefetch(x + tokens[t + kOuterPrefetch] * x_stride, 0, 3);
    Vec columns[kVectors];
    for (int k = 0; k < kVectors; ++k) columns[k] = V ? load(row + k * kLanes) : load_up_to(row, lanes);
    for (int j = 0; j < C; ++j) {
      const Vec factor = broadcast(factors[t * rank + j]);
      for (int k = 0; k < kVectors; ++k) acc[j][k] = fma(factor, columns[k], acc[j][k]);
    }
  }
  for (int j = 0; j < C; ++j)
    for (int k = 0; k < kVectors; ++k) {
      const int n = V ? static_cast<int>(kLanes) : lanes;
      WT* to = out + j * out_rank + k * kLanes * out_col;
      if (out_col == 1) {
        store_as(to, acc[j][k], n);
        continue;
      }
      float sums[kLanes];
      store(sums, acc[j][k]);
      for (int c = 0; c < n; ++c) from_float(sums[c], to + c * out_col);
    }
}

template <int V, class T, class WT>
inline void outer_ranks(const T* x, int64_t x_stride, const int32_t* tokens, int64_t count, const float* factors,
                        int64_t rank, int lanes, WT* out, int64_t out_rank, int64_t out_col) {
  constexpr int kRanks = kLanes == 16 ? 8 : 4;
  int64_t j = 0;
  for (; j + kRanks <= rank; j += kRanks)
    outer_tile<kRanks, V>(x, x_stride, tokens, count, factors + j, rank, lanes, out + j * out_rank, out_rank, out_col);
  for (; j < rank; ++j)
    outer_tile<1, V>(x, x_stride, tokens, count, factors + j, rank, lanes, out + j * out_rank, out_rank, out_col);
}

template <class T, class WT>
inline void outer_columns(const T* x, int64_t x_stride, const int32_t* tokens, int64_t count, const float* factors,
                          int64_t rank, int64_t cols, WT* out, int64_t out_rank, int64_t out_col) {
  int64_t c = 0;
  for (; c + 2 * kLanes <= cols; c += 2 * kLanes)
    outer_ranks<2>(x + c, x_stride, tokens, count, factors, rank, 0, out + c * out_col, out_rank, out_col);
  for (; c < cols; c += kLanes)
    outer_ranks<0>(x + c, x_stride, tokens, count, factors, rank, static_cast<int>(min(kLanes, cols - c)), out + c * out_col,
                   out_rank, out_col);
}

// Work item `item` of a run: columns of grad_a, then of grad_b.
template <class T, class WT>
inline void backward_columns(const LoraBackwardParams& q, const TokenOrder& order, int64_t run, int64_t item,
                             const RankVectors& vectors) {
  const LoraParams& p = q.lora;
  const int64_t adapter = order.run_adapter.data[run], rank = rank_of(p, adapter);
  if (rank == 0) return;
  const int64_t first = order.run_begin(run), count = order.run_end.data[run] - first;
  const int32_t* tokens = order.sorted.data + first;
  const int64_t chunks_a = (p.in + kGradCols - 1) / kGradCols;
  if (item < chunks_a) {
    const int64_t c = item * kGradCols;
    outer_columns(static_cast<const T*>(p.x) + c, p.x_stride, tokens, count, vectors.w.data + first * p.rank, rank,
                  min(kGradCols, p.in - c), static_cast<WT*>(q.grad_a) + adapter * p.rank * p.in + c, p.in, 1);
  } else {
    const int64_t c = (item - chunks_a) * kGradCols;
    outer_columns(static_cast<const T*>(q.grad) + c, q.grad_stride, tokens, count, vectors.v.data + first * p.rank, rank,
                  min(kGradCols, p.out - c), static_cast<WT*>(q.grad_b) + adapter * p.rank * p.out + c * q.grad_b_stride_out,
                  q.grad_b_stride_rank, q.grad_b_stride_out);
  }
}

template <class T, class WT>
inline void backward_typed(const LoraBackwardParams& q, ParallelFor parallel) {
  const LoraParams& p = q.lora;
  const TokenOrder order(p);
  if (order.blocks == 0) return;
  RankVectors vectors(p.tokens, p.rank);
  auto blocks = [&](int64_t first, int64_t last) {
    SmallScratch<float, kChunkStride * 16> b_transposed(p.b_stride_out == 1 ? 0 : kChunkStride * p.rank);
    for (TokenOrder::BlockIterator it(order, first, last, 1); it.more(); it.next()) {
      const int64_t begin = order.run_begin(it.run);
      const int64_t place = begin * p.rank + (it.first - begin) * rank_of(p, it.adapter());
      backward_block<T, WT>(q, it.adapter(), it.tokens(), it.count(), b_transposed.data, vectors.v.data + place,
                            vectors.w.data + place);
    }
  };
  const int64_t macs = p.tokens * p.rank * (2 * p.in + p.out) / order.blocks + 1;
  for_range(parallel, order.blocks, kGrainMacs / macs + 1, blocks);
  const int64_t items = (p.in + kGradCols - 1) / kGradCols + (p.out + kGradCols - 1) / kGradCols;
  // A range is of tokens times items: item i of a run begins after those of the runs before it, and i times the run's
  // tokens. It is done where it begins, so that threads have alike many tokens, however long the runs are.
  auto columns = [&](int64_t first, int64_t last) {
    for (int64_t run = 0; run < order.runs; ++run) {
      const int64_t begin = order.run_begin(run), count = order.run_end.data[run] - begin;
      const auto item_from = [&](int64_t place) { return (place - begin * items + count - 1) / count; };
      const int64_t from = item_from(first), until = min(items, item_from(last));
      for (int64_t i = from < 0 ? 0 : from; i < until; ++i) backward_columns<T, WT>(q, order, run, i, vectors);
    }
  };
  const int64_t all = order.run_end.data[order.runs - 1] * items;
  for_range(parallel, all, kGrainMacs / (p.rank * kGradCols + 1) + 1, columns);
}

void lora_backward(const LoraBackwardParams& q, ParallelFor parallel) {
  const bool x16 = q.lora.x_type == DType::bf16, w16 = q.lora.w_type == DType::bf16;
  if (x16 && w16) backward_typed<bf16, bf16>(q, parallel);
  if (x16 && !w16) backward_typed<bf16, float>(q, parallel);
  if (!x16 && w16) backward_typed<float, bf16>(q, parallel);
  if (!x16 && !w16) backward_typed<float, float>(q, parallel);
}

}  // namespace T2L_ISA_NAMESPACE
}  // namespace t2l
