// Batched LoRA: per block of tokens of one adapter, shrink v = scaling * A x, then expand y (+)= B v.  The rank vector stays
// in float32 and in L1; each element of y is rounded once.
#pragma once
#include "dots.h"
#include "lora_order.h"
#include "transpose.h"

namespace t2l {
namespace T2L_ISA_NAMESPACE {

constexpr int64_t kChunk = 512;                // outputs of [out, rank] storage per transpose
constexpr int64_t kChunkStride = kChunk + 16;  // padded: a power of two would map all ranks to the same cache sets
constexpr int64_t kPrefetchOutputs = 256;      // prefetch distance within a row of y
constexpr int64_t kGrainMacs = 1 << 15;        // multiply-adds worth a thread: few, since a decode step is memory-bound

// Two vectors of outputs of type T: consecutive, or, for bfloat16 with AVX2 and AVX512-BF16, the even and the odd ones,
// which is the order in which pairs of bfloat16 widen and narrow without shuffles.
template <class T>
struct PairOf {
  static constexpr int64_t kSecond = kLanes, kStep = 1;  // first output of the second vector, distance of outputs
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
// Whether PairOf<T> can transpose [out, 8] storage of BT in registers.
template <class T, class BT>
struct InRegisterTranspose {
  static constexpr bool kSupported = false;
};
#if T2L_ISA_LEVEL == T2L_AVX512_BF16 || T2L_ISA_LEVEL == T2L_AVX2
template <>
struct PairOf<bf16> {
  static constexpr int64_t kSecond = 1, kStep = 2;
  static void load_outputs(const bf16* p, Vec* v) {
    IntVec both;
    std::memcpy(&both, p, sizeof both);
    v[0] = first_bf16(both);
    v[1] = second_bf16(both);
  }
  static void load_weights(const bf16* p, bool, Vec* v) { load_outputs(p, v); }
  static void load_weights(const float* p, bool ordered, Vec* v) {
    v[0] = load(p);
    v[1] = load(p + kLanes);
    if (!ordered) even_and_odd(v);
  }
#if T2L_ISA_LEVEL == T2L_AVX2
  static void even_and_odd(Vec* v) {
    const __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(v[0], v[1], 0x88));
    const __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps(v[0], v[1], 0xdd));
    v[0] = _mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xd8));
    v[1] = _mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xd8));
  }
  __attribute__((always_inline)) static void store_outputs(bf16* p, const Vec* v) {
    const __m256i even = _mm256_srli_epi32(rounded_to_bf16(v[0]), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(even, rounded_to_bf16(v[1]), 0xaa));
  }
#else
  static void even_and_odd(Vec* v) {
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
  // 32 outputs of [out, 8] storage, transposed: v[2 * j] and v[2 * j + 1] are the pair of rank j.
  static void load_transposed_weights(const bf16* b, Vec* v) {
    // A dword holds two ranks of an output; picks two dwords of 8 outputs, even outputs before odd ones.
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
#endif
};
#endif
#if T2L_ISA_LEVEL == T2L_AVX512_BF16
template <>
struct InRegisterTranspose<bf16, bf16> {
  static constexpr bool kSupported = true;
};
#endif

// Micro-kernel: y[i] (+)= v[i] b for R tokens and P pairs of vectors of outputs; v [R, rank], b [rank, outputs] with stride
// ldb.  `ordered`: b is stored in the order of PairOf<T>.
template <bool kAdd, int R, int P, class T, class BT>
__attribute__((always_inline)) inline void expand_pairs(T* const* y, int64_t first, const float* v, int64_t rank,
                                                        const BT* b, int64_t ldb, bool ordered) {
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

// Tail: the outputs after the last pair, up to one vector at a time.
template <bool kAdd, class T, class BT>
inline void expand_tail(T* y, const float* v, int64_t rank, const BT* b, int64_t ldb, int outputs) {
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
      expand_tail<kAdd>(y[i] + first + o, v + i * rank, rank, b + o, ldb, static_cast<int>(min(kLanes, outputs - o)));
}

// Rank 8: keeps the weights of a pair in registers for all tokens of a block.  Returns the outputs done, whole pairs only.
// `kTranspose`: b is [out, 8] storage, transposed in registers.  `ahead`: another adapter's values of b, prefetched; or
// null.
template <bool kAdd, bool kTranspose, class T, class BT>
inline int64_t expand_rank8(T* const* y, int rows, const float* v, const BT* b, int64_t ldb, int64_t outputs,
                            const BT* ahead) {
  using Pair = PairOf<T>;
  constexpr int64_t kPair = 2 * kLanes;
  int64_t o = 0;
  for (; o + kPair <= outputs; o += kPair) {
    Vec weights[16];
    if (ahead) prefetch_bytes(ahead + 8 * o, 8 * kPair * sizeof(BT));
    if constexpr (kTranspose)
      Pair::load_transposed_weights(b + 8 * o, weights);
    else
      for (int j = 0; j < 8; ++j) Pair::load_weights(b + j * ldb + o, false, weights + 2 * j);
    for (int i = 0; i < rows; ++i) {
      Vec acc[2] = {zero(), zero()};
      if (kAdd) __builtin_prefetch(y[i] + o + kPrefetchOutputs, 0, 2);
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

// b_transposed[j * kChunkStride + c] = b[c, j] for outputs c < cols of [out, rank] storage, in the order of PairOf<T>.
template <class T, class BT>
inline void transpose_chunk(const BT* b, int64_t ld_out, int64_t ld_rank, int64_t cols, int64_t rank, float* b_transposed) {
  constexpr int64_t kVec16 = 16 / sizeof(BT), kPair = 2 * kLanes;  // kVec16: ranks of 16 bytes
  const int64_t whole_cols = cols / kPair * kPair, whole_rank = ld_rank == 1 ? rank / kVec16 * kVec16 : 0;
  for (int64_t c = 0; c < whole_cols; c += kPair) {
    for (int half = 0; half < 2; ++half) {
      const int64_t first = c + half * PairOf<T>::kSecond, step = PairOf<T>::kStep;
      float* out = b_transposed + c + half * kLanes;
      int64_t j = 0;
      for (; j < whole_rank; j += kVec16) {
        Vec ranks[kVec16];
        transpose_vec16(b + first * ld_out + j, step * ld_out, ranks);
        for (int64_t k = 0; k < kVec16; ++k) store(out + (j + k) * kChunkStride, ranks[k]);
      }
      for (; j < rank; ++j)
        for (int i = 0; i < kLanes; ++i) out[j * kChunkStride + i] = to_float(b[(first + i * step) * ld_out + j * ld_rank]);
    }
  }
  for (int64_t c = whole_cols; c < cols; ++c)
    for (int64_t j = 0; j < rank; ++j) b_transposed[j * kChunkStride + c] = to_float(b[c * ld_out + j * ld_rank]);
}

// One token and [out, rank] storage whose rows are whole vectors of 16 bytes: transposed in registers.  Returns the outputs
// done, whole pairs only.
template <bool kAdd, class T, class BT>
inline int64_t expand_transposed(T* y, const float* v, int64_t rank, const BT* b, int64_t outputs) {
  using Pair = PairOf<T>;
  constexpr int64_t kVec16 = 16 / sizeof(BT), kPair = 2 * kLanes;
  int64_t o = 0;
  for (; o + kPair <= outputs; o += kPair) {
    Vec acc[2] = {zero(), zero()};
    for (int half = 0; half < 2; ++half) {
      const BT* first = b + (o + half * Pair::kSecond) * rank;
      for (int64_t j = 0; j < rank; j += kVec16) {
        Vec ranks[kVec16];
        transpose_vec16(first + j, Pair::kStep * rank, ranks);
        for (int64_t k = 0; k < kVec16; ++k) acc[half] = fma(broadcast(v[j + k]), ranks[k], acc[half]);
      }
    }
    if (kAdd) {
      Vec before[2];
      Pair::load_outputs(y + o, before);
      for (int half = 0; half < 2; ++half) acc[half] = add(before[half], acc[half]);
    }
    Pair::store_outputs(y + o, acc);
  }
  return o;
}

inline int64_t rank_of(const LoraParams& p, int64_t adapter) {
  return adapter < 0 ? 0 : p.true_ranks ? p.true_ranks[adapter] : p.rank;
}

// y (+)= v b for b [rank, outputs] with stride ldb.
template <bool kAdd, class T, class BT>
inline void expand_whole(T* const* y, int rows, const float* v, int64_t rank, const BT* b, int64_t ldb, int64_t outputs,
                         const BT* ahead = nullptr) {
  constexpr bool kManyRegisters = kLanes == 16;  // AVX-512: enough registers for the weights of eight ranks
  const int64_t done = kManyRegisters && rank == 8 ? expand_rank8<kAdd, false>(y, rows, v, b, ldb, outputs, ahead) : 0;
  expand<kAdd>(y, rows, done, v, rank, b + done, ldb, outputs - done, false);
}

// Blocks of one adapter that share a transpose of [out, rank] storage, where it goes through memory.
template <class T, class WT>
constexpr int64_t kBlocksPerTranspose = InRegisterTranspose<T, WT>::kSupported ? 1 : 4;

// One block of tokens of one adapter, or kBlocksPerTranspose.  kAdd: p.accumulate.  `next`: the adapter of the next block,
// of which a block of one token prefetches A, and at rank 8 with AVX-512 B; or -1.
template <bool kAdd, class T, class WT>
inline void lora_block(const LoraParams& p, int64_t adapter, int64_t next, const int32_t* tokens, int count, float* v,
                       float* b_transposed) {
  T* y[kDotRows * kBlocksPerTranspose<T, WT>];
  const T* x[kDotRows * kBlocksPerTranspose<T, WT>];
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
  const bool prefetches = next >= 0 && count == 1;
  const WT* a_next = prefetches ? static_cast<const WT*>(p.a) + next * p.a_stride_adapter : nullptr;
  const WT* b_next = prefetches ? static_cast<const WT*>(p.b) + next * p.b_stride_adapter : nullptr;
  for (int i = 0; i < count; i += kDotRows)
    dot_rows(x + i, static_cast<int>(min(kDotRows, count - i)), a, p.a_stride_rank, rank, p.in, v + i * rank, rank, a_next);
  const float scaling = p.scaling[adapter];
  for (int64_t i = 0; i < count * rank; ++i) v[i] *= scaling;
  if (p.b_stride_out == 1) {
    expand_whole<kAdd>(y, count, v, rank, b, p.b_stride_rank, p.out, b_next);
    return;
  }
  int64_t o = 0;
  if constexpr (InRegisterTranspose<T, WT>::kSupported)
    if (rank == 8 && p.b_stride_out == 8 && p.b_stride_rank == 1)
      o = expand_rank8<kAdd, true>(y, count, v, b, 0, p.out, b_next);
  if (o == 0 && count == 1 && p.b_stride_rank == 1 && p.b_stride_out == rank && rank * sizeof(WT) % 16 == 0)
    o = expand_transposed<kAdd>(y[0], v, rank, b, p.out);
  for (; o < p.out; o += kChunk) {  // [out, rank] storage: one transpose for all tokens
    const int64_t cols = min(kChunk, p.out - o);
    transpose_chunk<T>(b + o * p.b_stride_out, p.b_stride_out, p.b_stride_rank, cols, rank, b_transposed);
    expand<kAdd>(y, count, o, v, rank, b_transposed, kChunkStride, cols, true);
  }
}

// A block of tokens goes through all problems while its x is in cache.
template <class T, class WT>
inline void lora_typed(const LoraParams* problems, int64_t count, bool prefetches, ParallelFor parallel) {
  const LoraParams& p = problems[0];  // x and segments are common to all problems
  const TokenOrder order(p);
  if (order.blocks == 0) return;
  int64_t rank = 0, width = 0, transposed_rank = 0;
  for (int64_t i = 0; i < count; ++i) {
    rank = problems[i].rank > rank ? problems[i].rank : rank;
    if (problems[i].b_stride_out != 1) transposed_rank = rank;
    width += problems[i].rank * (p.in + problems[i].out);
  }
  const auto block = p.accumulate ? lora_block<true, T, WT> : lora_block<false, T, WT>;
  auto body = [&](int64_t first, int64_t last) {
    const int64_t most = transposed_rank ? kBlocksPerTranspose<T, WT> : 1;
    SmallScratch<float, kDotRows * 128> v(kDotRows * most * rank);
    SmallScratch<float, kChunkStride * 16> b_transposed(kChunkStride * transposed_rank);
    for (TokenOrder::BlockIterator it(order, first, last, most); it.more(); it.next()) {
      const int64_t next = prefetches ? it.next_adapter() : -1;
      for (int64_t i = 0; i < count; ++i)
        block(problems[i], it.adapter(), next, it.tokens(), it.count(), v.data, b_transposed.data);
    }
  };
  const int64_t macs = p.tokens * width / order.blocks + 1;
  for_range(parallel, order.blocks, kGrainMacs / macs + 1, body);
}

// `prefetches`: in a block of one token, the next adapter's weights.
void lora(const LoraParams* problems, int64_t count, bool prefetches, ParallelFor parallel) {
  const bool x16 = problems[0].x_type == DType::bf16, w16 = problems[0].w_type == DType::bf16;
  if (x16 && w16) lora_typed<bf16, bf16>(problems, count, prefetches, parallel);
  if (x16 && !w16) lora_typed<bf16, float>(problems, count, prefetches, parallel);
  if (!x16 && w16) lora_typed<float, bf16>(problems, count, prefetches, parallel);
  if (!x16 && !w16) lora_typed<float, float>(problems, count, prefetches, parallel);
}

}  // namespace T2L_ISA_NAMESPACE
}  // namespace t2l
