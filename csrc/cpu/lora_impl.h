// Batched LoRA for one instruction set: per block of tokens that use one adapter, v = scaling * A x, then y (+)= B v.  The
// rank vector stays in float32 and in L1; each element of y is rounded once.
#pragma once
#include "dots.h"
#include "lora_order.h"

namespace t2l {
namespace T2L_ISA_NAMESPACE {

constexpr int64_t kChunk = 512;                // outputs of [out, rank] storage turned at a time
constexpr int64_t kChunkStride = kChunk + 16;  // not a power of two, so that ranks do not share the sets of a cache
constexpr int64_t kOutputsAhead = 256;         // of a token, brought near before they are added to
constexpr int64_t kGrainMacs = 1 << 15;        // multiply-adds worth another thread: in a decode step they wait for memory

// Two vectors of outputs in the order that costs least for outputs of type T: one after the other, or, for bfloat16 where
// the instruction set converts it, the even ones and the odd ones of 32.
template <class T>
struct PairOf {
  static constexpr bool kEvenOdd = false;
  template <class BT>
  static void load_weights(const BT* p, bool, Vec* v) {
    v[0] = load(p);
    v[1] = load(p + kLanes);
  }
  static void load_outputs(const T* p, Vec* v) {
    v[0] = load(p);
    v[1] = load(p + kLanes);
  }
  static void store_outputs(T* p, const Vec* v) {
    store_as(p, v[0], kLanes);
    store_as(p + kLanes, v[1], kLanes);
  }
};
// Whether PairOf<T> can turn [out, 8] storage of BT in registers.
template <class T, class BT>
struct Turns {
  static constexpr bool kInRegisters = false;
};
#if T2L_ISA_LEVEL == T2L_AVX512_BF16
template <>
struct PairOf<bf16> {
  static constexpr bool kEvenOdd = true;
  static void load_outputs(const bf16* p, Vec* v) {
    const __m512i both = _mm512_loadu_si512(p);
    v[0] = first_bf16(both);
    v[1] = second_bf16(both);
  }
  static void load_weights(const bf16* p, bool, Vec* v) { load_outputs(p, v); }
  static void load_weights(const float* p, bool ordered, Vec* v) {
    v[0] = load(p);
    v[1] = load(p + kLanes);
    if (ordered) return;
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const Vec first = v[0];
    v[0] = _mm512_permutex2var_ps(first, even, v[1]);
    v[1] = _mm512_permutex2var_ps(first, _mm512_add_epi32(even, _mm512_set1_epi32(1)), v[1]);
  }
  static void store_outputs(bf16* p, const Vec* v) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                           20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(v[1], v[0]));
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, halves));
  }
  // 32 outputs of [out, 8] storage: v[2 * j] and v[2 * j + 1] are the pair of rank j.
  static void turn_weights(const bf16* b, Vec* v) {
    // Dwords, two ranks each, of 8 outputs: the even outputs' and the odd outputs' of two dwords of a row.
    const __m512i pick = _mm512_setr_epi32(0, 8, 16, 24, 4, 12, 20, 28, 1, 9, 17, 25, 5, 13, 21, 29);
    for (int half = 0; half < 2; ++half) {
      const __m512i order = _mm512_add_epi32(pick, _mm512_set1_epi32(2 * half));
      __m512i t[4];
      for (int m = 0; m < 4; ++m)
        t[m] = _mm512_permutex2var_epi32(_mm512_loadu_si512(b + 64 * m), order, _mm512_loadu_si512(b + 64 * m + 32));
      const __m512i even0 = _mm512_shuffle_i32x4(t[0], t[1], 0x88), even1 = _mm512_shuffle_i32x4(t[2], t[3], 0x88);
      const __m512i odd0 = _mm512_shuffle_i32x4(t[0], t[1], 0xdd), odd1 = _mm512_shuffle_i32x4(t[2], t[3], 0xdd);
      const __m512i dwords[4] = {_mm512_shuffle_i32x4(even0, even1, 0x88), _mm512_shuffle_i32x4(odd0, odd1, 0x88),
                                 _mm512_shuffle_i32x4(even0, even1, 0xdd), _mm512_shuffle_i32x4(odd0, odd1, 0xdd)};
      for (int d = 0; d < 4; ++d) {  // even and odd outputs of one dword, then of the next
        Vec* rank = v + 8 * half + 4 * (d / 2) + d % 2;
        rank[0] = first_bf16(dwords[d]);
        rank[2] = second_bf16(dwords[d]);
      }
    }
  }
};

template <>
struct Turns<bf16, bf16> {
  static constexpr bool kInRegisters = true;
};
#endif

// y[i] (+)= v[i] b for R tokens and P pairs of vectors of outputs; v rows rank apart, b [rank, outputs] with rows ldb apart.
// `ordered`: pairs of b lie in memory as PairOf<T> has them.
template <bool kAdd, int R, int P, class T, class BT>
inline void expand_pairs(T* const* y, int64_t first, const float* v, int64_t rank, const BT* b, int64_t ldb, bool ordered) {
  using Pair = PairOf<T>;
  constexpr int V = 2 * P;
  Vec acc[R][V];
  for (int i = 0; i < R; ++i)
    for (int k = 0; k < V; ++k) acc[i][k] = zero();
  for (int64_t j = 0; j < rank; ++j) {
    Vec bv[V];
    for (int k = 0; k < V; k += 2) Pair::load_weights(b + j * ldb + k * kLanes, ordered, bv + k);
    for (int i = 0; i < R; ++i) {
      const Vec factor = broadcast(v[i * rank + j]);
      for (int k = 0; k < V; ++k) acc[i][k] = fma(factor, bv[k], acc[i][k]);
    }
  }
  for (int i = 0; i < R; ++i)
    for (int k = 0; k < V; k += 2) {
      T* out = y[i] + first + k * kLanes;
      if (kAdd) {
        Vec before[2];
        Pair::load_outputs(out, before);
        acc[i][k] = add(before[0], acc[i][k]);
        acc[i][k + 1] = add(before[1], acc[i][k + 1]);
      }
      Pair::store_outputs(out, acc[i] + k);
    }
}

// The same for the outputs that fill no pair, at most one vector at a time.
template <bool kAdd, class T, class BT>
inline void expand_rest(T* y, const float* v, int64_t rank, const BT* b, int64_t ldb, int outputs) {
  Vec acc = zero();
  for (int64_t j = 0; j < rank; ++j) acc = fma(broadcast(v[j]), load_up_to(b + j * ldb, outputs), acc);
  if (kAdd) acc = add(load_up_to(y, outputs), acc);
  store_as(y, acc, outputs);
}

template <bool kAdd, int R, int P, class T, class BT>
inline void expand_rows(T* const* y, int64_t first, const float* v, int64_t rank, const BT* b, int64_t ldb, int64_t outputs,
                        bool ordered) {
  constexpr int64_t kPair = 2 * kLanes;
  int64_t o = 0;
  for (; o + P * kPair <= outputs; o += P * kPair) expand_pairs<kAdd, R, P>(y, first + o, v, rank, b + o, ldb, ordered);
  for (; o + kPair <= outputs; o += kPair) expand_pairs<kAdd, R, 1>(y, first + o, v, rank, b + o, ldb, ordered);
  for (; o < outputs; o += kLanes)
    for (int i = 0; i < R; ++i)
      expand_rest<kAdd>(y[i] + first + o, v + i * rank, rank, b + o, ldb, static_cast<int>(lesser(kLanes, outputs - o)));
}

// Rank 8, whole pairs; returns the outputs done.  The weights of a pair stay in registers for all tokens of a block, and are
// turned there (`kTurn`: b is [out, 8] storage).
template <bool kAdd, bool kTurn, class T, class BT>
inline int64_t expand_eight(T* const* y, int rows, const float* v, const BT* b, int64_t ldb, int64_t outputs) {
  using Pair = PairOf<T>;
  constexpr int64_t kPair = 2 * kLanes;
  int64_t o = 0;
  for (; o + kPair <= outputs; o += kPair) {
    Vec weights[16];
    if constexpr (kTurn)
      Pair::turn_weights(b + 8 * o, weights);
    else
      for (int j = 0; j < 8; ++j) Pair::load_weights(b + j * ldb + o, false, weights + 2 * j);
    for (int i = 0; i < rows; ++i) {
      Vec acc[2] = {zero(), zero()};
      if (kAdd) __builtin_prefetch(y[i] + o + kOutputsAhead, 0, 2);
      for (int j = 0; j < 8; ++j) {
        const Vec factor = broadcast(v[8 * i + j]);
        for (int k = 0; k < 2; ++k) acc[k] = fma(factor, weights[2 * j + k], acc[k]);
      }
      if (kAdd) {
        Vec before[2];
        Pair::load_outputs(y[i] + o, before);
        for (int k = 0; k < 2; ++k) acc[k] = add(before[k], acc[k]);
      }
      Pair::store_outputs(y[i] + o, acc);
    }
  }
  return o;
}

// Outputs [first, first + outputs) of all tokens of a block.
template <bool kAdd, class T, class BT>
inline void expand(T* const* y, int rows, int64_t first, const float* v, int64_t rank, const BT* b, int64_t ldb,
                   int64_t outputs, bool ordered) {
  int i = 0;
  if (kLanes == 16)
    for (; i + 8 <= rows; i += 8) expand_rows<kAdd, 8, 1>(y + i, first, v + i * rank, rank, b, ldb, outputs, ordered);
  for (; i + 4 <= rows; i += 4) expand_rows<kAdd, 4, 1>(y + i, first, v + i * rank, rank, b, ldb, outputs, ordered);
  for (; i < rows; ++i) expand_rows<kAdd, 1, 2>(y + i, first, v + i * rank, rank, b, ldb, outputs, ordered);
}

// turned[j * kChunkStride + c] = b[c, j] for outputs c < cols of [out, rank] storage, pairs of vectors as PairOf<T> has
// them.
template <class T, class BT>
inline void turn_chunk(const BT* b, int64_t ld_out, int64_t ld_rank, int64_t cols, int64_t rank, float* turned) {
  constexpr int64_t kQuad = 16 / sizeof(BT), kPair = 2 * kLanes;  // kQuad: ranks turned at a time
  const int64_t whole_cols = cols / kPair * kPair, whole_rank = ld_rank == 1 ? rank / kQuad * kQuad : 0;
  for (int64_t c = 0; c < whole_cols; c += kPair) {
    for (int half = 0; half < 2; ++half) {
      const int64_t first = PairOf<T>::kEvenOdd ? c + half : c + half * kLanes, step = PairOf<T>::kEvenOdd ? 2 : 1;
      float* out = turned + c + half * kLanes;
      int64_t j = 0;
      for (; j < whole_rank; j += kQuad)
        turn_quad(b + first * ld_out + j, step * ld_out, out + j * kChunkStride, kChunkStride);
      for (; j < rank; ++j)
        for (int i = 0; i < kLanes; ++i) out[j * kChunkStride + i] = to_float(b[(first + i * step) * ld_out + j * ld_rank]);
    }
  }
  for (int64_t c = whole_cols; c < cols; ++c)
    for (int64_t j = 0; j < rank; ++j) turned[j * kChunkStride + c] = to_float(b[c * ld_out + j * ld_rank]);
}

inline int64_t rank_of(const LoraParams& p, int64_t adapter) {
  return adapter < 0 ? 0 : p.ranks ? p.ranks[adapter] : p.rank;
}

// y (+)= v b for weights [rank, outputs] with rows ldb apart.
template <bool kAdd, class T, class BT>
inline void expand_whole(T* const* y, int rows, const float* v, int64_t rank, const BT* b, int64_t ldb, int64_t outputs) {
  constexpr bool kWide = kLanes == 16;  // registers for the weights of eight ranks
  const int64_t done = kWide && rank == 8 ? expand_eight<kAdd, false>(y, rows, v, b, ldb, outputs) : 0;
  expand<kAdd>(y, rows, done, v, rank, b + done, ldb, outputs - done, false);
}

// One block: tokens that use the same adapter.  kAdd: p.accumulate.
template <bool kAdd, class T, class WT>
inline void lora_block(const LoraParams& p, int64_t adapter, const int32_t* tokens, int count, float* v, float* turned) {
  T* y[kDotRows];
  const T* x[kDotRows];
  for (int i = 0; i < count; ++i) {
    y[i] = static_cast<T*>(p.y) + tokens[i] * p.y_stride;
    x[i] = static_cast<const T*>(p.x) + tokens[i] * p.x_stride;
  }
  const int64_t rank = rank_of(p, adapter);
  if (rank == 0) {
    if (!kAdd)
      for (int i = 0; i < count; ++i) std::memset(y[i], 0, p.out * sizeof(T));
    return;
  }
  const WT* a = static_cast<const WT*>(p.a) + adapter * p.a_stride_adapter;
  const WT* b = static_cast<const WT*>(p.b) + adapter * p.b_stride_adapter;
  dot_rows(x, count, a, p.a_stride_rank, rank, p.in, v, rank);
  const float scaling = p.scaling[adapter];
  for (int64_t i = 0; i < count * rank; ++i) v[i] *= scaling;
  if (p.b_stride_out == 1) {
    expand_whole<kAdd>(y, count, v, rank, b, p.b_stride_rank, p.out);
    return;
  }
  int64_t o = 0;
  if constexpr (Turns<T, WT>::kInRegisters)
    if (rank == 8 && p.b_stride_out == 8 && p.b_stride_rank == 1) o = expand_eight<kAdd, true>(y, count, v, b, 0, p.out);
  for (; o < p.out; o += kChunk) {  // [out, r] storage: turn a chunk once for all tokens of the block
    const int64_t cols = lesser(kChunk, p.out - o);
    turn_chunk<T>(b + o * p.b_stride_out, p.b_stride_out, p.b_stride_rank, cols, rank, turned);
    expand<kAdd>(y, count, o, v, rank, turned, kChunkStride, cols, true);
  }
}

// A block of tokens goes through all members while its x is in the cache.
template <class T, class WT>
inline void lora_typed(const LoraParams* members, int64_t count, ParallelFor parallel) {
  const LoraParams& p = members[0];  // of x and the segments
  const TokenOrder order(p);
  if (order.blocks == 0) return;
  int64_t rank = 0, width = 0, turned_rank = 0;
  for (int64_t i = 0; i < count; ++i) {
    rank = members[i].rank > rank ? members[i].rank : rank;
    if (members[i].b_stride_out != 1) turned_rank = rank;
    width += members[i].rank * (p.in + members[i].out);
  }
  const auto block = p.accumulate ? lora_block<true, T, WT> : lora_block<false, T, WT>;
  auto body = [&](int64_t first, int64_t last) {
    SmallScratch<float, kDotRows * 128> v(kDotRows * rank);
    SmallScratch<float, kChunkStride * 16> turned(kChunkStride * turned_rank);
    for (TokenOrder::Walk walk(order, first); walk.block < last; walk.next())
      for (int64_t i = 0; i < count; ++i)
        block(members[i], walk.adapter(), walk.tokens(), walk.count(), v.data, turned.data);
  };
  const int64_t macs = p.tokens * width / order.blocks + 1;
  for_range(parallel, order.blocks, kGrainMacs / macs + 1, body);
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
