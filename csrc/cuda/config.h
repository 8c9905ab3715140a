// How each kernel is launched: pure functions of the sizes and of what a device has.
#pragma once
#include <cstdint>

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

// Multiprocessors of a device, and what a block of it may have of shared memory.
struct DeviceLimits {
  int multiprocessors = 0;
  int shared_bytes = 0;
  const char* error = nullptr;  // why the rest is unknown
};

T2L_ANYWHERE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
T2L_ANYWHERE constexpr int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
T2L_ANYWHERE constexpr int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }
T2L_ANYWHERE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
T2L_ANYWHERE constexpr int64_t piece(int64_t bytes) { return round_up(bytes, 16); }  // as SharedMemory hands it out
T2L_ANYWHERE constexpr int64_t bytes_of(DType type) { return type == DType::f32 ? 4 : 2; }

// ---- LoRA

constexpr int kBins = 1024;            // adapters counted at a time when tokens are brought together
constexpr int64_t kTileOutputs = 64;   // outputs of a warp at a time
constexpr int64_t kDirectTokens = 64;  // single rows up to here are not brought together

struct LoraConfig {
  int m_tiles;                     // tokens of a chunk: 16 times this
  int n_tiles;                     // ranks of a pass over x: 8 times this
  bool direct;                     // one block a token, ids read in place; else tokens of an adapter are brought together
  int64_t chunks;                  // blocks along x: chunks of tokens, at most
  int64_t outputs;                 // of a slice
  int first_slice[kMaxGroup + 1];  // of each member, along y; then all slices
  int64_t v_stride;                // floats between rank vectors in shared memory
  int64_t shared_bytes;
};

// What is multiplied as: the 16-bit type that x, A and B share, else float32 (split in two).
inline DType lora_compute_type(const LoraParams& p) { return p.x_type == p.w_type ? p.x_type : DType::f32; }

// Products of a warp that leave no register in local memory, by the bytes of what is multiplied: 8 ranks times n tiles of a
// pass over the features (1, 2 or this for ranks above 16), 16 tokens times m tiles of a chunk where there are many.
constexpr int kWideTiles = 4;
constexpr int many_m_tiles(int64_t element, int n_tiles) { return element == 4 && n_tiles == kWideTiles ? 1 : 2; }

// Blocks that a multiprocessor has registers for; as many are wanted of a launch.
constexpr int lora_blocks(int64_t element, int m_tiles) { return element == 2 && m_tiles == 1 ? 2 : 1; }

// With the large chunks that many tokens get, or without.
inline LoraConfig lora_config(const LoraParams* members, int64_t count, const DeviceLimits& limits, bool many) {
  const LoraParams& p = members[0];
  LoraConfig c{};
  int64_t rank = 1, outputs = 0, widest = 1;
  for (int64_t i = 0; i < count; ++i) {
    rank = greater(rank, members[i].rank);
    outputs += members[i].out;
    widest = greater(widest, members[i].out);
  }
  const int64_t element = bytes_of(lora_compute_type(p));
  c.direct = !many && p.max_seg_len <= 1 && p.segments == p.tokens && p.tokens <= kDirectTokens;
  c.n_tiles = rank <= 8 ? 1 : rank <= 16 ? 2 : kWideTiles;
  c.m_tiles = many ? many_m_tiles(element, c.n_tiles) : 1;
  const int64_t chunk = 16 * c.m_tiles;
  const int64_t kinds = lesser(p.adapters + (p.accumulate ? 0 : 1), p.segments);  // of tokens that need a chunk
  c.chunks = c.direct ? p.tokens : lesser(p.tokens, p.tokens / chunk + kinds);
  const int64_t blocks = lora_blocks(element, c.m_tiles) * limits.multiprocessors;
  const int64_t wanted = greater(1, ceil_div(blocks, greater(c.chunks, 1)));
  c.outputs = round_up(lesser(widest, ceil_div(outputs, wanted)), kWarps * kTileOutputs);
  for (int64_t i = 0; i < count; ++i)
    c.first_slice[i + 1] = c.first_slice[i] + static_cast<int>(ceil_div(members[i].out, c.outputs));
  const int64_t width = round_up(rank, 8 * c.n_tiles);
  c.v_stride = width / 8 % 2 ? width : width + 8;  // 8 or 24 banks from row to row
  c.shared_bytes = piece(16 * sizeof(int)) + piece(chunk * sizeof(int)) + piece(kBins * sizeof(int)) +
                   piece(kWarps * chunk * 8 * c.n_tiles * sizeof(float)) + piece(chunk * c.v_stride * sizeof(float));
  return c;
}

inline LoraConfig choose_lora_config(const LoraParams* members, int64_t count, const DeviceLimits& limits) {
  const LoraConfig few = lora_config(members, count, limits, false), many = lora_config(members, count, limits, true);
  // Large chunks read A and B least often.  They pay where each multiprocessor has some even so: with fewer, outputs have to
  // be cut into slices, of which each reads x again.
  const int64_t element = bytes_of(lora_compute_type(members[0]));
  const int64_t enough = 16 * many.m_tiles * lora_blocks(element, many.m_tiles) * limits.multiprocessors;
  return !few.direct && members[0].tokens >= enough && many.shared_bytes <= limits.shared_bytes ? many : few;
}

// ---- hypernetwork trunk

constexpr int64_t kMaxHelpers = 16;
constexpr int64_t kMaxTrunkRows = int64_t{1} << 30;  // (task, module, layer): counted in 32 bits

struct TrunkConfig {
  int64_t tile_rows;  // (task, module, layer) rows of a block: 16 or fewer
  int64_t tiles;
  int64_t helpers;        // blocks that only ask for the weights, where most multiprocessors would be idle
  int64_t sides_at_once;  // of a block; the rest go to other blocks
  int64_t ranks_at_once;
  int64_t narrow_stride;  // elements between rows of inputs of the first products
  int64_t wide_stride;    // and of the second ones
  int64_t shared_bytes;
};

// Rows of operands in shared memory: padded to whole blocks of 64 bytes, then so that two rows lie 64 bytes apart modulo
// 128, which lets eight lanes read two rows at once.
inline int64_t operand_stride(int64_t features, DType type) {
  const int64_t blocks = ceil_div(features * bytes_of(type), 64);
  return (blocks % 2 ? blocks : blocks + 1) * 64 / bytes_of(type);
}

inline TrunkConfig choose_trunk_config(const TrunkParams& p, const DeviceLimits& limits) {
  TrunkConfig c{};
  c.narrow_stride = operand_stride(greater(p.m, p.t), p.w_type);
  c.wide_stride = operand_stride(4 * p.m, p.w_type);
  const int64_t rows = p.tasks * p.modules * p.layers;
  for (c.tile_rows = 16; c.tile_rows >= 1; c.tile_rows /= 2) {
    c.tiles = ceil_div(rows, c.tile_rows);
    const bool spread = c.tiles * p.sides * p.ranks <= limits.multiprocessors;
    c.sides_at_once = spread ? 1 : p.sides;
    c.ranks_at_once = spread ? 1 : p.ranks;
    const int64_t panels = 1 + (c.sides_at_once > 1) + (c.ranks_at_once > 1);
    c.shared_bytes = panels * piece(c.tile_rows * p.m * sizeof(float)) +
                     piece(c.tile_rows * c.narrow_stride * bytes_of(p.w_type)) +
                     piece(c.tile_rows * c.wide_stride * bytes_of(p.w_type));
    const int64_t blocks = c.tiles * (p.sides / c.sides_at_once) * (p.ranks / c.ranks_at_once);
    c.helpers = greater(0, lesser(kMaxHelpers, limits.multiprocessors - blocks));
    if (c.shared_bytes <= limits.shared_bytes) return c;
  }
  c.tile_rows = 0;  // does not fit
  return c;
}

// ---- hypernetwork heads

constexpr int kHeadStages = 4;    // copies under way, less one
constexpr int kStageBytes = 128;  // of a row and a stage: two blocks of 64
constexpr int kHeadTile = 128;    // weight rows of a tile
// Of all heads of a launch together, and of latent: rows, and bytes of one, are counted in 32 bits.
constexpr int64_t kMaxHeadRows = int64_t{1} << 30;
constexpr int kNarrowRows = 32;  // latent rows of a tile
constexpr int kWideRows = 128;   // the same for many rows, in 16-bit types: float32 sums would not fit the registers

struct HeadConfig {
  bool wide;
  bool aligned;                   // every row of weights and latents begins at a multiple of 16 bytes
  int latent_rows;                // of a side
  int latent_tiles;               // of all sides
  int per_latent;                 // ranks of a latent row
  int depth_steps;                // stages of a product
  int rows[kMaxGroup];            // of the weights of each module
  int first_tile[kMaxGroup + 1];  // weight tiles of the modules before this one
  int64_t blocks;
  int64_t shared_bytes;
};

// Weight rows of one module: as stored.
inline int64_t head_rows(const HeadParams& p) {
  const int64_t per_latent = p.rank / p.ranks;
  return per_latent * (p.sides == 2 ? greater(p.in, p.out_features) : p.in + p.out_features);
}
inline int64_t head_latent_rows(const HeadParams& p) { return p.tasks * p.ranks * p.layers; }

inline bool head_is_aligned(const HeadParams& p) {
  const int64_t quad = 16 / bytes_of(p.w_type);
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  bool all = p.h % quad == 0 && aligned(p.weight) && aligned(p.latent);
  for (const int64_t stride : p.latent_stride) all = all && stride % quad == 0;
  return all;
}

// Of modules with at most kMaxHeadRows rows.
inline HeadConfig choose_head_config(const HeadParams* modules, int64_t count, const DeviceLimits& limits) {
  const HeadParams& p = modules[0];
  HeadConfig c{};
  c.latent_rows = static_cast<int>(head_latent_rows(p));
  const auto shared = [](int64_t tile) { return piece(kHeadStages * (kHeadTile + tile) * kStageBytes) + piece(tile * 16); };
  c.wide = c.latent_rows > 2 * kNarrowRows && p.w_type != DType::f32 && shared(kWideRows) <= limits.shared_bytes;
  const int64_t tile = c.wide ? kWideRows : kNarrowRows;
  c.latent_tiles = static_cast<int>(p.sides * ceil_div(c.latent_rows, tile));
  c.per_latent = static_cast<int>(p.rank / p.ranks);
  c.depth_steps = static_cast<int>(greater(1, ceil_div(p.h * bytes_of(p.w_type), kStageBytes)));  // without depth: the bias
  c.aligned = true;
  for (int64_t i = 0; i < count; ++i) {
    c.rows[i] = static_cast<int>(head_rows(modules[i]));
    c.first_tile[i + 1] = c.first_tile[i] + static_cast<int>(ceil_div(c.rows[i], kHeadTile));
    c.aligned = c.aligned && head_is_aligned(modules[i]);
  }
  c.blocks = lesser(c.first_tile[count], (c.wide || p.w_type == DType::f32 ? 1 : 2) * limits.multiprocessors);
  c.shared_bytes = shared(tile);
  return c;
}

}  // namespace t2l::cuda
