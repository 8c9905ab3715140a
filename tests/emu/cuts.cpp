// What launch configurations promise, over sizes of models, batches and devices.
#include <algorithm>
#include <string>
#include <vector>

#include "checks.h"
#include "cuda/config.h"
#include "emu/emulator.h"

namespace {

namespace cuda = t2l::cuda;
namespace emu = t2l::emu;

// Over sizes of models and batches: blocks of LoRA fit the device at once where whole problems do, and no finer cut would.
std::string check_lora_cut() {
  constexpr int64_t kStep = cuda::kWarps * cuda::kWarpOutputs;
  const std::vector<std::vector<int64_t>> groups = {
      {64}, {576}, {4096}, {14336}, {128256}, {4096, 1024}, {576, 192}, {4096, 1024, 1024}, {14336, 14336}, {3072, 0, 1}};
  int64_t cases = 0;
  for (const std::vector<int64_t>& outs : groups)
    for (const int64_t slots : {108, 132, 216, 264})
      for (int64_t token_tiles = 1; token_tiles <= 2 * slots; ++token_tiles) {
        std::vector<t2l::LoraParams> problems(outs.size());
        for (size_t i = 0; i < outs.size(); ++i) problems[i].out = outs[i];
        const int64_t count = static_cast<int64_t>(outs.size());
        const int64_t size = cuda::lora_tile_outputs(problems.data(), count, token_tiles, slots);
        const auto blocks = [&](int64_t outputs) {
          int64_t output_tiles = 0;
          for (const int64_t out : outs) output_tiles += cuda::ceil_div(out, outputs);
          return output_tiles * token_tiles;
        };
        const int64_t whole = cuda::round_up(*std::max_element(outs.begin(), outs.end()), kStep);
        EXPECT(size >= kStep && size % kStep == 0 && size <= whole, static_cast<double>(size));
        EXPECT(blocks(size) <= slots || size == whole, static_cast<double>(token_tiles));
        EXPECT(size == kStep || blocks(size - kStep) > slots, static_cast<double>(token_tiles));
        ++cases;
      }
  EXPECT(cases == 10 * 2 * (108 + 132 + 216 + 264));
  return "";
}

// Clusters are of 2, 4 or 8 blocks, need split-K slices of x to share, and with the N-tiles that fill them up all run at
// once, as do the blocks that registers allow beside each other.  Every rank that a launch may have fits every device.
std::string check_lora_clusters() {
  const float scaling = 1;
  int64_t clustered = 0, filled = 0;
  for (const int64_t kib : {99, 163, 227})
    for (const t2l::DType type : {t2l::DType::bf16, t2l::DType::f32})
      for (const int64_t in : {64, 576, 1024, 1040, 4096, 18944})
        for (const std::vector<int64_t>& outs :
             {std::vector<int64_t>{576}, {4096}, {18944}, {4096, 1024, 1024}, {14336, 14336}})
          for (const int64_t rank : {1, 8, 12, 64, 1024})
            for (const int64_t tokens : {1, 7, 33, 64, 512, 8192})
              for (const int64_t most : {1, 2, 3, 8}) {
                std::vector<t2l::LoraParams> problems(outs.size());
                for (size_t i = 0; i < outs.size(); ++i) {
                  t2l::LoraParams& p = problems[i];
                  p.x_type = p.w_type = type, p.in = in, p.out = outs[i], p.rank = rank, p.scaling = &scaling;
                  p.tokens = tokens, p.segments = tokens <= 64 ? tokens : 8, p.max_seg_len = tokens <= 64 ? 1 : tokens / 8;
                  p.adapters = 64, p.accumulate = true;
                }
                const int64_t count = static_cast<int64_t>(outs.size()), shared = kib * 1024;
                const auto choose = [&] { return cuda::choose_lora_config(problems.data(), count, most, {132, shared}); };
                const cuda::LoraConfig c = choose();
                const int64_t element = cuda::bytes_of(type), per_sm = cuda::lora_blocks_per_sm(element, c.m_tiles);
                EXPECT(c.shared_bytes <= shared, static_cast<double>(rank));
                EXPECT(c.m_tiles <= cuda::large_m_tiles(element, c.n_tiles), c.n_tiles);  // there is such a kernel
                EXPECT(c.cluster == 1 || c.cluster == 2 || c.cluster == 4 || c.cluster == 8, c.cluster);
                EXPECT(c.cluster <= most && c.output_tiles % c.cluster == 0 && c.first_output_tile[count] == c.output_tiles,
                       c.cluster);
                EXPECT(c.k_slices == (c.cluster == 1 ? 1 : cuda::lora_k_slices(in, element)), c.k_slices);
                if (c.cluster == 1) continue;
                EXPECT(in * element > 4 * cuda::kWarps * 64, static_cast<double>(in));
                EXPECT(per_sm * c.shared_bytes <= shared, static_cast<double>(rank));
                const int64_t last = outs.size() - 1, whole = cuda::ceil_div(outs[last], c.outputs);
                const int64_t empty = c.output_tiles - c.first_output_tile[last] - whole;
                EXPECT(empty >= 0 && empty < c.cluster, static_cast<double>(empty));
                EXPECT(empty == 0 || c.token_tiles * c.output_tiles <= per_sm * 132, static_cast<double>(tokens));
                problems.back().x = &scaling;  // another x than the others'
                EXPECT(outs.size() == 1 || choose().cluster == 1);
                ++clustered, filled += empty > 0;
              }
  EXPECT(clustered > 1000 && filled > 100, static_cast<double>(clustered));
  return "";
}

// Clusters of the trunk: powers of two that leave room, whose blocks all have columns; whole ones to prefetch.
std::string check_trunk_cut() {
  int clustered = 0;
  for (const int64_t m : {32, 34, 48, 64, 128, 512, 1024, 4096})
    for (const int64_t sides : {1, 2})
      for (const int64_t ranks : {1, 8})
        for (const int sms : {1, 16, 108, 132})
          for (const int64_t most : {1, 2, 8})
            for (int64_t layers = 1; layers <= 4096; layers = layers * 3 / 2 + 1) {
              t2l::TrunkParams p{};
              p.tasks = 1, p.modules = 2, p.layers = layers, p.sides = sides, p.ranks = ranks;
              const float matrix = 0;  // of the encoder, whose columns are shared too
              p.t = ranks == 8 ? 40 : 64, p.m = m, p.h = m, p.w_type = t2l::DType::bf16;
              p.encoder.weight = sides == 2 ? &matrix : nullptr;
              const cuda::TrunkConfig c = cuda::choose_trunk_config(p, most, {sms, emu::kMaxSharedBytes});
              EXPECT(c.tile_rows > 0, static_cast<double>(m));
              const int64_t blocks = c.tiles * (sides / c.sides_per_block) * (ranks / c.ranks_per_block);
              EXPECT(c.cluster >= 1 && c.cluster <= most && (c.cluster & (c.cluster - 1)) == 0);
              EXPECT(c.cluster == 1 || (m % 16 == 0 && 16 * c.cluster <= m && 8 * c.cluster * blocks <= 7 * sms + 7));
              EXPECT(c.cluster == 1 || !p.encoder.weight || p.t % 16 == 0);
              EXPECT(c.prefetch_blocks % c.cluster == 0 && c.prefetch_blocks <= cuda::kMaxPrefetchBlocks);
              EXPECT(c.prefetch_blocks == 0 || c.cluster * blocks + c.prefetch_blocks <= sms);
              clustered += c.cluster == 8;
            }
  EXPECT(clustered > 100, clustered);
  return "";
}

// Heads: blocks, which run to the end of the launch, all run at once, on each SM as many as its shared memory holds.  Where
// weights stay in shared memory, both groups of warps have latents.
std::string check_head_blocks() {
  int doubled = 0, stationary = 0;
  for (const int64_t kib : {99, 163, 227})
    for (const t2l::DType type : {t2l::DType::bf16, t2l::DType::f32})
      for (const int64_t tasks : {1, 2, 16})
        for (const int64_t h : {0, 64, 512, 4096, 16 << 20}) {
          t2l::HeadParams p{};
          p.w_type = type, p.tasks = tasks, p.layers = 32, p.sides = 2, p.ranks = 1, p.rank = 8, p.h = h;
          p.in = p.out_features = 4096;
          const cuda::HeadConfig c = cuda::choose_head_config(&p, 1, {132, static_cast<int>(kib * 1024)});
          const int64_t per_sm = cuda::ceil_div(c.blocks, 132);
          EXPECT(per_sm * c.shared_bytes <= kib * 1024, static_cast<double>(c.shared_bytes));
          EXPECT(!c.stationary || c.latent_tiles / p.sides >= 2, c.latent_tiles);  // some for both groups
          stationary += c.stationary;
          doubled += per_sm == 2;
        }
  EXPECT(doubled == 20, doubled);
  EXPECT(stationary == 5, stationary);
  return "";
}

const Check kChecks[] = {
    {"lora_cut", check_lora_cut},
    {"lora_clusters", check_lora_clusters},
    {"trunk_cut", check_trunk_cut},
    {"head_blocks", check_head_blocks},
};

}  // namespace

int main(int argc, char** argv) { return run_check(kChecks, argc, argv); }
