// Shrink of batched LoRA: v = A x for a token tile, over split-K slices of the features and the tiles of several
// problems' ranks.
#pragma once
#include "config.h"
#include "fragments.cuh"
#include "lora_token_tile.cuh"

namespace t2l::device {

using cuda::kThreads;
using cuda::kWarps;

T2L_DEVICE bool is_aligned(const void* data, int64_t stride_bytes) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride_bytes % 16 == 0;
}

// Rows of x or A, loaded as operands of type T.
template <class T>
struct Rows {
  const char* data;
  int64_t stride;  // in bytes
  DType type;
  bool aligned;
  T2L_DEVICE Rows(const void* first, int64_t stride_elements, DType element)
      : data(static_cast<const char*>(first)), stride(stride_elements * cuda::bytes_of(element)), type(element) {
    aligned = is_aligned(first, stride);
  }
  T2L_DEVICE Rows(DType element, bool are_aligned) : data(nullptr), stride(0), type(element), aligned(are_aligned) {}
  T2L_DEVICE const char* row(int64_t i) const { return data + i * stride; }
  // 16 bytes of T from feature k on; the row is aligned and has them all.
  T2L_DEVICE Vec16 load_full(const char* row, int64_t k) const {
    return load_vec16(row + k * static_cast<int64_t>(sizeof(T)));
  }
  // Tail, or a row that is not aligned; zero from feature `size` on.
  T2L_DEVICE Vec16 load_tail(const char* row, int64_t k, int64_t size) const {
    return load_features(reinterpret_cast<const T*>(row), k, size, aligned);
  }
};
template <>
T2L_DEVICE Vec16 Rows<float>::load_full(const char* row, int64_t k) const {
  if (type == DType::f32) return load_vec16(row + k * 4);
  const Pair two = load_one(reinterpret_cast<const Pair*>(row + k * 2));
  float v[4];
  if (type == DType::bf16)
    unpack_pair(two, bf16(), v);
  else
    unpack_pair(two, f16(), v);
  return pack(v, float());
}
template <>
T2L_DEVICE Vec16 Rows<float>::load_tail(const char* row, int64_t k, int64_t size) const {
  if (aligned && k + 4 <= size) return load_full(row, k);
  Vec16 q = zero_vec16();
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (k + i < size) q.word[i] = float_to_bits(load_float(row, k + i, type));
  return q;
}

// k-blocks of a warp whose loads are in flight together: as many as registers hold without spills.
template <class T>
T2L_ANYWHERE constexpr int k_blocks_in_flight(int m_tiles, int n_tiles) {
  return sizeof(T) == 4 || m_tiles * n_tiles > 2 ? 1 : 4 / (m_tiles * n_tiles);
}

// Types of x and y, and of A and B: compile-time constants for 16-bit operands, which share theirs.
template <class T>
T2L_DEVICE DType x_type_of(const LoraParams& p) {
  return sizeof(T) == 4 ? p.x_type : Traits<T>::kType;
}
template <class T>
T2L_DEVICE DType w_type_of(const LoraParams& p) {
  return sizeof(T) == 4 ? p.w_type : Traits<T>::kType;
}

// The ranks of a cluster's problems follow each other, each problem's from a new tile of eight on.
struct RankTiles {
  int total;         // tiles of all
  int rank, first;   // of one problem: its rank, its first tile
  int problem, row;  // of a place, counted over all tiles: whose row of A is there, and which; problem -1: none
};
// For problem `own` and place `place`; lane i has the rank of the i-th of `problems`.
T2L_DEVICE RankTiles find_ranks(int lane_rank, int problems, int own, int place) {
  RankTiles found{0, 0, 0, -1, 0};
#pragma unroll 1
  for (int i = 0; i < problems; ++i) {
    const int rank = shuffle(lane_rank, i), row = place - 8 * found.total;
    if (i == own) found.rank = rank, found.first = found.total;
    if (row >= 0 && row < rank) found.problem = i, found.row = row;
    found.total += (rank + 7) / 8;
  }
  return found;
}

// What a block needs after the shrink: kept in shared memory, and so in no register.
struct BlockRanks {
  float scaling;
  uint32_t valid;   // bit i: row i of the tiles is one of A
  int first, rank;  // of this block's problem: where its rank vectors begin, and its rank
};

// The rows of A of NT tiles that this lane loads; null beyond the rank.
template <class T, int NT>
struct RowsOfA {
  static_assert(32 % (8 * NT) == 0, "a row a lane, and a bit of `valid`");
  const char* row[NT];
  uint32_t valid;  // bit i: row i of the tiles is one of A
  bool aligned;    // all of them

  // `at`: in lane i, of row i of the tiles.  Each lane finds one address, and takes those that it loads from others.
  T2L_DEVICE RowsOfA(const LoraParams* problems, int adapter, const RankTiles& at) {
    uintptr_t mine = 0;
    bool is_odd = false;
    if (at.problem >= 0) {
      const LoraParams& p = problems[at.problem];
      const int64_t size = cuda::bytes_of(w_type_of<T>(p)), stride = p.a_stride_rank * size;
      const char* first = static_cast<const char*>(p.a) + adapter * p.a_stride_adapter * size;
      mine = reinterpret_cast<uintptr_t>(first + at.row * stride);
      is_odd = !is_aligned(first, stride);
    }
    valid = lanes_where(at.problem >= 0);
    aligned = lanes_where(is_odd) == 0;
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) row[nt] = reinterpret_cast<const char*>(shuffle(mine, 8 * nt + lane_index() / 4));
  }
};

// Partial sums of this warp over the features [begin, end) of every token, for the ranks of `of_a`.
template <class T, int MT, int NT>
T2L_DEVICE void shrink(const LoraParams& p, const RowsOfA<T, NT>& of_a, int begin, int end, const Tokens<false>& tokens,
                       int count, float (&sum)[MT][NT][4]) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  const Rows<T> x(p.x, p.x_stride, x_type_of<T>(p)), a(w_type_of<T>(p), of_a.aligned);
  const auto& a_row = of_a.row;
  const char* x_row[MT][2];  // null: padding
#pragma unroll
  for (int mt = 0; mt < MT; ++mt)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = 16 * mt + 8 * half + g;
      x_row[mt][half] = i < count ? x.row(tokens[i]) : nullptr;
    }
  constexpr int kStep = Traits<T>::kPerKBlock, kInFlight = k_blocks_in_flight<T>(MT, NT);
  Vec16 x_vec16[kInFlight][MT][2], a_vec16[kInFlight][NT];
  const auto multiply = [&](int u) {
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) multiply_vec16(sum[mt][nt], x_vec16[u][mt][0], x_vec16[u][mt][1], a_vec16[u][nt], T());
  };
  const int lane_k = t * Traits<T>::kPerVec16, in = static_cast<int>(p.in);
  int k = begin + warp_index() * kStep + lane_k;  // feature of this lane in the next k-block of its warp
  if (x.aligned && a.aligned)
    for (; k - lane_k + ((kInFlight - 1) * kWarps + 1) * kStep <= end; k += kInFlight * kWarps * kStep) {
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
          a_vec16[u][nt] = a_row[nt] ? a.load_full(a_row[nt], k + u * kWarps * kStep) : zero_vec16();
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            x_vec16[u][mt][half] = x_row[mt][half] ? x.load_full(x_row[mt][half], k + u * kWarps * kStep) : zero_vec16();
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) multiply(u);
    }
#pragma unroll 1
  for (; k - lane_k < end; k += kWarps * kStep) {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) a_vec16[0][nt] = a_row[nt] ? a.load_tail(a_row[nt], k, in) : zero_vec16();
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        x_vec16[0][mt][half] = x_row[mt][half] ? x.load_tail(x_row[mt][half], k, in) : zero_vec16();
    multiply(0);
  }
}

// The same for the token of a decode step, of whole k-blocks at 16-byte boundaries.  Ranks are the 16-row side of the
// products, two tiles at a time, and the token is the first of 8 columns: from two tiles on half as many products as with
// the token in the rows, of the same bits.  sum[0][i] has tiles 2 i, in the first of its registers, and 2 i + 1, in the
// third.
template <class T, int MT, int NT>
T2L_DEVICE void shrink(const LoraParams& p, const RowsOfA<T, NT>& of_a, int begin, int end, const Tokens<true>& tokens, int,
                       float (&sum)[MT][NT][4]) {
  static_assert(MT == 1, "one token");
  const int g = lane_index() / 4, t = lane_index() % 4;
  const char* x_row = g == 0 ? static_cast<const char*>(p.x) + tokens.one * p.x_stride * 2 : nullptr;  // null: padding
  constexpr int kStep = Traits<T>::kPerKBlock, kInFlight = NT <= 2 ? 4 : 2;  // one row of x leaves room for more of A
  Vec16 x_vec16[kInFlight], a_vec16[kInFlight][NT];
#pragma unroll 1
  for (int k_block = begin + warp_index() * kStep; k_block < end; k_block += kInFlight * kWarps * kStep) {
    const int64_t first = int64_t{2} * (k_block + t * Traits<T>::kPerVec16);  // byte of a row
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const bool inside = k_block + u * kWarps * kStep < end;
      const auto load = [&](const char* row) {
        return row && inside ? load_vec16(row + first + 2 * u * kWarps * kStep) : zero_vec16();
      };
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) a_vec16[u][nt] = load(of_a.row[nt]);
      x_vec16[u] = load(x_row);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u)
#pragma unroll
      for (int nt = 0; nt < NT; nt += 2)
        multiply_vec16(sum[0][nt / 2], a_vec16[u][nt], nt + 1 < NT ? a_vec16[u][nt + 1] : zero_vec16(), x_vec16[u], T());
  }
}

// Stores the partial sums of this warp for `count` tokens to those of its split-K slice `k_slice`, in all blocks of the
// cluster.
template <int MT, int NT, bool kDecode>
T2L_DEVICE void store_partial(float* k_slice, const float (&sum)[MT][NT][4], int count, int cluster) {
  constexpr int kWarp = (kDecode ? 1 : 16 * MT) * (8 * NT), kSize = sizeof(float);
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll 1
  for (int block = 0; block < cluster; ++block) {
    const OfBlock there(k_slice + warp_index() * kWarp, kWarp * kSize, block);
    if constexpr (kDecode) {
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
        if (t == 0) there.store((8 * nt + g) * kSize, float_to_bits(sum[0][nt / 2][nt % 2 * 2]));
    } else {
#pragma unroll
      for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            if (16 * mt + 8 * half + g < count)
              there.store(((16 * mt + g + 8 * half) * (8 * NT) + 8 * nt + 2 * t) * kSize,
                          Pair{{float_to_bits(sum[mt][nt][2 * half]), float_to_bits(sum[mt][nt][2 * half + 1])}});
    }
  }
}

// Adds the partial sums of `k_slices` split-K slices to the rank vectors of `count` tokens, in the order of slices and
// warps. `first`: the rank vectors begin at zero.  `is_last`: they are scaled, and zero beyond the ranks, even if x is
// infinite.
template <int kRows, int NT>
T2L_DEVICE void add_partial(const float* partial, int k_slices, int count, bool first, bool is_last, float* v, int v_stride,
                            const BlockRanks& block_ranks) {
  constexpr int kWarp = kRows * (8 * NT);
#pragma unroll 1
  for (int i = thread_index(); i < count * (8 * NT); i += kThreads) {
    const int column = i % (8 * NT);
    float* at = v + i / (8 * NT) * v_stride + column;
    float sum = first ? 0.0f : *at;
#pragma unroll 1
    for (int k_slice = 0; k_slice < k_slices; ++k_slice)
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += partial[(k_slice * kWarps + w) * kWarp + i];
    if (is_last) sum = block_ranks.valid >> column & 1 ? sum * block_ranks.scaling : 0.0f;
    *at = sum;
  }
}

}  // namespace t2l::device
