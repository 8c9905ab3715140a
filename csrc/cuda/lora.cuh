// Batched LoRA in one launch: y[t] (+)= scaling[a] * B[a] (A[a] x[t]).
//
// A block (CTA) takes a token tile of one adapter and an N-tile: outputs of one problem of the group.
//
// Shrink: v = A x is summed in split-K slices of the features and, in a slice, by the eight warps of the block: warp w takes
// k-blocks w, w + 8, ... of 64 bytes.  The partial sums are reduced in shared memory, in the order of slices and warps.  The
// blocks of a cluster share the N-tiles of a token tile: each sums its slices for the ranks of all their problems, so that x
// and A are read once, and stores them in every block.  Without clusters each N-tile computes all of v: A comes from L2.
// Expand: every warp computes 64 outputs at a time.  The order of every sum depends on the number of features and the rank
// alone, so results are batch-invariant: prefill and decode agree bitwise.
#pragma once
#include "config.h"
#include "fragments.cuh"
#include "lora_shrink.cuh"
#include "lora_token_tile.cuh"

namespace t2l::device {

using cuda::kWarpOutputs;

struct LoraLaunch {
  LoraParams problem[cuda::kMaxGroup];
  cuda::LoraConfig config;
  bool counts_bad_ids;  // of this launch, if a call has several
};

// ---- expand

// Weights of ranks `j` and j + 1 for outputs [o, o + 8).
template <class T, bool kDecode>
T2L_DEVICE void load_weights(const LoraParams& p, const char* b, int rank, int j, int64_t o, float (&first)[8],
                             float (&second)[8]) {
  if constexpr (kDecode) {  // [rank, out] storage, whole runs of eight
    const bool inside = o < p.out;
    unpack(inside && j < rank ? load_vec16(b + (j * p.b_stride_rank + o) * 2) : zero_vec16(), T(), first);
    unpack(inside && j + 1 < rank ? load_vec16(b + ((j + 1) * p.b_stride_rank + o) * 2) : zero_vec16(), T(), second);
    return;
  }
  const bool full = o + 8 <= p.out && j + 1 < rank && sizeof(T) == 2;
  if (full && p.b_stride_out == 1 && is_aligned(b, p.b_stride_rank * 2)) {  // [rank, out] storage
    unpack(load_vec16(b + (j * p.b_stride_rank + o) * 2), T(), first);
    unpack(load_vec16(b + ((j + 1) * p.b_stride_rank + o) * 2), T(), second);
    return;
  }
  if constexpr (sizeof(T) == 2)
    if (full && p.b_stride_rank == 1 && reinterpret_cast<uintptr_t>(b) % 4 == 0 &&
        p.b_stride_out % 2 == 0) {  // [out, rank] storage: two ranks per 32-bit load
#pragma unroll
      for (int i = 0; i < 8; ++i)
        unpack_two(load_one(reinterpret_cast<const uint32_t*>(b + ((o + i) * p.b_stride_out + j) * 2)), T(), &first[i],
                   &second[i]);
      return;
    }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const bool inside = o + i < p.out;
    const int64_t at = (o + i) * p.b_stride_out + j * p.b_stride_rank;
    first[i] = inside && j < rank ? load_float(b, at, w_type_of<T>(p)) : 0.0f;
    second[i] = inside && j + 1 < rank ? load_float(b, at + p.b_stride_rank, w_type_of<T>(p)) : 0.0f;
  }
}

// Eight consecutive outputs as stored in y.
struct Outputs {
  Vec16 vec[2];  // the second for float32 only
};
T2L_DEVICE Outputs load_outputs(const char* y, DType type) {
  Outputs q{load_vec16_mutable(y), zero_vec16()};
  if (type == DType::f32) q.vec[1] = load_vec16_mutable(y + 16);
  return q;
}
T2L_DEVICE void add_outputs(const Outputs& q, DType type, float (&v)[8]) {
  float before[8];
  if (type == DType::bf16) {
    unpack(q.vec[0], bf16(), before);
  } else if (type == DType::f16) {
    unpack(q.vec[0], f16(), before);
  } else {
    unpack(q.vec[0], float(), before);
    unpack(q.vec[1], float(), before + 4);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = before[i] + v[i];
}
T2L_DEVICE void store_outputs(char* y, DType type, const float (&v)[8]) {
  if (type == DType::bf16) return store_vec16(y, pack(v, bf16()));
  if (type == DType::f16) return store_vec16(y, pack(v, f16()));
  store_vec16(y, pack(v, float()));
  store_vec16(y + 16, pack(v + 4, float()));
}
// Tail, or a row that is not aligned: element by element.
template <class T>
T2L_DEVICE void update_tail(const LoraParams& p, char* row, int64_t o, float (&v)[8]) {
  const DType type = x_type_of<T>(p);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (o + i < p.out) {
      if (p.accumulate) v[i] = load_float(row, o + i, type) + v[i];
      store_float(row, o + i, type, v[i]);
    }
}
// 16-bit weights are exact in TF32.
template <class T>
T2L_DEVICE Split split_weight(float weight, T) {
  return Split{weight, 0.0f};
}
T2L_DEVICE Split split_weight(float weight, float) { return split(weight); }

// Outputs [first, last) of every token of the token tile, in warp tiles of 64.  Column n of MMA tile i is permuted to output
// 32 * (n % 2) + 8 * (n / 2) + i of 64, so that every lane has twice eight consecutive outputs: loads and stores of y are
// coalesced 128-bit accesses.  The registers of an operand are ranks 2t and 2t + 1 of eight.
template <class T, int MT, bool kDecode>
T2L_DEVICE void expand(const LoraParams& p, int adapter, int rank, const Tokens<kDecode>& tokens, int count, const float* v,
                       int v_stride, int first, int last) {
  constexpr bool kExact = sizeof(T) == 2;
  const int g = lane_index() / 4, t = lane_index() % 4, out = static_cast<int>(p.out);
  const DType type = x_type_of<T>(p);
  const int64_t size = cuda::bytes_of(type);
  const bool aligned = kDecode || is_aligned(p.y, p.y_stride * size), accumulate = kDecode || p.accumulate;
  const char* b = static_cast<const char*>(p.b) + adapter * p.b_stride_adapter * cuda::bytes_of(w_type_of<T>(p));
  for (int o = first + warp_index() * kWarpOutputs; o < last; o += kWarps * kWarpOutputs)
    for (int mt = 0; mt < MT && 16 * mt < count; ++mt) {
      char* row[2];  // of y; null: padding
      Outputs before[2][2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = 16 * mt + 8 * half + g;
        row[half] = i < count ? static_cast<char*>(p.y) + tokens[i] * p.y_stride * size : nullptr;
#pragma unroll
        for (int column = 0; column < 2; ++column) {  // loaded early, used after the MMAs
          const int at = o + 32 * column + 8 * t;
          if (kExact && accumulate && row[half] && aligned && at + 8 <= out)
            before[half][column] = load_outputs(row[half] + at * size, type);
        }
      }
      float sum[8][4] = {};
      const float* low_row = v + (16 * mt + g) * v_stride;
      const float* high_row = low_row + 8 * v_stride;
      for (int j = 2 * t; j - 2 * t < rank; j += 8) {
        float weights[2][8];
        load_weights<T, kDecode>(p, b, rank, j, o + 32 * (g % 2) + 8 * (g / 2), weights[0], weights[1]);
        // Rows from the eighth on are padding in decode steps.
        const auto high = [&](int at) { return kDecode ? Split{0.0f, 0.0f} : split(high_row[at]); };
        const Split left[4] = {split(low_row[j]), high(j), split(low_row[j + 1]), high(j + 1)};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const Split right[2] = {split_weight(weights[0][i], T()), split_weight(weights[1][i], T())};
          multiply_split<kExact>(sum[i], left, right);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          if (!row[half]) continue;
          const int at = o + 32 * column + 8 * t;
          float values[8];
#pragma unroll
          for (int i = 0; i < 8; ++i) values[i] = sum[i][2 * half + column];
          if (aligned && at + 8 <= out) {
            if (accumulate) {
              if (!kExact)
                before[half][column] = load_outputs(row[half] + at * size, type);  // no registers to load it early
              add_outputs(before[half][column], type, values);
            }
            store_outputs(row[half] + at * size, type, values);
          } else if (!kDecode) {
            update_tail<T>(p, row[half], at, values);
          }
        }
    }
}

// Outputs of tokens without an adapter.
template <class T>
T2L_DEVICE void write_zeros(const LoraParams& p, const int* tokens, int count, int first, int last) {
  const DType type = x_type_of<T>(p);
  for (int i = 0; i < count; ++i) {
    char* row = static_cast<char*>(p.y) + tokens[i] * p.y_stride * cuda::bytes_of(type);
    for (int o = first + thread_index(); o < last; o += kThreads) store_float(row, o, type, 0.0f);
  }
}

// Prefetches the weights of an adapter that this block reads into L2: its outputs of B, and every `blocks`-th row of A from
// row `block` on, of those that blocks of a cluster share.
template <class T, bool kDecode>
T2L_DEVICE void prefetch_weights(const LoraParams& p, int adapter, int rank, int first, int last, int block, int blocks) {
  constexpr int kLine = 128;
  const int64_t size = cuda::bytes_of(w_type_of<T>(p)), a_bytes = p.in * size;
  const char* a = static_cast<const char*>(p.a) + adapter * p.a_stride_adapter * size;
#pragma unroll 1
  for (int i = block + warp_index() * blocks; i < rank; i += kWarps * blocks)
#pragma unroll 1
    for (int64_t at = lane_index() * kLine; at < a_bytes; at += 32 * kLine) prefetch(a + i * p.a_stride_rank * size + at);
  // [rank, out] storage: an N-tile of every row; [out, rank] storage: whole rows, usually within one line.
  const bool by_rank = kDecode || p.b_stride_out == 1;
  const char* b =
      static_cast<const char*>(p.b) + (adapter * p.b_stride_adapter + first * (by_rank ? 1 : p.b_stride_out)) * size;
  const int64_t stride = (by_rank ? p.b_stride_rank : p.b_stride_out) * size;
  const int64_t rows = by_rank ? rank : last - first, row_bytes = (by_rank ? last - first : rank) * size;
#pragma unroll 1
  for (int64_t i = by_rank ? warp_index() : thread_index(); i < rows; i += by_rank ? kWarps : kThreads)
#pragma unroll 1
    for (int64_t at = by_rank ? lane_index() * kLine : 0; at < row_bytes; at += by_rank ? 32 * kLine : kLine)
      prefetch(b + i * stride + at);
}

// kDecode: what lora_is_decode() says, so that the code of anything else is not in the way of what decodes.
template <class T, int MT, int NT, bool kDecode>
T2L_KERNEL(kThreads, cuda::lora_blocks_per_sm(sizeof(T), MT))
lora_kernel(T2L_ARGUMENT(LoraLaunch) launch) {
  const cuda::LoraConfig& c = launch.config;
  SharedMemory shared;
  int* scratch = shared.take<int>(16);
  Tokens<kDecode> tokens{kDecode ? nullptr : shared.take<int>(16 * MT), 0};
  int* bins = kDecode ? nullptr : shared.take<int>(kSortBins);
  constexpr int kRows = kDecode ? 1 : 16 * MT, kSlice = kWarps * kRows * (8 * NT);  // partial sums of a split-K slice
  float* partial = shared.take<float>(c.k_slices * kSlice);
  float* v = shared.take<float>(16 * MT * c.v_stride);
  const int block = static_cast<int>(block_index());
  const int place = block / c.output_tiles, output_tile = block - place * c.output_tiles;
  int index = 0;
  while (output_tile >= c.first_output_tile[index + 1]) ++index;
  const LoraParams& p = launch.problem[index];
  const int outputs = static_cast<int>(c.outputs), out = static_cast<int>(p.out);
  const int first = (output_tile - c.first_output_tile[index]) * outputs,
            last = first + outputs < out ? first + outputs : out;
  const bool clustered = c.cluster > 1;
  const auto prefetch_share = [&](int adapter, int rank) {
    prefetch_weights<T, kDecode>(p, adapter, rank, first, last, clustered ? output_tile - c.first_output_tile[index] : 0,
                                 clustered ? c.first_output_tile[index + 1] - c.first_output_tile[index] : 1);
  };
  if (kDecode && kPdl) {  // beside the end of the product before it, whose y this adds to
    const int guess = peek(p.seg_adapters + place);
    if (guess >= 0 && guess < p.adapters) {
      const int rank = p.true_ranks ? peek(p.true_ranks + guess) : static_cast<int>(p.rank);
      if (rank > 0 && rank <= p.rank) prefetch_share(guess, rank);
    }
  }
  wait_for_earlier_launches();
  if (launch.counts_bad_ids && block == 0 && warp_index() == 0) count_bad_ids<kDecode>(p);
  TokenTile tile;
  if (kDecode || c.one_token_per_block) {
    const int end = read_index(p.seg_indptr + place + 1);
    tile = TokenTile{adapter_of(p, place), 1};
    require(end == place + 1, "seg_indptr: not one token a segment");
    if (kDecode) {
      tokens.one = place;
    } else {
      if (thread_index() == 0) tokens.many[0] = place;
      block_barrier();
    }
  } else {
    tile = find_token_tile(p, place, 16 * MT, scratch, bins, tokens.many);
  }
  if (tile.count == 0) return;
  // The scaling, and ranks of the problems of the cluster's N-tiles, one a lane: loaded before the first that waits for one.
  float scaling = 0.0f;
  if (thread_index() == 0 && tile.adapter >= 0) scaling = read_index(p.scaling + tile.adapter);
  const int block_in_cluster = index_in_cluster(c.cluster),
            last_output_tile = output_tile - block_in_cluster + c.cluster - 1;
  int first_problem = index, problems = 1;
  while (output_tile - block_in_cluster < c.first_output_tile[first_problem]) --first_problem;
  while (last_output_tile >= c.first_output_tile[first_problem + problems]) ++problems;
  int lane_rank = 0;
  if (tile.adapter >= 0 && lane_index() < problems) {
    const LoraParams& problem = launch.problem[first_problem + lane_index()];
    lane_rank = problem.true_ranks ? read_index(problem.true_ranks + tile.adapter) : static_cast<int>(problem.rank);
    require(lane_rank >= 0 && lane_rank <= problem.rank, "ranks: a rank out of range");
  }
  const int in = static_cast<int>(p.in), slice_features = static_cast<int>(cuda::lora_k_slice_features(p.in, sizeof(T)));
  BlockRanks& block_ranks = *reinterpret_cast<BlockRanks*>(scratch);
  if (thread_index() == 0) block_ranks.scaling = scaling;
  int total, first_tile = 0;
#pragma unroll 1
  do {
    const RankTiles tiles = find_ranks(lane_rank, problems, index - first_problem, 8 * first_tile + lane_index() % (8 * NT));
    total = tiles.total;
    if (total == 0) break;
    if (clustered) {
      if (first_tile == 0)
        cluster_arrive_relaxed();  // this block has begun
      else
        cluster_arrive();  // it has read what others stored
    }
    if (!(kDecode && kPdl) && first_tile == 0 && tiles.rank > 0) prefetch_share(tile.adapter, tiles.rank);
    const RowsOfA<T, NT> a(launch.problem + first_problem, tile.adapter, tiles);
    if (thread_index() == 0) {
      block_ranks.valid = a.valid;
      block_ranks.first = 8 * tiles.first;
      block_ranks.rank = tiles.rank;
    }
    int k_slice = block_in_cluster, begin;  // its first feature
#pragma unroll 1
    do {
      begin = k_slice * slice_features;
      const bool has_slice = begin < in || k_slice == 0;  // there may be fewer than blocks
      float sum[MT][NT][4] = {};
      if (has_slice) shrink(p, a, begin, cuda::min(begin + slice_features, in), tokens, tile.count, sum);
      if (clustered && k_slice == block_in_cluster) cluster_wait();  // the others have begun, or read what was stored before
      if (has_slice)
        store_partial<MT, NT, kDecode>(partial + (clustered ? k_slice * kSlice : 0), sum, tile.count, c.cluster);
      k_slice += c.cluster;
      begin = k_slice * slice_features;
      // A block alone adds each split-K slice to v at once, a cluster all of them at the end: in the same order.
      if (clustered) {
        if (begin < in) continue;
        cluster_barrier();
      } else {
        block_barrier();
      }
      add_partial<kRows, NT>(partial, clustered ? c.k_slices : 1, tile.count, clustered || k_slice == 1, begin >= in,
                             v + 8 * first_tile, static_cast<int>(c.v_stride), block_ranks);
      block_barrier();  // before partial is overwritten or v is read
    } while (begin < in);
    first_tile += NT;
  } while (first_tile < total);
  const int rank = total == 0 ? 0 : block_ranks.rank;
  if (rank == 0) {
    if (!kDecode && !p.accumulate) write_zeros<T>(p, tokens.many, tile.count, first, last);
    return;
  }
  const float* mine = v + block_ranks.first;
  if (!kDecode && p.rank_vectors && first == 0)
    for (int i = thread_index(); i < tile.count * rank; i += kThreads)
      store_one(p.rank_vectors + tokens[i / rank] * p.rank + i % rank, mine[i / rank * c.v_stride + i % rank]);
  expand<T, MT, kDecode>(p, tile.adapter, rank, tokens, tile.count, mine, static_cast<int>(c.v_stride), first, last);
}

}  // namespace t2l::device
