// Hypernetwork for one instruction set, on panels of 16 rows.  Trunk: one pass over panels of (task, module, layer) rows,
// nothing larger than a panel in between.  Head: weight rows are split over threads and each is read once; the epilogue
// writes A and B where they belong.
#pragma once
#include <cmath>

#include "simd.h"

namespace t2l {
namespace T2L_ISA_NAMESPACE {

constexpr int64_t kHeadCols = 96;  // weight rows a head tile covers: a multiple of kPanelCols
constexpr float kLayerNormEps = 1e-5f;

// exp(x) to 2 ulp for |x| <= 87, e^-87 below, infinity above 88: 2^k times a polynomial of degree 6 (Cody-Waite reduction).
// Branch-free, so that loops over it vectorise.  A NaN gives a finite value: the caller's own arithmetic keeps it.
inline float fast_exp(float argument) {
  float x = argument > -87.0f ? argument : -87.0f;
  x = x < 88.0f ? x : 88.0f;
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
  return argument > 88.0f ? INFINITY : y * scale;
}

// x = silu(x + bias) on a feature-major panel; NaN in, NaN out.
inline void bias_silu(float* x, const float* bias, int64_t features) {
  for (int64_t j = 0; j < features; ++j)
    for (int64_t i = 0; i < kPanelRows; ++i) {
      const float v = x[j * kPanelRows + i] + (bias ? bias[j] : 0.0f);
      x[j * kPanelRows + i] = v / (1.0f + fast_exp(-v));
    }
}

// LayerNorm of every row of a panel; the rows are lanes, so nothing is summed across them.
inline void layer_norm(const float* x, const float* weight, const float* bias, int64_t features, float* out) {
  float mean[kPanelRows] = {}, scale[kPanelRows] = {};
  const float count = static_cast<float>(features);
  for (int64_t j = 0; j < features; ++j)
    for (int64_t i = 0; i < kPanelRows; ++i) mean[i] += x[j * kPanelRows + i];
  for (float& m : mean) m /= count;
  for (int64_t j = 0; j < features; ++j)
    for (int64_t i = 0; i < kPanelRows; ++i) {
      const float d = x[j * kPanelRows + i] - mean[i];
      scale[i] += d * d;
    }
  for (float& s : scale) s = 1.0f / std::sqrt(s / count + kLayerNormEps);
  for (int64_t j = 0; j < features; ++j)
    for (int64_t i = 0; i < kPanelRows; ++i)
      out[j * kPanelRows + i] = (x[j * kPanelRows + i] - mean[i]) * scale[i] * weight[j] + bias[j];
}

// One thread's buffers, all feature-major panels.
template <class WT>
struct TrunkScratch {
  TrunkScratch(int64_t m, int64_t h)
      : x(kPanelRows * m),
        u(kPanelRows * m),
        v(kPanelRows * m),
        normed(kPanelRows * m),
        hidden(kPanelRows * 4 * m),
        result(kPanelRows * (m > h ? m : h)),
        panel(panel_size<WT>(4 * m)) {}
  Scratch<float> x, u, v, normed, hidden, result;
  Scratch<typename PanelOf<WT>::Element> panel;
};

// s.result = silu(W2 s.hidden + b2)
template <class WT>
inline void second_linear(TrunkScratch<WT>& s, int64_t m, const void* w2, const float* b2, int64_t out) {
  make_panel<WT>(s.hidden.data, 4 * m, s.panel.data);
  matmul_panel(s.panel.data, static_cast<const WT*>(w2), 4 * m, out, 4 * m, s.result.data);
  bias_silu(s.result.data, b2, out);
}

// s.result = silu(W2 silu(W1 LN(x) + b1) + b2)
template <class WT>
inline void mlp(TrunkScratch<WT>& s, const MlpParams& p, const float* x, int64_t m, int64_t out) {
  layer_norm(x, p.norm_weight, p.norm_bias, m, s.normed.data);
  make_panel<WT>(s.normed.data, m, s.panel.data);
  matmul_panel(s.panel.data, static_cast<const WT*>(p.w1), m, 4 * m, m, s.hidden.data);
  bias_silu(s.hidden.data, p.b1, 4 * m);
  second_linear(s, m, p.w2, p.b2, out);
}

template <class WT>
inline void residual(TrunkScratch<WT>& s, const MlpParams& p, float* x, int64_t m) {
  mlp(s, p, x, m, m);
  for (int64_t i = 0; i < kPanelRows * m; ++i) x[i] += s.result.data[i];
}

// Half-split rotation of every row by position k, base 1e4.
inline void rotate(const float* x, int64_t m, int64_t k, float* out) {
  const int64_t half = m / 2;
  for (int64_t j = 0; j < half; ++j) {
    const float angle = static_cast<float>(k) * std::pow(10000.0f, -2.0f * static_cast<float>(j) / static_cast<float>(m));
    const float c = std::cos(angle), s = std::sin(angle);
    for (int64_t i = 0; i < kPanelRows; ++i) {
      const float a = x[j * kPanelRows + i], b = x[(half + j) * kPanelRows + i];
      out[j * kPanelRows + i] = a * c - b * s;
      out[(half + j) * kPanelRows + i] = b * c + a * s;
    }
  }
}

// u = x plus the side embedding of each row's module.
inline void add_side(const TrunkParams& p, const float* x, int64_t first, int64_t rows, int64_t side, float* u) {
  std::memcpy(u, x, kPanelRows * p.m * sizeof(float));
  if (!p.side_emb) return;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t module = (first + i) / p.layers % p.modules;
    const float* emb = p.side_emb + (module * p.sides + side) * p.m;
    for (int64_t j = 0; j < p.m; ++j) u[j * kPanelRows + i] += emb[j];
  }
}

template <class WT>
inline void store_latent(const TrunkParams& p, const float* result, int64_t first, int64_t rows, int64_t side, int64_t k) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t task_module = (first + i) / p.layers, layer = (first + i) % p.layers;
    const int64_t row = ((task_module * p.sides + side) * p.ranks + k) * p.layers + layer;
    WT* out = static_cast<WT*>(p.latent) + row * p.h;
    for (int64_t j = 0; j < p.h; ++j) from_float(result[j * kPanelRows + i], out + j);
  }
}

// Rows [first, first + rows) of the (task, module, layer) product, all their sides and ranks.
template <class WT>
inline void trunk_panel(const TrunkParams& p, const float* task_part, int64_t first, int64_t rows, TrunkScratch<WT>& s) {
  const int64_t m = p.m, hidden = 4 * m, group = p.modules * p.layers;
  for (int64_t i = 0; i < kPanelRows; ++i) {  // rows beyond the last repeat it and are not stored
    const int64_t row = first + lesser(i, rows - 1);
    const float* task = task_part + row / group * hidden;
    const float* constant = p.mixer_table + row % group * hidden;
    for (int64_t j = 0; j < hidden; ++j) s.hidden.data[j * kPanelRows + i] = task[j] + constant[j];
  }
  bias_silu(s.hidden.data, nullptr, hidden);
  second_linear(s, m, p.mixer_w2, p.mixer_b2, m);
  std::memcpy(s.x.data, s.result.data, kPanelRows * m * sizeof(float));
  residual(s, p.mlp[0], s.x.data, m);
  for (int64_t side = 0; side < p.sides; ++side) {
    float* u = s.u.data;
    add_side(p, s.x.data, first, rows, side, u);
    residual(s, p.mlp[1], u, m);
    for (int64_t k = 0; k < p.ranks; ++k) {
      float* v = s.v.data;
      if (p.rotary) {
        rotate(u, m, k, v);
        residual(s, p.mlp[1], v, m);
      } else {
        for (int64_t j = 0; j < m; ++j)
          for (int64_t i = 0; i < kPanelRows; ++i)
            v[j * kPanelRows + i] = u[j * kPanelRows + i] + (p.pos_emb ? p.pos_emb[k * m + j] : 0.0f);
      }
      mlp(s, p.mlp[2], v, m, p.h);
      store_latent<WT>(p, s.result.data, first, rows, side, k);
    }
  }
}

template <class WT>
inline void trunk_typed(const TrunkParams& p, ParallelFor parallel) {
  const int64_t hidden = 4 * p.m;
  Scratch<float> task_part(p.tasks * hidden);
  auto project = [&](int64_t begin, int64_t end) {
    Scratch<WT> z((end - begin) * p.t);
    for (int64_t i = 0; i < (end - begin) * p.t; ++i) from_float(p.z[begin * p.t + i], z.data + i);
    matmul_nt(z.data, p.t, end - begin, static_cast<const WT*>(p.mixer_task), p.t, hidden, p.t,
              task_part.data + begin * hidden, hidden);
  };
  for_range(parallel, p.tasks, 8, project);
  const int64_t rows = p.tasks * p.modules * p.layers;
  auto body = [&](int64_t begin, int64_t end) {
    TrunkScratch<WT> scratch(p.m, p.h);
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * kPanelRows;
      trunk_panel(p, task_part.data, first, lesser(kPanelRows, rows - first), scratch);
    }
  };
  for_range(parallel, (rows + kPanelRows - 1) / kPanelRows, 1, body);
}

// Latent rows as panels: one run of layers for every (task, side, rank), padded to whole panels.
template <class WT>
struct LatentPanels {
  explicit LatentPanels(const HeadParams& p)
      : per_run((p.layers + kPanelRows - 1) / kPanelRows),
        size(panel_size<WT>(p.h)),
        data(p.tasks * p.sides * p.ranks * per_run * size) {}
  typename PanelOf<WT>::Element* at(int64_t run, int64_t panel) { return data.data + (run * per_run + panel) * size; }
  int64_t per_run, size;
  Scratch<typename PanelOf<WT>::Element> data;
};

template <class WT>
inline void pack_latent(const HeadParams& p, LatentPanels<WT>& panels, ParallelFor parallel) {
  auto body = [&](int64_t begin, int64_t end) {
    Scratch<float> rows(kPanelRows * p.h);
    for (int64_t run = begin; run < end; ++run) {
      const int64_t k = run % p.ranks, side = run / p.ranks % p.sides, task = run / p.ranks / p.sides;
      const WT* latent =
          static_cast<const WT*>(p.latent) + task * p.latent_stride[0] + side * p.latent_stride[1] + k * p.latent_stride[2];
      for (int64_t panel = 0; panel < panels.per_run; ++panel) {
        for (int64_t i = 0; i < kPanelRows; ++i) {
          const WT* row = latent + lesser(panel * kPanelRows + i, p.layers - 1) * p.latent_stride[3];
          for (int64_t j = 0; j < p.h; ++j) rows.data[j * kPanelRows + i] = to_float(row[j]);
        }
        make_panel<WT>(rows.data, p.h, panels.at(run, panel));
      }
    }
  };
  for_range(parallel, p.tasks * p.sides * p.ranks, 4, body);
}

// Columns [column, column + cols) of rank `rank` of one side, layer `layer`: bias, mul, add, scale, cast, store.
template <class OT>
inline void head_epilogue(const HeadParams& p, int side, const float* tile, const float* bias, int64_t task, int64_t layer,
                          int64_t rank, int64_t column, int64_t cols) {
  const int64_t* os = p.out_stride[side];
  const int64_t* ms = p.mul_stride[side];
  const int64_t* as = p.add_stride[side];
  const float* mul = p.mul[side] ? p.mul[side] + layer * ms[0] + rank * ms[1] + column * ms[2] : nullptr;
  const float* plus = p.add[side] ? p.add[side] + layer * as[0] + rank * as[1] + column * as[2] : nullptr;
  OT* out = static_cast<OT*>(p.out[side]) + task * os[0] + layer * os[1] + rank * os[2] + column * os[3];
  float y[kHeadCols];  // separate plain loops: each vectorises where its strides allow
  for (int64_t c = 0; c < cols; ++c) y[c] = tile[c * kPanelRows];
  if (bias)
    for (int64_t c = 0; c < cols; ++c) y[c] += bias[c];
  if (mul)
    for (int64_t c = 0; c < cols; ++c) y[c] *= mul[c * ms[2]];
  if (plus)
    for (int64_t c = 0; c < cols; ++c) y[c] += plus[c * as[2]];
  if (p.scale[side] != 1.0f)
    for (int64_t c = 0; c < cols; ++c) y[c] *= p.scale[side];
  if (os[3] == 1)
    store_row(y, cols, out);
  else
    for (int64_t c = 0; c < cols; ++c) from_float(y[c], out + c * os[3]);
}

// Weight rows [row, row + cols), which give columns of one side, against all its latent rows; `p_rank` is the rank within
// a latent row's share of ranks.
template <class WT, class OT>
inline void head_tile(const HeadParams& p, LatentPanels<WT>& panels, int side, int64_t row, int64_t p_rank, int64_t column,
                      int64_t cols, float* tile) {
  const WT* weight = static_cast<const WT*>(p.weight) + row * p.h;
  const float* bias = p.bias ? p.bias + row : nullptr;
  for (int64_t task = 0; task < p.tasks; ++task)
    for (int64_t k = 0; k < p.ranks; ++k) {
      const int64_t run = (task * p.sides + (p.sides == 2 ? side : 0)) * p.ranks + k;
      for (int64_t panel = 0; panel < panels.per_run; ++panel) {
        matmul_panel(panels.at(run, panel), weight, p.h, cols, p.h, tile);
        const int64_t first = panel * kPanelRows, rows = lesser(kPanelRows, p.layers - first);
        for (int64_t i = 0; i < rows; ++i)
          head_epilogue<OT>(p, side, tile + i, bias, task, first + i, k * (p.rank / p.ranks) + p_rank, column, cols);
      }
    }
}

template <class WT, class OT>
inline void head_typed(const HeadParams& p, ParallelFor parallel) {
  if (p.tasks == 0 || p.layers == 0) return;
  LatentPanels<WT> panels(p);
  pack_latent(p, panels, parallel);
  const int64_t per_latent = p.rank / p.ranks;
  const int64_t width[2] = {p.in, p.out_features};
  const int64_t wider = p.in > p.out_features ? p.in : p.out_features;
  const int64_t stride[2] = {p.sides == 2 ? wider : p.in, p.sides == 2 ? wider : p.out_features};
  const int64_t start[2] = {0, p.sides == 2 ? 0 : per_latent * p.in};
  const int64_t tiles[2] = {(p.in + kHeadCols - 1) / kHeadCols, (p.out_features + kHeadCols - 1) / kHeadCols};
  auto body = [&](int64_t begin, int64_t end) {
    Scratch<float> tile(kHeadCols * kPanelRows);
    for (int64_t item = begin; item < end; ++item) {
      const int side = item < per_latent * tiles[0] ? 0 : 1;
      const int64_t local = item - (side ? per_latent * tiles[0] : 0);
      const int64_t p_rank = local / tiles[side], column = local % tiles[side] * kHeadCols;
      const int64_t row = start[side] + p_rank * stride[side] + column;
      head_tile<WT, OT>(p, panels, side, row, p_rank, column, lesser(kHeadCols, width[side] - column), tile.data);
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
