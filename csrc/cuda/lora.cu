// Launches of the LoRA kernel.
#include "launch.cuh"
#include "lora.cuh"

namespace t2l::cuda {
namespace {

using Kernel = void (*)(device::LoraLaunch);

template <class T>
Kernel kernel_for(const LoraConfig& c) {
  constexpr int kMany = large_m_tiles(sizeof(T), 1), kManyWide = large_m_tiles(sizeof(T), kWideTiles);
  if (c.n_tiles == 1) return c.m_tiles == 1 ? device::lora_kernel<T, 1, 1> : device::lora_kernel<T, kMany, 1>;
  if (c.n_tiles == 2) return c.m_tiles == 1 ? device::lora_kernel<T, 1, 2> : device::lora_kernel<T, kMany, 2>;
  return c.m_tiles == 1 ? device::lora_kernel<T, 1, kWideTiles> : device::lora_kernel<T, kManyWide, kWideTiles>;
}

const char* launch_group(const LoraParams* members, int64_t count, void* stream) {
  const DeviceLimits limits = device_limits();
  if (limits.error) return limits.error;
  device::LoraLaunch argument{};
  for (int64_t i = 0; i < count; ++i) {
    if (members[i].rank > kMaxRank) return "lora: a rank above 1024";
    argument.member[i] = members[i];
  }
  const LoraConfig& c = argument.config = choose_lora_config(members, count, limits);
  const int64_t slices = c.first_slice[count];
  if (c.chunks == 0 || slices == 0) return nullptr;
  const DType type = lora_compute_type(members[0]);
  const Kernel kernel = type == DType::bf16  ? kernel_for<device::bf16>(c)
                        : type == DType::f16 ? kernel_for<device::f16>(c)
                                             : kernel_for<float>(c);
  return launch(kernel, c.chunks, slices, c.shared_bytes, limits, stream, argument);
}

}  // namespace

const char* lora(const LoraParams* members, int64_t count, void* stream) {
  for (int64_t i = 0; i < count; i += kMaxGroup)
    if (const char* error = launch_group(members + i, min(kMaxGroup, count - i), stream)) return error;
  return nullptr;
}

}  // namespace t2l::cuda
