// Hypernetwork heads of all modules as one grouped GEMM, weights x latents^T, with a fused epilogue (bias, mul, add, scale,
// cast) that scatters the results to A and B.
//
// Persistent kernel: a block owns consecutive weight tiles (the M side) and streams them through a multistage cp.async
// pipeline, which continues across tiles and modules and drains once, at the end.  Latent tiles (the N side) come with them,
// from L2; where there are several and shared memory has room, the weights of a tile are loaded with the first and stay.
// There is no split-K and K is reduced in order, so bits do not depend on tiling or batch.
//
// Weight rows are permuted when they are copied to shared memory, so that the accumulators of a lane are consecutive rows:
// the epilogue stores whole 32-byte sectors from registers.
#pragma once
#include "config.h"
#include "fragments.cuh"

namespace t2l::device {

using cuda::kHeadStages;
using cuda::kHeadTile;
using cuda::kThreads;
using cuda::kTileRowBytes;

struct HeadLaunch {
  HeadParams module[cuda::kMaxGroup];
  int count;
  cuda::HeadConfig config;
};

constexpr int kKBlockBytes = 64;  // of a row
constexpr int kWarpsM = 4;        // warps along the weight rows (M); two along the latent rows (N)
constexpr int kMTiles = kHeadTile / (16 * kWarpsM);
constexpr int kRowsPerLane = 2 * kMTiles;  // consecutive weight rows of a lane's accumulators

// Permuted position of weight row `row` of a tile in shared memory: the kRowsPerLane rows of lane g become rows g and g + 8
// of its MMA tiles.
T2L_DEVICE int smem_row_of(int row) {
  const int group = row / (16 * kMTiles), local = row % (16 * kMTiles);
  const int g = local / kRowsPerLane, i = local % kRowsPerLane;
  return group * (16 * kMTiles) + i / 2 * 16 + i % 2 * 8 + g;
}

// Position in the loop nest of a block: weight tiles, latent tiles, k-tiles.
struct HeadCursor {
  int tile;  // weight tile, counted over all modules
  int module, latent_tile, k_tile;
};

T2L_DEVICE int width_of(const HeadParams& p, int side) { return static_cast<int>(side ? p.out_features : p.in); }
T2L_DEVICE int stored_width(const HeadParams& p) { return static_cast<int>(cuda::max(p.in, p.out_features)); }
T2L_DEVICE int side_of(const HeadLaunch& launch, const HeadCursor& at) {
  return launch.module[at.module].sides == 2 && at.latent_tile >= launch.config.latent_tiles / 2;
}

// Whether a tile has outputs.  Heads shared by both sides store max(in, out) rows per rank, some unused by the narrower
// side.
T2L_DEVICE bool has_columns(const HeadLaunch& launch, const HeadCursor& at) {
  const HeadParams& p = launch.module[at.module];
  if (p.sides == 1) return true;
  const int stored = stored_width(p), first = (at.tile - launch.config.first_tile[at.module]) * kHeadTile % stored;
  return first < width_of(p, side_of(launch, at)) ||
         first + kHeadTile > stored;  // the latter: the tile reaches the next rank
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
  if (++at->k_tile < launch.config.k_tiles) return;
  at->k_tile = 0;
  if (++at->latent_tile == launch.config.latent_tiles) {
    at->latent_tile = 0;
    ++at->tile;
    find_module(launch, at);
  }
  skip_empty(launch, end, at);
}

struct alignas(16) LatentRow {
  int task, rank, layer;
  int valid;  // 0: padding of the last tile
};
T2L_DEVICE LatentRow latent_row(const HeadLaunch& launch, const HeadCursor& at, int row) {
  const HeadParams& p = launch.module[at.module];
  const int layers = static_cast<int>(p.layers), ranks = static_cast<int>(p.ranks), rest = row / layers;
  return LatentRow{rest / ranks, rest % ranks, row % layers, row < launch.config.latent_rows};
}
// First row of a latent tile within its side.
T2L_DEVICE int first_latent(const HeadLaunch& launch, const HeadCursor& at, int rows) {
  const int sides = static_cast<int>(launch.module[at.module].sides), tiles_per_side = launch.config.latent_tiles / sides;
  return (at.latent_tile - side_of(launch, at) * tiles_per_side) * rows;
}

// ---- producer: global memory to a pipeline stage

constexpr int kQuadsPerRow = kTileRowBytes / 16;       // per stage
constexpr int kRowsPerPass = kThreads / kQuadsPerRow;  // rows copied by one cp.async of every thread
constexpr int kQuadsPerKBlock = kKBlockBytes / 16;

// Offset of a 16-byte quad in a stage, laid out [k-block, row, 64 bytes].  XOR swizzle of the second k-block: the 128 bytes
// of a row are stored to all 32 banks, without bank conflicts.
T2L_DEVICE int stage_offset(int rows, int row, int quad) {
  const int k_block = quad / kQuadsPerKBlock;
  return (k_block * rows + (row ^ k_block)) * kKBlockBytes + quad % kQuadsPerKBlock * 16;
}

// Source addresses of a thread's copies, in passes of kRowsPerPass rows.  Computed once per tile, not per stage: the kernel
// would otherwise be bound by instruction issue.
template <class T, int kLatentRows>
struct HeadSource {
  static constexpr int kLatentPasses = kLatentRows / kRowsPerPass;
  const char* weight;                 // row of the first pass
  const char* latent[kLatentPasses];  // null: padding
  int rows_left, row_bytes;

  T2L_DEVICE void find(const HeadLaunch& launch, const HeadCursor& at) {
    const HeadParams& p = launch.module[at.module];
    const int row = thread_index() / kQuadsPerRow;
    const int weight_row = (at.tile - launch.config.first_tile[at.module]) * kHeadTile + row;
    row_bytes = static_cast<int>(p.h * static_cast<int64_t>(sizeof(T)));
    rows_left = launch.config.rows[at.module] - weight_row;
    weight = static_cast<const char*>(p.weight) + int64_t{weight_row} * row_bytes;
#pragma unroll
    for (int i = 0; i < kLatentPasses; ++i) {
      const LatentRow r = latent_row(launch, at, first_latent(launch, at, kLatentRows) + row + i * kRowsPerPass);
      const int64_t offset = r.task * p.latent_stride[0] + side_of(launch, at) * p.latent_stride[1] +
                             r.rank * p.latent_stride[2] + r.layer * p.latent_stride[3];
      latent[i] = r.valid ? static_cast<const char*>(p.latent) + offset * static_cast<int64_t>(sizeof(T)) : nullptr;
    }
  }
};

// Copies one k-tile of all weight rows of the tile, unless `weights` is null, and of all latent rows.
template <class T, int kLatentRows>
T2L_DEVICE void load_stage(const HeadSource<T, kLatentRows>& from, bool aligned, int k_tile, char* weights, char* latents) {
  const int row = thread_index() / kQuadsPerRow, quad = thread_index() % kQuadsPerRow,
            k = k_tile * kTileRowBytes + quad * 16;
  const auto to_weights = stage_offset(kHeadTile, smem_row_of(row), quad);
  char* to_latents = latents + stage_offset(kLatentRows, row, quad);
  if (aligned) {
    const int left = from.row_bytes - k, valid = left < 0 ? 0 : left < 16 ? left : 16;
    if (weights) {
#pragma unroll
      for (int i = 0; i < kHeadTile / kRowsPerPass; ++i) {  // smem_row_of() permutes within a pass
        const bool in_range = i * kRowsPerPass < from.rows_left && valid > 0;
        copy_async(weights + to_weights + i * kRowsPerPass * kKBlockBytes,
                   in_range ? from.weight + int64_t{i} * kRowsPerPass * from.row_bytes + k : from.weight,
                   in_range ? valid : 0);
      }
    }
#pragma unroll
    for (int i = 0; i < kLatentRows / kRowsPerPass; ++i) {
      const bool in_range = from.latent[i] && valid > 0;
      copy_async(to_latents + i * kRowsPerPass * kKBlockBytes, in_range ? from.latent[i] + k : from.weight,
                 in_range ? valid : 0);
    }
    return;
  }
  constexpr int kSize = static_cast<int>(sizeof(T));
  const auto copy_unaligned = [&](char* target, const char* source) {
    *reinterpret_cast<Quad*>(target) =
        source ? load_features(reinterpret_cast<const T*>(source), k / kSize, from.row_bytes / kSize, false) : zero_quad();
  };
#pragma unroll 1
  for (int i = 0; weights && i < kHeadTile / kRowsPerPass; ++i)
    copy_unaligned(weights + to_weights + i * kRowsPerPass * kKBlockBytes,
                   i * kRowsPerPass < from.rows_left ? from.weight + int64_t{i} * kRowsPerPass * from.row_bytes : nullptr);
#pragma unroll
  for (int i = 0; i < kLatentRows / kRowsPerPass; ++i)
    copy_unaligned(to_latents + i * kRowsPerPass * kKBlockBytes, from.latent[i]);
}

// ---- consumer: MMA

template <int NT>
using HeadAccumulators = float[kMTiles][NT][4];

template <class T, int NT>
T2L_DEVICE void multiply_stage(const char* weights, const char* latents, HeadAccumulators<NT>& accum) {
  constexpr int kLatentRows = 16 * NT;
  const int g = lane_index() / 4, t = lane_index() % 4;
  const int warp_m = warp_index() % kWarpsM, warp_n = warp_index() / kWarpsM;
#pragma unroll(sizeof(T) == 4 ? 1 : 2)  // float32 operands are split in registers
  for (int k_block = 0; k_block < kTileRowBytes / kKBlockBytes; ++k_block) {
    const int quad = k_block * kQuadsPerKBlock + t;
    const char* left_rows = weights + stage_offset(kHeadTile, warp_m * 16 * kMTiles + g, quad);
    const char* right_rows = latents + stage_offset(kLatentRows, warp_n * 8 * NT + g, quad);
    Quad left[kMTiles][2];
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        left[mt][half] = *reinterpret_cast<const Quad*>(left_rows + (16 * mt + 8 * half) * kKBlockBytes);
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      const Quad right = *reinterpret_cast<const Quad*>(right_rows + 8 * nt * kKBlockBytes);
#pragma unroll
      for (int mt = 0; mt < kMTiles; ++mt) multiply_quads(accum[mt][nt], left[mt][0], left[mt][1], right, T());
    }
  }
}

// ---- epilogue: registers to A and B

// Output of a weight row: a column of A or B, and the rank within those of its latent row.
struct HeadColumn {
  int side, rank, column;
};
T2L_DEVICE HeadColumn head_column(const HeadParams& p, int per_latent, int row, int side) {
  if (p.sides == 2) return HeadColumn{side, row / stored_width(p), row % stored_width(p)};
  const int in = width_of(p, 0), out = width_of(p, 1), rows_of_a = per_latent * in;
  if (row < rows_of_a) return HeadColumn{0, row / in, row % in};
  return HeadColumn{1, (row - rows_of_a) / out, (row - rows_of_a) % out};
}

// Base address of mul or add, strides (layer, rank, column), for the outputs of a weight row.
T2L_DEVICE const float* epilogue_operand(const float* data, const int64_t (&stride)[3], const HeadColumn& at) {
  return data ? data + at.rank * stride[1] + at.column * stride[2] : nullptr;
}

// Stores kRowsPerLane columns of one latent row, as one vector store where alignment allows.
T2L_DEVICE void store_lane_rows(char* out, int64_t column_stride, DType type, const float (&v)[kRowsPerLane]) {
  static_assert(kRowsPerLane == 4, "a 64-bit store of 16-bit outputs, a 128-bit one of float32");
  const uintptr_t address = reinterpret_cast<uintptr_t>(out);
  if (column_stride == 1) {
    if (type == DType::f32 && address % 16 == 0) return store_quad(out, pack(v, float()));
    if (type == DType::bf16 && address % 8 == 0)
      return store_one(reinterpret_cast<Pair*>(out), Pair{{pack_two(v[0], v[1], bf16()), pack_two(v[2], v[3], bf16())}});
    if (type == DType::f16 && address % 8 == 0)
      return store_one(reinterpret_cast<Pair*>(out), Pair{{pack_two(v[0], v[1], f16()), pack_two(v[2], v[3], f16())}});
  }
#pragma unroll
  for (int i = 0; i < kRowsPerLane; ++i) store_float(out, i * column_stride, type, v[i]);
}

// A lane has kRowsPerLane consecutive weight rows (columns of A or B) for each of its latent rows.
template <int NT>
T2L_DEVICE void head_epilogue(const HeadLaunch& launch, const HeadCursor& at, const LatentRow* rows,
                              const HeadAccumulators<NT>& accum) {
  const HeadParams& p = launch.module[at.module];
  const int g = lane_index() / 4, t = lane_index() % 4;
  const int warp_m = warp_index() % kWarpsM, warp_n = warp_index() / kWarpsM;
  const int weight_rows = launch.config.rows[at.module], side = side_of(launch, at);
  const int first_row =
      (at.tile - launch.config.first_tile[at.module]) * kHeadTile + warp_m * 16 * kMTiles + g * kRowsPerLane;
  const int per_latent = launch.config.per_latent;
  const LatentRow* mine = rows + warp_n * 8 * NT + 2 * t;
  if (first_row >= weight_rows) return;
  const HeadColumn column = head_column(p, per_latent, first_row, side);
  if (first_row + kRowsPerLane <= weight_rows &&
      column.column + kRowsPerLane <= width_of(p, column.side)) {  // all in one row of A or B
    const int s = column.side;
    const int64_t size = cuda::bytes_of(p.out_type);
    char* out =
        static_cast<char*>(p.out[s]) + (column.rank * p.out_stride[s][2] + column.column * p.out_stride[s][3]) * size;
    const float* mul = epilogue_operand(p.mul[s], p.mul_stride[s], column);
    const float* add = epilogue_operand(p.add[s], p.add_stride[s], column);
    float bias[kRowsPerLane];
#pragma unroll
    for (int i = 0; i < kRowsPerLane; ++i) bias[i] = p.bias ? load_one(p.bias + first_row + i) : 0.0f;
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const LatentRow r = mine[8 * nt + j];
        if (!r.valid) continue;
        const int rank = r.rank * per_latent;
        float v[kRowsPerLane];
#pragma unroll
        for (int i = 0; i < kRowsPerLane; ++i) v[i] = accum[i / 2][nt][i % 2 * 2 + j] + bias[i];
        if (mul) {
          const float* from = mul + r.layer * p.mul_stride[s][0] + rank * p.mul_stride[s][1];
#pragma unroll
          for (int i = 0; i < kRowsPerLane; ++i) v[i] *= load_one(from + i * p.mul_stride[s][2]);
        }
        if (add) {
          const float* from = add + r.layer * p.add_stride[s][0] + rank * p.add_stride[s][1];
#pragma unroll
          for (int i = 0; i < kRowsPerLane; ++i) v[i] += load_one(from + i * p.add_stride[s][2]);
        }
#pragma unroll
        for (int i = 0; i < kRowsPerLane; ++i) v[i] *= p.scale[s];
        const int64_t offset = r.task * p.out_stride[s][0] + r.layer * p.out_stride[s][1] + rank * p.out_stride[s][2];
        store_lane_rows(out + offset * size, p.out_stride[s][3], p.out_type, v);
      }
    return;
  }
#pragma unroll
  for (int i = 0; i < kRowsPerLane; ++i) {  // tail: across the end of a row of A or B, or of the weights
    if (first_row + i >= weight_rows) continue;
    const HeadColumn here = head_column(p, per_latent, first_row + i, side);
    const int s = here.side;
    if (here.column >= width_of(p, s)) continue;
    const float* mul = epilogue_operand(p.mul[s], p.mul_stride[s], here);
    const float* add = epilogue_operand(p.add[s], p.add_stride[s], here);
    const float bias = p.bias ? load_one(p.bias + first_row + i) : 0.0f;
    const int64_t base = here.rank * p.out_stride[s][2] + here.column * p.out_stride[s][3];
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const LatentRow r = mine[8 * nt + j];
        if (!r.valid) continue;
        const int rank = r.rank * per_latent;
        float v = accum[i / 2][nt][i % 2 * 2 + j] + bias;
        if (mul) v *= load_one(mul + r.layer * p.mul_stride[s][0] + rank * p.mul_stride[s][1]);
        if (add) v += load_one(add + r.layer * p.add_stride[s][0] + rank * p.add_stride[s][1]);
        const int64_t offset = r.task * p.out_stride[s][0] + r.layer * p.out_stride[s][1] + rank * p.out_stride[s][2];
        store_float(p.out[s], base + offset, p.out_type, v * p.scale[s]);
      }
  }
}

// Prefetches the first rows of the weights of tile `at` into L2: what blocks that begin early do while they wait for
// latents.
T2L_DEVICE void prefetch_tile(const HeadLaunch& launch, const HeadCursor& at) {
  constexpr int kLine = 128;
  const cuda::HeadConfig& c = launch.config;
  const HeadParams& p = launch.module[at.module];
  const int first = (at.tile - c.first_tile[at.module]) * kHeadTile;
  const int64_t row_bytes = p.h * cuda::bytes_of(p.w_type);
  const int64_t bytes = cuda::min(c.prefetch_rows, c.rows[at.module] - first) * row_bytes;
  const char* begin = static_cast<const char*>(p.weight) + first * row_bytes;
#pragma unroll 1
  for (int64_t i = thread_index() * kLine; i < bytes; i += kThreads * kLine) prefetch(begin + i);
}

template <class T, int NT>
T2L_KERNEL(kThreads, NT > 4 || sizeof(T) == 4 ? 1 : 2)
head_kernel(T2L_ARGUMENT(HeadLaunch) launch) {
  const cuda::HeadConfig& c = launch.config;
  constexpr int kLatentRows = 16 * NT, kWeightBytes = kHeadTile * kTileRowBytes, kLatentBytes = kLatentRows * kTileRowBytes;
  const bool stationary = NT > 4 && c.stationary;
  SharedMemory shared;
  char* weights = shared.take<char>((stationary ? c.k_tiles : kHeadStages) * kWeightBytes);
  char* latents = shared.take<char>(kHeadStages * kLatentBytes);
  LatentRow* rows = shared.take<LatentRow>(kLatentRows);  // of the latent tile of the last epilogue
  const int64_t tiles = c.first_tile[launch.count];
  const int end = static_cast<int>((block_index() + 1) * tiles / c.blocks);
  HeadCursor load{static_cast<int>(block_index() * tiles / c.blocks), 0, 0, 0};
  find_module(launch, &load);
  skip_empty(launch, end, &load);
  if (load.tile < end) prefetch_tile(launch, load);
  wait_for_earlier_launches();
  HeadCursor mma = load;
  HeadSource<T, kLatentRows> source;
  int write_stage = 0, read_stage = 0, rows_of_tile = -1, weights_of_tile = -1;
  bool with_weights = true;
  const auto load_next = [&] {
    if (load.tile < end) {
      if (load.k_tile == 0) {
        source.find(launch, load);
        with_weights = !stationary || load.tile != weights_of_tile;  // else they are there, from its first latents
        weights_of_tile = load.tile;
      }
      char* to_weights = weights + (stationary ? load.k_tile : write_stage) * kWeightBytes;
      load_stage<T, kLatentRows>(source, c.aligned, load.k_tile, with_weights ? to_weights : nullptr,
                                 latents + write_stage * kLatentBytes);
      advance(launch, end, &load);
    }
    commit_copies();  // also an empty group: waits count groups
    write_stage = write_stage + 1 == kHeadStages ? 0 : write_stage + 1;
  };
#pragma unroll 1
  for (int i = 0; i < kHeadStages - 1; ++i) load_next();
  HeadAccumulators<NT> accum = {};
  while (mma.tile < end) {
    wait_for_copies<kHeadStages - 2>();
    block_barrier();  // read_stage is visible to all threads, and write_stage is no longer read
    load_next();
    multiply_stage<T, NT>(weights + (stationary ? mma.k_tile : read_stage) * kWeightBytes,
                          latents + read_stage * kLatentBytes, accum);
    read_stage = read_stage + 1 == kHeadStages ? 0 : read_stage + 1;
    if (mma.k_tile + 1 == c.k_tiles) {
      if (mma.latent_tile != rows_of_tile) {  // the barrier above orders this after the last epilogue
        rows_of_tile = mma.latent_tile;
        for (int i = thread_index(); i < kLatentRows; i += kThreads)
          rows[i] = latent_row(launch, mma, first_latent(launch, mma, kLatentRows) + i);
        block_barrier();
      }
      head_epilogue<NT>(launch, mma, rows, accum);
#pragma unroll
      for (int mt = 0; mt < kMTiles; ++mt)
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
#pragma unroll
          for (int i = 0; i < 4; ++i) accum[mt][nt][i] = 0.0f;
    }
    advance(launch, end, &mma);
  }
  wait_for_copies<0>();
}

}  // namespace t2l::device
