// Hypernetwork trunk: every panel of (task, module, layer) rows goes through all layers; intermediates are one panel large.
#pragma once
#include <cmath>

#include "dots.h"
#include "panel.h"

namespace t2l {
namespace T2L_ISA_NAMESPACE {

constexpr float kLayerNormEps = 1e-5f;

#if T2L_ISA_LEVEL >= T2L_AVX512
// v / (1 + exp(-v)) to 4 ulp, down to v = -87; below, where it is at most 1e-36, zero.  exp by Cody-Waite range reduction
// and a polynomial of degree 6; the quotient by an estimate and a step of Newton, which take less time than a division.
inline Vec silu(Vec v) {
  const Vec x = _mm512_max_ps(_mm512_min_ps(_mm512_sub_ps(zero(), v), broadcast(87.0f)), broadcast(-87.0f));
  const Vec k = _mm512_roundscale_ps(multiply(x, broadcast(1.44269504088896341f)), _MM_FROUND_TO_NEAREST_INT);
  const Vec r = _mm512_fnmadd_ps(k, broadcast(-2.12194440e-4f), _mm512_fnmadd_ps(k, broadcast(0.693359375f), x));
  Vec poly = broadcast(1.9875691500e-4f);
  constexpr float kPoly[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  for (const float c : kPoly) poly = fma(poly, r, broadcast(c));
  const Vec y = fma(multiply(poly, r), r, add(r, broadcast(1.0f)));
  const Vec d = add(_mm512_scalef_ps(y, k), broadcast(1.0f));
  const Vec q = _mm512_maskz_rcp14_ps(_mm512_cmp_ps_mask(v, broadcast(-87.0f), _CMP_NLT_UQ), d);
  return multiply(multiply(v, q), _mm512_fnmadd_ps(d, q, broadcast(2.0f)));
}

// x = silu(x + bias) on a feature-major panel; propagates NaN.
inline void bias_silu(float* x, const float* bias, int64_t features) {
  for (int64_t j = 0; j < features; ++j) {
    const Vec shift = bias ? broadcast(bias[j]) : zero();
    for (int64_t i = j * kPanelRows; i < (j + 1) * kPanelRows; i += kLanes) store(x + i, silu(add(load(x + i), shift)));
  }
}
#else
// exp(x) to 2 ulp for |x| <= 87, e^-87 below, infinity above 88: Cody-Waite range reduction and a polynomial of degree 6.
// Branch-free, so that loops over it vectorise.  NaN gives a finite value: callers propagate it themselves.
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

// x = silu(x + bias) on a feature-major panel; propagates NaN.
inline void bias_silu(float* x, const float* bias, int64_t features) {
  for (int64_t j = 0; j < features; ++j)
    for (int64_t i = 0; i < kPanelRows; ++i) {
      const float v = x[j * kPanelRows + i] + (bias ? bias[j] : 0.0f);
      x[j * kPanelRows + i] = v / (1.0f + fast_exp(-v));
    }
}
#endif

// LayerNorm of every row of a panel; rows are lanes, so there is no horizontal sum.
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

// Per-thread buffers, all feature-major panels.
template <class WT>
struct TrunkScratch {
  TrunkScratch(int64_t m, int64_t h)
      : x(kPanelRows * m),
        u(kPanelRows * m),
        v(kPanelRows * m),
        normed(kPanelRows * m),
        hidden(kPanelRows * 4 * m),
        result(kPanelRows * (m > h ? m : h)),
        panel(panel_size<WT>(4 * m)),
        scope(4 * m) {}
  Scratch<float> x, u, v, normed, hidden, result;
  Scratch<typename PanelOf<WT>::Element> panel;
  MatmulScope<WT> scope;
};

// s.result = silu(W2 s.hidden + b2)
template <class WT>
inline void second_linear(TrunkScratch<WT>& s, int64_t m, const void* w2, const float* b2, int64_t out) {
  round_to_panel(s.hidden.data, 4 * m, s.panel.data, WT());
  matmul_panel<Keep::panel>(s.scope, s.panel.data, static_cast<const WT*>(w2), out, 4 * m, s.result.data);
  bias_silu(s.result.data, b2, out);
}

// s.result = silu(W2 silu(W1 LN(x) + b1) + b2)
template <class WT>
inline void mlp(TrunkScratch<WT>& s, const MlpParams& p, const float* x, int64_t m, int64_t out) {
  layer_norm(x, p.norm_weight, p.norm_bias, m, s.normed.data);
  round_to_panel(s.normed.data, m, s.panel.data, WT());
  matmul_panel<Keep::panel>(s.scope, s.panel.data, static_cast<const WT*>(p.w1), 4 * m, m, s.hidden.data);
  bias_silu(s.hidden.data, p.b1, 4 * m);
  second_linear(s, m, p.w2, p.b2, out);
}

template <class WT>
inline void residual(TrunkScratch<WT>& s, const MlpParams& p, float* x, int64_t m) {
  mlp(s, p, x, m, m);
  for (int64_t i = 0; i < kPanelRows * m; ++i) x[i] += s.result.data[i];
}

// Rotary embedding of every row at position k, half-split, base 1e4.
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

constexpr int64_t kChunkFeatures = 64;  // features per transpose between panels and rows

template <class WT>
inline void store_latent(const TrunkParams& p, const float* result, int64_t first, int64_t rows, int64_t side, int64_t k) {
  alignas(kCacheLine) float transposed[kPanelRows * kChunkFeatures];
  for (int64_t j = 0; j < p.h; j += kChunkFeatures) {
    const int64_t n = min(kChunkFeatures, p.h - j);
    transpose(result + j * kPanelRows, kPanelRows, n, kPanelRows, transposed, kChunkFeatures);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t task_module = (first + i) / p.layers, layer = (first + i) % p.layers;
      const int64_t row = ((task_module * p.sides + side) * p.ranks + k) * p.layers + layer;
      store_row(transposed + i * kChunkFeatures, n, static_cast<WT*>(p.latent) + row * p.h + j);
    }
  }
}

// hidden = silu of the first mixer layer: the task's projection plus the folded constant of module and layer.
template <class WT>
inline void mixer_hidden(const TrunkParams& p, const float* task_part, int64_t first, int64_t rows, TrunkScratch<WT>& s) {
  const int64_t hidden = 4 * p.m, group = p.modules * p.layers;
  alignas(kCacheLine) float sums[kPanelRows * kChunkFeatures];
  for (int64_t j = 0; j < hidden; j += kChunkFeatures) {
    const int64_t n = min(kChunkFeatures, hidden - j);
    for (int64_t i = 0; i < kPanelRows; ++i) {  // padding rows repeat the last one and are not stored
      const int64_t row = first + min(i, rows - 1);
      const float* task = task_part + row / group * hidden + j;
      const float* constant = p.mixer_table + row % group * hidden + j;
      for (int64_t c = 0; c < n; ++c) sums[i * kChunkFeatures + c] = task[c] + constant[c];
    }
    transpose(sums, kChunkFeatures, kPanelRows, n, s.hidden.data + j * kPanelRows, kPanelRows);
  }
  bias_silu(s.hidden.data, nullptr, hidden);
}

// Rows [first, first + rows) of (task, module, layer), for all sides and ranks.
template <class WT>
inline void trunk_panel(const TrunkParams& p, const float* task_part, int64_t first, int64_t rows, TrunkScratch<WT>& s) {
  const int64_t m = p.m;
  mixer_hidden(p, task_part, first, rows, s);
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
    Scratch<WT> z(kDotRows * p.t);
    const WT* row[kDotRows];
    for (int64_t i = 0; i < kDotRows; ++i) row[i] = z.data + i * p.t;
    for (int64_t task = begin; task < end; task += kDotRows) {
      const int64_t rows = min(kDotRows, end - task);
      store_row(p.z + task * p.t, rows * p.t, z.data);
      dot_rows(row, static_cast<int>(rows), static_cast<const WT*>(p.mixer_task), p.t, hidden, p.t,
               task_part.data + task * hidden, hidden);
    }
  };
  for_range(parallel, p.tasks, 8, project);
  const int64_t rows = p.tasks * p.modules * p.layers;
  auto body = [&](int64_t begin, int64_t end) {
    TrunkScratch<WT> scratch(p.m, p.h);
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * kPanelRows;
      trunk_panel(p, task_part.data, first, min(kPanelRows, rows - first), scratch);
    }
  };
  for_range(parallel, (rows + kPanelRows - 1) / kPanelRows, 1, body);
}

void hypernet_trunk(const TrunkParams& p, ParallelFor parallel) {
  if (p.w_type == DType::bf16)
    trunk_typed<bf16>(p, parallel);
  else
    trunk_typed<float>(p, parallel);
}

}  // namespace T2L_ISA_NAMESPACE
}  // namespace t2l
