// Shrink of batched LoRA: v = A x for a chunk of tokens, over parts of the features and the tiles of several members' ranks.
#pragma once
#include "config.h"
#include "fragments.cuh"
#include "lora_chunk.cuh"

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
  T2L_DEVICE Quad load_full(const char* row, int64_t k) const {
    return load_quad(row + k * static_cast<int64_t>(sizeof(T)));
  }
  // Tail, or a row that is not aligned; zero from feature `size` on.
  T2L_DEVICE Quad load_tail(const char* row, int64_t k, int64_t size) const {
    return load_features(reinterpret_cast<const T*>(row), k, size, aligned);
  }
};
template <>
T2L_DEVICE Quad Rows<float>::load_full(const char* row, int64_t k) const {
  if (type == DType::f32) return load_quad(row + k * 4);
  const Pair two = load_one(reinterpret_cast<const Pair*>(row + k * 2));
  float v[4];
  if (type == DType::bf16)
    unpack_pair(two, bf16(), v);
  else
    unpack_pair(two, f16(), v);
  return pack(v, float());
}
template <>
T2L_DEVICE Quad Rows<float>::load_tail(const char* row, int64_t k, int64_t size) const {
  if (aligned && k + 4 <= size) return load_full(row, k);
  Quad q = zero_quad();
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (k + i < size) q.word[i] = float_to_bits(load_float(row, k + i, type));
  return q;
}

// k-blocks of a warp whose loads are in flight together: as many as registers hold without spills.  A decode step has one
// row of x, so room for more of A.
template <class T>
T2L_ANYWHERE constexpr int k_blocks_in_flight(int m_tiles, int n_tiles, bool decode) {
  if (decode) return n_tiles <= 2 ? 4 : 2;
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

// Eight ranks of a member, from the first on.
struct RankTile {
  int member, first;
  int count;  // that the adapter has: less than eight in its last tile, zero beyond all
};

// The tiles of kMaxGroup members one after the other.  Lane i has the rank of the i-th, later ones 0.
class RankTiles {
 public:
  T2L_DEVICE explicit RankTiles(int lane_rank) : rank_(lane_rank), end_(tiles_of(lane_rank)) {
#pragma unroll
    for (int distance = 1; distance < kMax; distance *= 2) {
      const int below = shuffle_up(end_, distance);
      if (lane_index() >= distance) end_ += below;
    }
  }
  T2L_DEVICE int rank(int member) const { return shuffle(rank_, member); }
  T2L_DEVICE int first_of(int member) const { return shuffle(end_ - tiles_of(rank_), member); }
  T2L_DEVICE int total() const { return shuffle(end_, kMax - 1); }
  T2L_DEVICE RankTile at(int tile) const {
    const int member = count_lanes(lane_index() < kMax && end_ <= tile);  // kMax beyond the last tile
    if (member == kMax) return RankTile{0, 0, 0};
    const int first = 8 * (tile - first_of(member));
    return RankTile{member, first, rank(member) - first};
  }

 private:
  static constexpr int kMax = cuda::kMaxGroup;
  T2L_DEVICE static int tiles_of(int rank) { return (rank + 7) / 8; }
  int rank_, end_;
};

// The rows of A of NT tiles that this lane loads; null beyond the rank.
template <class T, int NT>
struct RowsOfA {
  const char* row[NT];
  bool aligned = true;
  T2L_DEVICE void set(int nt, const LoraParams& p, int adapter, const RankTile& tile) {
    const int64_t size = cuda::bytes_of(w_type_of<T>(p)), stride = p.a_stride_rank * size;
    const char* first = static_cast<const char*>(p.a) + adapter * p.a_stride_adapter * size;
    const int g = lane_index() / 4;
    row[nt] = g < tile.count ? first + (tile.first + g) * stride : nullptr;
    aligned = aligned && is_aligned(first, stride);
  }
};

// Partial sums of this warp over the features [begin, end) of every token, for the ranks of `of_a`.
template <class T, int MT, int NT, bool kDecode>
T2L_DEVICE void shrink(const LoraParams& p, const RowsOfA<T, NT>& of_a, int begin, int end, const Tokens<kDecode>& tokens,
                       int count, float (&sum)[MT][NT][4]) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  const Rows<T> x(p.x, p.x_stride, x_type_of<T>(p)), a(w_type_of<T>(p), of_a.aligned);
  const auto& a_row = of_a.row;
  constexpr int kHalves = kDecode ? 1 : 2;  // of 16 rows of x: a decode step has one row
  const char* x_row[MT][kHalves];           // null: padding
#pragma unroll
  for (int mt = 0; mt < MT; ++mt)
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const int i = 16 * mt + 8 * half + g;
      x_row[mt][half] = i < count ? x.row(tokens[i]) : nullptr;
    }
  constexpr int kStep = Traits<T>::kPerKBlock, kInFlight = k_blocks_in_flight<T>(MT, NT, kDecode);
  Quad x_quad[kInFlight][MT][kHalves], a_quad[kInFlight][NT];
  const auto multiply = [&](int u) {
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
        multiply_quads(sum[mt][nt], x_quad[u][mt][0], kDecode ? zero_quad() : x_quad[u][mt][kHalves - 1], a_quad[u][nt],
                       T());
  };
  const int lane_k = t * Traits<T>::kPerQuad, in = static_cast<int>(p.in);
  int k = begin + warp_index() * kStep + lane_k;  // feature of this lane in the next k-block of its warp
  if (kDecode || (x.aligned && a.aligned))
    for (; k - lane_k + ((kInFlight - 1) * kWarps + 1) * kStep <= end; k += kInFlight * kWarps * kStep) {
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
          a_quad[u][nt] = a_row[nt] ? a.load_full(a_row[nt], k + u * kWarps * kStep) : zero_quad();
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
          for (int half = 0; half < kHalves; ++half)
            x_quad[u][mt][half] = x_row[mt][half] ? x.load_full(x_row[mt][half], k + u * kWarps * kStep) : zero_quad();
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) multiply(u);
    }
  const auto last = [&](const Rows<T>& rows, const char* row) {
    return kDecode ? rows.load_full(row, k) : rows.load_tail(row, k, in);
  };
#pragma unroll 1
  for (; k - lane_k < end; k += kWarps * kStep) {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) a_quad[0][nt] = a_row[nt] ? last(a, a_row[nt]) : zero_quad();
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int half = 0; half < kHalves; ++half)
        x_quad[0][mt][half] = x_row[mt][half] ? last(x, x_row[mt][half]) : zero_quad();
    multiply(0);
  }
}

// Stores the partial sums of this warp for `count` tokens to those of its part, in all blocks of the cluster.
template <int MT, int NT>
T2L_DEVICE void store_partial(float* part, const float (&sum)[MT][NT][4], int count, int cluster) {
  constexpr int kWarp = (16 * MT) * (8 * NT), kSize = sizeof(float);
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll 1
  for (int block = 0; block < cluster; ++block) {
    const OfBlock there(part + warp_index() * kWarp, kWarp * kSize, block);
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

// Adds the partial sums of `parts` parts, in the order of parts and warps, to the rank vectors of `count` tokens, which
// begin at zero with the `first` of them.  After the last they are scaled; beyond the ranks they are zero, even if x is
// infinite.
template <int MT, int NT>
T2L_DEVICE void add_partial(const float* partial, int parts, int count, bool first, bool is_last, float* v, int v_stride,
                            const int* scratch) {
  constexpr int kWarp = (16 * MT) * (8 * NT);
#pragma unroll 1
  for (int i = thread_index(); i < count * (8 * NT); i += kThreads) {
    const int column = i % (8 * NT);
    float* at = v + i / (8 * NT) * v_stride + column;
    float sum = first ? 0.0f : *at;
#pragma unroll 1
    for (int part = 0; part < parts; ++part)
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += partial[(part * kWarps + w) * kWarp + i];
    if (is_last)
      sum = column % 8 < (scratch[1] >> column / 8 * 4 & 15) ? sum * bits_to_float(static_cast<uint32_t>(scratch[0])) : 0.0f;
    *at = sum;
  }
}

}  // namespace t2l::device
