// Batched LoRA for one instruction set: per block of tokens of one segment, v = scaling * A x, then y (+)= B v.  The rank
// vector stays in float32 and in L1; each element of y is rounded once.
#pragma once
#include "simd.h"

namespace t2l {
namespace T2L_ISA_NAMESPACE {

constexpr int64_t kBlockTokens = 16;
constexpr int64_t kChunk = 64;           // outputs expanded at a time: a chunk of B stays in L1 for all tokens of a block
constexpr int64_t kGrainMacs = 1 << 18;  // multiply-adds worth handing to another thread

// y[rows, cols] (+)= v[rows, rank] b[rank, cols], b rows ldb apart, columns contiguous.
template <int R, class T, class BT>
inline void expand_rows(T* y, int64_t ldy, const float* v, int64_t rank, const BT* b, int64_t ldb, int64_t cols,
                        bool accumulate) {
  for (int64_t o = 0; o < cols; o += kLanes) {
    const int n = static_cast<int>(lesser(kLanes, cols - o));
    Vec acc[R];
    for (int i = 0; i < R; ++i) acc[i] = zero();
    for (int64_t j = 0; j < rank; ++j) {
      const Vec bv = n == kLanes ? load(b + j * ldb + o) : load(b + j * ldb + o, n);
      for (int i = 0; i < R; ++i) acc[i] = fma(broadcast(v[i * rank + j]), bv, acc[i]);
    }
    for (int i = 0; i < R; ++i) {
      T* out = y + i * ldy + o;
      if (accumulate) acc[i] = add(n == kLanes ? load(out) : load(out, n), acc[i]);
      store_as(out, acc[i], n);
    }
  }
}

template <class T, class BT>
inline void expand(T* y, int64_t ldy, const float* v, int64_t rows, int64_t rank, const BT* b, int64_t ldb, int64_t cols,
                   bool accumulate) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) expand_rows<4>(y + i * ldy, ldy, v + i * rank, rank, b, ldb, cols, accumulate);
  for (; i < rows; ++i) expand_rows<1>(y + i * ldy, ldy, v + i * rank, rank, b, ldb, cols, accumulate);
}

// Tokens [begin, end) of one segment.
template <class T, class WT>
inline void lora_block(const LoraParams& p, int64_t adapter, int64_t begin, int64_t end, float* v, float* packed) {
  T* y = static_cast<T*>(p.y) + begin * p.y_stride;
  const int64_t rows = end - begin;
  const int64_t rank = adapter < 0 ? 0 : p.ranks ? p.ranks[adapter] : p.rank;
  if (rank == 0) {
    if (!p.accumulate)
      for (int64_t i = 0; i < rows; ++i) std::memset(y + i * p.y_stride, 0, p.out * sizeof(T));
    return;
  }
  const T* x = static_cast<const T*>(p.x) + begin * p.x_stride;
  const WT* a = static_cast<const WT*>(p.a) + adapter * p.a_stride_adapter;
  const WT* b = static_cast<const WT*>(p.b) + adapter * p.b_stride_adapter;
  matmul_nt(x, p.x_stride, rows, a, p.a_stride_rank, rank, p.in, v, rank);
  const float scaling = p.scaling[adapter];
  for (int64_t i = 0; i < rows * rank; ++i) v[i] *= scaling;
  for (int64_t o = 0; o < p.out; o += kChunk) {
    const int64_t cols = lesser(kChunk, p.out - o);
    if (p.b_stride_out == 1) {
      expand(y + o, p.y_stride, v, rows, rank, b + o, p.b_stride_rank, cols, p.accumulate);
    } else {  // [out, r] storage: turn the chunk once for all tokens of the block
      for (int64_t c = 0; c < cols; ++c)
        for (int64_t j = 0; j < rank; ++j)
          packed[j * kChunk + c] = to_float(b[(o + c) * p.b_stride_out + j * p.b_stride_rank]);
      expand(y + o, p.y_stride, v, rows, rank, packed, kChunk, cols, p.accumulate);
    }
  }
}

// A block of tokens goes through all members while its x is in the cache.
template <class T, class WT>
inline void lora_typed(const LoraParams* members, int64_t count, ParallelFor parallel) {
  const LoraParams& p = members[0];  // of x and the segments
  // Blocks are numbered through all segments; a thread finds the segment of its first block and walks on from there.
  const auto blocks_of = [&p](int64_t s) {
    return (p.seg_indptr[s + 1] - p.seg_indptr[s] + kBlockTokens - 1) / kBlockTokens;
  };
  int64_t blocks = 0, rank = 0, width = 0;
  for (int64_t s = 0; s < p.segments; ++s) blocks += blocks_of(s);
  if (blocks == 0) return;
  for (int64_t i = 0; i < count; ++i) {
    rank = members[i].rank > rank ? members[i].rank : rank;
    width += members[i].rank * (p.in + members[i].out);
  }
  auto body = [&](int64_t first, int64_t last) {
    Scratch<float> v(kBlockTokens * rank), packed(kChunk * rank);
    int64_t s = 0, before = 0;
    for (int64_t block = first; block < last; ++block) {
      while (block >= before + blocks_of(s)) before += blocks_of(s++);
      const int64_t begin = p.seg_indptr[s] + (block - before) * kBlockTokens;
      const int64_t end = lesser(begin + kBlockTokens, p.seg_indptr[s + 1]);
      for (int64_t i = 0; i < count; ++i) lora_block<T, WT>(members[i], p.seg_adapters[s], begin, end, v.data, packed.data);
    }
  };
  const int64_t macs = p.tokens * width / blocks + 1;
  for_range(parallel, blocks, kGrainMacs / macs + 1, body);
}

void lora(const LoraParams* members, int64_t count, ParallelFor parallel) {
  const bool x16 = members[0].x_type == DType::bf16, w16 = members[0].w_type == DType::bf16;
  if (x16 && w16) lora_typed<bf16, bf16>(members, count, parallel);
  if (x16 && !w16) lora_typed<bf16, float>(members, count, parallel);
  if (!x16 && w16) lora_typed<float, bf16>(members, count, parallel);
  if (!x16 && !w16) lora_typed<float, float>(members, count, parallel);
}

}  // namespace T2L_ISA_NAMESPACE
}  // namespace t2l
