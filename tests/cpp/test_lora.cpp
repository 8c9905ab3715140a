// t2l_lora_add, and the gradients of t2l/kernels.h, against a double loop, for every instruction set, every pair of dtypes,
// both layouts of B, ragged segments, mixed ranks; errors.
#include <algorithm>
#include <cmath>
#include <limits>

#include "check.h"
#include "pool.h"
#include "t2l/kernels.h"

namespace {

struct Shape {
  int64_t in, out, rank, adapters;
  std::vector<int32_t> lengths, ids, ranks;  // no ranks: all `rank`
  bool out_first;                            // B as [out, rank]
  int32_t x_type, w_type;
};

// One product's operands: every row and every matrix is followed by a gap that nothing may read or write.
class Case {
 public:
  Case(const Shape& shape, uint64_t seed)
      : s(shape),
        tokens(total(shape.lengths)),
        x_stride(shape.in + 3),
        y_stride(shape.out + 5),
        a_row(shape.in + 2),
        a_all(shape.rank * a_row + 7),
        b_all(shape.rank * (shape.out + 1) + 9),
        x(tokens * x_stride, shape.x_type),
        y(tokens * y_stride, shape.x_type),
        a(shape.adapters * a_all, shape.w_type),
        b(shape.adapters * b_all, shape.w_type) {
    Random random(seed);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t i = 0; i < s.in; ++i) x.set(t * x_stride + i, random.number());
      for (int64_t o = 0; o < s.out; ++o) y.set(t * y_stride + o, random.number());
    }
    for (int64_t k = 0; k < s.adapters; ++k) {
      scaling.push_back(1.5f + random.number());
      for (int64_t r = 0; r < rank_of(k); ++r) {
        for (int64_t i = 0; i < s.in; ++i) a.set(k * a_all + r * a_row + i, random.number());
        for (int64_t o = 0; o < s.out; ++o) b.set(b_index(k, r, o), random.number());
      }
    }
    indptr.push_back(0);
    for (const int32_t length : s.lengths) indptr.push_back(indptr.back() + length);
  }

  t2l_lora record(int32_t isa) {
    t2l_lora l{};
    l.y = y.data();
    l.x = x.data();
    l.lora_A = a.data();
    l.lora_B = b.data();
    l.scaling = scaling.data();
    l.seg_indptr = indptr.data();
    l.seg_adapters = s.ids.data();
    l.ranks = s.ranks.empty() ? nullptr : s.ranks.data();
    l.num_tokens = tokens;
    l.in_features = s.in;
    l.out_features = s.out;
    l.num_adapters = s.adapters;
    l.rank = s.rank;
    l.num_segments = static_cast<int64_t>(s.ids.size());
    l.x_stride = x_stride;
    l.y_stride = y_stride;
    l.A_stride[0] = a_all;
    l.A_stride[1] = a_row;
    l.B_stride[0] = b_all;
    l.B_stride[1] = s.out_first ? s.rank : 1;
    l.B_stride[2] = s.out_first ? 1 : s.out + 1;
    l.x_dtype = s.x_type;
    l.w_dtype = s.w_type;
    l.isa = isa;
    return l;
  }

  // Every element against the loop, within the rounding of the result and of in + rank + 4 steps in float32 on either side.
  void verify(const Buffer& before) const {
    const double u_out = s.x_type == T2L_BF16 ? std::ldexp(1, -8) : std::ldexp(1, -24);
    const double steps = static_cast<double>(s.in + s.rank + 4) * std::ldexp(1, -24);
    for (size_t segment = 0; segment < s.ids.size(); ++segment)
      for (int64_t t = indptr[segment]; t < indptr[segment + 1]; ++t) {
        const int64_t k = s.ids[segment];
        for (int64_t o = 0; o < y_stride; ++o) {
          const int64_t index = t * y_stride + o;
          if (k < 0 || rank_of(k) == 0 || o >= s.out) {
            CHECK(y.same_bits(before, index));
            continue;
          }
          double sum = 0, size = 0;
          for (int64_t r = 0; r < rank_of(k); ++r) {
            double v = 0, v_size = 0;
            for (int64_t i = 0; i < s.in; ++i) {
              const double term = x.at(t * x_stride + i) * a.at(k * a_all + r * a_row + i);
              v += term, v_size += std::abs(term);
            }
            sum += v * b.at(b_index(k, r, o)), size += v_size * std::abs(b.at(b_index(k, r, o)));
          }
          const double exact = before.at(index) + scaling[static_cast<size_t>(k)] * sum;
          const double magnitude = std::abs(scaling[static_cast<size_t>(k)]) * size + std::abs(before.at(index));
          CHECK(std::abs(y.at(index) - exact) <= u_out * (std::abs(exact) + u_out) + 2 * steps * magnitude);
        }
      }
  }

  int64_t rank_of(int64_t adapter) const { return s.ranks.empty() ? s.rank : s.ranks[static_cast<size_t>(adapter)]; }
  int64_t b_index(int64_t k, int64_t r, int64_t o) const {
    return k * b_all + (s.out_first ? o * s.rank + r : r * (s.out + 1) + o);
  }
  static int64_t total(const std::vector<int32_t>& lengths) {
    int64_t sum = 0;
    for (const int32_t length : lengths) sum += length;
    return sum;
  }

  Shape s;
  int64_t tokens, x_stride, y_stride, a_row, a_all, b_all;
  Buffer x, y, a, b;
  std::vector<float> scaling;
  std::vector<int32_t> indptr;
};

// Gradients of c's product for the output's gradient c.y, each element against the loop: within one rounding, and the steps
// in float32 of both sums.
void verify_backward(Case& c, int32_t isa, const t2l_parallel& parallel) {
  const Shape& s = c.s;
  const auto type = [](int32_t dtype) { return dtype == T2L_BF16 ? t2l::DType::bf16 : t2l::DType::f32; };
  const int64_t b_out = s.out_first ? s.rank : 1, b_rank = s.out_first ? 1 : s.out;
  Buffer grad_x(c.tokens * s.in, s.x_type);
  const auto before = [](int64_t i) { return static_cast<double>(i % 7 - 3); };  // is added to
  for (int64_t i = 0; i < c.tokens * s.in; ++i) grad_x.set(i, before(i));
  Buffer grad_a(s.adapters * s.rank * s.in, s.w_type), grad_b(s.adapters * s.rank * s.out, s.w_type);
  for (int64_t i = 0; i < s.adapters * s.rank * s.in; ++i) grad_a.set(i, 0);
  for (int64_t i = 0; i < s.adapters * s.rank * s.out; ++i) grad_b.set(i, 0);
  const t2l_lora l = c.record(isa);
  t2l::LoraBackwardParams q{};
  q.lora = {l.x,           nullptr,        l.lora_A,       l.lora_B,      l.scaling,     l.seg_indptr,   l.seg_adapters,
            l.ranks,       l.num_tokens,   s.in,           s.out,         s.rank,        l.num_segments, s.adapters,
            l.num_tokens,  l.x_stride,     l.y_stride,     l.A_stride[0], l.A_stride[1], l.B_stride[0],  l.B_stride[1],
            l.B_stride[2], type(s.x_type), type(s.w_type), true};
  q.grad = l.y, q.grad_stride = l.y_stride;
  q.grad_x = grad_x.data(), q.grad_a = grad_a.data(), q.grad_b = grad_b.data();
  q.grad_b_stride_out = b_out, q.grad_b_stride_rank = b_rank;
  t2l::lora_backward(q, static_cast<t2l::Isa>(isa - T2L_ISA_GENERIC), {parallel.run, parallel.pool});

  struct Sum {
    double value = 0, size = 0;
    void add(const Sum& a, double b) { value += a.value * b, size += a.size * std::abs(b); }
  };
  const double steps = static_cast<double>(s.in + s.out + s.rank + c.tokens + 4) * std::ldexp(1, -24);
  const auto close = [&](double got, const Sum& sum, int32_t dtype) {
    const double u_out = dtype == T2L_BF16 ? std::ldexp(1, -8) : std::ldexp(1, -24);
    return std::abs(got - sum.value) <= u_out * (std::abs(sum.value) + u_out) + 2 * steps * sum.size;
  };
  std::vector<Sum> a_sums(static_cast<size_t>(s.adapters * s.rank * s.in));
  std::vector<Sum> b_sums(static_cast<size_t>(s.adapters * s.rank * s.out));
  for (size_t segment = 0; segment < s.ids.size(); ++segment)
    for (int64_t t = c.indptr[segment]; t < c.indptr[segment + 1]; ++t) {
      const int64_t k = s.ids[segment], rank = k < 0 ? 0 : c.rank_of(k);
      std::vector<Sum> x_sums(static_cast<size_t>(s.in));
      for (int64_t i = 0; i < s.in; ++i)
        x_sums[static_cast<size_t>(i)] = {before(t * s.in + i), std::abs(before(t * s.in + i))};
      for (int64_t r = 0; r < rank; ++r) {
        const double scaling = c.scaling[static_cast<size_t>(k)];
        Sum v, w;
        for (int64_t i = 0; i < s.in; ++i)
          v.add({scaling, std::abs(scaling)}, c.x.at(t * c.x_stride + i) * c.a.at(k * c.a_all + r * c.a_row + i));
        for (int64_t o = 0; o < s.out; ++o)
          w.add({scaling, std::abs(scaling)}, c.y.at(t * c.y_stride + o) * c.b.at(c.b_index(k, r, o)));
        for (int64_t i = 0; i < s.in; ++i) {
          x_sums[static_cast<size_t>(i)].add(w, c.a.at(k * c.a_all + r * c.a_row + i));
          a_sums[static_cast<size_t>((k * s.rank + r) * s.in + i)].add(w, c.x.at(t * c.x_stride + i));
        }
        for (int64_t o = 0; o < s.out; ++o)
          b_sums[static_cast<size_t>(k * s.rank * s.out + o * b_out + r * b_rank)].add(v, c.y.at(t * c.y_stride + o));
      }
      for (int64_t i = 0; i < s.in; ++i) CHECK(close(grad_x.at(t * s.in + i), x_sums[static_cast<size_t>(i)], s.x_type));
    }
  for (size_t i = 0; i < a_sums.size(); ++i) CHECK(close(grad_a.at(static_cast<int64_t>(i)), a_sums[i], s.w_type));
  for (size_t i = 0; i < b_sums.size(); ++i) CHECK(close(grad_b.at(static_cast<int64_t>(i)), b_sums[i], s.w_type));
}

// As many ranges as there are threads in a static schedule, the last ones empty.
void run_static(void*, int64_t count, int64_t, t2l_range_body body, void* context) {
  constexpr int64_t kThreads = 7;
  const int64_t each = (count + kThreads - 1) / kThreads;
  for (int64_t i = 0; i < kThreads; ++i) body(std::min(i * each, count), std::min((i + 1) * each, count), context);
}

void test_values(const t2l_parallel& parallel) {
  const std::vector<Shape> shapes = {
      {33, 70, 5, 3, {1, 0, 17, 2, 40}, {2, 0, -1, 1, 0}, {5, 0, 3}, false, 0, 0},
      {64, 64, 8, 2, {3, 3}, {1, 0}, {}, false, 0, 0},
      {1, 1, 1, 1, {1}, {0}, {}, false, 0, 0},
      {7, 130, 16, 4, {16, 16, 1}, {3, -1, 1}, {16, 1, 2, 9}, false, 0, 0},
      {40, 9, 2, 2, {0, 0}, {0, -1}, {}, false, 0, 0},
      {12, 20, 3, 0, {4}, {-1}, {}, false, 0, 0},
  };
  uint64_t seed = 0;
  for (Shape shape : shapes)
    for (const bool out_first : {false, true})
      for (const int32_t x_type : {T2L_F32, T2L_BF16})
        for (const int32_t w_type : {T2L_F32, T2L_BF16})
          for (const int32_t isa : isas()) {
            shape.out_first = out_first;
            shape.x_type = x_type;
            shape.w_type = w_type;
            Case one(shape, ++seed), other(shape, seed);
            const Buffer before = one.y;
            const t2l_lora alone = one.record(isa), threaded = other.record(isa);
            CHECK_OK(t2l_lora_add(&alone, nullptr, &error));
            one.verify(before);
            CHECK_OK(t2l_lora_add(&threaded, &parallel, &error));
            for (int64_t i = 0; i < one.tokens * one.y_stride; ++i) CHECK(one.y.same_bits(other.y, i));
            verify_backward(one, isa, parallel);
            verify_backward(one, isa, {run_static, nullptr});
          }
}

// Sums of two bfloat16 numbers of similar size, many of them half way between two results: rounded to nearest even.
void test_rounding() {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  const float largest = from_bf16(0x7f7f);
  for (const int32_t isa : isas()) {
    Case c({1, 1003, 1, 1, {1}, {0}, {}, false, T2L_BF16, T2L_BF16}, 1);
    c.x.set(0, 1), c.a.set(0, 1), c.scaling[0] = 1;
    Random random(3);
    for (int64_t o = 0; o < c.s.out; ++o) {
      const auto number = [&](int64_t exponent) {
        return from_bf16(static_cast<uint16_t>(random.below(2) << 15 | exponent << 7 | random.below(128)));
      };
      const int64_t exponent = 64 + random.below(160);
      c.y.set(o, number(exponent));
      c.b.set(c.b_index(0, 0, o), number(exponent - 9 + random.below(19)));
    }
    const float special[][2] = {{nan, 1}, {1, nan}, {inf, 1}, {-1, -inf}, {inf, -inf}, {largest, largest}, {0.0f, -0.0f}};
    int64_t place = 0;
    for (const auto& [y, b] : special)
      for (int64_t copies = 0; copies < 17; ++copies, ++place) c.y.set(place, y), c.b.set(c.b_index(0, 0, place), b);
    const Buffer before = c.y;
    const t2l_lora l = c.record(isa);
    CHECK_OK(t2l_lora_add(&l, nullptr, &error));
    for (int64_t o = 0; o < c.s.out; ++o) {
      const float sum = static_cast<float>(before.at(o)) + static_cast<float>(c.b.at(c.b_index(0, 0, o)));
      const float got = static_cast<float>(c.y.at(o));
      CHECK_SAYS(std::isnan(sum) ? std::isnan(got) : got == from_bf16(to_bf16(sum)),
                 std::string(t2l_isa_name(isa)) + " " + std::to_string(sum) + " " + std::to_string(got));
    }
  }
}

// Changes one field of a sound record; the call must say so and leave y alone.
template <class F>
void refused(const char* text, const F& change, t2l_status status = T2L_INVALID_ARGUMENT) {
  Case c({8, 6, 4, 2, {2, 3}, {0, 1}, {4, 2}, false, T2L_F32, T2L_F32}, 1);
  const Buffer before = c.y;
  t2l_lora l = c.record(T2L_ISA_BEST);
  change(c, l);
  CHECK_FAILS(status, text, t2l_lora_add(&l, nullptr, &error));
  for (int64_t i = 0; i < c.tokens * c.y_stride; ++i) CHECK(c.y.same_bits(before, i));
}

void test_errors() {
  CHECK_FAILS(T2L_INVALID_ARGUMENT, "t2l_lora_add: lora: expected an address, got NULL",
              t2l_lora_add(nullptr, nullptr, &error));
  CHECK(t2l_lora_add(nullptr, nullptr, nullptr) == T2L_INVALID_ARGUMENT);
  refused("y: expected memory, got NULL", [](Case&, t2l_lora& l) { l.y = nullptr; });
  refused("x: expected memory, got NULL", [](Case&, t2l_lora& l) { l.x = nullptr; });
  refused("lora_A: expected memory, got NULL", [](Case&, t2l_lora& l) { l.lora_A = nullptr; });
  refused("lora_B: expected memory, got NULL", [](Case&, t2l_lora& l) { l.lora_B = nullptr; });
  refused("scaling: expected memory, got NULL", [](Case&, t2l_lora& l) { l.scaling = nullptr; });
  refused("seg_indptr: expected memory, got NULL", [](Case&, t2l_lora& l) { l.seg_indptr = nullptr; });
  refused("seg_adapters: expected memory, got NULL", [](Case&, t2l_lora& l) { l.seg_adapters = nullptr; });
  refused("x: expected an address aligned to 4 bytes", [](Case&, t2l_lora& l) { l.x = static_cast<const char*>(l.x) + 2; });
  refused("num_tokens: expected a size in [0, 2147483648), got -1", [](Case&, t2l_lora& l) { l.num_tokens = -1; });
  refused("in_features: expected a size", [](Case&, t2l_lora& l) { l.in_features = -8; });
  refused("out_features: expected a size", [](Case&, t2l_lora& l) { l.out_features = int64_t{1} << 40; });
  refused("num_adapters: expected a size", [](Case&, t2l_lora& l) { l.num_adapters = -2; });
  refused("num_segments: expected a size", [](Case&, t2l_lora& l) { l.num_segments = -1; });
  refused("rank: expected a size in [0, 65537), got 65537", [](Case&, t2l_lora& l) { l.rank = 65537; });
  refused("x_stride: expected at least 8, got 7", [](Case&, t2l_lora& l) { l.x_stride = 7; });
  refused("y_stride: expected at least 6, got 0", [](Case&, t2l_lora& l) { l.y_stride = 0; });
  refused("A_stride[0]: expected at least 1, got 0", [](Case&, t2l_lora& l) { l.A_stride[0] = 0; });
  refused("B_stride[2]: expected at least 1, got -4", [](Case&, t2l_lora& l) { l.B_stride[2] = -4; });
  refused("y_stride: expected strides that reach over at most 2^60 elements, got 9223372036854775807",
          [](Case&, t2l_lora& l) { l.y_stride = INT64_MAX; });
  refused("x_stride: expected strides that reach over", [](Case&, t2l_lora& l) { l.x_stride = int64_t{1} << 58; });
  refused("B_stride[1]: expected strides that reach over", [](Case&, t2l_lora& l) { l.B_stride[1] = int64_t{1} << 58; });
  refused("A_stride[1]: expected strides that reach over",  // the first one alone reaches as far as may be
          [](Case&, t2l_lora& l) { l.A_stride[0] = (int64_t{1} << 60) - l.in_features; });
  refused("x_dtype: expected T2L_F32 or T2L_BF16, got 2", [](Case&, t2l_lora& l) { l.x_dtype = 2; });
  refused("w_dtype: expected T2L_F32 or T2L_BF16, got -1", [](Case&, t2l_lora& l) { l.w_dtype = -1; });
  refused("isa: expected a t2l_isa, got 10", [](Case&, t2l_lora& l) { l.isa = T2L_ISA_AVX512_BF16_WIDE + 1; });
  refused("seg_indptr: expected 0 first, got 1", [](Case& c, t2l_lora&) { c.indptr[0] = 1; });
  refused("seg_indptr: expected the number of tokens 5 last, got 4", [](Case& c, t2l_lora&) { c.indptr[2] = 4; });
  refused("seg_indptr: expected segments of 0 or more tokens, got -1 at segment 1",
          [](Case& c, t2l_lora&) { c.indptr[1] = 6; });
  refused("seg_adapters: expected ids in [-1, 2), got 2 at segment 0", [](Case& c, t2l_lora&) { c.s.ids[0] = 2; });
  refused("seg_adapters: expected ids in [-1, 2), got -2 at segment 1", [](Case& c, t2l_lora&) { c.s.ids[1] = -2; });
  refused("ranks: expected values in [0, 4], got 5 at adapter 0", [](Case& c, t2l_lora&) { c.s.ranks[0] = 5; });
  refused("ranks: expected values in [0, 4], got -1 at adapter 1", [](Case& c, t2l_lora&) { c.s.ranks[1] = -1; });
  for (int32_t isa = T2L_ISA_GENERIC; t2l_isa_name(isa) != nullptr; ++isa)
    if (!t2l_has_isa(isa))
      refused("isa: expected one that this CPU has", [isa](Case&, t2l_lora& l) { l.isa = isa; }, T2L_UNSUPPORTED);
}

// Nothing to do is no error, whatever is NULL.
void test_empty() {
  const int32_t indptr[] = {0};
  t2l_lora l{};
  l.seg_indptr = indptr;
  CHECK_OK(t2l_lora_add(&l, nullptr, &error));
  l.in_features = 8, l.out_features = 6, l.rank = 4;
  CHECK_OK(t2l_lora_add(&l, nullptr, &error));
}

// A sum over no features is 0: y keeps its bits, and nothing of x and A is looked at.
void test_no_features() {
  for (const int32_t isa : isas()) {
    Case c({0, 40, 4, 2, {2, 3}, {0, 1}, {}, false, T2L_F32, T2L_F32}, 1);
    const Buffer before = c.y;
    t2l_lora l = c.record(isa);
    l.x = l.lora_A = nullptr;
    l.x_stride = l.A_stride[0] = l.A_stride[1] = INT64_MAX;
    CHECK_OK(t2l_lora_add(&l, nullptr, &error));
    for (int64_t i = 0; i < c.tokens * c.y_stride; ++i) CHECK(c.y.same_bits(before, i));
  }
}

}  // namespace

int main() {
  Pool pool(3);
  test_values(pool.parallel());
  test_rounding();
  test_errors();
  test_empty();
  test_no_features();
  return result();
}
