#include "hypernet.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "parallel.h"

namespace t2l::lib {
namespace {

constexpr float kStdEps = 1e-10f;  // the reference's un-normalisation adds it to the standard deviation

size_t size_of(DType type) { return type == DType::bf16 ? 2 : 4; }

DType kernel_type(FileType type) { return type == FileType::bf16 ? DType::bf16 : DType::f32; }

bool aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Product of sizes; std::bad_alloc where no memory could hold as many.
int64_t elements(std::initializer_list<int64_t> sizes) {
  int64_t count = 1;
  for (const int64_t size : sizes)
    if (__builtin_mul_overflow(count, size, &count)) throw std::bad_alloc();
  if (count > (int64_t{1} << 56)) throw std::bad_alloc();
  return count;
}

std::string at(const std::string& name, int64_t index, const char* field) {
  return name + "[" + std::to_string(index) + "]." + field;
}

// The strides (task, layer, rank, column) of one output: none of its elements shares a place with another.
void check_strides(const std::string& name, const int64_t (&strides)[4], const int64_t (&sizes)[4]) {
  std::pair<int64_t, int64_t> order[4];
  int dims = 0;
  for (int i = 0; i < 4; ++i) {
    if (sizes[i] < 2) continue;
    if (strides[i] < 1) invalid(name, "positive strides", std::to_string(strides[i]) + " at " + std::to_string(i));
    order[dims++] = {strides[i], sizes[i]};
  }
  for (int i = 1; i < dims; ++i)
    for (int j = i; j > 0 && order[j] < order[j - 1]; --j) std::swap(order[j], order[j - 1]);
  int64_t reach = 1;  // elements that the dimensions so far span
  for (int i = 0; i < dims; ++i) {
    int64_t span = 0;
    if (order[i].first < reach)
      invalid(name, "strides of which none falls into the span of smaller ones",
              std::to_string(order[i].first) + " within " + std::to_string(reach) + " elements");
    if (__builtin_mul_overflow(order[i].first, order[i].second - 1, &span) || __builtin_add_overflow(reach, span, &reach) ||
        reach > (int64_t{1} << 60))
      invalid(name, "strides within the address space", std::to_string(order[i].first));
  }
}

void check_output(const t2l_adapter& output, int64_t index, int64_t num_tasks, const HyperNetConfig& c) {
  const std::string name = "outputs";
  const Module& module = c.modules[static_cast<size_t>(index)];
  if (output.dtype != T2L_F32 && output.dtype != T2L_BF16)
    invalid(at(name, index, "dtype"), "T2L_F32 or T2L_BF16", std::to_string(output.dtype));
  if (!std::isfinite(output.scale_B) || output.scale_B == 0)
    invalid(at(name, index, "scale_B"), "a finite number other than 0", std::to_string(output.scale_B));
  if (num_tasks == 0) return;
  const size_t size = output.dtype == T2L_BF16 ? 2 : 4;
  for (const auto& [field, pointer] : {std::pair{"lora_A", output.lora_A}, std::pair{"lora_B", output.lora_B}}) {
    if (pointer == nullptr) invalid(at(name, index, field), "memory", "NULL");
    if (!aligned(pointer, size)) invalid(at(name, index, field), "an address aligned to its dtype", "another");
  }
  check_strides(at(name, index, "A_stride"), output.A_stride, {num_tasks, c.num_layers, c.rank, module.in_features});
  check_strides(at(name, index, "B_stride"), output.B_stride, {num_tasks, c.num_layers, c.rank, module.out_features});
}

}  // namespace

HyperNet::HyperNet(const std::string& folder, Isa isa, bool skip_checksum)
    : checkpoint_(folder, skip_checksum), isa_(isa), heads_(config().modules.size()) {
  fold_task_encoder();
  fold_mixer();
  fold_trunk();
  for (size_t i = 0; i < heads_.size(); ++i) fold_head(i);
}

// --- what a checkpoint holds, as the kernels take it --------------------------------------------------------------------

Floats HyperNet::floats(const std::string& key) const {
  const Tensor& tensor = checkpoint_.at(key);
  return as_floats(tensor.data, kernel_type(tensor.type), tensor.count());
}

const float* HyperNet::keep(Floats values) {
  kept_.push_back(std::move(values));
  return kept_.back().data();
}

const void* HyperNet::keep_as(const Floats& values, DType type) {
  if (type == DType::f32) return keep(values);
  std::vector<uint16_t> narrow(values.size());
  std::transform(values.begin(), values.end(), narrow.begin(), narrowed);
  kept_bf16_.push_back(std::move(narrow));
  return kept_bf16_.back().data();
}

// Float32: in the file, or a copy where the file holds another type or no alignment.
const float* HyperNet::vector(const std::string& key) {
  const Tensor& tensor = checkpoint_.at(key);
  if (tensor.type == FileType::f32 && aligned(tensor.data, sizeof(float)))
    return reinterpret_cast<const float*>(tensor.data);
  return keep(floats(key));
}

const void* HyperNet::matrix(const std::string& key) {
  const Tensor& tensor = checkpoint_.at(key);
  if (aligned(tensor.data, type_size(tensor.type))) return tensor.data;
  return keep_as(floats(key), weights_type());
}

// A table [rows, width] after its LayerNorm.
Floats HyperNet::embedding(const std::string& key, int64_t width) {
  Floats table = floats(key + ".weight");
  layer_norm(table, width, vector(key + ".norm.weight"), vector(key + ".norm.bias"));
  return table;
}

// --- folding: HyperNetwork._fold of the Python package --------------------------------------------------------------------

void HyperNet::fold_task_encoder() {
  encoder_weight_ = floats("task_encoder.linear.weight");
  encoder_bias_ = vector("task_encoder.linear.bias");
  encoder_norm_weight_ = vector("task_encoder.norm.weight");
  encoder_norm_bias_ = vector("task_encoder.norm.bias");
}

// The first mixer matrix [4m, m] takes task, depth and module: its columns of the task by themselves, and a table of what
// the rest gives for every module and layer.
void HyperNet::fold_mixer() {
  const int64_t t = config().task_width(), d = config().part_width(), m = config().width(), hidden = 4 * m;
  const int64_t layers = config().num_layers, modules = static_cast<int64_t>(config().modules.size());
  const Floats weight = floats("mixer.linear1.weight");
  Floats task(static_cast<size_t>(hidden * t));
  for (int64_t i = 0; i < hidden; ++i) std::copy_n(weight.data() + i * m, t, task.data() + i * t);
  trunk_.mixer_task = keep_as(task, weights_type());

  const float* bias = vector("mixer.linear1.bias");
  const Floats depth_emb = embedding("depth_emb", d), module_emb = embedding("module_emb", d);
  const std::vector<double> by_layer = product(depth_emb.data(), layers, d, weight.data() + t, m, hidden);
  const std::vector<double> by_module = product(module_emb.data(), modules, d, weight.data() + t + d, m, hidden);
  Floats table(static_cast<size_t>(elements({modules, layers, hidden})));
  float* out = table.data();
  for (int64_t k = 0; k < modules; ++k)
    for (int64_t l = 0; l < layers; ++l)
      for (int64_t j = 0; j < hidden; ++j)
        *out++ = static_cast<float>(by_layer[static_cast<size_t>(l * hidden + j)] +
                                    by_module[static_cast<size_t>(k * hidden + j)] + bias[j]);
  trunk_.mixer_table = keep(std::move(table));
}

void HyperNet::fold_trunk() {
  const HyperNetConfig& c = config();
  trunk_.mixer_w2 = matrix("mixer.linear2.weight");
  trunk_.mixer_b2 = vector("mixer.linear2.bias");
  for (int i = 0; i < 3; ++i) {
    const std::string name = "mlp" + std::to_string(i + 1);
    trunk_.mlp[i] = {vector(name + ".norm.weight"),  vector(name + ".norm.bias"),      matrix(name + ".linear1.weight"),
                     vector(name + ".linear1.bias"), matrix(name + ".linear2.weight"), vector(name + ".linear2.bias")};
  }
  trunk_.modules = static_cast<int64_t>(c.modules.size());
  trunk_.layers = c.num_layers;
  trunk_.sides = c.num_sides();
  trunk_.ranks = c.num_ranks();
  trunk_.t = c.task_width();
  trunk_.m = c.width();
  trunk_.h = c.head_in_size;
  trunk_.rotary = c.rotary();
  trunk_.w_type = weights_type();
  if (c.num_sides() == 2) trunk_.side_emb = keep(embedding("side_emb", trunk_.m));
  if (!c.learnable()) return;
  // The branch of a position through mlp2 does not depend on the task.
  Floats pos = embedding("pos_emb", trunk_.m), x = pos;
  const MlpParams& mlp = trunk_.mlp[1];
  layer_norm(x, trunk_.m, mlp.norm_weight, mlp.norm_bias);
  x = silu_linear(std::move(x), trunk_.m, floats("mlp2.linear1.weight"), weights_type(), mlp.b1, 4 * trunk_.m);
  x = silu_linear(std::move(x), 4 * trunk_.m, floats("mlp2.linear2.weight"), weights_type(), mlp.b2, trunk_.m);
  for (size_t i = 0; i < pos.size(); ++i) pos[i] += x[i];
  trunk_.pos_emb = keep(std::move(pos));
}

void HyperNet::fold_head(size_t index) {
  const HyperNetConfig& c = config();
  const Module& module = c.modules[index];
  const std::string weight = "heads." + module.name + ".weight", bias = "heads." + module.name + ".bias";
  const float scale = static_cast<float>(c.output_scale);
  HeadParams& head = heads_[index];
  if (c.output_scale == 1) {
    head.weight = matrix(weight);
    head.bias = c.head_bias ? vector(bias) : nullptr;
  } else {
    const auto scaled = [scale](Floats values) {
      for (float& v : values) v *= scale;
      return values;
    };
    head.weight = keep_as(scaled(floats(weight)), weights_type());
    head.bias = c.head_bias ? keep(scaled(floats(bias))) : nullptr;
  }
  head.sides = trunk_.sides;
  head.ranks = trunk_.ranks;
  head.layers = c.num_layers;
  head.h = c.head_in_size;
  head.rank = c.rank;
  head.in = module.in_features;
  head.out_features = module.out_features;
  head.w_type = weights_type();
  head.scale[0] = 1;
  // What follows here and in t2l_adapter_init multiplies without checks.
  elements({trunk_.modules, head.sides, head.ranks, head.layers, head.h});
  elements({head.layers, head.rank, std::max(head.in, head.out_features)});
  const int64_t row = head.h, per_rank = row * head.layers, side = per_rank * head.ranks, all = side * head.sides;
  const int64_t strides[4] = {all * trunk_.modules, side, per_rank, row};
  std::copy_n(strides, 4, head.latent_stride);
  fold_offsets(module, head);
}

// A * (std + 1e-10) + (mean + add), B alike.
void HyperNet::fold_offsets(const Module& module, HeadParams& head) {
  for (int s = 0; s < 2; ++s) {
    const auto key = [&](const char* name) { return "offsets." + module.name + "." + name + (s ? "_B" : "_A"); };
    const bool mean = checkpoint_.find(key("mean")) != nullptr, add = checkpoint_.find(key("add")) != nullptr;
    if (checkpoint_.find(key("std")) != nullptr) {
      Floats mul = floats(key("std"));
      for (float& v : mul) v += kStdEps;
      head.mul[s] = keep(std::move(mul));
    }
    if (mean && add) {
      Floats sum = floats(key("mean"));
      const Floats other = floats(key("add"));
      for (size_t i = 0; i < sum.size(); ++i) sum[i] += other[i];
      head.add[s] = keep(std::move(sum));
    } else if (mean || add) {
      head.add[s] = vector(key(mean ? "mean" : "add"));
    }
    // A lies as [layers, rank, in], B as [layers, out, rank].
    const int64_t width = s ? head.out_features : head.in;
    const int64_t strides[3] = {head.rank * width, s ? 1 : width, s ? head.rank : 1};
    std::copy_n(strides, 3, head.mul_stride[s]);
    std::copy_n(strides, 3, head.add_stride[s]);
  }
}

// --- generation ---------------------------------------------------------------------------------------------------------

// LN(W e + b) [num_tasks, t].
Floats HyperNet::encode(const float* task_emb, int64_t num_tasks) const {
  const int64_t e = config().embed_dim, t = config().task_width();
  elements({num_tasks, t});
  const std::vector<double> sums = product(task_emb, num_tasks, e, encoder_weight_.data(), e, t);
  Floats z(sums.size());
  for (size_t i = 0; i < z.size(); ++i) z[i] = static_cast<float>(sums[i] + encoder_bias_[i % static_cast<size_t>(t)]);
  layer_norm(z, t, encoder_norm_weight_, encoder_norm_bias_);
  return z;
}

void HyperNet::generate(const float* task_emb, int64_t num_tasks, const t2l_adapter* outputs, int64_t num_outputs,
                        const t2l_parallel* caller) const {
  const HyperNetConfig& c = config();
  Parallel parallel(caller);
  if (num_tasks < 0) invalid("num_tasks", "0 or more", std::to_string(num_tasks));
  if (task_emb == nullptr && num_tasks > 0) invalid("task_emb", "memory", "NULL");
  if (!aligned(task_emb, alignof(float))) invalid("task_emb", "an address aligned to float", "another");
  if (outputs == nullptr) invalid("outputs", "one record a module", "NULL");
  if (num_outputs != trunk_.modules)
    invalid("num_outputs", std::to_string(trunk_.modules) + ", one a module", std::to_string(num_outputs));
  for (int64_t i = 0; i < num_outputs; ++i) check_output(outputs[i], i, num_tasks, c);
  if (num_tasks == 0) return;

  const Floats z = encode(task_emb, num_tasks);
  const int64_t latents = elements({num_tasks, trunk_.modules, trunk_.sides, trunk_.ranks, trunk_.layers, trunk_.h});
  // Not value-initialised: the trunk writes all of it.
  const size_t element = size_of(weights_type());
  const std::unique_ptr<unsigned char[]> latent(new unsigned char[static_cast<size_t>(latents) * element]);
  TrunkParams trunk = trunk_;
  trunk.z = z.data();
  trunk.tasks = num_tasks;
  trunk.latent = latent.get();
  hypernet_trunk(trunk, isa_, parallel.get());

  for (size_t i = 0; i < heads_.size(); ++i) {
    const t2l_adapter& output = outputs[i];
    HeadParams head = heads_[i];
    head.tasks = num_tasks;
    head.latent = latent.get() + i * element * static_cast<size_t>(head.latent_stride[1] * head.sides);
    head.out[0] = output.lora_A;
    head.out[1] = output.lora_B;
    std::copy_n(output.A_stride, 4, head.out_stride[0]);
    std::copy_n(output.B_stride, 4, head.out_stride[1]);
    head.out_type = output.dtype == T2L_BF16 ? DType::bf16 : DType::f32;
    head.scale[1] = output.scale_B;
    hypernet_head(head, isa_, parallel.get());
  }
}

}  // namespace t2l::lib
