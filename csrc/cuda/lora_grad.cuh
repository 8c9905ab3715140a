// Gradients of A and B in one launch, from the rank vectors that the LoRA kernel leaves: with v = scaling A x and u = scaling
// B^T g of every token, grad_A = sum u x^T and grad_B = sum g v^T over the tokens of an adapter.
//
// A block has 16 ranks of an adapter and 64 columns of A or B.  Its warps take the tokens in turns of 16; sums of a turn are
// made on tensor cores, turns are added in the order of tokens and warps in theirs, so that results are the same every time.
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

constexpr int kTurn = 16;                                         // tokens
using GradAccumulators = float[kGradColumns / 8][4];              // of a warp

// Eight columns of a row as float32, zero from `columns` on.
template <class T>
T2L_DEVICE void load_columns(const Rows<T>& rows, const char* row, int64_t first, int64_t columns, float (&v)[8]) {
  if (rows.aligned && first + 8 <= columns) {
    if constexpr (sizeof(T) == 2) {
      unpack(rows.load_full(row, first), T(), v);
    } else {
      unpack(rows.load_full(row, first), T(), v);
      unpack(rows.load_full(row, first + 4), T(), v + 4);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = first + i < columns ? load_float(row, first + i, rows.type) : 0.0f;
}

// What one operand is: rank vectors (left), and rows of x or of the gradient (right).
template <class T>
struct GradSum {
  const float* left;
  Rows<T> right;
  int64_t columns;

  // sum += over tokens [begin, end), 16 at most.  Column n of MMA tile i is column 8 n + i of the 64: a lane's columns are
  // eight consecutive ones, which it loads at once.
  T2L_DEVICE void add(int begin, int end, int64_t width, int first_rank, int rank, int64_t first_column,
                      GradAccumulators& sum) const {
    constexpr bool kExact = sizeof(T) == 2;
    const int g = lane_index() / 4, t = lane_index() % 4;
    GradAccumulators part = {};
#pragma unroll
    for (int step = 0; step < kTurn / 8; ++step) {
      Split rank_vector[4];
      float row[2][8];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = begin + 8 * step + 4 * half + t;
        const bool inside = token < end;
#pragma unroll
        for (int high = 0; high < 2; ++high) {
          const int j = first_rank + g + 8 * high;
          rank_vector[2 * half + high] = split(inside && j < rank ? load_one(left + token * width + j) : 0.0f);
        }
        if (inside)
          load_columns(right, right.row(token), first_column + 8 * g, columns, row[half]);
        else
#pragma unroll
          for (int i = 0; i < 8; ++i) row[half][i] = 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kGradColumns / 8; ++i) {
        const Split columns_of[2] = {split_weight(row[0][i], T()), split_weight(row[1][i], T())};
        multiply_split<kExact>(part[i], rank_vector, columns_of);
      }
    }
#pragma unroll
    for (int i = 0; i < kGradColumns / 8; ++i)
#pragma unroll
      for (int r = 0; r < 4; ++r) sum[i][r] += part[i][r];
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
  const int64_t of_adapter = block_index() / c.tiles, tile = block_index() % c.tiles;
  const int adapter = static_cast<int>(of_adapter / c.rank_tiles);
  const int first_rank = static_cast<int>(of_adapter % c.rank_tiles) * kGradRanks;
  const int rank = p.ranks ? p.ranks[adapter] : static_cast<int>(p.rank);
  const bool of_b = tile >= c.tiles_a;
  const int64_t first_column = (of_b ? tile - c.tiles_a : tile) * kGradColumns;
  const GradSum<T> of = of_b ? GradSum<T>{launch.v, Rows<T>(q.grad, q.grad_stride, p.x_type), p.out}
                             : GradSum<T>{launch.grad_v, Rows<T>(p.x, p.x_stride, p.x_type), p.in};
  const int warp = warp_index(), g = lane_index() / 4, t = lane_index() % 4;
  GradAccumulators sum = {};
  int turns = 0;  // of earlier segments of the adapter
  for (int64_t s = 0; s < p.segments && first_rank < rank; ++s) {
    if (p.seg_adapters[s] != adapter) continue;
    const int begin = p.seg_indptr[s], end = p.seg_indptr[s + 1], count = (end - begin + kTurn - 1) / kTurn;
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
      store_float(out, adapter * p.rank * of.columns + j * stride_rank + column * stride_column, p.w_type,
                  j < rank ? total : 0.0f);
  }
}

}  // namespace t2l::device
