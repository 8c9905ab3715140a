// hypernet_trunk, hypernet_head and hypernet_head_out_ on CPU.
#include <tuple>

#include "checks.h"

namespace t2l::torch_ops {
namespace {

constexpr size_t kTrunkWeights = 22;  // t2l_engine.reference.TRUNK_WEIGHTS

const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

// Of the given type and shape, contiguous; the pointer is meant for float32 alone.
const float* vector(const char* op, const std::string& name, const Tensor& t, ScalarType type,
                    std::initializer_list<int64_t> sizes) {
  check_shape(op, name, t, sizes);
  check_type(op, name, t, type);
  check_contiguous(op, name, t);
  return floats(t);
}

const void* matrix(const char* op, const std::string& name, const Tensor& t, ScalarType type, int64_t rows, int64_t cols) {
  check_shape(op, name, t, {rows, cols});
  check_type(op, name, t, type);
  check_contiguous(op, name, t);
  return t.const_data_ptr();
}

Tensor hypernet_trunk(const Tensor& z, std::vector<Tensor> weights, const OptTensor& side_emb, const OptTensor& pos_emb,
                      int64_t rotary_ranks) {
  const char* op = "hypernet_trunk";
  if (weights.size() != kTrunkWeights)
    fail(op, "weights", std::to_string(kTrunkWeights) + " tensors", std::to_string(weights.size()));
  const ScalarType type = weights[0].scalar_type();
  check_floating(op, "weights[0]", weights[0]);
  const ScalarType vec = vector_type(type);
  if (rotary_ranks < 0) fail(op, "rotary_ranks", ">= 0", std::to_string(rotary_ranks));
  if (rotary_ranks > 0 && pos_emb) fail(op, "pos_emb", "None with rotary_ranks", "a tensor");
  check_shape(op, "z", z, {kAny, kAny});
  check_shape(op, "weights[1]", weights[1], {kAny, kAny, kAny});
  TrunkParams p{};
  p.tasks = z.size(0);
  p.t = z.size(1);
  p.modules = weights[1].size(0);
  p.layers = weights[1].size(1);
  check_shape(op, "weights[2]", weights[2], {kAny, kAny});
  p.m = weights[2].size(0);
  check_shape(op, "weights[20]", weights[20], {kAny, kAny});
  p.h = weights[20].size(0);
  const int64_t m = p.m, hidden = 4 * m;
  p.z = vector(op, "z", z, vec, {p.tasks, p.t});
  p.mixer_task = matrix(op, "weights[0]", weights[0], type, hidden, p.t);
  p.mixer_table = vector(op, "weights[1]", weights[1], vec, {p.modules, p.layers, hidden});
  p.mixer_w2 = matrix(op, "weights[2]", weights[2], type, m, hidden);
  p.mixer_b2 = vector(op, "weights[3]", weights[3], vec, {m});
  for (int64_t block = 0; block < 3; ++block) {
    const int64_t first = 4 + 6 * block, out = block == 2 ? p.h : m;
    const auto name = [first](int64_t i) { return "weights[" + std::to_string(first + i) + "]"; };
    const auto w = [&](int64_t i) -> const Tensor& { return weights[first + i]; };
    p.mlp[block] = {vector(op, name(0), w(0), vec, {m}),          vector(op, name(1), w(1), vec, {m}),
                    matrix(op, name(2), w(2), type, hidden, m),   vector(op, name(3), w(3), vec, {hidden}),
                    matrix(op, name(4), w(4), type, out, hidden), vector(op, name(5), w(5), vec, {out})};
  }
  p.sides = 1;
  if (side_emb) {
    check_shape(op, "side_emb", *side_emb, {p.modules, kAny, m});
    p.sides = side_emb->size(1);
    p.side_emb = vector(op, "side_emb", *side_emb, vec, {p.modules, p.sides, m});
  }
  p.ranks = rotary_ranks > 0 ? rotary_ranks : 1;
  if (pos_emb) {
    check_shape(op, "pos_emb", *pos_emb, {kAny, m});
    p.ranks = pos_emb->size(0);
    p.pos_emb = vector(op, "pos_emb", *pos_emb, vec, {p.ranks, m});
  }
  p.rotary = rotary_ranks > 0;
  if (p.rotary && m % 2) fail(op, "weights[2]", "an even trunk width with rotary_ranks", to_text(weights[2]));
  if (!native_type(type))
    return tensor_of(call_reference("t2l_engine::hypernet_trunk_reference", z, weights, side_emb, pos_emb, rotary_ranks)[0]);
  p.w_type = kernel_type(type);
  Tensor latent = torch::stable::new_empty(weights[0], {p.tasks, p.modules, p.sides, p.ranks, p.layers, p.h});
  p.latent = latent.mutable_data_ptr();
  hypernet_trunk(p, isa(op), parallel);
  return latent;
}

struct Epilogue {
  const OptTensor& mul_A;
  const OptTensor& add_A;
  const OptTensor& mul_B;
  const OptTensor& add_B;
};

// [layers, rank, in] for A, [layers, out, rank] for B, to (layer, rank, column) strides.
const float* epilogue(const char* op, const char* name, const OptTensor& t, ScalarType type, int side, const HeadParams& p,
                      int64_t* strides) {
  if (!t) return nullptr;
  if (side == 0)
    check_shape(op, name, *t, {p.layers, p.rank, p.in});
  else
    check_shape(op, name, *t, {p.layers, p.out_features, p.rank});
  check_type(op, name, *t, type);
  strides[0] = t->stride(0);
  strides[1] = t->stride(side ? 2 : 1);
  strides[2] = t->stride(side ? 1 : 2);
  return floats(*t);
}

HeadParams prepare(const char* op, const Tensor& latent, const Tensor& weight, const OptTensor& bias, const Epilogue& e,
                   int64_t rank, int64_t in_features, int64_t out_features) {
  check_shape(op, "latent", latent, {kAny, kAny, kAny, kAny, kAny});
  HeadParams p{};
  p.tasks = latent.size(0);
  p.sides = latent.size(1);
  p.ranks = latent.size(2);
  p.layers = latent.size(3);
  p.h = latent.size(4);
  p.rank = rank;
  p.in = in_features;
  p.out_features = out_features;
  if (in_features < 1 || out_features < 1 || rank < 1)
    fail(op, "rank, in_features, out_features", "positive sizes",
         std::to_string(rank) + ", " + std::to_string(in_features) + ", " + std::to_string(out_features));
  if (p.sides < 1 || p.sides > 2) fail(op, "latent", "1 or 2 sides (dimension 1)", to_text(latent));
  if (p.ranks != 1 && p.ranks != rank)
    fail(op, "latent", "1 or rank = " + std::to_string(rank) + " ranks (dimension 2)", to_text(latent));
  const int64_t per_latent = rank / p.ranks;
  const int64_t rows = per_latent * (p.sides == 2 ? std::max(in_features, out_features) : in_features + out_features);
  check_floating(op, "weight", weight);
  const ScalarType vec = vector_type(weight.scalar_type());
  p.weight = matrix(op, "weight", weight, weight.scalar_type(), rows, p.h);
  check_type(op, "latent", latent, weight.scalar_type());
  check_rows(op, "latent", latent);
  p.latent = latent.const_data_ptr();
  for (int i = 0; i < 4; ++i) p.latent_stride[i] = latent.stride(i);
  if (bias) p.bias = vector(op, "bias", *bias, vec, {rows});
  p.mul[0] = epilogue(op, "mul_A", e.mul_A, vec, 0, p, p.mul_stride[0]);
  p.add[0] = epilogue(op, "add_A", e.add_A, vec, 0, p, p.add_stride[0]);
  p.mul[1] = epilogue(op, "mul_B", e.mul_B, vec, 1, p, p.mul_stride[1]);
  p.add[1] = epilogue(op, "add_B", e.add_B, vec, 1, p, p.add_stride[1]);
  p.scale[0] = p.scale[1] = 1.0f;
  p.w_type = kernel_type(weight.scalar_type());
  return p;
}

void set_output(HeadParams& p, const Tensor& lora_A, const Tensor& lora_B) {
  p.out[0] = lora_A.mutable_data_ptr();
  p.out[1] = lora_B.mutable_data_ptr();
  const int order[2][4] = {{0, 1, 2, 3}, {0, 1, 3, 2}};  // (task, layer, rank, column) of A and of B
  for (int i = 0; i < 4; ++i) {
    p.out_stride[0][i] = lora_A.stride(order[0][i]);
    p.out_stride[1][i] = lora_B.stride(order[1][i]);
  }
  p.out_type = kernel_type(lora_A.scalar_type());
}

std::tuple<Tensor, Tensor> hypernet_head(const Tensor& latent, const Tensor& weight, const OptTensor& bias,
                                         const OptTensor& mul_A, const OptTensor& add_A, const OptTensor& mul_B,
                                         const OptTensor& add_B, int64_t rank, int64_t in_features, int64_t out_features) {
  const char* op = "hypernet_head";
  HeadParams p = prepare(op, latent, weight, bias, {mul_A, add_A, mul_B, add_B}, rank, in_features, out_features);
  if (!native_type(weight.scalar_type())) {
    const auto results = call_reference("t2l_engine::hypernet_head_reference", latent, weight, bias, mul_A, add_A, mul_B,
                                        add_B, rank, in_features, out_features);
    return {tensor_of(results[0]), tensor_of(results[1])};
  }
  Tensor lora_A = torch::stable::new_empty(weight, {p.tasks, p.layers, rank, in_features});
  Tensor stored_B = torch::stable::new_empty(weight, {p.tasks, p.layers, rank, out_features});
  Tensor lora_B = torch::stable::transpose(stored_B, 2, 3);
  for (const Tensor& fresh : {lora_A, stored_B})
    touch_output(fresh.mutable_data_ptr(), fresh.numel() * fresh.element_size(), parallel);
  set_output(p, lora_A, lora_B);
  hypernet_head(p, isa(op), parallel);
  return {lora_A, lora_B};
}

void hypernet_head_out(const Tensor& lora_A, const Tensor& lora_B, const Tensor& latent, const Tensor& weight,
                       const OptTensor& bias, const OptTensor& mul_A, const OptTensor& add_A, const OptTensor& mul_B,
                       const OptTensor& add_B, int64_t rank, int64_t in_features, int64_t out_features, double scale_B) {
  const char* op = "hypernet_head_out_";
  HeadParams p = prepare(op, latent, weight, bias, {mul_A, add_A, mul_B, add_B}, rank, in_features, out_features);
  check_shape(op, "lora_A", lora_A, {p.tasks, p.layers, rank, in_features});
  check_shape(op, "lora_B", lora_B, {p.tasks, p.layers, out_features, rank});
  check_type(op, "lora_B", lora_B, lora_A.scalar_type());
  if (!native_type(weight.scalar_type()) || !native_type(lora_A.scalar_type())) {
    call_reference("t2l_engine::hypernet_head_out__reference", lora_A, lora_B, latent, weight, bias, mul_A, add_A, mul_B,
                   add_B, rank, in_features, out_features, scale_B);
    return;
  }
  set_output(p, lora_A, lora_B);
  p.scale[1] = static_cast<float>(scale_B);
  hypernet_head(p, isa(op), parallel);
}

}  // namespace
}  // namespace t2l::torch_ops

STABLE_TORCH_LIBRARY_IMPL(t2l_engine, CPU, m) {
  m.impl("hypernet_trunk", TORCH_BOX(&t2l::torch_ops::hypernet_trunk));
  m.impl("hypernet_head", TORCH_BOX(&t2l::torch_ops::hypernet_head));
  m.impl("hypernet_head_out_", TORCH_BOX(&t2l::torch_ops::hypernet_head_out));
}
