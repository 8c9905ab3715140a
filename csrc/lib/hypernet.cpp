#include "hypernet.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "parallel.h"
#include "t2l/strides.h"

namespace t2l::lib {
namespace {

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
  for (int i = 0; i < 4; ++i)
    if (sizes[i] > 1 && strides[i] < 1)
      invalid(name, "positive strides", std::to_string(strides[i]) + " at " + std::to_string(i));
  const StrideFault fault = find_stride_fault(strides, sizes);
  if (fault.dimension < 0) return;
  const std::string stride = std::to_string(strides[fault.dimension]);
  if (fault.overlaps)
    invalid(name, "strides of which none falls into the span of smaller ones",
            stride + " within " + std::to_string(fault.span) + " elements");
  invalid(name, "strides within the address space", stride);
}

}  // namespace

void HyperNet::check_output(const t2l_adapter& output, int64_t index, int64_t num_tasks) const {
  const std::string name = "outputs";
  const int64_t layers = header().num_layers, rank = header().rank;
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
  check_strides(at(name, index, "A_stride"), output.A_stride, {num_tasks, layers, rank, modules()[index].in_features});
  check_strides(at(name, index, "B_stride"), output.B_stride, {num_tasks, layers, rank, modules()[index].out_features});
}

// LN(W e + b) [num_tasks, t], with sums in double.
std::vector<float> HyperNet::encode(const float* task_emb, int64_t num_tasks) const {
  constexpr double kEps = 1e-5;
  constexpr int64_t kSums = 4;  // at a time: one alone would wait for each of its additions
  const int64_t e = header().embed_dim, t = header().task_width;
  std::vector<float> z(static_cast<size_t>(elements({num_tasks, t})));
  for (int64_t i = 0; i < num_tasks; ++i) {
    float* row = z.data() + i * t;
    double mean = 0, variance = 0;
    for (int64_t first = 0; first < t; first += kSums) {
      double sums[kSums] = {};
      const float* weights[kSums];
      for (int64_t c = 0; c < kSums; ++c) weights[c] = &net_.encoder_weight[std::min(first + c, t - 1) * e];
      for (int64_t k = 0; k < e; ++k)
        for (int64_t c = 0; c < kSums; ++c) sums[c] += static_cast<double>(task_emb[i * e + k]) * weights[c][k];
      for (int64_t j = first; j < std::min(first + kSums, t); ++j) {
        row[j] = static_cast<float>(sums[j - first] + net_.encoder_bias[j]);
        mean += row[j];
      }
    }
    mean /= static_cast<double>(t);
    for (int64_t j = 0; j < t; ++j) variance += (row[j] - mean) * (row[j] - mean);
    const double scale = 1 / std::sqrt(variance / static_cast<double>(t) + kEps);
    for (int64_t j = 0; j < t; ++j)
      row[j] = static_cast<float>((row[j] - mean) * scale * net_.encoder_norm_weight[j] + net_.encoder_norm_bias[j]);
  }
  return z;
}

void HyperNet::generate(const float* task_emb, int64_t num_tasks, const t2l_adapter* outputs, int64_t num_outputs,
                        const t2l_parallel* caller) const {
  const TrunkParams& sizes = net_.trunk;
  Parallel parallel(caller);
  if (num_tasks < 0) invalid("num_tasks", "0 or more", std::to_string(num_tasks));
  if (task_emb == nullptr && num_tasks > 0) invalid("task_emb", "memory", "NULL");
  if (!aligned(task_emb, alignof(float))) invalid("task_emb", "an address aligned to float", "another");
  if (outputs == nullptr) invalid("outputs", "one record a module", "NULL");
  if (num_outputs != sizes.modules)
    invalid("num_outputs", std::to_string(sizes.modules) + ", one a module", std::to_string(num_outputs));
  for (int64_t i = 0; i < num_outputs; ++i) check_output(outputs[i], i, num_tasks);
  if (num_tasks == 0) return;

  const std::vector<float> z = encode(task_emb, num_tasks);
  const int64_t latents = elements({num_tasks, sizes.modules, sizes.sides, sizes.ranks, sizes.layers, sizes.h});
  // Not value-initialised: the trunk writes all of it.
  const size_t element = weights_type() == DType::bf16 ? 2 : 4;
  const std::unique_ptr<unsigned char[]> latent(new unsigned char[static_cast<size_t>(latents) * element]);
  TrunkParams trunk = sizes;
  trunk.z = z.data();
  trunk.tasks = num_tasks;
  trunk.latent = latent.get();
  hypernet_trunk(trunk, isa_, parallel.get());

  for (size_t i = 0; i < net_.heads.size(); ++i) {
    const t2l_adapter& output = outputs[i];
    HeadParams head = net_.heads[i];
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
