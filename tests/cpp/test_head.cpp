// hypernet_head of t2l/kernels.h against a loop, for every instruction set and pair of dtypes: odd and even depths, rows and
// columns that fill no tile.  Networks that were exported have none of that.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "pool.h"
#include "t2l/kernels.h"

namespace {

constexpr int64_t kTasks = 4, kLayers = 5, kRank = 3, kIn = 130, kOut = 9;
constexpr float kScaleB = 0.5f;

t2l::DType type_of(int32_t dtype) { return dtype == T2L_BF16 ? t2l::DType::bf16 : t2l::DType::f32; }

// One latent vector per task and layer gives all of A [rank, in] and B [rank, out].
void test_depth(int64_t h, int32_t isa, int32_t w_type, int32_t out_type, const t2l_parallel& parallel) {
  const int64_t rows = kRank * (kIn + kOut), size_A = kLayers * kRank * kIn, size_B = kLayers * kRank * kOut;
  Buffer latent(kTasks * kLayers * h, w_type), weight(rows * h, w_type);
  Buffer A(kTasks * size_A, out_type), B(kTasks * size_B, out_type);
  Random random(static_cast<uint64_t>(h));
  for (int64_t i = 0; i < kTasks * kLayers * h; ++i) latent.set(i, random.number());
  for (int64_t i = 0; i < rows * h; ++i) weight.set(i, random.number());
  const std::vector<float> bias = random.numbers(rows);

  t2l::HeadParams p{};
  p.latent = latent.data(), p.weight = weight.data(), p.bias = bias.data();
  p.out[0] = A.data(), p.out[1] = B.data();
  p.scale[0] = 1, p.scale[1] = kScaleB;
  p.tasks = kTasks, p.sides = 1, p.ranks = 1, p.layers = kLayers, p.h = h;
  p.rank = kRank, p.in = kIn, p.out_features = kOut;
  for (int side = 0; side < 2; ++side) {
    const int64_t width = side ? kOut : kIn, strides[] = {kLayers * kRank * width, kRank * width, width, 1};
    std::copy(strides, strides + 4, p.out_stride[side]);
  }
  const int64_t strides[] = {kLayers * h, kLayers * h, kLayers * h, h};
  std::copy(strides, strides + 4, p.latent_stride);
  p.w_type = type_of(w_type), p.out_type = type_of(out_type);
  t2l::hypernet_head(p, static_cast<t2l::Isa>(isa - T2L_ISA_GENERIC), {parallel.run, parallel.pool});

  const double u_out = out_type == T2L_BF16 ? std::ldexp(1, -8) : std::ldexp(1, -24);
  for (int64_t t = 0; t < kTasks * kLayers; ++t)
    for (int64_t row = 0; row < rows; ++row) {
      double sum = bias[static_cast<size_t>(row)], size = std::abs(sum);
      for (int64_t k = 0; k < h; ++k) {
        const double term = latent.at(t * h + k) * weight.at(row * h + k);
        sum += term, size += std::abs(term);
      }
      const bool is_A = row < kRank * kIn;
      const double scale = is_A ? 1 : kScaleB;
      const double got = is_A ? A.at(t * kRank * kIn + row) : B.at(t * kRank * kOut + row - kRank * kIn);
      const double allowed = u_out * std::abs(sum) + static_cast<double>(h + 4) * std::ldexp(1, -24) * size;
      CHECK_SAYS(std::abs(got - scale * sum) <= scale * allowed, t2l_isa_name(isa));
    }
}

}  // namespace

int main() {
  Pool pool(3);
  for (const int32_t isa : isas())
    for (const int32_t w_type : {T2L_F32, T2L_BF16})
      for (const int32_t out_type : {T2L_F32, T2L_BF16})
        for (const int64_t h : {1, 2, 33, 96}) test_depth(h, isa, w_type, out_type, pool.parallel());
  return result();
}
