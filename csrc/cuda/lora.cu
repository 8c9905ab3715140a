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

const char* launch_group(const LoraParams* members, int64_t count, bool counts_bad_ids, void* stream) {
  const DeviceLimits limits = device_limits();
  if (limits.error) return limits.error;
  device::LoraLaunch argument{};
  for (int64_t i = 0; i < count; ++i) {
    if (members[i].rank > kMaxRank) return "lora: a rank above 1024";
    if (max(members[i].in, members[i].out) > kMaxLoraFeatures) return "lora: more than 2^28 features";
    if (members[i].tokens > kMaxLoraTokens) return "lora: more than 2^30 tokens";
    argument.member[i] = members[i];
  }
  argument.counts_bad_ids = counts_bad_ids;
  const LoraConfig& c = argument.config =
      choose_lora_config(members, count, max_cluster(device::lora_kernel<float, 1, 1, false>, limits), limits);
  if (c.chunks == 0 || c.slices == 0) return nullptr;
  const DType type = lora_compute_type(members[0]);
  const Kernel kernel = type == DType::bf16  ? kernel_for<device::bf16>(c)
                        : type == DType::f16 ? kernel_for<device::f16>(c)
                                             : kernel_for<float>(c);
  return launch(kernel, c.chunks * c.slices, c.shared_bytes, limits, stream, argument, Start::early, c.cluster);
}

}  // namespace

const char* lora(const LoraParams* members, int64_t count, void* stream) {
  for (int64_t i = 0; i < count; i += kMaxGroup)
    if (const char* error = launch_group(members + i, min(kMaxGroup, count - i), i == 0 && members[0].bad_ids, stream))
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
  const LoraParams members[2] = {backward, forward};
  if (const char* error = lora(members, 2, stream)) return error;
  const device::LoraGradLaunch argument{params, forward.rank_vectors, backward.rank_vectors, choose_lora_grad_config(p)};
  if (argument.config.blocks == 0) return nullptr;
  const auto kernel = lora_compute_type(p) == DType::bf16  ? device::lora_grad_kernel<device::bf16>
                      : lora_compute_type(p) == DType::f16 ? device::lora_grad_kernel<device::f16>
                                                           : device::lora_grad_kernel<float>;
  const DeviceLimits limits = device_limits();
  return launch(kernel, argument.config.blocks, argument.config.shared_bytes, limits, stream, argument);
}

}  // namespace t2l::cuda
