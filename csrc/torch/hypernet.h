// hypernet_trunk, hypernet_heads and hypernet_heads_out_ as templates over a backend (see lora.h).
#pragma once
#include <algorithm>

#include "checks.h"

namespace t2l::torch_ops {

constexpr size_t kTrunkWeights = 22;  // t2l_engine.ops.reference.TRUNK_WEIGHTS

inline const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

// Checks dtype, shape and contiguity.  The pointer is only valid for float32.
inline const float* vector(const Op& op, const std::string& name, const Tensor& t, ScalarType type,
                           std::initializer_list<int64_t> sizes) {
  check_shape(op, name, t, sizes);
  check_type(op, name, t, type);
  check_contiguous(op, name, t);
  return floats(t);
}

inline const void* matrix(const Op& op, const std::string& name, const Tensor& t, ScalarType type, int64_t rows,
                          int64_t cols) {
  check_shape(op, name, t, {rows, cols});
  check_type(op, name, t, type);
  check_contiguous(op, name, t);
  return t.const_data_ptr();
}

inline EncoderParams prepare_encoder(const Op& op, const Tensor& task_emb, const std::vector<Tensor>& encoder,
                                     ScalarType vec) {
  if (encoder.size() != 4) fail(op, "encoder", "none or 4 tensors", std::to_string(encoder.size()));
  vector(op, "z", task_emb, vec, {kAny, kAny});
  check_shape(op, "encoder[0]", encoder[0], {kAny, task_emb.size(1)});
  const int64_t t = encoder[0].size(0), e = encoder[0].size(1);
  return {vector(op, "encoder[0]", encoder[0], vec, {t, e}), vector(op, "encoder[1]", encoder[1], vec, {t}),
          vector(op, "encoder[2]", encoder[2], vec, {t}), vector(op, "encoder[3]", encoder[3], vec, {t}), e};
}

// `task_emb`: encoded tasks, or with `encoder` what it encodes.
template <class Backend>
Tensor hypernet_trunk(const Tensor& task_emb, std::vector<Tensor> weights, const OptTensor& side_emb,
                      const OptTensor& pos_emb, int64_t rotary_ranks, std::vector<Tensor> encoder) {
  const Op op = op_of<Backend>("hypernet_trunk", task_emb);
  if (weights.size() != kTrunkWeights)
    fail(op, "weights", std::to_string(kTrunkWeights) + " tensors", std::to_string(weights.size()));
  const ScalarType type = weights[0].scalar_type();
  check_floating(op, "weights[0]", weights[0].scalar_type());
  const ScalarType vec = vector_type(type);
  if (rotary_ranks < 0) fail(op, "rotary_ranks", ">= 0", std::to_string(rotary_ranks));
  if (rotary_ranks > 0 && pos_emb) fail(op, "pos_emb", "None with rotary_ranks", "a tensor");
  TrunkParams p{};
  if (!encoder.empty()) p.encoder = prepare_encoder(op, task_emb, encoder, vec);
  const bool encodes = Backend::kEncodes && Backend::covers(type);
  const Tensor z =
      encoder.empty() || encodes ? task_emb : tensor_of(call_reference("t2l_engine::encode_task", task_emb, encoder)[0]);
  if (!encodes) p.encoder = EncoderParams{};
  check_shape(op, "z", z, {kAny, kAny});
  check_shape(op, "weights[1]", weights[1], {kAny, kAny, kAny});
  p.tasks = z.size(0);
  p.t = p.encoder.weight ? encoder[0].size(0) : z.size(1);
  p.modules = weights[1].size(0);
  p.layers = weights[1].size(1);
  check_shape(op, "weights[2]", weights[2], {kAny, kAny});
  p.m = weights[2].size(0);
  check_shape(op, "weights[20]", weights[20], {kAny, kAny});
  p.h = weights[20].size(0);
  const int64_t m = p.m, hidden = 4 * m;
  p.z = vector(op, "z", z, vec, {p.tasks, p.encoder.weight ? p.encoder.e : p.t});
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
  if (!Backend::covers(type) || std::max(p.m, p.t) > Backend::kMaxTrunkWidth)
    return tensor_of(call_reference("t2l_engine::hypernet_trunk_reference", z, weights, side_emb, pos_emb, rotary_ranks,
                                    p.encoder.weight ? encoder : std::vector<Tensor>())[0]);
  p.w_type = kernel_type(type);
  Tensor latent = torch::stable::new_empty(weights[0], {p.tasks, p.modules, p.sides, p.ranks, p.layers, p.h});
  p.latent = latent.mutable_data_ptr();
  Backend::hypernet_trunk(op, p);
  return latent;
}

// Arguments of the heads: lists have one entry per module; bias may be empty.
struct Heads {
  const Tensor& latent;
  const std::vector<Tensor>& weight;
  const std::vector<Tensor>& bias;
  const std::vector<OptTensor>& mul_A;
  const std::vector<OptTensor>& add_A;
  const std::vector<OptTensor>& mul_B;
  const std::vector<OptTensor>& add_B;
  int64_t rank;
  const std::vector<int64_t>& in_features;
  const std::vector<int64_t>& out_features;
};

inline std::string entry(const char* name, size_t module) { return std::string(name) + "[" + std::to_string(module) + "]"; }

// mul or add, [layers, rank, in] for A and [layers, out, rank] for B; sets its (layer, rank, column) strides.
inline const float* epilogue(const Op& op, const std::string& name, const OptTensor& t, ScalarType type, int side,
                             const HeadParams& p, int64_t* strides) {
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

inline HeadParams prepare_head(const Op& op, const Heads& heads, size_t i) {
  const Tensor& latent = heads.latent;
  const int64_t rank = heads.rank;
  HeadParams p{};
  p.tasks = latent.size(0);
  p.sides = latent.size(2);
  p.ranks = latent.size(3);
  p.layers = latent.size(4);
  p.h = latent.size(5);
  p.rank = rank;
  p.in = heads.in_features[i];
  p.out_features = heads.out_features[i];
  if (p.in < 1 || p.out_features < 1 || rank < 1)
    fail(op, "rank, in_features, out_features", "positive sizes",
         std::to_string(rank) + ", " + std::to_string(p.in) + ", " + std::to_string(p.out_features));
  if (p.sides < 1 || p.sides > 2) fail(op, "latent", "1 or 2 sides (dimension 2)", to_text(latent));
  if (p.ranks != 1 && p.ranks != rank)
    fail(op, "latent", "1 or rank = " + std::to_string(rank) + " ranks (dimension 3)", to_text(latent));
  const int64_t per_latent = rank / p.ranks;
  const int64_t rows = per_latent * (p.sides == 2 ? std::max(p.in, p.out_features) : p.in + p.out_features);
  const Tensor& weight = heads.weight[i];
  const ScalarType type = heads.weight[0].scalar_type();
  check_floating(op, entry("weight", i), weight.scalar_type());
  const ScalarType vec = vector_type(type);
  p.weight = matrix(op, entry("weight", i), weight, type, rows, p.h);
  check_type(op, "latent", latent, type);
  check_rows(op, "latent", latent);
  p.latent = static_cast<const char*>(latent.const_data_ptr()) + i * latent.stride(1) * latent.element_size();
  const int dimensions[4] = {0, 2, 3, 4};
  for (int d = 0; d < 4; ++d) p.latent_stride[d] = latent.stride(dimensions[d]);
  if (!heads.bias.empty()) p.bias = vector(op, entry("bias", i), heads.bias[i], vec, {rows});
  p.mul[0] = epilogue(op, entry("mul_A", i), heads.mul_A[i], vec, 0, p, p.mul_stride[0]);
  p.add[0] = epilogue(op, entry("add_A", i), heads.add_A[i], vec, 0, p, p.add_stride[0]);
  p.mul[1] = epilogue(op, entry("mul_B", i), heads.mul_B[i], vec, 1, p, p.mul_stride[1]);
  p.add[1] = epilogue(op, entry("add_B", i), heads.add_B[i], vec, 1, p, p.add_stride[1]);
  p.scale[0] = p.scale[1] = 1.0f;
  p.w_type = kernel_type(type);
  return p;
}

inline void check_listed(const Op& op, const char* name, size_t got, size_t modules) {
  if (got != modules || modules == 0)
    fail(op, name, "one entry for each module of latent (dimension 1), at least one",
         std::to_string(got) + " for " + std::to_string(modules) + " modules");
}

inline std::vector<HeadParams> prepare_heads(const Op& op, const Heads& heads) {
  check_shape(op, "latent", heads.latent, {kAny, kAny, kAny, kAny, kAny, kAny});
  const size_t count = static_cast<size_t>(heads.latent.size(1));
  const auto listed = [&](const char* name, size_t got) { check_listed(op, name, got, count); };
  listed("weight", heads.weight.size());
  if (!heads.bias.empty()) listed("bias", heads.bias.size());
  listed("mul_A", heads.mul_A.size());
  listed("add_A", heads.add_A.size());
  listed("mul_B", heads.mul_B.size());
  listed("add_B", heads.add_B.size());
  listed("in_features", heads.in_features.size());
  listed("out_features", heads.out_features.size());
  std::vector<HeadParams> modules;
  for (size_t i = 0; i < count; ++i) modules.push_back(prepare_head(op, heads, i));
  return modules;
}

inline void set_output(HeadParams& p, const Tensor& lora_A, const Tensor& lora_B) {
  p.out[0] = lora_A.mutable_data_ptr();
  p.out[1] = lora_B.mutable_data_ptr();
  const int order[2][4] = {{0, 1, 2, 3}, {0, 1, 3, 2}};  // (task, layer, rank, column) of A and of B
  for (int i = 0; i < 4; ++i) {
    p.out_stride[0][i] = lora_A.stride(order[0][i]);
    p.out_stride[1][i] = lora_B.stride(order[1][i]);
  }
  p.out_type = kernel_type(lora_A.scalar_type());
}

template <class Backend>
std::vector<Tensor> hypernet_heads(const Tensor& latent, std::vector<Tensor> weight, std::vector<Tensor> bias,
                                   std::vector<OptTensor> mul_A, std::vector<OptTensor> add_A, std::vector<OptTensor> mul_B,
                                   std::vector<OptTensor> add_B, int64_t rank, std::vector<int64_t> in_features,
                                   std::vector<int64_t> out_features) {
  const Op op = op_of<Backend>("hypernet_heads", latent);
  std::vector<HeadParams> modules =
      prepare_heads(op, {latent, weight, bias, mul_A, add_A, mul_B, add_B, rank, in_features, out_features});
  if (!Backend::covers(weight[0].scalar_type()))
    return torch::stable::detail::to<std::vector<Tensor>>(call_reference("t2l_engine::hypernet_heads_reference", latent,
                                                                         weight, bias, mul_A, add_A, mul_B, add_B, rank,
                                                                         in_features, out_features)[0]);
  std::vector<Tensor> results;
  for (HeadParams& p : modules) {
    Tensor lora_A = torch::stable::new_empty(weight[0], {p.tasks, p.layers, rank, p.in});
    Tensor stored_B = torch::stable::new_empty(weight[0], {p.tasks, p.layers, rank, p.out_features});
    Tensor lora_B = torch::stable::transpose(stored_B, 2, 3);
    for (const Tensor& fresh : {lora_A, stored_B})
      Backend::touch_output(fresh.mutable_data_ptr(), fresh.numel() * fresh.element_size());
    set_output(p, lora_A, lora_B);
    results.push_back(lora_A);
    results.push_back(lora_B);
  }
  Backend::hypernet_heads(op, modules.data(), static_cast<int64_t>(modules.size()));
  return results;
}

template <class Backend>
void hypernet_heads_out(std::vector<Tensor> lora_A, std::vector<Tensor> lora_B, const Tensor& latent,
                        std::vector<Tensor> weight, std::vector<Tensor> bias, std::vector<OptTensor> mul_A,
                        std::vector<OptTensor> add_A, std::vector<OptTensor> mul_B, std::vector<OptTensor> add_B,
                        int64_t rank, std::vector<int64_t> in_features, std::vector<int64_t> out_features, double scale_B) {
  const Op op = op_of<Backend>("hypernet_heads_out_", latent);
  std::vector<HeadParams> modules =
      prepare_heads(op, {latent, weight, bias, mul_A, add_A, mul_B, add_B, rank, in_features, out_features});
  check_listed(op, "lora_A", lora_A.size(), modules.size());
  check_listed(op, "lora_B", lora_B.size(), modules.size());
  check_floating(op, "lora_A[0]", lora_A[0].scalar_type());
  for (size_t i = 0; i < modules.size(); ++i) {
    HeadParams& p = modules[i];
    check_shape(op, entry("lora_A", i), lora_A[i], {p.tasks, p.layers, rank, p.in});
    check_shape(op, entry("lora_B", i), lora_B[i], {p.tasks, p.layers, p.out_features, rank});
    check_type(op, entry("lora_A", i), lora_A[i], lora_A[0].scalar_type());
    check_type(op, entry("lora_B", i), lora_B[i], lora_A[0].scalar_type());
    check_strides(op, entry("lora_A", i), lora_A[i]);
    check_strides(op, entry("lora_B", i), lora_B[i]);
    set_output(p, lora_A[i], lora_B[i]);
    p.scale[1] = static_cast<float>(scale_B);
  }
  if (!Backend::covers(weight[0].scalar_type()) || !Backend::covers(lora_A[0].scalar_type())) {
    call_reference("t2l_engine::hypernet_heads_out__reference", lora_A, lora_B, latent, weight, bias, mul_A, add_A, mul_B,
                   add_B, rank, in_features, out_features, scale_B);
    return;
  }
  Backend::hypernet_heads(op, modules.data(), static_cast<int64_t>(modules.size()));
}

}  // namespace t2l::torch_ops
