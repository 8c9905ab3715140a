// Hypernetwork heads of all modules in one launch: every weight row times all latent rows, bias, mul, add, scale, cast, and
// the results where A and B belong.
//
// Weights are the large operand, and stand on the 16-row side of the products.  A block owns a run of weight tiles and
// streams them through a ring of stages in shared memory by asynchronous copies; the ring goes on across tiles and modules,
// so it runs empty once, at the end.  Latent rows travel with them, from L2.  Sums stay in registers over the whole depth,
// in order, so bits do not depend on tiles or batch.
//
// A tile's weight rows are permuted on their way into shared memory, such that each lane ends with a run of consecutive
// ones: results are then stored in whole sectors straight from registers.
#pragma once
#include "config.h"
#include "fragments.cuh"

namespace t2l::device {

using cuda::kHeadStages;
using cuda::kHeadTile;
using cuda::kStageBytes;
using cuda::kThreads;

struct HeadLaunch {
  HeadParams module[cuda::kMaxGroup];
  int count;
  cuda::HeadConfig config;
};

constexpr int kBlockBytes = 64;  // of a row: what one step of the products reads
constexpr int kWarpsAcross = 4;  // warps along the weight rows; the other two split the latent rows
constexpr int kMTiles = kHeadTile / (16 * kWarpsAcross);
constexpr int kRun = 2 * kMTiles;  // consecutive weight rows a lane ends with

// Where weight row `row` of a tile stands in shared memory: lane g's run of kRun rows becomes rows g and g + 8 of its
// products.
T2L_DEVICE int place_of(int row) {
  const int group = row / (16 * kMTiles), inside = row % (16 * kMTiles);
  const int g = inside / kRun, i = inside % kRun;
  return group * (16 * kMTiles) + i / 2 * 16 + i % 2 * 8 + g;
}

// Position in a block's work: tiles, for each the latent tiles, for each the depth.
struct HeadCursor {
  int tile;  // over all modules
  int module, latent_tile, step;
};

T2L_DEVICE int width_of(const HeadParams& p, int side) { return static_cast<int>(side ? p.out_features : p.in); }
T2L_DEVICE int stored_width(const HeadParams& p) { return static_cast<int>(cuda::greater(p.in, p.out_features)); }
T2L_DEVICE int side_of(const HeadLaunch& launch, const HeadCursor& at) {
  return launch.module[at.module].sides == 2 && at.latent_tile >= launch.config.latent_tiles / 2;
}

// The shared heads (two sides) hold max(in, out) rows for every rank: the narrower side leaves some out.
T2L_DEVICE bool has_columns(const HeadLaunch& launch, const HeadCursor& at) {
  const HeadParams& p = launch.module[at.module];
  if (p.sides == 1) return true;
  const int stored = stored_width(p), first = (at.tile - launch.config.first_tile[at.module]) * kHeadTile % stored;
  return first < width_of(p, side_of(launch, at)) ||
         first + kHeadTile > stored;  // a column in use, or the next rank's first
}

T2L_DEVICE void find_module(const HeadLaunch& launch, HeadCursor* at) {
  while (at->module + 1 < launch.count && at->tile >= launch.config.first_tile[at->module + 1]) ++at->module;
}

T2L_DEVICE void skip_empty(const HeadLaunch& launch, int end, HeadCursor* at) {
  while (at->tile < end && !has_columns(launch, *at)) {
    if (++at->latent_tile < launch.config.latent_tiles) continue;
    at->latent_tile = 0;
    ++at->tile;
    find_module(launch, at);
  }
}

T2L_DEVICE void advance(const HeadLaunch& launch, int end, HeadCursor* at) {
  if (++at->step < launch.config.depth_steps) return;
  at->step = 0;
  if (++at->latent_tile == launch.config.latent_tiles) {
    at->latent_tile = 0;
    ++at->tile;
    find_module(launch, at);
  }
  skip_empty(launch, end, at);
}

struct alignas(16) LatentRow {
  int task, rank, layer;
  int inside;  // whether there is such a row
};
T2L_DEVICE LatentRow latent_row(const HeadLaunch& launch, const HeadCursor& at, int row) {
  const HeadParams& p = launch.module[at.module];
  const int layers = static_cast<int>(p.layers), ranks = static_cast<int>(p.ranks), rest = row / layers;
  return LatentRow{rest / ranks, rest % ranks, row % layers, row < launch.config.latent_rows};
}
// First row of a latent tile, counted in its side.
T2L_DEVICE int first_latent(const HeadLaunch& launch, const HeadCursor& at, int rows) {
  const int sides = static_cast<int>(launch.module[at.module].sides), tiles_a_side = launch.config.latent_tiles / sides;
  return (at.latent_tile - side_of(launch, at) * tiles_a_side) * rows;
}

// ---- from memory into the ring

constexpr int kQuads = kStageBytes / 16;       // of a row and a stage
constexpr int kRowsAPass = kThreads / kQuads;  // rows that the block copies at once
constexpr int kQuadsOfBlock = kBlockBytes / 16;

// Where 16 bytes of a row stand in a stage: rows of the second 64 bytes change places in pairs, so that the 128 bytes of a
// row are written to all banks.
T2L_DEVICE int stage_offset(int rows, int row, int quad) {
  const int block = quad / kQuadsOfBlock;
  return (block * rows + (row ^ block)) * kBlockBytes + quad % kQuadsOfBlock * 16;
}

// What a thread copies of a tile, in passes of kRowsAPass rows; found once a tile, so that a stage is little but copies.
template <class T, int kLatentRows>
struct HeadSource {
  static constexpr int kLatentPasses = kLatentRows / kRowsAPass;
  const char* weight;                 // its row of the first pass
  const char* latent[kLatentPasses];  // null: no such row
  int rows_left, row_bytes;

  T2L_DEVICE void find(const HeadLaunch& launch, const HeadCursor& at) {
    const HeadParams& p = launch.module[at.module];
    const int row = thread_index() / kQuads;
    const int weight_row = (at.tile - launch.config.first_tile[at.module]) * kHeadTile + row;
    row_bytes = static_cast<int>(p.h * static_cast<int64_t>(sizeof(T)));
    rows_left = launch.config.rows[at.module] - weight_row;
    weight = static_cast<const char*>(p.weight) + int64_t{weight_row} * row_bytes;
#pragma unroll
    for (int i = 0; i < kLatentPasses; ++i) {
      const LatentRow r = latent_row(launch, at, first_latent(launch, at, kLatentRows) + row + i * kRowsAPass);
      const int64_t offset = r.task * p.latent_stride[0] + side_of(launch, at) * p.latent_stride[1] +
                             r.rank * p.latent_stride[2] + r.layer * p.latent_stride[3];
      latent[i] = r.inside ? static_cast<const char*>(p.latent) + offset * static_cast<int64_t>(sizeof(T)) : nullptr;
    }
  }
};

// One stage: kStageBytes of every weight row of the tile, then of every latent row.
template <class T, int kLatentRows>
T2L_DEVICE void load_stage(const HeadSource<T, kLatentRows>& from, bool aligned, int step, char* stage) {
  const int row = thread_index() / kQuads, quad = thread_index() % kQuads, k = step * kStageBytes + quad * 16;
  char* weights = stage + stage_offset(kHeadTile, place_of(row), quad);
  char* latents = stage + kHeadTile * kStageBytes + stage_offset(kLatentRows, row, quad);
  if (aligned) {
    const int left = from.row_bytes - k, valid = left < 0 ? 0 : left < 16 ? left : 16;
#pragma unroll
    for (int i = 0; i < kHeadTile / kRowsAPass; ++i) {  // a pass is a multiple of what place_of() permutes
      const bool inside = i * kRowsAPass < from.rows_left && valid > 0;
      copy_async(weights + i * kRowsAPass * kBlockBytes,
                 inside ? from.weight + int64_t{i} * kRowsAPass * from.row_bytes + k : from.weight, inside ? valid : 0);
    }
#pragma unroll
    for (int i = 0; i < kLatentRows / kRowsAPass; ++i) {
      const bool inside = from.latent[i] && valid > 0;
      copy_async(latents + i * kRowsAPass * kBlockBytes, inside ? from.latent[i] + k : from.weight, inside ? valid : 0);
    }
    return;
  }
  constexpr int kSize = static_cast<int>(sizeof(T));
  const auto put = [&](char* target, const char* source) {
    *reinterpret_cast<Quad*>(target) =
        source ? load_features(reinterpret_cast<const T*>(source), k / kSize, from.row_bytes / kSize, false) : zero_quad();
  };
#pragma unroll 1
  for (int i = 0; i < kHeadTile / kRowsAPass; ++i)
    put(weights + i * kRowsAPass * kBlockBytes,
        i * kRowsAPass < from.rows_left ? from.weight + int64_t{i} * kRowsAPass * from.row_bytes : nullptr);
#pragma unroll
  for (int i = 0; i < kLatentRows / kRowsAPass; ++i) put(latents + i * kRowsAPass * kBlockBytes, from.latent[i]);
}

// ---- products

template <int NT>
using HeadSums = float[kMTiles][NT][4];

template <class T, int NT>
T2L_DEVICE void multiply_stage(const char* stage, HeadSums<NT>& sum) {
  constexpr int kLatentRows = 16 * NT;
  const int g = lane_index() / 4, t = lane_index() % 4;
  const int across = warp_index() % kWarpsAcross, along = warp_index() / kWarpsAcross;
#pragma unroll(sizeof(T) == 4 ? 1 : 2)  // float32 operands are split in registers
  for (int block = 0; block < kStageBytes / kBlockBytes; ++block) {
    const int quad = block * kQuadsOfBlock + t;
    const char* weights = stage + stage_offset(kHeadTile, across * 16 * kMTiles + g, quad);
    const char* latents = stage + kHeadTile * kStageBytes + stage_offset(kLatentRows, along * 8 * NT + g, quad);
    Quad left[kMTiles][2];
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        left[mt][half] = *reinterpret_cast<const Quad*>(weights + (16 * mt + 8 * half) * kBlockBytes);
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      const Quad right = *reinterpret_cast<const Quad*>(latents + 8 * nt * kBlockBytes);
#pragma unroll
      for (int mt = 0; mt < kMTiles; ++mt) multiply_quads(sum[mt][nt], left[mt][0], left[mt][1], right, T());
    }
  }
}

// ---- from registers to A and B

// What a weight row gives: column `column` of rank `rank` of a side, counted in its latent's ranks.
struct HeadColumn {
  int side, rank, column;
};
T2L_DEVICE HeadColumn head_column(const HeadParams& p, int per_latent, int row, int side) {
  if (p.sides == 2) return HeadColumn{side, row / stored_width(p), row % stored_width(p)};
  const int in = width_of(p, 0), out = width_of(p, 1), rows_of_a = per_latent * in;
  if (row < rows_of_a) return HeadColumn{0, row / in, row % in};
  return HeadColumn{1, (row - rows_of_a) / out, (row - rows_of_a) % out};
}

// Where an array with strides (layer, rank, column) has what belongs to a weight row, for latent row (0, 0, 0).
T2L_DEVICE const float* offset_of(const float* data, const int64_t (&stride)[3], const HeadColumn& at) {
  return data ? data + at.rank * stride[1] + at.column * stride[2] : nullptr;
}

// kRun values for one latent row, in the columns from `at` on.
T2L_DEVICE void store_run(char* out, int64_t column_stride, DType type, const float (&v)[kRun]) {
  static_assert(kRun == 4, "two words of 16-bit numbers, four of float32");
  const uintptr_t address = reinterpret_cast<uintptr_t>(out);
  if (column_stride == 1) {
    if (type == DType::f32 && address % 16 == 0) return store_quad(out, pack(v, float()));
    if (type == DType::bf16 && address % 8 == 0)
      return store_one(reinterpret_cast<Pair*>(out), Pair{{pack_two(v[0], v[1], bf16()), pack_two(v[2], v[3], bf16())}});
    if (type == DType::f16 && address % 8 == 0)
      return store_one(reinterpret_cast<Pair*>(out), Pair{{pack_two(v[0], v[1], f16()), pack_two(v[2], v[3], f16())}});
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) store_float(out, i * column_stride, type, v[i]);
}

// Sums of a tile: kRun consecutive weight rows a lane, for each of its latent rows.
template <int NT>
T2L_DEVICE void finish_tile(const HeadLaunch& launch, const HeadCursor& at, const LatentRow* rows, const HeadSums<NT>& sum) {
  const HeadParams& p = launch.module[at.module];
  const int g = lane_index() / 4, t = lane_index() % 4;
  const int across = warp_index() % kWarpsAcross, along = warp_index() / kWarpsAcross;
  const int weight_rows = launch.config.rows[at.module], side = side_of(launch, at);
  const int first_row = (at.tile - launch.config.first_tile[at.module]) * kHeadTile + across * 16 * kMTiles + g * kRun;
  const int per_latent = launch.config.per_latent;
  const LatentRow* mine = rows + along * 8 * NT + 2 * t;
  if (first_row >= weight_rows) return;
  const HeadColumn column = head_column(p, per_latent, first_row, side);
  if (first_row + kRun <= weight_rows && column.column + kRun <= width_of(p, column.side)) {  // in one row of A or B
    const int s = column.side;
    const int64_t size = cuda::bytes_of(p.out_type);
    char* out =
        static_cast<char*>(p.out[s]) + (column.rank * p.out_stride[s][2] + column.column * p.out_stride[s][3]) * size;
    const float* mul = offset_of(p.mul[s], p.mul_stride[s], column);
    const float* add = offset_of(p.add[s], p.add_stride[s], column);
    float bias[kRun];
#pragma unroll
    for (int i = 0; i < kRun; ++i) bias[i] = p.bias ? load_one(p.bias + first_row + i) : 0.0f;
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const LatentRow r = mine[8 * nt + j];
        if (!r.inside) continue;
        const int rank = r.rank * per_latent;
        float v[kRun];
#pragma unroll
        for (int i = 0; i < kRun; ++i) v[i] = sum[i / 2][nt][i % 2 * 2 + j] + bias[i];
        if (mul) {
          const float* from = mul + r.layer * p.mul_stride[s][0] + rank * p.mul_stride[s][1];
#pragma unroll
          for (int i = 0; i < kRun; ++i) v[i] *= load_one(from + i * p.mul_stride[s][2]);
        }
        if (add) {
          const float* from = add + r.layer * p.add_stride[s][0] + rank * p.add_stride[s][1];
#pragma unroll
          for (int i = 0; i < kRun; ++i) v[i] += load_one(from + i * p.add_stride[s][2]);
        }
#pragma unroll
        for (int i = 0; i < kRun; ++i) v[i] *= p.scale[s];
        const int64_t offset = r.task * p.out_stride[s][0] + r.layer * p.out_stride[s][1] + rank * p.out_stride[s][2];
        store_run(out + offset * size, p.out_stride[s][3], p.out_type, v);
      }
    return;
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) {  // over the end of a row, or of the weights
    if (first_row + i >= weight_rows) continue;
    const HeadColumn here = head_column(p, per_latent, first_row + i, side);
    const int s = here.side;
    if (here.column >= width_of(p, s)) continue;
    const float* mul = offset_of(p.mul[s], p.mul_stride[s], here);
    const float* add = offset_of(p.add[s], p.add_stride[s], here);
    const float bias = p.bias ? load_one(p.bias + first_row + i) : 0.0f;
    const int64_t base = here.rank * p.out_stride[s][2] + here.column * p.out_stride[s][3];
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const LatentRow r = mine[8 * nt + j];
        if (!r.inside) continue;
        const int rank = r.rank * per_latent;
        float v = sum[i / 2][nt][i % 2 * 2 + j] + bias;
        if (mul) v *= load_one(mul + r.layer * p.mul_stride[s][0] + rank * p.mul_stride[s][1]);
        if (add) v += load_one(add + r.layer * p.add_stride[s][0] + rank * p.add_stride[s][1]);
        const int64_t offset = r.task * p.out_stride[s][0] + r.layer * p.out_stride[s][1] + rank * p.out_stride[s][2];
        store_float(p.out[s], base + offset, p.out_type, v * p.scale[s]);
      }
  }
}

template <class T, int NT>
T2L_KERNEL(kThreads, NT > 4 || sizeof(T) == 4 ? 1 : 2)
head_kernel(T2L_ARGUMENT(HeadLaunch) launch) {
  const cuda::HeadConfig& c = launch.config;
  constexpr int kLatentRows = 16 * NT;
  constexpr int64_t kStage = (kHeadTile + kLatentRows) * kStageBytes;
  SharedMemory shared;
  char* stages = shared.take<char>(kHeadStages * kStage);
  LatentRow* rows = shared.take<LatentRow>(kLatentRows);  // of the latent tile that was finished last
  const int64_t tiles = c.first_tile[launch.count];
  const int end = static_cast<int>((block_index_x() + 1) * tiles / c.blocks);
  HeadCursor load{static_cast<int>(block_index_x() * tiles / c.blocks), 0, 0, 0};
  find_module(launch, &load);
  skip_empty(launch, end, &load);
  HeadCursor work = load;
  HeadSource<T, kLatentRows> source;
  int load_slot = 0, work_slot = 0, finished_latents = -1;
  const auto load_next = [&] {
    if (load.tile < end) {
      if (load.step == 0) source.find(launch, load);
      load_stage<T, kLatentRows>(source, c.aligned, load.step, stages + load_slot * kStage);
      advance(launch, end, &load);
    }
    commit_copies();  // an empty group too: what is waited for is counted in groups
    load_slot = load_slot + 1 == kHeadStages ? 0 : load_slot + 1;
  };
#pragma unroll 1
  for (int i = 0; i < kHeadStages - 1; ++i) load_next();
  HeadSums<NT> sum = {};
  while (work.tile < end) {
    wait_for_copies<kHeadStages - 2>();
    block_barrier();  // this stage is there for all, and the one before it is free
    load_next();
    multiply_stage<T, NT>(stages + work_slot * kStage, sum);
    work_slot = work_slot + 1 == kHeadStages ? 0 : work_slot + 1;
    if (work.step + 1 == c.depth_steps) {
      if (work.latent_tile != finished_latents) {  // their last readers are behind the barrier above
        finished_latents = work.latent_tile;
        for (int i = thread_index(); i < kLatentRows; i += kThreads)
          rows[i] = latent_row(launch, work, first_latent(launch, work, kLatentRows) + i);
        block_barrier();
      }
      finish_tile<NT>(launch, work, rows, sum);
#pragma unroll
      for (int mt = 0; mt < kMTiles; ++mt)
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[mt][nt][i] = 0.0f;
    }
    advance(launch, end, &work);
  }
  wait_for_copies<0>();
}

}  // namespace t2l::device
