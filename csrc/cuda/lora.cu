// Launches of the LoRA kernel.
#include "launch.cuh"
#include "lora.cuh"
#include "lora_grad.cuh"

namespace t2l::cuda {
namespace {

using Kernel = void (*)(device::LoraLaunch);

template <class T>
Kernel kernel_for(const LoraConfig& c) {
  constexpr int kMany = large_m_tiles(sizeof(T), 1), kManyWide = large_m_tiles(sizeof(T), kWideTiles);
  if constexpr (sizeof(T) == 2)
    if (c.decode)
      return c.n_tiles == 1   ? device::lora_kernel<T, 1, 1, true>
             : c.n_tiles == 2 ? device::lora_kernel<T, 1, 2, true>
                              : device::lora_kernel<T, 1, kWideTiles, true>;
  if (c.n_tiles == 1) return c.m_tiles == 1 ? device::lora_kernel<T, 1, 1, false> : device::lora_kernel<T, kMany, 1, false>;
  if (c.n_tiles == 2) return c.m_tiles == 1 ? device::lora_kernel<T, 1, 2, false> : device::lora_kernel<T, kMany, 2, false>;
  return c.m_tiles == 1 ? device::lora_kernel<T, 1, kWideTiles, false>
                        : device::lora_kernel<T, kManyWide, kWideTiles, false>;
}

const char* launch_group(const LoraParams* problems, int64_t count, bool counts_bad_ids, void* stream) {
  const DeviceLimits limits = device_limits();
  if (limits.error) return limits.error;
  device::LoraLaunch argument{};
  for (int64_t i = 0; i < count; ++i) {
    if (problems[i].rank > kMaxRank) return "lora: a rank above 1024";
    if (max(problems[i].in, problems[i].out) > kMaxLoraFeatures) return "lora: more than 2^28 features";
    if (problems[i].tokens > kMaxLoraTokens) return "lora: more than 2^30 tokens";
    argument.problem[i] = problems[i];
  }
  argument.counts_bad_ids = counts_bad_ids;
  const LoraConfig& c = argument.config =
      choose_lora_config(problems, count, max_cluster(device::lora_kernel<float, 1, 1, false>, limits), limits);
  if (c.token_tiles == 0 || c.output_tiles == 0) return nullptr;
  const DType type = lora_compute_type(problems[0]);
  const Kernel kernel = type == DType::bf16  ? kernel_for<device::bf16>(c)
                        : type == DType::f16 ? kernel_for<device::f16>(c)
                                             : kernel_for<float>(c);
  return launch(kernel, c.token_tiles * c.output_tiles, c.shared_bytes, limits, stream, argument, Start::pdl, c.cluster);
}

}  // namespace

const char* lora(const LoraParams* problems, int64_t count, void* stream) {
  for (int64_t i = 0; i < count; i += kMaxGroup)
    if (const char* error = launch_group(problems + i, min(kMaxGroup, count - i), i == 0 && problems[0].bad_ids, stream))
      return error;
  return nullptr;
}

const char* lora_backward(const LoraBackwardParams& params, float* workspace, void* stream) {
  const LoraParams& p = params.lora;
  // B^T and A^T as the A and B of one more linear, whose inputs are the gradients: the sum over its outputs is that of x.
  LoraParams forward = p, backward = p;
  forward.out = 0;
  forward.rank_vectors = workspace;
  backward.x = params.grad, backward.x_stride = params.grad_stride;
  backward.y = params.grad_x, backward.y_stride = p.in;
  backward.in = p.out, backward.out = p.in;
  backward.a = p.b, backward.a_stride_adapter = p.b_stride_adapter, backward.a_stride_rank = p.b_stride_rank;
  backward.b = p.a, backward.b_stride_adapter = p.a_stride_adapter, backward.b_stride_rank = p.a_stride_rank;
  backward.rank_vectors = workspace + p.tokens * p.rank;
  const LoraParams problems[2] = {backward, forward};
  if (const char* error = lora(problems, 2, stream)) return error;
  const device::LoraGradLaunch argument{params, forward.rank_vectors, backward.rank_vectors, choose_lora_grad_config(p)};
  if (argument.config.blocks == 0) return nullptr;
  const auto kernel = lora_compute_type(p) == DType::bf16  ? device::lora_grad_kernel<device::bf16>
                      : lora_compute_type(p) == DType::f16 ? device::lora_grad_kernel<device::f16>
                                                           : device::lora_grad_kernel<float>;
  const DeviceLimits limits = device_limits();
  return launch(kernel, argument.config.blocks, argument.config.shared_bytes, limits, stream, argument);
}

}  // namespace t2l::cuda
