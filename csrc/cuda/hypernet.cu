// Launches of the hypernetwork kernels.
#include "hypernet_head.cuh"
#include "hypernet_trunk.cuh"
#include "launch.cuh"

namespace t2l::cuda {
namespace {

using HeadKernel = void (*)(device::HeadLaunch);

template <class T>
HeadKernel head_kernel_for(const HeadConfig& c) {
  return c.stationary ? device::head_kernel<T, kWideRows / 16, true>
         : c.wide     ? device::head_kernel<T, kWideRows / 16, false>
                      : device::head_kernel<T, kNarrowRows / 16, false>;
}

const char* launch_heads(const HeadParams* modules, int64_t count, void* stream) {
  const DeviceLimits limits = device_limits();
  if (limits.error) return limits.error;
  device::HeadLaunch argument{};
  for (int64_t i = 0; i < count; ++i) argument.module[i] = modules[i];
  argument.count = static_cast<int>(count);
  int64_t rows = head_latent_rows(modules[0]), bytes = modules[0].h * bytes_of(modules[0].w_type);
  for (int64_t i = 0; i < count; ++i) rows += head_rows(modules[i]) + kHeadTile;
  if (max(rows, bytes) > kMaxHeadRows) return "hypernet_heads: more than 2^30 rows of weights and latent, or bytes of one";
  const HeadConfig& c = argument.config = choose_head_config(modules, count, limits);
  if (c.latent_rows == 0 || c.blocks == 0) return nullptr;
  const DType type = modules[0].w_type;
  const HeadKernel kernel = type == DType::bf16  ? head_kernel_for<device::bf16>(c)
                            : type == DType::f16 ? head_kernel_for<device::f16>(c)
                                                 : device::head_kernel<float, kNarrowRows / 16, false>;
  return launch(kernel, c.blocks, c.shared_bytes, limits, stream, argument, Start::pdl);
}

}  // namespace

const char* hypernet_trunk(const TrunkParams& params, void* stream) {
  const DeviceLimits limits = device_limits();
  if (limits.error) return limits.error;
  const int64_t rows = params.tasks * params.modules * params.layers;
  if (rows * params.sides * params.ranks == 0) return nullptr;
  if (rows > kMaxTrunkRows) return "hypernet_trunk: more than 2^30 rows of tasks, modules and layers";
  using Kernel = void (*)(device::TrunkLaunch);
  const Kernel kernel = params.w_type == DType::bf16  ? device::trunk_kernel<device::bf16>
                        : params.w_type == DType::f16 ? device::trunk_kernel<device::f16>
                                                      : device::trunk_kernel<float>;
  const device::TrunkLaunch argument{params, choose_trunk_config(params, max_cluster(kernel, limits), limits)};
  const TrunkConfig& c = argument.config;
  if (c.tile_rows == 0) return "hypernet_trunk: a trunk too wide for the shared memory of this device";
  const int64_t splits = params.sides / c.sides_per_block * (params.ranks / c.ranks_per_block);
  const int64_t blocks = c.tiles * splits * c.cluster + c.prefetch_blocks;
  return launch(kernel, blocks, c.shared_bytes, limits, stream, argument, Start::in_turn, c.cluster);
}

const char* hypernet_head(const HeadParams* modules, int64_t count, void* stream) {
  for (int64_t i = 0; i < count; i += kMaxGroup)
    if (const char* error = launch_heads(modules + i, min(kMaxGroup, count - i), stream)) return error;
  return nullptr;
}

}  // namespace t2l::cuda
