// Hypernetwork heads of all modules as one grouped GEMM, weights x latents^T, with a fused epilogue (bias, mul, add, scale,
// cast) that scatters the results to A and B.
//
// Persistent kernel: a block owns consecutive weight tiles (the M side) and streams them through a multistage cp.async
// pipeline, which continues across tiles and modules and drains once, at the end.  Latent tiles (the N side) come with them,
// from L2.  There is no split-K and K is reduced in order, so bits do not depend on tiling or batch.
//
// Stationary weights, where there are several latent tiles and shared memory has room: the weights of a tile stay while the
// latents pass, in tiles of 64 rows of which two groups of four warps take every other one.  Each group has a pipeline of
// its own and waits for the other only where weights change, so that the products of one run under the epilogue of the
// other.
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
constexpr int kWarpsM = 4;        // warps along the weight rows (M); along the latent rows (N) two or, in a group, one
constexpr int kMTiles = kHeadTile / (16 * kWarpsM);
constexpr int kRowsPerLane = 2 * kMTiles;  // consecutive weight rows of a lane's accumulators

// Permuted position of weight row `row` of a tile in shared memory: the kRowsPerLane rows of lane g become rows g and g + 8
// of its MMA tiles.
T2L_DEVICE int smem_row_of(int row) {
  const int group = row / (16 * kMTiles), local = row % (16 * kMTiles);
  const int g = local / kRowsPerLane, i = local % kRowsPerLane;
  return group * (16 * kMTiles) + i / 2 * 16 + i % 2 * 8 + g;
}

// The threads that have a latent tile together: a group of two or, without stationary weights, the block.
template <int NT, bool kStationary>
struct HeadGroup {
  static constexpr int kGroups = kStationary ? 2 : 1;
  static constexpr int kGroupThreads = kThreads / kGroups;
  static constexpr int kLatentRows = 16 * NT / kGroups;  // of a tile
  static constexpr int kTurn = kGroups + 1;              // name of the barrier at which the second waits for the first

  T2L_DEVICE static int index() { return thread_index() / kGroupThreads; }
  T2L_DEVICE static int thread() { return thread_index() % kGroupThreads; }
  T2L_DEVICE static void barrier() {
    if (kStationary)
      named_barrier<kGroupThreads>(1 + index());
    else
      block_barrier();
  }
};

// Position in the loop nest of a group: weight tiles, latent tiles, k-tiles.
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

// To the next latent tile of the group that began with latent tile `first`.
T2L_DEVICE void next_latents(const HeadLaunch& launch, int first, int groups, HeadCursor* at) {
  at->latent_tile += groups;
  if (at->latent_tile < launch.config.latent_tiles) return;
  at->latent_tile = first;
  ++at->tile;
  find_module(launch, at);
}

template <class Group>
T2L_DEVICE void skip_empty(const HeadLaunch& launch, int end, HeadCursor* at) {
  while (at->tile < end && !has_columns(launch, *at)) next_latents(launch, Group::index(), Group::kGroups, at);
}

template <class Group>
T2L_DEVICE void advance(const HeadLaunch& launch, int end, HeadCursor* at) {
  if (++at->k_tile < launch.config.k_tiles) return;
  at->k_tile = 0;
  next_latents(launch, Group::index(), Group::kGroups, at);
  skip_empty<Group>(launch, end, at);
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

constexpr int kVec16PerRow = kTileRowBytes / 16;  // per stage
constexpr int kVec16PerKBlock = kKBlockBytes / 16;

// Offset of a 16-byte vector in a stage, laid out [k-block, row, 64 bytes].  XOR swizzle of the second k-block: the 128
// bytes of a row are stored to all 32 banks, without bank conflicts.
T2L_DEVICE int stage_offset(int rows, int row, int vec) {
  const int k_block = vec / kVec16PerKBlock;
  return (k_block * rows + (row ^ k_block)) * kKBlockBytes + vec % kVec16PerKBlock * 16;
}

// Copies vec `vec` of k-tile `k_tile` of kPasses rows to `target` and every kStep rows of a stage on; zeros follow the end
// of a row.  `row_of(i)`: row of pass i, null for zeros; `any`: an address that may be read.  Rows that are not aligned are
// rare: their code is unrolled no more than kUnroll times.
template <class T, int kPasses, int kStep, int kUnroll, class RowOf>
T2L_DEVICE void load_rows(char* target, RowOf row_of, int row_bytes, int k_tile, int vec, bool aligned, const char* any) {
  constexpr int kSize = static_cast<int>(sizeof(T)), kStepBytes = kStep * kKBlockBytes;
  const int k = k_tile * kTileRowBytes + vec * 16;
  if (aligned) {
    const int left = row_bytes - k, valid = left < 0 ? 0 : left < 16 ? left : 16;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const char* row = row_of(i);
      const bool in_range = row && valid > 0;
      copy_async(target + i * kStepBytes, in_range ? row + k : any, in_range ? valid : 0);
    }
    return;
  }
#pragma unroll(kUnroll)
  for (int i = 0; i < kPasses; ++i) {
    const char* row = row_of(i);
    *reinterpret_cast<Vec16*>(target + i * kStepBytes) =
        row ? load_features(reinterpret_cast<const T*>(row), k / kSize, row_bytes / kSize, false) : zero_vec16();
  }
}

// The weight rows of a tile, whose copies all threads of the block share, in passes of kRows rows.
template <class T>
struct WeightSource {
  static constexpr int kRows = kThreads / kVec16PerRow;
  const char* first;  // row of this thread's first pass
  const char* any;
  int rows_left, row_bytes;

  T2L_DEVICE void find(const HeadLaunch& launch, const HeadCursor& at) {
    const HeadParams& p = launch.module[at.module];
    const int row = (at.tile - launch.config.first_tile[at.module]) * kHeadTile + thread_index() / kVec16PerRow;
    row_bytes = static_cast<int>(p.h * static_cast<int64_t>(sizeof(T)));
    rows_left = launch.config.rows[at.module] - row;
    any = static_cast<const char*>(p.weight);
    first = any + int64_t{row} * row_bytes;
  }
  T2L_DEVICE void load(bool aligned, int k_tile, char* stage) const {
    const int row = thread_index() / kVec16PerRow, vec = thread_index() % kVec16PerRow;
    const auto row_of = [&](int i) { return i * kRows < rows_left ? first + int64_t{i} * kRows * row_bytes : nullptr; };
    load_rows<T, kHeadTile / kRows, kRows, 1>(stage + stage_offset(kHeadTile, smem_row_of(row), vec),  // permutes in a pass
                                              row_of, row_bytes, k_tile, vec, aligned, any);
  }
};

// The rows of a latent tile, whose copies the threads of a group share.  Addresses are computed once per tile, not per
// stage: the kernel would otherwise be bound by instruction issue.
template <class T, class Group>
struct LatentSource {
  static constexpr int kRows = Group::kGroupThreads / kVec16PerRow, kPasses = Group::kLatentRows / kRows;
  const char* row[kPasses];  // null: padding
  const char* any;
  int row_bytes;

  T2L_DEVICE void find(const HeadLaunch& launch, const HeadCursor& at) {
    const HeadParams& p = launch.module[at.module];
    const int first = first_latent(launch, at, Group::kLatentRows) + Group::thread() / kVec16PerRow;
    row_bytes = static_cast<int>(p.h * static_cast<int64_t>(sizeof(T)));
    any = static_cast<const char*>(p.latent);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const LatentRow r = latent_row(launch, at, first + i * kRows);
      const int64_t offset = r.task * p.latent_stride[0] + side_of(launch, at) * p.latent_stride[1] +
                             r.rank * p.latent_stride[2] + r.layer * p.latent_stride[3];
      row[i] = r.valid ? any + offset * static_cast<int64_t>(sizeof(T)) : nullptr;
    }
  }
  T2L_DEVICE void load(bool aligned, int k_tile, char* stage) const {
    const int vec = Group::thread() % kVec16PerRow;
    const auto row_of = [&](int i) { return row[i]; };
    load_rows<T, kPasses, kRows, kPasses>(stage + stage_offset(Group::kLatentRows, Group::thread() / kVec16PerRow, vec),
                                          row_of, row_bytes, k_tile, vec, aligned, any);
  }
};

// ---- consumer: MMA

template <int NT>
using HeadAccumulators = float[kMTiles][NT][4];

template <class T, class Group, int NT>
T2L_DEVICE void multiply_stage(const char* weights, const char* latents, HeadAccumulators<NT>& accum) {
  const int g = lane_index() / 4, t = lane_index() % 4, warp = Group::thread() / 32;
  const int warp_m = warp % kWarpsM, warp_n = warp / kWarpsM;
#pragma unroll(sizeof(T) == 4 ? 1 : 2)  // float32 operands are split in registers
  for (int k_block = 0; k_block < kTileRowBytes / kKBlockBytes; ++k_block) {
    const int vec = k_block * kVec16PerKBlock + t;
    const char* left_rows = weights + stage_offset(kHeadTile, warp_m * 16 * kMTiles + g, vec);
    const char* right_rows = latents + stage_offset(Group::kLatentRows, warp_n * 8 * NT + g, vec);
    Vec16 left[kMTiles][2];
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        left[mt][half] = *reinterpret_cast<const Vec16*>(left_rows + (16 * mt + 8 * half) * kKBlockBytes);
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      const Vec16 right = *reinterpret_cast<const Vec16*>(right_rows + 8 * nt * kKBlockBytes);
#pragma unroll
      for (int mt = 0; mt < kMTiles; ++mt) multiply_vec16(accum[mt][nt], left[mt][0], left[mt][1], right, T());
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
    if (type == DType::f32 && address % 16 == 0) return store_vec16(out, pack(v, float()));
    if (type == DType::bf16 && address % 8 == 0)
      return store_one(reinterpret_cast<Pair*>(out), Pair{{pack_two(v[0], v[1], bf16()), pack_two(v[2], v[3], bf16())}});
    if (type == DType::f16 && address % 8 == 0)
      return store_one(reinterpret_cast<Pair*>(out), Pair{{pack_two(v[0], v[1], f16()), pack_two(v[2], v[3], f16())}});
  }
#pragma unroll
  for (int i = 0; i < kRowsPerLane; ++i) store_float(out, i * column_stride, type, v[i]);
}

// A lane has kRowsPerLane consecutive weight rows (columns of A or B) for each of its latent rows.
template <class Group, int NT>
T2L_DEVICE void head_epilogue(const HeadLaunch& launch, const HeadCursor& at, const LatentRow* rows,
                              const HeadAccumulators<NT>& accum) {
  const HeadParams& p = launch.module[at.module];
  const int g = lane_index() / 4, t = lane_index() % 4, warp = Group::thread() / 32;
  const int warp_m = warp % kWarpsM, warp_n = warp / kWarpsM;
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

// Prefetches the first rows of the weights of tile `at` into L2: what blocks that begin early do while they wait for latents
// and, where weights are stationary, beside the products with those before.
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

// A group's latents in shared memory: a ring of k-tiles, and what rows they are.
template <class T, class Group, int NT>
struct HeadPipeline {
  static constexpr int kStageBytes = Group::kLatentRows * kTileRowBytes;
  char* latents;
  LatentRow* rows;  // of the latent tile of the last epilogue
  LatentSource<T, Group> source;
  HeadCursor load, mma;
  int write_stage = 0, read_stage = 0, rows_of_tile = -1;
  HeadAccumulators<NT> accum = {};

  T2L_DEVICE void take(SharedMemory* shared) {
#pragma unroll
    for (int i = 0; i < Group::kGroups; ++i) {
      char* of_group = shared->take<char>(kHeadStages * kStageBytes);
      LatentRow* rows_of_group = shared->take<LatentRow>(Group::kLatentRows);
      if (i == Group::index()) latents = of_group, rows = rows_of_group;
    }
  }
  // After the last k-tile of a latent tile: stores its outputs, and begins the next with zeros.
  T2L_DEVICE void finish(const HeadLaunch& launch) {
    if (mma.latent_tile != rows_of_tile) {  // the barrier before the products orders this after the last epilogue
      rows_of_tile = mma.latent_tile;
      for (int i = Group::thread(); i < Group::kLatentRows; i += Group::kGroupThreads)
        rows[i] = latent_row(launch, mma, first_latent(launch, mma, Group::kLatentRows) + i);
      Group::barrier();
    }
    head_epilogue<Group, NT>(launch, mma, rows, accum);
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int i = 0; i < 4; ++i) accum[mt][nt][i] = 0.0f;
  }
};

T2L_DEVICE int next_stage(int stage) { return stage + 1 == kHeadStages ? 0 : stage + 1; }

template <class T, int NT, bool kStationary>
T2L_KERNEL(kThreads, NT > 4 || sizeof(T) == 4 ? 1 : 2)
head_kernel(T2L_ARGUMENT(HeadLaunch) launch) {
  using Group = HeadGroup<NT, kStationary>;
  using Pipeline = HeadPipeline<T, Group, NT>;
  constexpr int kWeightBytes = kHeadTile * kTileRowBytes;  // of a k-tile
  const cuda::HeadConfig& c = launch.config;
  SharedMemory shared;
  char* weights = shared.take<char>((kStationary ? c.k_tiles : kHeadStages) * kWeightBytes);
  Pipeline p;
  p.take(&shared);
  const int64_t tiles = c.first_tile[launch.count];
  const int end = static_cast<int>((block_index() + 1) * tiles / c.blocks);
  HeadCursor first{static_cast<int>(block_index() * tiles / c.blocks), 0, 0, 0};
  find_module(launch, &first);
  if (first.tile < end) prefetch_tile(launch, first);
  wait_for_earlier_launches();
  p.load = first;
  p.load.latent_tile = Group::index();
  skip_empty<Group>(launch, end, &p.load);
  p.mma = p.load;
  WeightSource<T> weight_rows;
  const auto load_next = [&] {
    if (p.load.tile < end) {
      if (p.load.k_tile == 0) {
        p.source.find(launch, p.load);
        if (!kStationary) weight_rows.find(launch, p.load);
      }
      if (!kStationary) weight_rows.load(c.aligned, p.load.k_tile, weights + p.write_stage * kWeightBytes);
      p.source.load(c.aligned, p.load.k_tile, p.latents + p.write_stage * Pipeline::kStageBytes);
      advance<Group>(launch, end, &p.load);
    }
    commit_copies();  // also an empty group: waits count groups
    p.write_stage = next_stage(p.write_stage);
  };
  // All products of the group up to the end of weight tile `last`.
  const auto multiply_until = [&](int last, auto&& after_each) {
    while (p.mma.tile <= last) {
      wait_for_copies<kHeadStages - 2>();
      Group::barrier();  // read_stage is visible to all threads, and write_stage is no longer read
      load_next();
      multiply_stage<T, Group, NT>(weights + (kStationary ? p.mma.k_tile : p.read_stage) * kWeightBytes,
                                   p.latents + p.read_stage * Pipeline::kStageBytes, p.accum);
      p.read_stage = next_stage(p.read_stage);
      after_each();
      if (p.mma.k_tile + 1 == c.k_tiles) p.finish(launch);
      advance<Group>(launch, end, &p.mma);
    }
  };
#pragma unroll 1
  for (int i = 0; i < kHeadStages - 1; ++i) load_next();
  if constexpr (!kStationary) {
    multiply_until(end - 1, [] {});
  } else {
    HeadCursor at = first;
#pragma unroll 1
    while (at.tile < end) {
      block_barrier();  // the weights of the tile before are no longer read
      weight_rows.find(launch, at);
#pragma unroll 1
      for (int i = 0; i < c.k_tiles; ++i) weight_rows.load(c.aligned, i, weights + i * kWeightBytes);
      commit_copies();
      wait_for_copies<0>();
      block_barrier();
      const int tile = at.tile++;
      find_module(launch, &at);
      if (at.tile < end) prefetch_tile(launch, at);
      // The second group begins when the first has half of its first products, so that their epilogues take turns.  Both
      // have products with every weight tile: each side has two latent tiles or more.
      bool gives_turn = Group::index() == 0;
      if (!gives_turn) named_barrier<kThreads>(Group::kTurn);
      multiply_until(tile, [&] {
        if (!gives_turn || 2 * (p.mma.k_tile + 1) < c.k_tiles) return;
        named_arrive<kThreads>(Group::kTurn);
        gives_turn = false;
      });
    }
  }
  wait_for_copies<0>();
}

}  // namespace t2l::device
