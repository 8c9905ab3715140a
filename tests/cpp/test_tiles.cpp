// Matrix tiles: AMX and its model give the same bits, and so do the heads on both, whatever the sizes and the batch.
#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "t2l/kernels.h"
#include "tile_products.h"

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN(), kInf = std::numeric_limits<float>::infinity();

uint32_t bits_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}

// NaN is NaN whatever its bits.
bool same(float a, float b) { return bits_of(a) == bits_of(b) || (a != a && b != b); }

// Any of the values that a kind of inputs has.
float draw(Random& random, int kind) {
  const float v = random.number();
  switch (kind) {
    case 1:  // products and sums down to denormal numbers
      return std::ldexp(v, -60 - static_cast<int>(random.below(80)));
    case 2:  // sums beyond the largest number
      return std::ldexp(v, 40 + static_cast<int>(random.below(88)));
    case 3: {
      const float special[] = {0.0f, -0.0f, kInf, -kInf, kNan, 1e-40f, -1e-40f, 3.3e38f};
      return random.below(6) ? v : special[random.below(8)];
    }
    case 4:  // cancelling
      return std::ldexp(random.below(2) ? 1.0f : -1.0f, static_cast<int>(random.below(30)));
    default:
      return v;
  }
}

void test_product() {
  if (!t2l_has_isa(T2L_ISA_AMX)) {
    std::printf("no AMX here: its instructions are not compared with their model\n");
    return;
  }
  Random random(1);
  for (int kind = 0; kind < 5; ++kind)
    for (int repeat = 0; repeat < 40; ++repeat) {
      uint16_t a[512], b[512];
      float c[256], d[256];
      for (int i = 0; i < 512; ++i) a[i] = to_bf16(draw(random, kind)), b[i] = to_bf16(draw(random, kind));
      for (int i = 0; i < 256; ++i) c[i] = d[i] = draw(random, kind);
      product_by_amx(a, b, c);
      product_by_model(a, b, d);
      for (int i = 0; i < 256; ++i) CHECK_SAYS(same(c[i], d[i]), std::to_string(kind) + " " + std::to_string(i));
    }
  CHECK(configuration_survives());
}

void round(float v, uint16_t* out) { *out = to_bf16(v); }
void round(float v, float* out) { *out = v; }
double exact(uint16_t v) { return from_bf16(v); }
double exact(float v) { return v; }

// Heads of side A alone in T, bfloat16 or float: latent rows [rows, h] times weights [cols, h], in buffers of just this
// size.
template <class T>
struct Head {
  Head(int64_t rows, int64_t cols, int64_t h)
      : rows(rows), cols(cols), h(h), latent(rows * h), weight(cols * h), bias(cols) {
    Random random(static_cast<uint64_t>(cols * 1000 + h));
    for (T& v : weight) round(random.number(), &v);
    for (float& v : bias) v = random.number();
    for (T& v : latent) round(random.number(), &v);
  }
  std::vector<T> run(t2l::Isa isa) const {
    std::vector<T> out(static_cast<size_t>(rows * cols), T(0x7fff)), nothing(1);
    t2l::HeadParams p{};
    p.latent = latent.data();
    p.weight = weight.data();
    p.bias = bias.data();
    p.out[0] = out.data();
    p.out[1] = nothing.data();
    p.tasks = rows;
    p.sides = p.ranks = p.layers = p.rank = 1;
    p.h = h;
    p.latent_stride[0] = p.latent_stride[1] = p.latent_stride[2] = p.latent_stride[3] = h;
    p.in = cols;
    p.out_stride[0][0] = p.out_stride[0][1] = p.out_stride[0][2] = cols;
    p.out_stride[0][3] = 1;
    p.scale[0] = p.scale[1] = 1.0f;
    p.w_type = p.out_type = sizeof(T) == 2 ? t2l::DType::bf16 : t2l::DType::f32;
    const t2l::ParallelFor alone{
        [](void*, int64_t count, int64_t, t2l::RangeBody body, void* context) { body(0, count, context); }, nullptr};
    t2l::hypernet_head(p, isa, alone);
    return out;
  }
  int64_t rows, cols, h;
  std::vector<T> latent, weight;
  std::vector<float> bias;
};

template <class T>
void test_heads() {
  struct Sizes {
    int64_t rows, cols, h;
  };
  std::vector<Sizes> sizes;
  for (const int64_t h : {1, 2, 3, 31, 32, 33, 64, 70}) sizes.push_back({5, 40, h});
  for (const int64_t cols : {1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 97, 130}) sizes.push_back({33, cols, 34});
  for (const int64_t rows : {1, 15, 16, 31, 32, 64, 65, 300, 1023, 1024, 1030}) sizes.push_back({rows, 50, 64});
  sizes.push_back({1025, 300, 33});
  for (const Sizes& s : sizes) {
    const Head<T> head(s.rows, s.cols, s.h);
    const auto model = head.run(t2l::Isa::amx_model);
    const std::string name = std::to_string(s.rows) + " " + std::to_string(s.cols) + " " + std::to_string(s.h);
    // Products of float32 are those of the vectors, whose order is another one.
    if (sizeof(T) == 2 && t2l_has_isa(T2L_ISA_AMX)) CHECK_SAYS(head.run(t2l::Isa::amx) == model, name);
    for (int64_t r = 0; r < s.rows; r += 1 + s.rows / 5)
      for (int64_t c = 0; c < s.cols; ++c) {
        double sum = head.bias[c], size = std::fabs(sum);
        for (int64_t k = 0; k < s.h; ++k) {
          const double term = exact(head.latent[r * s.h + k]) * exact(head.weight[c * s.h + k]);
          sum += term;
          size += std::fabs(term);
        }
        // Of the longest path through a sum: 16 products, the sum of even and odd ones, a sum a step; and the bias.
        const double steps = sizeof(T) == 2 ? 18.0 + s.h / 32 : s.h + 2.0;
        const double bound = (sizeof(T) == 2 ? std::fabs(sum) / 256 : 0) + size * steps * std::ldexp(1.0, -24);
        CHECK_SAYS(std::fabs(exact(model[r * s.cols + c]) - sum) <= bound, name);
      }
    // A row has the same bits alone, where weights are the left operands, and among many, where latent rows are.
    Head<T> one(1, s.cols, s.h);
    const int64_t last = s.rows - 1;
    one.latent.assign(head.latent.begin() + last * s.h, head.latent.end());
    for (const t2l::Isa isa : {t2l::Isa::amx_model, t2l::Isa::amx}) {
      if (!t2l::has_isa(isa)) continue;
      const auto alone = one.run(isa), all = isa == t2l::Isa::amx ? head.run(isa) : model;
      CHECK_SAYS(std::equal(alone.begin(), alone.end(), all.begin() + last * s.cols), name);
    }
  }
}

// NaN and infinity reach the results of their own row and column, and no other: neither as padding nor as neighbours.
void test_nan_stays() {
  for (const int64_t rows : {7, 1030}) {
    Head<uint16_t> head(rows, 37, 35);
    const auto before = head.run(t2l::Isa::amx_model);
    head.weight[20 * 35 + 34] = to_bf16(kInf);
    head.latent[3 * 35] = 0x7fc0;
    for (const t2l::Isa isa : {t2l::Isa::amx_model, t2l::Isa::amx}) {
      if (!t2l::has_isa(isa)) continue;
      const auto after = head.run(isa);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < 37; ++c) {
          const bool touched = r == 3 || c == 20;
          CHECK(touched ? !std::isfinite(from_bf16(after[r * 37 + c])) : after[r * 37 + c] == before[r * 37 + c]);
        }
    }
  }
}

}  // namespace

int main() {
  test_product();
  test_heads<uint16_t>();
  test_heads<float>();
  test_nan_stays();
  return result();
}
