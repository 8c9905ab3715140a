// Hypernetwork trunk as one fused kernel: a block, or a cluster of blocks, takes a tile of (task, module, layer) rows
// through the mixer and three MLPs, and encodes their tasks first where the encoder is linear.
//
// Activations stay in shared memory: float32 for LayerNorm, SiLU and residuals, rounded to the weights' type as MMA
// operands. Weights are loaded from L2 directly into MMA fragments.  A warp tile is 16 weight rows over all of K: there is
// no split-K, so bits do not depend on tiling, batch or clusters.
//
// Blocks of a cluster hold the same activations.  Each computes some columns of every linear, from its share of the weights,
// and stores them in the shared memory of the others.
#pragma once
#include "config.h"
#include "fragments.cuh"

namespace t2l::device {

using cuda::kThreads;
using cuda::kWarps;

struct TrunkLaunch {
  TrunkParams params;
  cuda::TrunkConfig config;
};

constexpr float kLayerNormEps = 1e-5f;

T2L_DEVICE float silu(float v) { return fast_divide(v, 1.0f + exponential(-v)); }

// The tile of a block, in shared memory.
template <class T>
struct TrunkTile {
  int rows;
  float* x;   // [rows, m]
  T* input;   // [rows, input_stride], operand of first linears
  T* hidden;  // [rows, hidden_stride], operand of second linears
  int64_t input_stride, hidden_stride;
  int block, cluster;  // this block of so many that share the tile
};

// Columns of a linear that this block computes: whole warp tiles.
struct Columns {
  int begin, end;
};
template <class T>
T2L_DEVICE Columns own_columns(const TrunkTile<T>& tile, int columns) {
  constexpr int kColumns = cuda::kTrunkColumns;
  const int share = ((columns + kColumns - 1) / kColumns + tile.cluster - 1) / tile.cluster * kColumns;
  const int begin = tile.block * share, end = begin + share;
  return Columns{begin < columns ? begin : columns, end < columns ? end : columns};
}

// Gives the other blocks what this one wrote to its columns of a panel, and waits for theirs.
template <class T, class Element>
T2L_DEVICE void exchange(const TrunkTile<T>& tile, Element* panel, int64_t stride, int columns, int rows) {
  block_barrier();
  if (tile.cluster == 1) return;
  constexpr int kPerVec16 = 16 / static_cast<int>(sizeof(Element));
  const Columns own = own_columns(tile, columns);
  const int vectors = (own.end - own.begin) / kPerVec16;
#pragma unroll 1
  for (int i = thread_index(); i < rows * vectors; i += kThreads) {
    Element* at = panel + i / vectors * stride + own.begin + i % vectors * kPerVec16;
    const Vec16 q = *reinterpret_cast<const Vec16*>(at);
#pragma unroll 1
    for (int distance = 1; distance < tile.cluster; ++distance)
      OfBlock(at, sizeof(Vec16), (tile.block + distance) & (tile.cluster - 1)).store(0, q);
  }
  cluster_barrier();
}

// Calls epilogue(row, column, dot(inputs[row], weight[column])) for the rows of the tile and this block's columns; inputs
// are zero-padded (pad_rows).
template <class T, class Epilogue>
T2L_DEVICE void tile_linear(const TrunkTile<T>& tile, const T* inputs, int64_t stride, const void* weight, int columns,
                            int depth, Epilogue epilogue) {
  constexpr int kStep = Traits<T>::kPerKBlock,
                kUnroll = sizeof(T) == 4 ? 2 : 4;  // k-blocks whose loads are in flight together
  const int g = lane_index() / 4, t = lane_index() % 4, lane_k = t * Traits<T>::kPerVec16;
  const T* w = static_cast<const T*>(weight);
  const bool aligned = reinterpret_cast<uintptr_t>(w) % 16 == 0 && depth % Traits<T>::kPerVec16 == 0;
  const T* low_row = inputs + g * stride + lane_k;
  const T* high_row = low_row + 8 * stride;
  const int rows = tile.rows;
  const Columns own = own_columns(tile, columns);
  constexpr int kColumns = cuda::kTrunkColumns;
  for (int first = own.begin + warp_index() * kColumns; first < own.end; first += kWarps * kColumns) {
    float accum[2][4] = {};
    Vec16 weights[kUnroll][2];
    const auto multiply = [&](int k, const Vec16(&k_block)[2]) {
      const Vec16 low = g < rows ? *reinterpret_cast<const Vec16*>(low_row + k) : zero_vec16();
      const Vec16 high = g + 8 < rows ? *reinterpret_cast<const Vec16*>(high_row + k) : zero_vec16();
#pragma unroll
      for (int i = 0; i < 2; ++i) multiply_vec16(accum[i], low, high, k_block[i], T());
    };
    const T* row[2];  // null: padding
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = first + 8 * i + g;
      row[i] = column < own.end ? w + int64_t{column} * depth : nullptr;
    }
    int k = 0;
    if (aligned)
      for (; k + kUnroll * kStep <= depth; k += kUnroll * kStep) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
#pragma unroll
          for (int i = 0; i < 2; ++i) weights[u][i] = row[i] ? load_vec16(row[i] + k + u * kStep + lane_k) : zero_vec16();
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) multiply(k + u * kStep, weights[u]);
      }
#pragma unroll 1
    for (; k < depth; k += kStep) {
#pragma unroll
      for (int i = 0; i < 2; ++i) weights[0][i] = row[i] ? load_features(row[i], k + lane_k, depth, aligned) : zero_vec16();
      multiply(k, weights[0]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row_of_tile = g + 8 * (j / 2), column = first + 8 * i + 2 * t + j % 2;
        if (row_of_tile < rows && column < own.end) epilogue(row_of_tile, column, accum[i][j]);
      }
  }
}

// Zero-pads every row from `features` to a multiple of a k-block.
template <class T>
T2L_DEVICE void pad_rows(T* panel, int64_t stride, int rows, int features) {
  const int extra = static_cast<int>(cuda::round_up(features, Traits<T>::kPerKBlock)) - features;
  for (int i = thread_index(); i < rows * extra; i += kThreads)
    from_float(0.0f, panel + i / extra * stride + features + i % extra);
}

// Calls put(j, value) with LayerNorm of a row of m values, by one warp.
template <class Put>
T2L_DEVICE void normalise(const float* values, int m, const float* weight, const float* bias, Put put) {
  float sum = 0.0f, squares = 0.0f;
#pragma unroll 2
  for (int j = lane_index(); j < m; j += 32) sum += values[j];
#pragma unroll
  for (int mask = 16; mask; mask /= 2) sum += shuffle_xor(sum, mask);
  const float mean = fast_divide(sum, static_cast<float>(m));
#pragma unroll 2
  for (int j = lane_index(); j < m; j += 32) squares += (values[j] - mean) * (values[j] - mean);
#pragma unroll
  for (int mask = 16; mask; mask /= 2) squares += shuffle_xor(squares, mask);
  const float scale = rsqrt(fast_divide(squares, static_cast<float>(m)) + kLayerNormEps);
#pragma unroll 2
  for (int j = lane_index(); j < m; j += 32) put(j, (values[j] - mean) * scale * load_one(weight + j) + load_one(bias + j));
}

// tile.input = LayerNorm(x), one warp per row.
template <class T>
T2L_DEVICE void layer_norm(const float* x, int m, const float* weight, const float* bias, const TrunkTile<T>& tile) {
  for (int row = warp_index(); row < tile.rows; row += kWarps)
    normalise(x + row * m, m, weight, bias,
              [&](int j, float value) { from_float(value, tile.input + row * tile.input_stride + j); });
  pad_rows(tile.input, tile.input_stride, tile.rows, m);
}

// Dot product of two rows of `size` numbers, by one warp: the same for all lanes.
T2L_DEVICE float dot(const float* a, const float* b, int size) {
  float sum[4] = {};
  const bool aligned = size % 4 == 0 && reinterpret_cast<uintptr_t>(a) % 16 == 0 && reinterpret_cast<uintptr_t>(b) % 16 == 0;
  if (aligned) {
#pragma unroll 4
    for (int k = 4 * lane_index(); k < size; k += 128) {
      const Vec16 left = load_vec16(a + k), right = load_vec16(b + k);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += bits_to_float(left.word[i]) * bits_to_float(right.word[i]);
    }
  } else {
#pragma unroll 1
    for (int k = lane_index(); k < size; k += 32) sum[0] += load_one(a + k) * load_one(b + k);
  }
  float total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
#pragma unroll
  for (int mask = 16; mask; mask /= 2) total += shuffle_xor(total, mask);
  return total;
}

// z[i] = W e + b of the i-th task of the tile, before its LayerNorm; blocks of a cluster share the columns.
template <class T>
T2L_DEVICE void encode(const TrunkParams& p, const TrunkTile<T>& tile, int first_task, int tasks, float* z) {
  const int t = static_cast<int>(p.t), e = static_cast<int>(p.encoder.e);
  const Columns own = own_columns(tile, t);
  for (int i = 0; i < tasks; ++i)
    for (int column = own.begin + warp_index(); column < own.end; column += kWarps) {
      const float value = dot(p.encoder.weight + int64_t{column} * e, p.z + int64_t{first_task + i} * e, e);
      if (lane_index() == 0) z[i * t + column] = value + load_one(p.encoder.bias + column);
    }
  exchange(tile, z, t, t, tasks);
}

// Calls epilogue(row, column, silu(W2 silu(W1 LN(x) + b1) + b2)) for this block's columns.  Begins with a barrier: x may
// just have been written.
template <class T, class Epilogue>
T2L_DEVICE void mlp(const TrunkTile<T>& tile, const MlpParams& p, const float* x, int m, int out, Epilogue epilogue) {
  block_barrier();
  layer_norm(x, m, p.norm_weight, p.norm_bias, tile);
  block_barrier();
  tile_linear(tile, tile.input, tile.input_stride, p.w1, 4 * m, m, [&](int row, int column, float value) {
    from_float(silu(value + load_one(p.b1 + column)), tile.hidden + row * tile.hidden_stride + column);
  });
  pad_rows(tile.hidden, tile.hidden_stride, tile.rows, 4 * m);
  exchange(tile, tile.hidden, tile.hidden_stride, 4 * m, tile.rows);
  tile_linear(tile, tile.hidden, tile.hidden_stride, p.w2, out, 4 * m,
              [&](int row, int column, float value) { epilogue(row, column, silu(value + load_one(p.b2 + column))); });
}

// x = mixer output.  The first linear is split: the task's projection is computed here, the rest is folded into mixer_table.
// `z`: memory for the encoded tasks of the tile, where the encoder is the kernel's.
template <class T>
T2L_DEVICE void mixer(const TrunkParams& p, const TrunkTile<T>& tile, int first_row, float* z) {
  const int m = static_cast<int>(p.m), hidden = 4 * m, t = static_cast<int>(p.t);
  const int group = static_cast<int>(p.modules * p.layers);
  if (p.encoder.weight) {
    const int first_task = first_row / group, last_task = (first_row + tile.rows - 1) / group;
    encode(p, tile, first_task, last_task - first_task + 1, z);
    for (int row = warp_index(); row < tile.rows; row += kWarps)
      normalise(z + ((first_row + row) / group - first_task) * t, t, p.encoder.norm_weight, p.encoder.norm_bias,
                [&](int j, float value) { from_float(value, tile.input + row * tile.input_stride + j); });
  } else {
    for (int i = thread_index(); i < tile.rows * t; i += kThreads) {
      const int row = i / t, task = (first_row + row) / group;
      from_float(load_one(p.z + int64_t{task} * t + i % t), tile.input + row * tile.input_stride + i % t);
    }
  }
  pad_rows(tile.input, tile.input_stride, tile.rows, t);
  block_barrier();
  tile_linear(tile, tile.input, tile.input_stride, p.mixer_task, hidden, t, [&](int row, int column, float value) {
    const float constant = load_one(p.mixer_table + int64_t{(first_row + row) % group} * hidden + column);
    from_float(silu(value + constant), tile.hidden + row * tile.hidden_stride + column);
  });
  pad_rows(tile.hidden, tile.hidden_stride, tile.rows, hidden);
  exchange(tile, tile.hidden, tile.hidden_stride, hidden, tile.rows);
  tile_linear(tile, tile.hidden, tile.hidden_stride, p.mixer_w2, m, hidden, [&](int row, int column, float value) {
    tile.x[row * m + column] = silu(value + load_one(p.mixer_b2 + column));
  });
  exchange(tile, tile.x, m, m, tile.rows);
}

// Rotary embedding at position k, half-split, base 1e4.  In place if out == x.
T2L_DEVICE void rotate(const float* x, int rows, int m, int k, float* out) {
  const int half = m / 2;
  for (int i = thread_index(); i < rows * half; i += kThreads) {
    const int row = i / half, j = i % half;
    const float frequency = power(10000.0f, -2.0f * static_cast<float>(j) / static_cast<float>(m));
    float c, s;
    cos_sin(static_cast<float>(k) * frequency, &c, &s);
    const float a = x[row * m + j], b = x[row * m + half + j];
    out[row * m + j] = a * c - b * s;
    out[row * m + half + j] = b * c + a * s;
  }
}

// Prefetches share `index` of `count` of all weights into L2.
T2L_DEVICE void prefetch_trunk(const TrunkParams& p, int64_t size, int64_t index, int64_t count) {
  constexpr int64_t kLine = 128;
  const auto prefetch_matrix = [&](const void* weights, int64_t elements) {
    const char* begin = static_cast<const char*>(weights);
    for (int64_t at = (index * kThreads + thread_index()) * kLine; at < elements * size; at += count * kThreads * kLine)
      prefetch(begin + at);
  };
  prefetch_matrix(p.mixer_task, 4 * p.m * p.t);
  prefetch_matrix(p.mixer_w2, 4 * p.m * p.m);
#pragma unroll 1
  for (int i = 0; i < 3; ++i) {
    prefetch_matrix(p.mlp[i].w1, 4 * p.m * p.m);
    prefetch_matrix(p.mlp[i].w2, 4 * p.m * (i < 2 ? p.m : p.h));
  }
}

// State machine of a block: `base`, mlp1 on x; for every side `side`, mlp2 on u; for every rank `rotate`, mlp2 on the
// rotated v (rotary alone), and `latent`, mlp3 on v.
enum class TrunkStep { base, side, rotate, latent };

template <class T>
T2L_KERNEL(kThreads, 1)
trunk_kernel(T2L_ARGUMENT(TrunkLaunch) launch) {
  const TrunkParams& p = launch.params;
  const cuda::TrunkConfig& c = launch.config;
  const int64_t splits = p.sides / c.sides_per_block * (p.ranks / c.ranks_per_block);
  const int64_t working = c.tiles * splits * c.cluster;
  if (block_index() >= working)
    return prefetch_trunk(p, static_cast<int64_t>(sizeof(T)), block_index() - working, c.prefetch_blocks);
  const int64_t index = block_index() / c.cluster;  // the same for all blocks of a cluster
  const int m = static_cast<int>(p.m), layers = static_cast<int>(p.layers), modules = static_cast<int>(p.modules);
  SharedMemory shared;
  TrunkTile<T> tile;
  tile.x = shared.take<float>(c.tile_rows * m);
  float* u = c.sides_per_block > 1 ? shared.take<float>(c.tile_rows * m) : tile.x;
  float* v = c.ranks_per_block > 1 ? shared.take<float>(c.tile_rows * m) : u;
  tile.input = shared.take<T>(c.tile_rows * c.input_stride);
  tile.hidden = shared.take<T>(c.tile_rows * c.hidden_stride);
  float* z = p.encoder.weight ? shared.take<float>(c.tile_rows * p.t) : nullptr;
  tile.input_stride = c.input_stride;
  tile.hidden_stride = c.hidden_stride;
  tile.block = static_cast<int>(block_index() % c.cluster);
  tile.cluster = static_cast<int>(c.cluster);
  const int64_t split = index / c.tiles, rank_splits = p.ranks / c.ranks_per_block;
  const int first_row = static_cast<int>((index - split * c.tiles) * c.tile_rows);
  const int first_side = static_cast<int>(split / rank_splits * c.sides_per_block);
  const int first_rank = static_cast<int>(split % rank_splits * c.ranks_per_block);
  const int last_side = first_side + static_cast<int>(c.sides_per_block);
  const int last_rank = first_rank + static_cast<int>(c.ranks_per_block);
  tile.rows = static_cast<int>(cuda::min(c.tile_rows, p.tasks * modules * layers - first_row));

  if (tile.cluster > 1) {  // all have begun
    cluster_arrive_relaxed();
    cluster_wait();
  }
  mixer(p, tile, first_row, z);
  let_next_launch_begin();  // the heads', which prefetch where SMs are idle, now that weights of the trunk are on their way
  int side = first_side, k = first_rank;
  TrunkStep step = TrunkStep::base;
  for (;;) {  // one inlined MLP for all steps: several would exceed the instruction cache
    const bool latent = step == TrunkStep::latent;
    float* panel = step == TrunkStep::base ? tile.x : step == TrunkStep::side ? u : v;
    if (step == TrunkStep::side)
      for (int i = thread_index(); i < tile.rows * m; i += kThreads) {
        const int module = (first_row + i / m) / layers % modules;
        u[i] = tile.x[i] + (p.side_emb ? load_one(p.side_emb + (module * p.sides + side) * m + i % m) : 0.0f);
      }
    if (step == TrunkStep::rotate) rotate(u, tile.rows, m, k, v);
    if (latent && !p.rotary)
      for (int i = thread_index(); i < tile.rows * m; i += kThreads)
        v[i] = u[i] + (p.pos_emb ? load_one(p.pos_emb + int64_t{k} * m + i % m) : 0.0f);
    const MlpParams& weights = p.mlp[latent ? 2 : step == TrunkStep::base ? 0 : 1];
    mlp(tile, weights, panel, m, latent ? static_cast<int>(p.h) : m, [&](int row, int column, float value) {
      if (!latent) {
        panel[row * m + column] += value;
        return;
      }
      const int task_module = (first_row + row) / layers, layer = (first_row + row) % layers;
      const int64_t at = ((task_module * p.sides + side) * p.ranks + k) * layers + layer;
      T rounded;
      from_float(value, &rounded);
      store_one(static_cast<T*>(p.latent) + at * p.h + column, rounded);
    });
    if (!latent)
      exchange(tile, panel, m, m, tile.rows);
    else if (tile.cluster > 1)
      cluster_barrier();  // no block may exit, or write to `hidden` again, before all have read theirs
    else
      block_barrier();
    if (step == TrunkStep::base) {
      step = TrunkStep::side;
    } else if (!latent) {
      step = step == TrunkStep::side && p.rotary ? TrunkStep::rotate : TrunkStep::latent;
    } else {
      step = p.rotary ? TrunkStep::rotate : TrunkStep::latent;
      if (++k < last_rank) continue;
      k = first_rank;
      step = TrunkStep::side;
      if (++side == last_side) return;
    }
  }
}

}  // namespace t2l::device
