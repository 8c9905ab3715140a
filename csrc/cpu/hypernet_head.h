// Hypernetwork head of one module: a GEMM of weight rows with packed latent rows.  Weight rows are split over threads and
// streamed once, in memory order; the epilogue scatters the results to A and B.
#pragma once
#include "panel.h"

namespace t2l {
namespace T2L_ISA_NAMESPACE {

constexpr int64_t kHeadCols = 96;  // weight rows of a tile: a multiple of kPanelCols and of kLanes
// With many latent rows weights are packed instead, once for all rows, and results need no transpose.
constexpr bool kPacksWeights = T2L_TILES != 0;
constexpr int64_t kManyRows = 1024;
constexpr int64_t kManyPanels = 8;         // of weights: stay in L2 while latent rows stream through
constexpr int64_t kBytesAhead = 64 << 10;  // of weights, prefetched into L2
// Results of a module that exceed this are stored past the caches.  Of use on CPUs with tiles from where they leave L2 on;
// on others from where they leave all caches.
constexpr int64_t kStreamBytes = T2L_TILES ? 2 << 20 : 32 << 20;

// Latent rows packed into panels: those of one (side, rank) are consecutive, so that only its last panel is padded.
template <class WT>
struct LatentPanels {
  explicit LatentPanels(const HeadParams& p)
      : rows(p.tasks * p.layers),
        per_run((rows + kPanelRows - 1) / kPanelRows),
        size(panel_size<WT>(p.h)),
        data(p.sides * p.ranks * per_run * size) {}
  typename PanelOf<WT>::Element* at(int64_t run, int64_t panel) { return data.data + (run * per_run + panel) * size; }
  int64_t rows, per_run, size;
  Scratch<typename PanelOf<WT>::Element> data;
};

template <class WT>
inline void pack_latent(const HeadParams& p, LatentPanels<WT>& panels, ParallelFor parallel) {
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t run = item / panels.per_run, panel = item % panels.per_run;
      const WT* latent =
          static_cast<const WT*>(p.latent) + run / p.ranks * p.latent_stride[1] + run % p.ranks * p.latent_stride[2];
      const auto row = [&](int64_t i) {
        const int64_t r = min(panel * kPanelRows + i, panels.rows - 1);
        return latent + r / p.layers * p.latent_stride[0] + r % p.layers * p.latent_stride[3];
      };
      pack_panel<WT>(row, p.h, panels.at(run, panel));
    }
  };
  for_range(parallel, p.sides * p.ranks * panels.per_run, 4, body);
}

// Epilogue operands and output of one side, for one rank and from one column on.
template <class OT>
struct HeadTarget {
  HeadTarget(const HeadParams& params, int side_index, int64_t row, int64_t rank, int64_t column)
      : p(params), side(side_index), bias(p.bias ? p.bias + row : nullptr) {
    mul = start(p.mul[side], p.mul_stride[side], rank, column);
    plus = start(p.add[side], p.add_stride[side], rank, column);
    out = static_cast<OT*>(p.out[side]) + rank * p.out_stride[side][2] + column * p.out_stride[side][3];
    stream = kCanStream &&
             static_cast<int64_t>(sizeof(OT)) * p.tasks * p.layers * p.rank * (p.in + p.out_features) > kStreamBytes;
    contiguous = p.out_stride[side][3] == 1 && (!mul || p.mul_stride[side][2] == 1) && (!plus || p.add_stride[side][2] == 1);
  }
  static const float* start(const float* t, const int64_t* stride, int64_t rank, int64_t column) {
    return t ? t + rank * stride[1] + column * stride[2] : nullptr;
  }
  OT* row(int64_t task, int64_t layer) const { return out + task * p.out_stride[side][0] + layer * p.out_stride[side][1]; }

  const HeadParams& p;
  int side;
  const float* bias;
  const float* mul;
  const float* plus;
  OT* out;
  bool contiguous, stream;
};

// Epilogue of y[cols], from column `from` of the target on: bias, mul, add, scale, cast, store.  y is read in whole vectors.
template <class OT>
inline void head_epilogue(const HeadTarget<OT>& t, const float* y, int64_t task, int64_t layer, int64_t from, int64_t cols) {
  const int side = t.side;
  const int64_t mul_step = t.p.mul_stride[side][2], add_step = t.p.add_stride[side][2], out_step = t.p.out_stride[side][3];
  const float* bias = t.bias ? t.bias + from : nullptr;
  const float* mul = t.mul ? t.mul + layer * t.p.mul_stride[side][0] + from * mul_step : nullptr;
  const float* plus = t.plus ? t.plus + layer * t.p.add_stride[side][0] + from * add_step : nullptr;
  const float scale = t.p.scale[side];
  OT* out = t.row(task, layer) + from * out_step;
  if (!t.contiguous) {
    for (int64_t c = 0; c < cols; ++c) {
      float value = y[c];
      if (bias) value += bias[c];
      if (mul) value *= mul[c * mul_step];
      if (plus) value += plus[c * add_step];
      from_float(value * scale, out + c * out_step);
    }
    return;
  }
  const Vec scales = broadcast(scale);
  const auto finished = [&](int64_t c, int n) {
    Vec value = load(y + c);
    if (bias) value = add(value, load_up_to(bias + c, n));
    if (mul) value = multiply(value, load_up_to(mul + c, n));
    if (plus) value = add(value, load_up_to(plus + c, n));
    return multiply(value, scales);
  };
  int64_t c = 0;
  if (t.stream && is_line(out))
    for (; c + 2 * kLanes <= cols; c += 2 * kLanes) stream_pair(out + c, finished(c, kLanes), finished(c + kLanes, kLanes));
  for (; c < cols; c += kLanes) {
    const int n = static_cast<int>(min(kLanes, cols - c));
    store_as(out + c, finished(c, n), n);
  }
}

#if T2L_ISA_LEVEL == T2L_AVX512_BF16
// Epilogue of y[cols, kPanelRows], feature-major, without mul and add: rounded before the transpose, which then moves half
// the bytes.  `first`: the latent row of y[0, 0].
inline void transposed_epilogue(const HeadTarget<bf16>& t, const float* y, int64_t first, int64_t rows, int64_t cols) {
  const Vec scales = broadcast(t.p.scale[t.side]);
  bf16* out[kPanelRows];
  for (int64_t i = 0; i < rows; ++i) out[i] = t.row((first + i) / t.p.layers, (first + i) % t.p.layers);
  for (int64_t from = 0; from < cols; from += kPanelRows) {
    const int64_t n = min(kPanelRows, cols - from);
    __m512i pairs[kPanelRows], turned[kPanelRows];
    for (int64_t j = 0; j < kPanelRows; ++j) {
      const float* column = y + (from + min(j, n - 1)) * kPanelRows;  // beyond the last one: not stored
      Vec low = load(column), high = load(column + kLanes);
      if (t.bias) {
        const Vec bias = broadcast(t.bias[from + min(j, n - 1)]);
        low = add(low, bias);
        high = add(high, bias);
      }
      pairs[j] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(multiply(high, scales), multiply(low, scales)));
    }
    transpose_pairs(pairs, turned);
    const __mmask32 mask = n == kPanelRows ? ~0u : (1u << n) - 1;
    for (int64_t i = 0; i < rows; ++i) {
      bf16* target = out[i] + from;
      if (t.stream && n == kPanelRows && is_line(target))
        _mm512_stream_si512(reinterpret_cast<__m512i*>(target), turned[i]);
      else
        _mm512_mask_storeu_epi16(target, mask, turned[i]);
    }
  }
}
#endif

// Per-thread buffers: the product of a tile, its transpose, and what products need.
template <class WT>
struct HeadScratch {
  explicit HeadScratch(int64_t h) : scope(h), tile(kHeadCols * kPanelRows), transposed(kPanelRows * kHeadCols) {}
  MatmulScope<WT> scope;
  Scratch<float> tile, transposed;
};

// Weight rows [row, row + cols), columns [column, column + cols) of one side, times all latent rows of that side.  A latent
// row covers rank / ranks ranks; `p_rank` is the rank within these.
template <class WT, class OT>
inline void head_tile(const HeadParams& p, LatentPanels<WT>& panels, int side, int64_t row, int64_t p_rank, int64_t column,
                      int64_t cols, HeadScratch<WT>& s) {
  const WT* weight = static_cast<const WT*>(p.weight) + row * p.h;
  const bool again = side == 1 && p.sides == 2 && column < p.in;  // read just before, for the other side
  s.scope.expect(again ? nullptr : reinterpret_cast<const char*>(weight) + kBytesAhead);
  for (int64_t k = 0; k < p.ranks; ++k) {
    const HeadTarget<OT> target(p, side, row, k * (p.rank / p.ranks) + p_rank, column);
    const int64_t run = (p.sides == 2 ? side : 0) * p.ranks + k;
    for (int64_t panel = 0; panel < panels.per_run; ++panel) {
      const int64_t first = panel * kPanelRows, last = min(first + kPanelRows, panels.rows);
      if (target.contiguous && !target.stream)  // prefetch the output cache lines for writing
        for (int64_t i = first; i < last; ++i)
          for (int64_t c = 0; c < cols; c += kCacheLine / sizeof(OT))
            __builtin_prefetch(target.row(i / p.layers, i % p.layers) + c, 1, 2);
      matmul_panel<Keep::panel>(s.scope, panels.at(run, panel), weight, cols, p.h, s.tile.data);
      s.scope.expect(nullptr);
#if T2L_ISA_LEVEL == T2L_AVX512_BF16
      if constexpr (sizeof(OT) == sizeof(bf16))
        if (target.contiguous && !target.mul && !target.plus) {
          transposed_epilogue(target, s.tile.data, first, last - first, cols);
          continue;
        }
#endif
      transpose(s.tile.data, kPanelRows, cols, kPanelRows, s.transposed.data, kHeadCols);
      int64_t task = first / p.layers, layer = first % p.layers;
      for (int64_t i = first; i < last; ++i) {
        head_epilogue(target, s.transposed.data + (i - first) * kHeadCols, task, layer, 0, cols);
        if (++layer == p.layers) layer = 0, ++task;
      }
    }
  }
}

// Latent rows one behind the other: those of one (side, rank) are consecutive.
template <class WT>
struct LatentRows {
  explicit LatentRows(const HeadParams& p) : rows(p.tasks * p.layers), size(rows * p.h), data(p.sides * p.ranks * size) {}
  WT* at(int64_t run, int64_t row, int64_t h) { return data.data + run * size + row * h; }
  int64_t rows, size;
  Scratch<WT> data;
};

template <class WT>
inline void copy_latent(const HeadParams& p, LatentRows<WT>& latents, ParallelFor parallel) {
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t run = item / p.tasks, task = item % p.tasks;
      const WT* latent = static_cast<const WT*>(p.latent) + task * p.latent_stride[0] + run / p.ranks * p.latent_stride[1] +
                         run % p.ranks * p.latent_stride[2];
      for (int64_t layer = 0; layer < p.layers; ++layer)
        std::memcpy(latents.at(run, task * p.layers + layer, p.h), latent + layer * p.latent_stride[3], p.h * sizeof(WT));
    }
  };
  for_range(parallel, p.sides * p.ranks * p.tasks, 8, body);
}

template <class WT>
struct ManyScratch {
  explicit ManyScratch(int64_t h)
      : scope(h), size(panel_size<WT>(h)), panels(kManyPanels * size), block(kManyPanels * kPanelRows * kPanelRows) {}
  MatmulScope<WT> scope;
  int64_t size;
  Scratch<typename PanelOf<WT>::Element> panels;
  Scratch<float> block;
};

// As head_tile, for up to kManyPanels * kPanelRows weight rows.  The same bits: products of two numbers commute.
template <class WT, class OT>
inline void head_tile_many(const HeadParams& p, LatentRows<WT>& latents, int side, int64_t row, int64_t p_rank,
                           int64_t column, int64_t cols, ManyScratch<WT>& s) {
  const WT* weight = static_cast<const WT*>(p.weight) + row * p.h;
  const int64_t panels = (cols + kPanelRows - 1) / kPanelRows;
  for (int64_t i = 0; i < panels; ++i)
    pack_panel<WT>([&](int64_t c) { return weight + min(i * kPanelRows + c, cols - 1) * p.h; }, p.h,
                   s.panels.data + i * s.size);
  for (int64_t k = 0; k < p.ranks; ++k) {
    const HeadTarget<OT> target(p, side, row, k * (p.rank / p.ranks) + p_rank, column);
    const int64_t run = (p.sides == 2 ? side : 0) * p.ranks + k;
    int64_t task = 0, layer = 0;
    for (int64_t first = 0; first < latents.rows; first += kPanelRows) {
      const int64_t count = min(kPanelRows, latents.rows - first);
      for (int64_t i = 0; i < panels; ++i)
        matmul_panel<Keep::weights>(s.scope, s.panels.data + i * s.size, latents.at(run, first, p.h), count, p.h,
                                    s.block.data + i * kPanelRows * kPanelRows);
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t i = 0; i < panels; ++i)
          head_epilogue(target, s.block.data + (i * kPanelRows + r) * kPanelRows, task, layer, i * kPanelRows,
                        min(kPanelRows, cols - i * kPanelRows));
        if (++layer == p.layers) layer = 0, ++task;
      }
    }
  }
}

// Calls tile(scratch, side, row, p_rank, column, cols) for all weight rows, `width` at a time at most.  Sides that share
// their weights take turns, so that one of them finds these in the cache.
template <class S, class F>
inline void for_head_tiles(const HeadParams& p, int64_t width, ParallelFor parallel, const F& tile) {
  const bool shared = p.sides == 2;
  const int64_t per_latent = p.rank / p.ranks;
  const int64_t size[2] = {p.in, p.out_features};
  const int64_t wider = p.in > p.out_features ? p.in : p.out_features;
  const int64_t tiles[2] = {(p.in + width - 1) / width, (p.out_features + width - 1) / width};
  const int64_t all = tiles[0] + tiles[1], both = min(tiles[0], tiles[1]);
  const int wider_side = tiles[1] > tiles[0];
  auto body = [&](int64_t begin, int64_t end) {
    S scratch(p.h);
    for (int64_t item = begin; item < end; ++item) {
      int side;
      int64_t p_rank, column;
      if (shared) {
        const int64_t i = item % all;
        p_rank = item / all;
        side = i < 2 * both ? i % 2 : wider_side;
        column = (i < 2 * both ? i / 2 : i - both) * width;
      } else {
        side = item >= per_latent * tiles[0];
        const int64_t local = item - (side ? per_latent * tiles[0] : 0);
        p_rank = local / tiles[side];
        column = local % tiles[side] * width;
      }
      const int64_t row = (side && !shared ? per_latent * p.in : 0) + p_rank * (shared ? wider : size[side]) + column;
      tile(scratch, side, row, p_rank, column, min(width, size[side] - column));
    }
    end_streams();
  };
  for_range(parallel, per_latent * all, 1, body);
}

template <class WT, class OT>
inline void head_typed(const HeadParams& p, ParallelFor parallel) {
  if (p.tasks == 0 || p.layers == 0) return;
  if constexpr (kPacksWeights) {
    if (p.tasks * p.layers >= kManyRows) {
      LatentRows<WT> latents(p);
      copy_latent(p, latents, parallel);
      for_head_tiles<ManyScratch<WT>>(p, kManyPanels * kPanelRows, parallel, [&](auto& scratch, auto... tile) {
        head_tile_many<WT, OT>(p, latents, tile..., scratch);
      });
      return;
    }
  }
  LatentPanels<WT> panels(p);
  pack_latent(p, panels, parallel);
  for_head_tiles<HeadScratch<WT>>(p, kHeadCols, parallel,
                                  [&](auto& scratch, auto... tile) { head_tile<WT, OT>(p, panels, tile..., scratch); });
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
