// Gradients of A and B in one launch, from the rank vectors that the LoRA kernel leaves: with v = scaling A x and u =
// scaling B^T g of every token, grad_A = sum u x^T and grad_B = sum g v^T over the tokens of an adapter.
//
// A block has 16 ranks of an adapter and 64 columns of A or B.  Its warps take the tokens in turns of eight, one product
// deep; turns are added in the order of tokens and warps in theirs, so that results are the same every time.
#pragma once
#include "lora.cuh"

namespace t2l::device {

using cuda::kGradColumns;
using cuda::kGradRanks;
using cuda::kGradStride;

struct LoraGradLaunch {
  LoraBackwardParams params;
  const float* v;       // [tokens, rank]: the sums' factors of B
  const float* grad_v;  // and of A
  cuda::LoraGradConfig config;
};

constexpr int kTurn = 8;                              // tokens
using GradAccumulators = float[kGradColumns / 8][4];  // of a warp

// Eight columns of a row, as stored or, if they are not T, as float32.
template <class T>
struct EightColumns {
  static constexpr int kVectors = 8 / Traits<T>::kPerVec16;
  Vec16 vec[kVectors];
  // Zero from `columns` on, and without a row.
  T2L_DEVICE void load(const Rows<T>& rows, const char* row, int64_t first, int64_t columns) {
    const bool full = rows.aligned && first + 8 <= columns;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int64_t at = first + i * Traits<T>::kPerVec16;
      vec[i] = !row ? zero_vec16() : full ? rows.load_full(row, at) : rows.load_tail(row, at, columns);
    }
  }
  T2L_DEVICE void to_floats(float (&v)[8]) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) unpack(vec[i], T(), v + i * Traits<T>::kPerVec16);
  }
};

// What one operand is: rank vectors (left), and rows of x or of the gradient (right).
template <class T>
struct GradSum {
  const float* left;
  Rows<T> right;
  int64_t columns;

  // sum += over tokens [begin, end), kTurn at most.  Column n of MMA tile i is column 8 n + i of the 64: a lane's columns
  // are eight consecutive ones, which it loads at once.
  T2L_DEVICE void add(int begin, int end, int64_t width, int first_rank, int rank, int64_t first_column,
                      GradAccumulators& sum) const {
    constexpr bool kExact = sizeof(T) == 2;
    const int g = lane_index() / 4, t = lane_index() % 4;
    Split rank_vector[4];
    EightColumns<T> row[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = begin + 4 * half + t;
      const bool inside = token < end;
      row[half].load(right, inside ? right.row(token) : nullptr, first_column + 8 * g, columns);
#pragma unroll
      for (int high = 0; high < 2; ++high) {
        const int j = first_rank + g + 8 * high;
        rank_vector[2 * half + high] = split(inside && j < rank ? load_one(left + token * width + j) : 0.0f);
      }
    }
    float values[2][8];
#pragma unroll
    for (int half = 0; half < 2; ++half) row[half].to_floats(values[half]);
#pragma unroll
    for (int i = 0; i < kGradColumns / 8; ++i) {
      const Split right_of[2] = {split_weight(values[0][i], T()), split_weight(values[1][i], T())};
      // Tensor cores truncate, by some 2^-24 an addition: nothing beside results of 16 bits.
      if constexpr (kExact) {
        multiply_split<kExact>(sum[i], rank_vector, right_of);
      } else {
        float turn[4] = {};
        multiply_split<kExact>(turn, rank_vector, right_of);
#pragma unroll
        for (int r = 0; r < 4; ++r) sum[i][r] += turn[r];
      }
    }
  }
};

template <class T>
T2L_KERNEL(kThreads, sizeof(T) == 2 ? 2 : 1)
lora_grad_kernel(T2L_ARGUMENT(LoraGradLaunch) launch) {
  const LoraBackwardParams& q = launch.params;
  const LoraParams& p = q.lora;
  const cuda::LoraGradConfig& c = launch.config;
  SharedMemory shared;
  float* partial = shared.take<float>(kWarps * kGradRanks * kGradStride);
  const int block = static_cast<int>(block_index()), of_adapter = block / c.tiles, tile = block % c.tiles;
  const int adapter = of_adapter / c.rank_tiles, first_rank = of_adapter % c.rank_tiles * kGradRanks;
  const int rank = p.true_ranks ? read_index(p.true_ranks + adapter) : static_cast<int>(p.rank);
  const bool of_b = tile >= c.tiles_a;
  const int64_t first_column = int64_t{of_b ? tile - c.tiles_a : tile} * kGradColumns;
  const GradSum<T> of = of_b ? GradSum<T>{launch.v, Rows<T>(q.grad, q.grad_stride, x_type_of<T>(p)), p.out}
                             : GradSum<T>{launch.grad_v, Rows<T>(p.x, p.x_stride, x_type_of<T>(p)), p.in};
  const int warp = warp_index(), g = lane_index() / 4, t = lane_index() % 4;
  GradAccumulators sum = {};
  int turns = 0;  // of earlier segments of the adapter
  for (int64_t s = 0; s < p.segments && first_rank < rank; ++s) {
    if (read_index(p.seg_adapters + s) != adapter) continue;
    const int begin = read_index(p.seg_indptr + s), end = read_index(p.seg_indptr + s + 1),
              count = (end - begin + kTurn - 1) / kTurn;
    require(begin >= 0 && begin <= end && end <= p.tokens, "seg_indptr: not rising from 0 to the number of tokens");
    for (int i = (warp - turns) & (kWarps - 1); i < count; i += kWarps)
      of.add(begin + i * kTurn, end, p.rank, first_rank, rank, first_column, sum);
    turns += count;
  }
#pragma unroll
  for (int i = 0; i < kGradColumns / 8; ++i)
#pragma unroll
    for (int r = 0; r < 4; ++r)
      partial[(warp * kGradRanks + g + 8 * (r / 2)) * kGradStride + 8 * i + 2 * t + r % 2] = sum[i][r];
  block_barrier();
  void* out = of_b ? q.grad_b : q.grad_a;
  const int64_t stride_rank = of_b ? q.grad_b_stride_rank : p.in, stride_column = of_b ? q.grad_b_stride_out : 1;
  for (int i = thread_index(); i < kGradRanks * kGradColumns; i += kThreads) {
    const int row = i / kGradColumns, at = i % kGradColumns, j = first_rank + row;
    const int64_t column = first_column + at;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += partial[(w * kGradRanks + row) * kGradStride + at % 8 * 8 + at / 8];
    if (j < p.rank && column < of.columns)  // zero beyond the true rank, even if x is infinite
      store_float(out, adapter * p.rank * of.columns + j * stride_rank + column * stride_column, w_type_of<T>(p),
                  j < rank ? total : 0.0f);
  }
}

}  // namespace t2l::device
