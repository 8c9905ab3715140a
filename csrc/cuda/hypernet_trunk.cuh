// Hypernetwork trunk in one launch: mixer and three residual MLP blocks for a tile of (task, module, layer) rows a block.
//
// Activations stay in shared memory: float32 where LayerNorm, SiLU and residuals act, rounded to the weights' type where a
// product reads them.  Weights stream from L2 straight into the fragments of the products: a warp takes 16 of their rows at
// a time and the whole depth, so every sum is one warp's, in order, and bits do not depend on the tile or the batch.
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

T2L_DEVICE float silu(float v) { return quotient(v, 1.0f + exponential(-v)); }

// A block's tile: rows in use, and where its panels lie.
template <class T>
struct TrunkTile {
  int rows;
  float* x;   // [rows, m]
  T* narrow;  // [rows, narrow_stride]
  T* wide;    // [rows, wide_stride]
  int64_t narrow_stride, wide_stride;
};

// finish(row, column, inputs . weight[column]) for the rows of the tile.  Inputs are zero beyond their depth.
template <class T, class Finish>
T2L_DEVICE void tile_linear(const T* inputs, int64_t stride, int rows, const void* weight, int columns, int depth,
                            Finish finish) {
  constexpr int kStep = Traits<T>::kPerBlock, kAhead = sizeof(T) == 4 ? 2 : 4;  // steps whose loads are under way together
  const int g = lane_index() / 4, t = lane_index() % 4, lane_k = t * Traits<T>::kPerQuad;
  const T* w = static_cast<const T*>(weight);
  const bool aligned = reinterpret_cast<uintptr_t>(w) % 16 == 0 && depth % Traits<T>::kPerQuad == 0;
  const T* low_row = inputs + g * stride + lane_k;
  const T* high_row = low_row + 8 * stride;
  for (int first = warp_index() * 16; first < columns; first += kWarps * 16) {
    float sum[2][4] = {};
    Quad weights[kAhead][2];
    const auto multiply = [&](int k, const Quad(&of_step)[2]) {
      const Quad low = g < rows ? *reinterpret_cast<const Quad*>(low_row + k) : zero_quad();
      const Quad high = g + 8 < rows ? *reinterpret_cast<const Quad*>(high_row + k) : zero_quad();
#pragma unroll
      for (int i = 0; i < 2; ++i) multiply_quads(sum[i], low, high, of_step[i], T());
    };
    const T* row[2];  // null: no such column
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = first + 8 * i + g;
      row[i] = column < columns ? w + int64_t{column} * depth : nullptr;
    }
    int k = 0;
    if (aligned)
      for (; k + kAhead * kStep <= depth; k += kAhead * kStep) {
#pragma unroll
        for (int u = 0; u < kAhead; ++u)
#pragma unroll
          for (int i = 0; i < 2; ++i) weights[u][i] = row[i] ? load_quad(row[i] + k + u * kStep + lane_k) : zero_quad();
#pragma unroll
        for (int u = 0; u < kAhead; ++u) multiply(k + u * kStep, weights[u]);
      }
#pragma unroll 1
    for (; k < depth; k += kStep) {
#pragma unroll
      for (int i = 0; i < 2; ++i) weights[0][i] = row[i] ? load_features(row[i], k + lane_k, depth, aligned) : zero_quad();
      multiply(k, weights[0]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row_of_tile = g + 8 * (j / 2), column = first + 8 * i + 2 * t + j % 2;
        if (row_of_tile < rows && column < columns) finish(row_of_tile, column, sum[i][j]);
      }
  }
}

// Zeros after `features` of every row, up to the whole blocks that products read.
template <class T>
T2L_DEVICE void pad_rows(T* panel, int64_t stride, int rows, int features) {
  const int extra = static_cast<int>(cuda::round_up(features, Traits<T>::kPerBlock)) - features;
  for (int i = thread_index(); i < rows * extra; i += kThreads)
    from_float(0.0f, panel + i / extra * stride + features + i % extra);
}

// narrow = LN(x), a warp a row.
template <class T>
T2L_DEVICE void layer_norm(const float* x, int m, const float* weight, const float* bias, const TrunkTile<T>& tile) {
  for (int row = warp_index(); row < tile.rows; row += kWarps) {
    const float* values = x + row * m;
    float sum = 0.0f, squares = 0.0f;
    for (int j = lane_index(); j < m; j += 32) sum += values[j];
#pragma unroll
    for (int mask = 16; mask; mask /= 2) sum += shuffle_xor(sum, mask);
    const float mean = quotient(sum, static_cast<float>(m));
    for (int j = lane_index(); j < m; j += 32) squares += (values[j] - mean) * (values[j] - mean);
#pragma unroll
    for (int mask = 16; mask; mask /= 2) squares += shuffle_xor(squares, mask);
    const float scale = reciprocal_root(quotient(squares, static_cast<float>(m)) + kLayerNormEps);
    for (int j = lane_index(); j < m; j += 32)
      from_float((values[j] - mean) * scale * load_one(weight + j) + load_one(bias + j),
                 tile.narrow + row * tile.narrow_stride + j);
  }
  pad_rows(tile.narrow, tile.narrow_stride, tile.rows, m);
}

// finish(row, column, silu(W2 silu(W1 LN(x) + b1) + b2)); whoever wrote x meets the others here.
template <class T, class Finish>
T2L_DEVICE void mlp(const TrunkTile<T>& tile, const MlpParams& p, const float* x, int m, int out, Finish finish) {
  block_barrier();
  layer_norm(x, m, p.norm_weight, p.norm_bias, tile);
  block_barrier();
  tile_linear(tile.narrow, tile.narrow_stride, tile.rows, p.w1, 4 * m, m, [&](int row, int column, float value) {
    from_float(silu(value + load_one(p.b1 + column)), tile.wide + row * tile.wide_stride + column);
  });
  pad_rows(tile.wide, tile.wide_stride, tile.rows, 4 * m);
  block_barrier();
  tile_linear(tile.wide, tile.wide_stride, tile.rows, p.w2, out, 4 * m,
              [&](int row, int column, float value) { finish(row, column, silu(value + load_one(p.b2 + column))); });
  block_barrier();
}

// x after the mixer.  The first product is split: the task's part here, the rest is the constant table.
template <class T>
T2L_DEVICE void mixer(const TrunkParams& p, const TrunkTile<T>& tile, int first_row) {
  const int m = static_cast<int>(p.m), hidden = 4 * m, t = static_cast<int>(p.t);
  const int group = static_cast<int>(p.modules * p.layers);
  for (int i = thread_index(); i < tile.rows * t; i += kThreads) {
    const int row = i / t, task = (first_row + row) / group;
    from_float(load_one(p.z + int64_t{task} * t + i % t), tile.narrow + row * tile.narrow_stride + i % t);
  }
  pad_rows(tile.narrow, tile.narrow_stride, tile.rows, t);
  block_barrier();
  tile_linear(tile.narrow, tile.narrow_stride, tile.rows, p.mixer_task, hidden, t, [&](int row, int column, float value) {
    const float constant = load_one(p.mixer_table + int64_t{(first_row + row) % group} * hidden + column);
    from_float(silu(value + constant), tile.wide + row * tile.wide_stride + column);
  });
  pad_rows(tile.wide, tile.wide_stride, tile.rows, hidden);
  block_barrier();
  tile_linear(tile.wide, tile.wide_stride, tile.rows, p.mixer_w2, m, hidden, [&](int row, int column, float value) {
    tile.x[row * m + column] = silu(value + load_one(p.mixer_b2 + column));
  });
}

// out = x turned to position k: half-split rotation, base 1e4.  out may be x.
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

// This helper's share of all weights, which the others then find in L2.
T2L_DEVICE void prefetch_trunk(const TrunkParams& p, int64_t size, int64_t helper, int64_t helpers) {
  constexpr int64_t kLine = 128;
  const auto ask = [&](const void* weights, int64_t count) {
    const char* begin = static_cast<const char*>(weights);
    for (int64_t at = (helper * kThreads + thread_index()) * kLine; at < count * size; at += helpers * kThreads * kLine)
      prefetch(begin + at);
  };
  ask(p.mixer_task, 4 * p.m * p.t);
  ask(p.mixer_w2, 4 * p.m * p.m);
#pragma unroll 1
  for (int i = 0; i < 3; ++i) {
    ask(p.mlp[i].w1, 4 * p.m * p.m);
    ask(p.mlp[i].w2, 4 * p.m * (i < 2 ? p.m : p.h));
  }
}

// What a block does next: mlp1 on x; then for every side mlp2 on u; for every rank, with rotation, mlp2 on the turned v; and
// mlp3 on v, which gives the latent.
enum class TrunkStep { base, side, turn, latent };

template <class T>
T2L_KERNEL(kThreads, 1)
trunk_kernel(T2L_ARGUMENT(TrunkLaunch) launch) {
  const TrunkParams& p = launch.params;
  const cuda::TrunkConfig& c = launch.config;
  const int64_t shares = p.sides / c.sides_at_once * (p.ranks / c.ranks_at_once), working = c.tiles * shares;
  if (block_index_x() >= working)
    return prefetch_trunk(p, static_cast<int64_t>(sizeof(T)), block_index_x() - working, c.helpers);
  const int m = static_cast<int>(p.m), layers = static_cast<int>(p.layers), modules = static_cast<int>(p.modules);
  SharedMemory shared;
  TrunkTile<T> tile;
  tile.x = shared.take<float>(c.tile_rows * m);
  float* u = c.sides_at_once > 1 ? shared.take<float>(c.tile_rows * m) : tile.x;
  float* v = c.ranks_at_once > 1 ? shared.take<float>(c.tile_rows * m) : u;
  tile.narrow = shared.take<T>(c.tile_rows * c.narrow_stride);
  tile.wide = shared.take<T>(c.tile_rows * c.wide_stride);
  tile.narrow_stride = c.narrow_stride;
  tile.wide_stride = c.wide_stride;
  const int64_t share = block_index_x() / c.tiles, rank_shares = p.ranks / c.ranks_at_once;
  const int first_row = static_cast<int>((block_index_x() - share * c.tiles) * c.tile_rows);
  const int first_side = static_cast<int>(share / rank_shares * c.sides_at_once);
  const int first_rank = static_cast<int>(share % rank_shares * c.ranks_at_once);
  const int last_side = first_side + static_cast<int>(c.sides_at_once);
  const int last_rank = first_rank + static_cast<int>(c.ranks_at_once);
  tile.rows = static_cast<int>(cuda::lesser(c.tile_rows, p.tasks * modules * layers - first_row));

  mixer(p, tile, first_row);
  int side = first_side, k = first_rank;
  TrunkStep step = TrunkStep::base;
  for (;;) {  // one body for all MLPs: several would not fit the instruction cache
    const bool latent = step == TrunkStep::latent;
    float* panel = step == TrunkStep::base ? tile.x : step == TrunkStep::side ? u : v;
    if (step == TrunkStep::side)
      for (int i = thread_index(); i < tile.rows * m; i += kThreads) {
        const int module = (first_row + i / m) / layers % modules;
        u[i] = tile.x[i] + (p.side_emb ? load_one(p.side_emb + (module * p.sides + side) * m + i % m) : 0.0f);
      }
    if (step == TrunkStep::turn) rotate(u, tile.rows, m, k, v);
    if (latent && !p.rotary)
      for (int i = thread_index(); i < tile.rows * m; i += kThreads)
        v[i] = u[i] + (p.pos_emb ? load_one(p.pos_emb + k * m + i % m) : 0.0f);
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
    if (step == TrunkStep::base) {
      step = TrunkStep::side;
    } else if (!latent) {
      step = step == TrunkStep::side && p.rotary ? TrunkStep::turn : TrunkStep::latent;
    } else {
      step = p.rotary ? TrunkStep::turn : TrunkStep::latent;
      if (++k < last_rank) continue;
      k = first_rank;
      step = TrunkStep::side;
      if (++side == last_side) return;
    }
  }
}

}  // namespace t2l::device
