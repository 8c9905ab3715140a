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
  int64_t tile;  // over all modules
  int module, latent_tile, step;
};

T2L_DEVICE int64_t width_of(const HeadParams& p, int side) { return side ? p.out_features : p.in; }

// The shared heads (two sides) hold max(in, out) rows for every rank: the narrower side leaves some out.
T2L_DEVICE bool has_columns(const HeadLaunch& launch, const HeadCursor& at) {
  const HeadParams& p = launch.module[at.module];
  if (p.sides == 1) return true;
  const int64_t tiles_a_side = launch.config.latent_tiles / 2;
  const int64_t stored = cuda::greater(p.in, p.out_features), width = width_of(p, at.latent_tile >= tiles_a_side);
  const int64_t first = (at.tile - launch.config.first_tile[at.module]) * kHeadTile % stored;
  return first < width || first + kHeadTile > stored;  // a column in use, or the next rank's first
}

T2L_DEVICE void find_module(const HeadLaunch& launch, HeadCursor* at) {
  while (at->module + 1 < launch.count && at->tile >= launch.config.first_tile[at->module + 1]) ++at->module;
}

T2L_DEVICE void skip_empty(const HeadLaunch& launch, int64_t end, HeadCursor* at) {
  while (at->tile < end && !has_columns(launch, *at)) {
    if (++at->latent_tile < launch.config.latent_tiles) continue;
    at->latent_tile = 0;
    ++at->tile;
    find_module(launch, at);
  }
}

T2L_DEVICE void advance(const HeadLaunch& launch, int64_t end, HeadCursor* at) {
  if (++at->step < launch.config.depth_steps) return;
  at->step = 0;
  if (++at->latent_tile == launch.config.latent_tiles) {
    at->latent_tile = 0;
    ++at->tile;
    find_module(launch, at);
  }
  skip_empty(launch, end, at);
}

// 16 bytes of a row from feature k on, into shared memory: by asynchronous copy where the addresses allow.
template <class T>
T2L_DEVICE void copy_features(char* shared, const T* row, int64_t k, int64_t size, bool aligned) {
  constexpr int64_t n = Traits<T>::kPerQuad;
  if (aligned) {
    const int64_t left = cuda::greater(0, cuda::lesser(n, size - k));
    copy_async(shared, left ? row + k : row, static_cast<int>(left * static_cast<int64_t>(sizeof(T))));
  } else {
    *reinterpret_cast<Quad*>(shared) = load_features(row, k, size, false);
  }
}

struct LatentRow {
  int task, rank, layer;
};
T2L_DEVICE LatentRow latent_row(const HeadParams& p, int row) {
  const int layers = static_cast<int>(p.layers), ranks = static_cast<int>(p.ranks), rest = row / layers;
  return LatentRow{rest / ranks, rest % ranks, row % layers};
}

// One stage: kStageBytes of every weight row of the tile, then of every latent row.
template <class T, int kLatentRows>
T2L_DEVICE void load_stage(const HeadLaunch& launch, const HeadCursor& at, char* stage) {
  constexpr int kQuads = kStageBytes / 16, kQuadsOfBlock = kBlockBytes / 16;
  const HeadParams& p = launch.module[at.module];
  const cuda::HeadConfig& c = launch.config;
  const int quad = thread_index() % kQuads, block = quad / kQuadsOfBlock, in_block = quad % kQuadsOfBlock;
  const int64_t k = (at.step * kQuads + quad) * Traits<T>::kPerQuad;
  const bool depth_aligned = p.h % Traits<T>::kPerQuad == 0;
  const T* weight = static_cast<const T*>(p.weight);
  const bool weight_aligned = depth_aligned && reinterpret_cast<uintptr_t>(weight) % 16 == 0;
  const int64_t first_row = (at.tile - c.first_tile[at.module]) * kHeadTile, weight_rows = cuda::head_rows(p);
#pragma unroll
  for (int row = thread_index() / kQuads; row < kHeadTile; row += kThreads / kQuads) {
    char* target = stage + (block * kHeadTile + place_of(row)) * kBlockBytes + in_block * 16;
    const bool inside = first_row + row < weight_rows;
    copy_features(target, weight + (inside ? first_row + row : 0) * p.h, k, inside ? p.h : 0, weight_aligned);
  }
  char* latent_stage = stage + kHeadTile * kStageBytes;
  const int64_t tiles_a_side = c.latent_tiles / p.sides;
  const int64_t side = at.latent_tile / tiles_a_side, first = at.latent_tile % tiles_a_side * kLatentRows;
  bool latent_aligned = reinterpret_cast<uintptr_t>(p.latent) % 16 == 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) latent_aligned = latent_aligned && p.latent_stride[i] % Traits<T>::kPerQuad == 0;
#pragma unroll
  for (int row = thread_index() / kQuads; row < kLatentRows; row += kThreads / kQuads) {
    const bool inside = first + row < c.latent_rows;
    const LatentRow r = latent_row(p, static_cast<int>(inside ? first + row : 0));
    const T* data = static_cast<const T*>(p.latent) + r.task * p.latent_stride[0] + side * p.latent_stride[1] +
                    r.rank * p.latent_stride[2] + r.layer * p.latent_stride[3];
    copy_features(latent_stage + (block * kLatentRows + row) * kBlockBytes + in_block * 16, data, k, inside ? p.h : 0,
                  latent_aligned);
  }
}

template <int NT>
using HeadSums = float[kMTiles][NT][4];

template <class T, int NT>
T2L_DEVICE void multiply_stage(const char* stage, HeadSums<NT>& sum) {
  constexpr int kLatentRows = 16 * NT;
  const int g = lane_index() / 4, t = lane_index() % 4;
  const int across = warp_index() % kWarpsAcross, along = warp_index() / kWarpsAcross;
#pragma unroll(sizeof(T) == 4 ? 1 : 2)  // float32 operands are split in registers
  for (int block = 0; block < kStageBytes / kBlockBytes; ++block) {
    const char* weights = stage + (block * kHeadTile + across * 16 * kMTiles + g) * kBlockBytes + t * 16;
    const char* latents =
        stage + kHeadTile * kStageBytes + (block * kLatentRows + along * 8 * NT + g) * kBlockBytes + t * 16;
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

// What a weight row gives: column `column` of rank `rank` of a side, counted in its latent's ranks.
struct HeadColumn {
  int side, rank, column;
};
T2L_DEVICE HeadColumn head_column(const HeadParams& p, int row, int side) {
  const int in = static_cast<int>(p.in), out = static_cast<int>(p.out_features);
  if (p.sides == 2) {
    const int stored = in > out ? in : out;
    return HeadColumn{side, row / stored, row % stored};
  }
  const int rows_of_a = static_cast<int>(p.rank / p.ranks) * in;
  if (row < rows_of_a) return HeadColumn{0, row / in, row % in};
  return HeadColumn{1, (row - rows_of_a) / out, (row - rows_of_a) % out};
}

struct alignas(8) Double {
  uint32_t word[2];
};

// kRun values to consecutive addresses, at once where they are aligned.
T2L_DEVICE void store_run(void* out, int64_t offset, DType type, const float (&v)[kRun]) {
  static_assert(kRun == 4, "two words of 16-bit numbers, four of float32");
  char* target = static_cast<char*>(out) + offset * cuda::bytes_of(type);
  const uintptr_t address = reinterpret_cast<uintptr_t>(target);
  if (type == DType::f32 && address % 16 == 0) return store_quad(target, pack(v, float()));
  if (type == DType::bf16 && address % 8 == 0)
    return store_one(reinterpret_cast<Double*>(target),
                     Double{{pack_two(v[0], v[1], bf16()), pack_two(v[2], v[3], bf16())}});
  if (type == DType::f16 && address % 8 == 0)
    return store_one(reinterpret_cast<Double*>(target), Double{{pack_two(v[0], v[1], f16()), pack_two(v[2], v[3], f16())}});
#pragma unroll
  for (int i = 0; i < kRun; ++i) store_float(out, offset + i, type, v[i]);
}

// Results of one lane's run of weight rows for one latent row.
T2L_DEVICE void finish_run(const HeadParams& p, int first_row, int weight_rows, int side, const LatentRow& r,
                           float (&v)[kRun]) {
  const int per_latent = static_cast<int>(p.rank / p.ranks);
  HeadColumn at[kRun];
  bool whole = true;
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    const int row = first_row + i;
    at[i] = head_column(p, row < weight_rows ? row : weight_rows - 1, side);
    const int rank = r.rank * per_latent + at[i].rank;
    const bool inside = row < weight_rows && at[i].column < width_of(p, at[i].side);
    if (inside) {
      const int s = at[i].side;
      if (p.bias) v[i] += load_one(p.bias + row);
      if (p.mul[s])
        v[i] *= load_one(p.mul[s] + r.layer * p.mul_stride[s][0] + rank * p.mul_stride[s][1] +
                         at[i].column * p.mul_stride[s][2]);
      if (p.add[s])
        v[i] += load_one(p.add[s] + r.layer * p.add_stride[s][0] + rank * p.add_stride[s][1] +
                         at[i].column * p.add_stride[s][2]);
      v[i] *= p.scale[s];
    }
    whole = whole && inside && at[i].side == at[0].side && at[i].column == at[0].column + i;
  }
  const auto offset = [&](int i) {
    const int64_t* stride = p.out_stride[at[i].side];
    return r.task * stride[0] + r.layer * stride[1] + (r.rank * per_latent + at[i].rank) * stride[2] +
           at[i].column * stride[3];
  };
  if (whole && p.out_stride[at[0].side][3] == 1) return store_run(p.out[at[0].side], offset(0), p.out_type, v);
#pragma unroll
  for (int i = 0; i < kRun; ++i)
    if (first_row + i < weight_rows && at[i].column < width_of(p, at[i].side))
      store_float(p.out[at[i].side], offset(i), p.out_type, v[i]);
}

template <int NT>
T2L_DEVICE void finish_tile(const HeadLaunch& launch, const HeadCursor& at, const HeadSums<NT>& sum) {
  const HeadParams& p = launch.module[at.module];
  const cuda::HeadConfig& c = launch.config;
  const int g = lane_index() / 4, t = lane_index() % 4;
  const int across = warp_index() % kWarpsAcross, along = warp_index() / kWarpsAcross;
  const int tiles_a_side = static_cast<int>(c.latent_tiles / p.sides), weight_rows = static_cast<int>(cuda::head_rows(p));
  const int side = at.latent_tile / tiles_a_side;
  const int first_latent = at.latent_tile % tiles_a_side * (16 * NT) + along * 8 * NT;
  const int first_row = static_cast<int>(at.tile - c.first_tile[at.module]) * kHeadTile + across * 16 * kMTiles + g * kRun;
  if (first_row >= weight_rows) return;
#pragma unroll
  for (int nt = 0; nt < NT; ++nt)
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const int latent = first_latent + 8 * nt + 2 * t + column;
      if (latent >= c.latent_rows) continue;
      float v[kRun];
#pragma unroll
      for (int i = 0; i < kRun; ++i) v[i] = sum[i / 2][nt][i % 2 * 2 + column];
      finish_run(p, first_row, weight_rows, side, latent_row(p, latent), v);
    }
}

template <class T, int NT>
T2L_KERNEL(kThreads, NT > 4 || sizeof(T) == 4 ? 1 : 2)
head_kernel(T2L_ARGUMENT(HeadLaunch) launch) {
  const cuda::HeadConfig& c = launch.config;
  constexpr int64_t kStage = (kHeadTile + 16 * NT) * kStageBytes;
  SharedMemory shared;
  char* stages = shared.take<char>(kHeadStages * kStage);
  const int64_t tiles = c.first_tile[launch.count];
  const int64_t end = (block_index_x() + 1) * tiles / c.blocks;
  HeadCursor load{block_index_x() * tiles / c.blocks, 0, 0, 0};
  find_module(launch, &load);
  skip_empty(launch, end, &load);
  HeadCursor work = load;
  int load_slot = 0, work_slot = 0;
  const auto load_next = [&] {
    if (load.tile < end) {
      load_stage<T, 16 * NT>(launch, load, stages + load_slot * kStage);
      advance(launch, end, &load);
    }
    commit_copies();  // an empty group too: what is waited for is counted in groups
    load_slot = load_slot + 1 == kHeadStages ? 0 : load_slot + 1;
  };
#pragma unroll
  for (int i = 0; i < kHeadStages - 1; ++i) load_next();
  HeadSums<NT> sum = {};
  while (work.tile < end) {
    wait_for_copies<kHeadStages - 2>();
    block_barrier();  // this stage is there for all, and the one before it is free
    load_next();
    multiply_stage<T, NT>(stages + work_slot * kStage, sum);
    work_slot = work_slot + 1 == kHeadStages ? 0 : work_slot + 1;
    if (work.step + 1 == c.depth_steps) {
      finish_tile<NT>(launch, work, sum);
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
