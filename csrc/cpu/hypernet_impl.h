// Hypernetwork for one instruction set.  Trunk: one pass over tiles of rows, nothing larger than a tile in between.
// Head: weight rows are split over threads and read once; the epilogue writes A and B where they belong.
#pragma once
#include <cmath>

#include "simd.h"

namespace t2l {
namespace T2L_ISA_NAMESPACE {

constexpr int64_t kTrunkRows = 16;
constexpr int64_t kHeadCols = 64;  // weight rows a head tile covers
constexpr int64_t kHeadLayers = 32;
constexpr float kLayerNormEps = 1e-5f;

// exp(x) to 2 ulp for |x| <= 87, clamped beyond: 2^k times a polynomial of degree 6 (Cody-Waite reduction).  Branch-free, so
// that loops over it vectorise.
inline float fast_exp(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer in the low bits
  const float k = shifted - 12582912.0f;
  float r = x - k * 0.693359375f;
  r = r - k * -2.12194440e-4f;
  float poly = 1.9875691500e-4f;
  poly = poly * r + 1.3981999507e-3f;
  poly = poly * r + 8.3334519073e-3f;
  poly = poly * r + 4.1665795894e-2f;
  poly = poly * r + 1.6666665459e-1f;
  poly = poly * r + 5.0000001201e-1f;
  const float y = poly * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(k) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return y * scale;
}

// NaN in, NaN out: the clamps of fast_exp let it through in x itself.
inline void silu(float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = x[i] / (1.0f + fast_exp(-x[i]));
}

template <class T>
inline void round_to(const float* x, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) from_float(x[i], out + i);
}

template <class T>
inline void layer_norm(const float* x, const float* weight, const float* bias, int64_t n, T* out) {
  Vec total = zero();
  for (int64_t i = 0; i < n; i += kLanes) total = add(total, load(x + i, static_cast<int>(lesser(kLanes, n - i))));
  const float mean = sum(total) / static_cast<float>(n);
  float variance = 0.0f;
  for (int64_t i = 0; i < n; ++i) variance += (x[i] - mean) * (x[i] - mean);
  const float scale = 1.0f / std::sqrt(variance / static_cast<float>(n) + kLayerNormEps);
  for (int64_t i = 0; i < n; ++i) from_float((x[i] - mean) * scale * weight[i] + bias[i], out + i);
}

// One thread's tile: rows of width m (x, u), hidden 4m, result max(m, h), and inputs rounded to the matrix dtype.
template <class WT>
struct Tile {
  Tile(int64_t m, int64_t h)
      : width(m),
        result_width(m > h ? m : h),
        x(kTrunkRows * m),
        u(kTrunkRows * m),
        position(kTrunkRows * m),
        hidden(kTrunkRows * 4 * m),
        result(kTrunkRows * result_width),
        rounded(kTrunkRows * 4 * m) {}
  int64_t width, result_width;
  Scratch<float> x, u, position, hidden, result;
  Scratch<WT> rounded;
};

// hidden (already silu'd float32 rows of 4m) -> tile.result rows of `out` = silu(W2 hidden + b2)
template <class WT>
inline void second_linear(Tile<WT>& tile, int64_t rows, const void* w2, const float* b2, int64_t out) {
  const int64_t hidden = 4 * tile.width;
  round_to(tile.hidden.data, rows * hidden, tile.rounded.data);
  matmul_nt(tile.rounded.data, hidden, rows, static_cast<const WT*>(w2), hidden, out, hidden, tile.result.data, out);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < out; ++j) tile.result.data[i * out + j] += b2[j];
  silu(tile.result.data, rows * out);
}

// tile.result rows of `out` = silu(W2 silu(W1 LN(x) + b1) + b2)
template <class WT>
inline void mlp(Tile<WT>& tile, const MlpParams& p, const float* x, int64_t rows, int64_t out) {
  const int64_t m = tile.width, hidden = 4 * m;
  for (int64_t i = 0; i < rows; ++i) layer_norm(x + i * m, p.norm_weight, p.norm_bias, m, tile.rounded.data + i * m);
  matmul_nt(tile.rounded.data, m, rows, static_cast<const WT*>(p.w1), m, hidden, m, tile.hidden.data, hidden);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < hidden; ++j) tile.hidden.data[i * hidden + j] += p.b1[j];
  silu(tile.hidden.data, rows * hidden);
  second_linear(tile, rows, p.w2, p.b2, out);
}

template <class WT>
inline void residual(Tile<WT>& tile, const MlpParams& p, float* x, int64_t rows) {
  mlp(tile, p, x, rows, tile.width);
  for (int64_t i = 0; i < rows * tile.width; ++i) x[i] += tile.result.data[i];
}

// Half-split rotation of each row by position k, base 1e4.
inline void rotate(const float* x, int64_t rows, int64_t m, int64_t k, float* out) {
  const int64_t half = m / 2;
  for (int64_t j = 0; j < half; ++j) {
    const float angle = static_cast<float>(k) * std::pow(10000.0f, -2.0f * static_cast<float>(j) / static_cast<float>(m));
    const float c = std::cos(angle), s = std::sin(angle);
    for (int64_t i = 0; i < rows; ++i) {
      const float a = x[i * m + j], b = x[i * m + half + j];
      out[i * m + j] = a * c - b * s;
      out[i * m + half + j] = b * c + a * s;
    }
  }
}

template <class WT>
inline void trunk_tile(const TrunkParams& p, const float* task_part, int64_t first, int64_t rows, Tile<WT>& tile) {
  const int64_t m = p.m, hidden = 4 * m, group = p.modules * p.layers;
  for (int64_t i = 0; i < rows; ++i) {
    const float* task = task_part + (first + i) / group * hidden;
    const float* constant = p.mixer_table + (first + i) % group * hidden;
    for (int64_t j = 0; j < hidden; ++j) tile.hidden.data[i * hidden + j] = task[j] + constant[j];
  }
  silu(tile.hidden.data, rows * hidden);
  second_linear(tile, rows, p.mixer_w2, p.mixer_b2, m);
  std::memcpy(tile.x.data, tile.result.data, rows * m * sizeof(float));
  residual(tile, p.mlp[0], tile.x.data, rows);
  for (int64_t s = 0; s < p.sides; ++s) {
    float* u = tile.u.data;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t module = (first + i) % group / p.layers;
      const float* side = p.side_emb ? p.side_emb + (module * p.sides + s) * m : nullptr;
      for (int64_t j = 0; j < m; ++j) u[i * m + j] = tile.x.data[i * m + j] + (side ? side[j] : 0.0f);
    }
    residual(tile, p.mlp[1], u, rows);
    for (int64_t k = 0; k < p.ranks; ++k) {
      float* v = tile.position.data;
      if (p.rotary) {
        rotate(u, rows, m, k, v);
        residual(tile, p.mlp[1], v, rows);
      } else {
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < m; ++j) v[i * m + j] = u[i * m + j] + (p.pos_emb ? p.pos_emb[k * m + j] : 0.0f);
      }
      mlp(tile, p.mlp[2], v, rows, p.h);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t task_module = (first + i) / p.layers, layer = (first + i) % p.layers;
        const int64_t row = ((task_module * p.sides + s) * p.ranks + k) * p.layers + layer;
        round_to(tile.result.data + i * p.h, p.h, static_cast<WT*>(p.latent) + row * p.h);
      }
    }
  }
}

template <class WT>
inline void trunk_typed(const TrunkParams& p, ParallelFor parallel) {
  const int64_t hidden = 4 * p.m;
  Scratch<float> task_part(p.tasks * hidden);
  auto project = [&](int64_t first, int64_t last) {
    Scratch<WT> z((last - first) * p.t);
    round_to(p.z + first * p.t, (last - first) * p.t, z.data);
    matmul_nt(z.data, p.t, last - first, static_cast<const WT*>(p.mixer_task), p.t, hidden, p.t,
              task_part.data + first * hidden, hidden);
  };
  for_range(parallel, p.tasks, 8, project);
  const int64_t rows = p.tasks * p.modules * p.layers;
  auto body = [&](int64_t first, int64_t last) {
    Tile<WT> tile(p.m, p.h);
    for (int64_t t = first; t < last; ++t) {
      const int64_t begin = t * kTrunkRows;
      trunk_tile(p, task_part.data, begin, lesser(kTrunkRows, rows - begin), tile);
    }
  };
  for_range(parallel, (rows + kTrunkRows - 1) / kTrunkRows, 1, body);
}

// Weight rows [row, row + cols) of one side against all its latent rows; `p_rank` is the rank within a latent row's share.
template <class WT, class OT>
inline void head_tile(const HeadParams& p, int side, int64_t row, int64_t p_rank, int64_t column, int64_t cols,
                      float* tile) {
  const int64_t per_latent = p.rank / p.ranks;
  const WT* weight = static_cast<const WT*>(p.weight) + row * p.h;
  for (int64_t task = 0; task < p.tasks; ++task)
    for (int64_t k = 0; k < p.ranks; ++k) {
      const WT* latent = static_cast<const WT*>(p.latent) + task * p.latent_stride[0] +
                         (p.sides == 2 ? side : 0) * p.latent_stride[1] + k * p.latent_stride[2];
      const int64_t rank = k * per_latent + p_rank;
      for (int64_t layer = 0; layer < p.layers; layer += kHeadLayers) {
        const int64_t rows = lesser(kHeadLayers, p.layers - layer);
        matmul_nt(latent + layer * p.latent_stride[3], p.latent_stride[3], rows, weight, p.h, cols, p.h, tile, kHeadCols);
        for (int64_t i = 0; i < rows; ++i) {
          const float* mul = p.mul[side];
          const float* add_to = p.add[side];
          const int64_t* ms = p.mul_stride[side];
          const int64_t* as = p.add_stride[side];
          const int64_t* os = p.out_stride[side];
          float* y = tile + i * kHeadCols;
          if (p.bias)
            for (int64_t c = 0; c < cols; ++c) y[c] += p.bias[row + c];
          if (mul)
            for (int64_t c = 0; c < cols; ++c) y[c] *= mul[(layer + i) * ms[0] + rank * ms[1] + (column + c) * ms[2]];
          if (add_to)
            for (int64_t c = 0; c < cols; ++c) y[c] += add_to[(layer + i) * as[0] + rank * as[1] + (column + c) * as[2]];
          OT* out = static_cast<OT*>(p.out[side]) + task * os[0] + (layer + i) * os[1] + rank * os[2] + column * os[3];
          for (int64_t c = 0; c < cols; ++c) from_float(y[c] * p.scale[side], out + c * os[3]);
        }
      }
    }
}

template <class WT, class OT>
inline void head_typed(const HeadParams& p, ParallelFor parallel) {
  const int64_t per_latent = p.rank / p.ranks;
  const int64_t width[2] = {p.in, p.out_features};
  const int64_t stride[2] = {p.sides == 2 ? (p.in > p.out_features ? p.in : p.out_features) : p.in,
                             p.sides == 2 ? (p.in > p.out_features ? p.in : p.out_features) : p.out_features};
  const int64_t start[2] = {0, p.sides == 2 ? 0 : per_latent * p.in};
  const int64_t tiles[2] = {(p.in + kHeadCols - 1) / kHeadCols, (p.out_features + kHeadCols - 1) / kHeadCols};
  auto body = [&](int64_t first, int64_t last) {
    Scratch<float> tile(kHeadLayers * kHeadCols);
    for (int64_t item = first; item < last; ++item) {
      const int side = item < per_latent * tiles[0] ? 0 : 1;
      const int64_t local = item - (side ? per_latent * tiles[0] : 0);
      const int64_t p_rank = local / tiles[side], column = local % tiles[side] * kHeadCols;
      const int64_t row = start[side] + p_rank * stride[side] + column;
      head_tile<WT, OT>(p, side, row, p_rank, column, lesser(kHeadCols, width[side] - column), tile.data);
    }
  };
  for_range(parallel, per_latent * (tiles[0] + tiles[1]), 1, body);
}

void hypernet_trunk(const TrunkParams& p, ParallelFor parallel) {
  if (p.w_type == DType::bf16)
    trunk_typed<bf16>(p, parallel);
  else
    trunk_typed<float>(p, parallel);
}

void hypernet_head(const HeadParams& p, ParallelFor parallel) {
  const bool w16 = p.w_type == DType::bf16, o16 = p.out_type == DType::bf16;
  if (w16 && o16) head_typed<bf16, bf16>(p, parallel);
  if (w16 && !o16) head_typed<bf16, float>(p, parallel);
  if (!w16 && o16) head_typed<float, bf16>(p, parallel);
  if (!w16 && !o16) head_typed<float, float>(p, parallel);
}

}  // namespace T2L_ISA_NAMESPACE
}  // namespace t2l
