// Launch configuration of each kernel: pure functions of the problem sizes and the device limits.
#pragma once
#include <cstdint>
#include <initializer_list>

#include "t2l/cuda_kernels.h"
#include "t2l/params.h"

#ifdef __CUDACC__
#define T2L_ANYWHERE __host__ __device__
#else
#define T2L_ANYWHERE
#endif

namespace t2l::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// SMs of a device, and the shared memory that a block may have.
struct DeviceLimits {
  int num_sms = 0;
  int shared_bytes = 0;
  const char* error = nullptr;  // if set, the rest is unknown
};

T2L_ANYWHERE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
T2L_ANYWHERE constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
T2L_ANYWHERE constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
T2L_ANYWHERE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
T2L_ANYWHERE constexpr int64_t align16(int64_t bytes) { return round_up(bytes, 16); }  // allocation size of SharedMemory
T2L_ANYWHERE constexpr int64_t bytes_of(DType type) { return type == DType::f32 ? 4 : 2; }

// ---- LoRA

constexpr int kSortBins = 1024;   // histogram bins of the counting sort: adapters per pass
constexpr int kWarpOutputs = 64;  // outputs of a warp tile of expand
// 32-bit indices: those of split-K slices and N-tiles beyond the last are five times as large.
constexpr int64_t kMaxLoraFeatures = int64_t{1} << 28;  // in or out
constexpr int64_t kMaxLoraTokens = int64_t{1} << 30;
constexpr int64_t kMaxOneTokenBlocks = 64;  // batches of single tokens up to this size are not sorted
constexpr int kShrinkParts = 4;             // of the features of x, at most

// Features of a split-K slice: whole k-blocks of 64 bytes for every warp, four each, so that all loads of a slice can be in
// flight.  They depend on the number of features alone: sums have the same bits, however many blocks share the slices.
T2L_ANYWHERE constexpr int64_t lora_k_slice_features(int64_t in, int64_t element) {
  const int64_t step = 4 * kWarps * 64 / element;
  return step * max(1, ceil_div(in, step * kShrinkParts));
}
T2L_ANYWHERE constexpr int lora_k_slices(int64_t in, int64_t element) {
  return static_cast<int>(max(1, ceil_div(in, lora_k_slice_features(in, element))));
}

struct LoraConfig {
  int m_tiles;               // tokens of a token tile / 16
  int n_tiles;               // ranks of a pass over x / 8
  bool one_token_per_block;  // ids are read in place, without the counting sort of tokens by adapter
  bool decode;               // the kernel without code for anything else
  int64_t token_tiles;       // upper bound
  int64_t outputs;           // outputs of an N-tile
  int output_tiles;          // N-tiles of all problems; those of a token tile are neighbours in the grid and share x in L2
  int first_output_tile[kMaxGroup + 1];  // of each problem; last, the number of N-tiles
  int cluster;       // neighbouring N-tiles whose blocks share the rank vectors: each sums some of the split-K slices
  int k_slices;      // whose sums are kept apart: all of a cluster's, 1 of a block alone
  int64_t v_stride;  // row stride of the rank vectors in shared memory, in floats
  int64_t shared_bytes;
};

// Operand type of the tensor cores: the 16-bit type that x, A and B share, else float32 (3xTF32).
inline DType lora_compute_type(const LoraParams& p) { return p.x_type == p.w_type ? p.x_type : DType::f32; }

// Largest warp tiles without register spills: n tiles of 8 ranks for ranks above 16, and m tiles of 16 tokens of large
// token tiles, by the bytes of an operand.
constexpr int kWideTiles = 4;
constexpr int large_m_tiles(int64_t element, int n_tiles) { return element == 4 && n_tiles == kWideTiles ? 1 : 2; }

// Occupancy by registers, in blocks per SM: a launch that has no more of them runs in one wave.
constexpr int lora_blocks_per_sm(int64_t element, int m_tiles) { return element == 2 && m_tiles == 1 ? 2 : 1; }

// N-tiles of one problem: at least one where it leaves its rank vectors.
inline int64_t lora_output_tiles(const LoraParams& p, int64_t outputs) {
  return max(p.rank_vectors ? 1 : 0, ceil_div(p.out, outputs));
}

// Outputs of an N-tile: the finest cut with which all token tiles of all N-tiles run at once, in `slots` blocks; where whole
// problems are too many already, those, since each N-tile reads x and A again.
inline int64_t lora_tile_outputs(const LoraParams* problems, int64_t count, int64_t token_tiles, int64_t slots) {
  constexpr int64_t kStep = kWarps * kWarpOutputs;
  int64_t outputs = 0, widest = 1;
  for (int64_t i = 0; i < count; ++i) {
    outputs += problems[i].out;
    widest = max(widest, problems[i].out);
  }
  const auto output_tiles = [&](int64_t size) {
    int64_t found = 0;
    for (int64_t i = 0; i < count; ++i) found += lora_output_tiles(problems[i], size);
    return found;
  };
  const int64_t most = max(1, slots / max(token_tiles, 1)), whole = round_up(widest, kStep);
  int64_t size =
      min(round_up(max(1, ceil_div(outputs, most)), kStep), whole);  // none is finer: N-tiles end with their problem
  while (size < whole && output_tiles(size) > most) size += kStep;
  return size;
}

inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// One token a block, 16-bit operands and weights stored as generated adapters are, rows of whole k-blocks or runs of eight
// outputs at 16-byte boundaries, y added to.
inline bool lora_is_decode(const LoraParams* problems, int64_t count, const LoraConfig& c) {
  bool all = c.one_token_per_block && bytes_of(lora_compute_type(problems[0])) == 2;
  const auto aligned = [](const void* data, std::initializer_list<int64_t> strides) {
    bool whole = is_aligned(data);
    for (const int64_t stride : strides) whole = whole && stride % 8 == 0;
    return whole;
  };
  for (int64_t i = 0; i < count && all; ++i) {
    const LoraParams& p = problems[i];
    all = p.accumulate && !p.rank_vectors && p.in % 32 == 0 && p.out % 8 == 0 && p.b_stride_out == 1 &&
          aligned(p.x, {p.x_stride}) && aligned(p.y, {p.y_stride}) && aligned(p.a, {p.a_stride_adapter, p.a_stride_rank}) &&
          aligned(p.b, {p.b_stride_adapter, p.b_stride_rank});
  }
  return all;
}

// Blocks of a cluster, where x has split-K slices to share and is that of all problems.  N-tiles are filled up to whole
// clusters with empty ones, whose blocks only sum split-K slices, if all still run at once.  A cluster must fit one GPC, and
// GPCs differ in size: clusters of 8 use at most 7/8 of the SMs.
inline int lora_cluster(const LoraParams* problems, int64_t count, int64_t token_tiles, int64_t output_tiles, int64_t most,
                        int64_t slots) {
  const LoraParams& p = problems[0];
  if (output_tiles < 2 || lora_k_slices(p.in, bytes_of(lora_compute_type(p))) < 2) return 1;
  for (int64_t i = 1; i < count; ++i) {
    const LoraParams& other = problems[i];
    if (other.x != p.x || other.x_stride != p.x_stride || other.in != p.in || other.scaling != p.scaling) return 1;
  }
  for (const int cluster : {8, 4, 2}) {
    const bool is_needed = cluster < 2 * output_tiles;  // else half of its blocks would be enough
    if (is_needed && cluster <= most &&
        token_tiles * round_up(output_tiles, cluster) <= (cluster == 8 ? slots - slots / 8 : slots))
      return cluster;
  }
  return output_tiles % 2 == 0 && most >= 2 ? 2 : 1;
}

constexpr int lora_n_tiles(int64_t tiles) { return tiles <= 1 ? 1 : tiles == 2 ? 2 : kWideTiles; }

// What follows from the tiles of 8 ranks that a block makes rank vectors of: those of one problem or, in clusters, of all
// problems that a cluster has N-tiles of.
inline void choose_rank_tiles(const LoraParams* problems, int64_t count, LoraConfig& c) {
  const int64_t element = bytes_of(lora_compute_type(problems[0]));
  int64_t tiles = 1;
  for (int64_t first = 0; first < count; ++first) {
    const int last_output_tile =
        c.first_output_tile[first + 1] - 1;  // the cluster that begins with it, or before, has the most problems
    int64_t all = 0;
    for (int64_t i = first; i < count && (i == first || c.first_output_tile[i] < round_up(last_output_tile + 1, c.cluster));
         ++i)
      all += ceil_div(problems[i].rank, 8);
    tiles = max(tiles, all);
  }
  c.k_slices = c.cluster > 1 ? lora_k_slices(problems[0].in, element) : 1;
  // Token tiles are cut for the widest problem's.  Where no kernel has so many tiles beside theirs, there are more passes.
  if (c.m_tiles <= large_m_tiles(element, lora_n_tiles(tiles))) c.n_tiles = lora_n_tiles(tiles);
  const int64_t width = 8 * round_up(tiles, c.n_tiles), token_tile = 16 * c.m_tiles;
  c.v_stride = width / 8 % 2 ? width : width + 8;  // rows are 8 or 24 banks apart: no bank conflicts
  c.shared_bytes = align16(16 * sizeof(int)) +
                   (c.decode ? 0 : align16(token_tile * sizeof(int)) + align16(kSortBins * sizeof(int))) +
                   align16(c.k_slices * kWarps * (c.decode ? 1 : token_tile) * 8 * c.n_tiles * sizeof(float)) +
                   align16(token_tile * c.v_stride * sizeof(float));
}

// `max_cluster`: of the device.
inline LoraConfig lora_config(const LoraParams* problems, int64_t count, int64_t max_cluster, const DeviceLimits& limits,
                              bool large_chunks) {
  const LoraParams& p = problems[0];
  LoraConfig c{};
  int64_t rank = 1;
  for (int64_t i = 0; i < count; ++i) rank = max(rank, problems[i].rank);
  const int64_t element = bytes_of(lora_compute_type(p));
  c.one_token_per_block = !large_chunks && p.max_seg_len <= 1 && p.segments == p.tokens && p.tokens <= kMaxOneTokenBlocks;
  c.n_tiles = lora_n_tiles(ceil_div(rank, 8));
  c.m_tiles = large_chunks ? large_m_tiles(element, c.n_tiles) : 1;
  const int64_t token_tile = 16 * c.m_tiles;
  const int64_t used_adapters = min(p.adapters + (p.accumulate ? 0 : 1), p.segments);  // adapters in use, at most
  c.token_tiles = c.one_token_per_block ? p.tokens : min(p.tokens, p.tokens / token_tile + used_adapters);
  if (p.bad_ids && p.segments) c.token_tiles = max(c.token_tiles, 1);  // a block that counts, even without adapters
  const int64_t blocks_per_sm = lora_blocks_per_sm(element, c.m_tiles);
  c.outputs = lora_tile_outputs(problems, count, c.token_tiles, blocks_per_sm * limits.num_sms);
  for (int64_t i = 0; i < count; ++i)
    c.first_output_tile[i + 1] = c.first_output_tile[i] + static_cast<int>(lora_output_tiles(problems[i], c.outputs));
  c.output_tiles = c.first_output_tile[count];
  c.decode = lora_is_decode(problems, count, c);
  const LoraConfig alone = c;
  c.cluster = lora_cluster(problems, count, c.token_tiles, c.output_tiles, max_cluster, blocks_per_sm * limits.num_sms);
  c.first_output_tile[count] = c.output_tiles = static_cast<int>(round_up(c.output_tiles, c.cluster));
  choose_rank_tiles(problems, count, c);
  if (c.cluster == 1 || blocks_per_sm * c.shared_bytes <= limits.shared_bytes) return c;
  c = alone;  // fewer blocks would run at once
  c.cluster = 1;
  choose_rank_tiles(problems, count, c);
  return c;
}

inline LoraConfig choose_lora_config(const LoraParams* problems, int64_t count, int64_t max_cluster,
                                     const DeviceLimits& limits) {
  const LoraConfig small = lora_config(problems, count, max_cluster, limits, false);
  const LoraConfig large = lora_config(problems, count, max_cluster, limits, true);
  // Large token tiles read A and B least often.  They pay once they fill all SMs: with fewer token tiles, outputs are split
  // into N-tiles, and every N-tile reads x again.
  const int64_t element = bytes_of(lora_compute_type(problems[0]));
  const int64_t wave = 16 * large.m_tiles * lora_blocks_per_sm(element, large.m_tiles) * limits.num_sms;
  return !small.one_token_per_block && problems[0].tokens >= wave && large.shared_bytes <= limits.shared_bytes ? large
                                                                                                               : small;
}

// ---- gradients of A and B: a block has 16 ranks of an adapter and 64 columns of A or B

constexpr int kGradRanks = 16, kGradColumns = 64;
constexpr int kGradStride = kGradColumns + 8;  // of a rank's partial sums in shared memory: rows are 8 banks apart

struct LoraGradConfig {
  int tiles_a, tiles;  // columns of A, of A and B, / kGradColumns
  int rank_tiles;
  int64_t blocks;
  int64_t shared_bytes;
};

inline LoraGradConfig choose_lora_grad_config(const LoraParams& p) {
  LoraGradConfig c{};
  c.tiles_a = static_cast<int>(ceil_div(p.in, kGradColumns));
  c.tiles = c.tiles_a + static_cast<int>(ceil_div(p.out, kGradColumns));
  c.rank_tiles = static_cast<int>(ceil_div(p.rank, kGradRanks));
  c.blocks = int64_t{c.tiles} * c.rank_tiles * p.adapters;
  c.shared_bytes = align16(int64_t{kWarps} * kGradRanks * kGradStride * sizeof(float));
  return c;
}

// ---- hypernetwork trunk

constexpr int64_t kMaxPrefetchBlocks = 16;
constexpr int64_t kTrunkColumns = 16;                // of a warp tile
constexpr int64_t kMaxTrunkRows = int64_t{1} << 30;  // (task, module, layer): 32-bit indices

struct TrunkConfig {
  int64_t tile_rows;  // (task, module, layer) rows of a block: 16 or fewer
  int64_t tiles;
  int64_t cluster;          // blocks that share the columns of every linear of a tile
  int64_t prefetch_blocks;  // extra blocks that warm L2 with the weights, where SMs would be idle
  int64_t sides_per_block;  // all, or 1: one block per side
  int64_t ranks_per_block;
  int64_t input_stride;   // shared-memory row stride of the inputs of first linears, in elements
  int64_t hidden_stride;  // and of second linears
  int64_t shared_bytes;
};

// Row stride of operands in shared memory: an odd number of 64-byte k-blocks, so that eight lanes reading 16 bytes each of
// two adjacent rows hit all 32 banks.
inline int64_t operand_stride(int64_t features, DType type) {
  const int64_t k_blocks = ceil_div(features * bytes_of(type), 64);
  return (k_blocks % 2 ? k_blocks : k_blocks + 1) * 64 / bytes_of(type);
}

// Blocks of a cluster: as many as leave an eighth of the SMs free, since a cluster's blocks must be close to each other and
// do not fill all of them; and so that each has columns of its own in every linear.
inline int64_t trunk_cluster(const TrunkParams& p, int64_t blocks, int64_t most, const DeviceLimits& limits) {
  int64_t cluster = 1;
  if (p.m % kTrunkColumns || (p.encoder.weight && p.t % kTrunkColumns)) return cluster;  // exchanged 16 bytes at a time
  while (2 * cluster <= min(most, p.m / kTrunkColumns) && 2 * cluster * blocks <= limits.num_sms - limits.num_sms / 8)
    cluster *= 2;
  return cluster;
}

// `max_cluster`: of the device, a power of two.
inline TrunkConfig choose_trunk_config(const TrunkParams& p, int64_t max_cluster, const DeviceLimits& limits) {
  TrunkConfig c{};
  c.input_stride = operand_stride(max(p.m, p.t), p.w_type);
  c.hidden_stride = operand_stride(4 * p.m, p.w_type);
  const int64_t rows = p.tasks * p.modules * p.layers;
  for (c.tile_rows = 16; c.tile_rows >= 1; c.tile_rows /= 2) {
    c.tiles = ceil_div(rows, c.tile_rows);
    const bool split = c.tiles * p.sides * p.ranks <= limits.num_sms;
    c.sides_per_block = split ? 1 : p.sides;
    c.ranks_per_block = split ? 1 : p.ranks;
    const int64_t panels = 1 + (c.sides_per_block > 1) + (c.ranks_per_block > 1);
    c.shared_bytes = panels * align16(c.tile_rows * p.m * sizeof(float)) +
                     (p.encoder.weight ? align16(c.tile_rows * p.t * sizeof(float)) : 0) +
                     align16(c.tile_rows * c.input_stride * bytes_of(p.w_type)) +
                     align16(c.tile_rows * c.hidden_stride * bytes_of(p.w_type));
    const int64_t blocks = c.tiles * (p.sides / c.sides_per_block) * (p.ranks / c.ranks_per_block);
    c.cluster = trunk_cluster(p, blocks, max_cluster, limits);
    c.prefetch_blocks = max(0, min(kMaxPrefetchBlocks, limits.num_sms - c.cluster * blocks)) / c.cluster * c.cluster;
    if (c.shared_bytes <= limits.shared_bytes) return c;
  }
  c.tile_rows = 0;  // does not fit
  return c;
}

// ---- hypernetwork heads

constexpr int kHeadStages = 4;      // of the cp.async pipeline
constexpr int kTileRowBytes = 128;  // k-tile: bytes of a row per stage, two k-blocks of 64
constexpr int kHeadTile = 128;      // weight rows of a tile
// 32-bit indices: limit of the rows of weights and latent of a launch, and of the bytes of a row.
constexpr int64_t kMaxHeadRows = int64_t{1} << 30;
constexpr int64_t kHeadPrefetchBytes = 24 << 20;  // of all blocks, in half of an H100's L2
constexpr int kNarrowRows = 32;                   // latent rows of a tile
constexpr int kWideRows = 128;             // for many rows, 16-bit types only: accumulators of split float32 would spill
constexpr int kGroupRows = kWideRows / 2;  // where two groups of warps share stationary weights

struct HeadConfig {
  bool wide;
  bool stationary;      // the weights of a tile stay in shared memory while all latents pass, a tile of them a group
  bool aligned;         // rows of weights and latents are 16-byte aligned
  int latent_rows;      // per side
  int latent_tiles;     // of all sides
  int per_latent;       // ranks per latent row
  int k_tiles;          // pipeline stages per product
  int prefetch_rows;    // of a weight tile that a block prefetches: its first before it waits for latents, the next
  int rows[kMaxGroup];  // weight rows of each module
  int first_tile[kMaxGroup + 1];  // first weight tile of each module; last, the number of tiles
  int64_t blocks;
  int64_t shared_bytes;
};

// Stored weight rows of one module.
inline int64_t head_rows(const HeadParams& p) {
  const int64_t per_latent = p.rank / p.ranks;
  return per_latent * (p.sides == 2 ? max(p.in, p.out_features) : p.in + p.out_features);
}
inline int64_t head_latent_rows(const HeadParams& p) { return p.tasks * p.ranks * p.layers; }

inline bool head_is_aligned(const HeadParams& p) {
  const int64_t vec = 16 / bytes_of(p.w_type);
  bool all = p.h % vec == 0 && is_aligned(p.weight) && is_aligned(p.latent);
  for (const int64_t stride : p.latent_stride) all = all && stride % vec == 0;
  return all;
}

// Requires at most kMaxHeadRows rows.
inline HeadConfig choose_head_config(const HeadParams* modules, int64_t count, const DeviceLimits& limits) {
  const HeadParams& p = modules[0];
  HeadConfig c{};
  c.latent_rows = static_cast<int>(head_latent_rows(p));
  const auto shared = [](int64_t tile) {
    return align16(kHeadStages * kHeadTile * kTileRowBytes) + align16(kHeadStages * tile * kTileRowBytes) +
           align16(tile * 16);
  };
  c.wide = c.latent_rows > 2 * kNarrowRows && p.w_type != DType::f32 && shared(kWideRows) <= limits.shared_bytes;
  const int64_t tile = c.wide ? kWideRows : kNarrowRows;
  c.per_latent = static_cast<int>(p.rank / p.ranks);
  c.k_tiles = static_cast<int>(max(1, ceil_div(p.h * bytes_of(p.w_type), kTileRowBytes)));  // h = 0: bias alone
  const int64_t stationary = align16(int64_t{c.k_tiles} * kHeadTile * kTileRowBytes) +
                             2 * (align16(kHeadStages * kGroupRows * kTileRowBytes) + align16(kGroupRows * 16));
  c.stationary = c.wide && p.sides * c.latent_rows > kWideRows && stationary <= limits.shared_bytes;
  c.latent_tiles = static_cast<int>(p.sides * ceil_div(c.latent_rows, c.stationary ? kGroupRows : tile));
  c.aligned = true;
  for (int64_t i = 0; i < count; ++i) {
    c.rows[i] = static_cast<int>(head_rows(modules[i]));
    c.first_tile[i + 1] = c.first_tile[i] + static_cast<int>(ceil_div(c.rows[i], kHeadTile));
    c.aligned = c.aligned && head_is_aligned(modules[i]);
  }
  const bool one_per_sm = c.wide || p.w_type == DType::f32 || 2 * shared(tile) > limits.shared_bytes;
  c.blocks = min(c.first_tile[count], (one_per_sm ? 1 : 2) * limits.num_sms);
  const int64_t row_bytes = max(1, p.h * bytes_of(p.w_type));
  c.prefetch_rows = static_cast<int>(min(kHeadTile, kHeadPrefetchBytes / max(1, c.blocks) / row_bytes));
  c.shared_bytes = c.stationary ? stationary : shared(tile);
  return c;
}

}  // namespace t2l::cuda
