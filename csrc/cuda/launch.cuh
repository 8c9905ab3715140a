// Host side of a kernel launch, on a device or in the emulator.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdio>

#ifdef T2L_EMULATOR
#include "emu/emulator.h"
#else
#include <cuda_runtime.h>
#endif

#include "config.h"

namespace t2l::cuda {

constexpr int kDevices = 64;        // whose properties are kept
constexpr int kLargestCluster = 8;  // that needs no attribute of a kernel to be allowed

// Limits of the current device; the driver is asked once for each.
inline DeviceLimits device_limits() {
  DeviceLimits limits;
#ifdef T2L_EMULATOR
  limits.num_sms = emu::num_sms();
  limits.shared_bytes = emu::shared_bytes();
#else
  static std::atomic<uint64_t> known[kDevices] = {};  // SMs in the upper half, bytes in the lower; 0: not asked yet
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  const bool is_kept = error == cudaSuccess && device < kDevices;
  if (const uint64_t found = is_kept ? known[device].load(std::memory_order_relaxed) : 0) {
    limits.num_sms = static_cast<int>(found >> 32);
    limits.shared_bytes = static_cast<int>(found & 0xffffffffu);
    return limits;
  }
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limits.num_sms, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess) {
    limits.error = cudaGetErrorString(error);
  } else if (major < 8) {
    static thread_local char text[96];
    std::snprintf(text, sizeof(text), "expected a device of compute capability 8.0 or later, got %d.%d", major, minor);
    limits.error = text;
  } else if (is_kept) {
    known[device].store(uint64_t(limits.num_sms) << 32 | uint32_t(limits.shared_bytes), std::memory_order_relaxed);
  }
#endif
  return limits;
}

#ifndef T2L_EMULATOR
// The current device, or kDevices for one whose properties are not block_ranks.
inline int kept_device() {
  int device = 0;
  return cudaGetDevice(&device) == cudaSuccess && device < kDevices ? device : kDevices;
}

// Whether the code of a kernel that device `device` runs, the current one, is of compute capability 9.0 or later, which has
// clusters and PDL launches.
template <class Argument>
bool is_for_clusters(void (*kernel)(Argument), int device) {
  static std::atomic<signed char> known[kDevices] = {};  // by device: 1 yes, -1 no; all kernels are compiled for the same
  if (device == kDevices) return false;
  if (const int found = known[device].load(std::memory_order_relaxed)) return found > 0;
  cudaFuncAttributes of{};
  if (cudaFuncGetAttributes(&of, kernel) != cudaSuccess) {
    cudaGetLastError();  // not the next caller's, and what failed now may not fail then
    return false;
  }
  known[device].store(of.ptxVersion >= 90 ? 1 : -1, std::memory_order_relaxed);
  return of.ptxVersion >= 90;
}
#endif

// Blocks of the largest cluster of a kernel, 1, 2, 4 or 8: as many as the current device runs together where each has an SM
// of its own.  A part of a card (MIG) may have smaller groups of SMs than the card.
template <class Argument>
int64_t max_cluster([[maybe_unused]] void (*kernel)(Argument), [[maybe_unused]] const DeviceLimits& limits) {
#ifdef T2L_EMULATOR
  return emu::max_cluster();
#else
  static std::atomic<signed char> known[kDevices] = {};  // by device; 0: not asked yet
  const int device = kept_device();
  if (!is_for_clusters(kernel, device)) return 1;
  if (const int found = known[device].load(std::memory_order_relaxed)) return found;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(kLargestCluster);
  launch.blockDim = dim3(kThreads);
  launch.dynamicSmemBytes = static_cast<size_t>(limits.shared_bytes);
  int most = 0, found = 1;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_bytes);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxPotentialClusterSize(&most, reinterpret_cast<const void*>(kernel), &launch);
  if (error != cudaSuccess) {
    cudaGetLastError();  // as above
    return 1;
  }
  while (2 * found <= min(most, kLargestCluster)) found *= 2;
  known[device].store(static_cast<signed char>(found), std::memory_order_relaxed);
  return found;
#endif
}

// Whether a launch may begin before the one before it in its stream has ended, where the device has such launches.
enum class Start { in_turn, pdl };

// Whether launches may be PDL launches: as of driver 12.3 they can be captured in a graph, too.
template <class Argument>
bool has_pdl([[maybe_unused]] void (*kernel)(Argument)) {
#ifdef T2L_EMULATOR
  return emu::max_cluster() > 1;  // devices that have clusters have them
#else
  constexpr int kCaptured = 12030;
  static const int driver = [] {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
  }();
  return driver >= kCaptured && is_for_clusters(kernel, kept_device());
#endif
}

// Kernels take one argument: a struct of parameters and launch configuration.  `cluster`: neighbouring blocks that run
// together.
template <class Argument>
const char* launch(void (*kernel)(Argument), int64_t blocks, int64_t shared_bytes, const DeviceLimits& limits, void* stream,
                   const Argument& argument, Start start = Start::in_turn, int64_t cluster = 1) {
  static_assert(sizeof(Argument) <= 4096, "what a kernel may take, before CUDA 12.1 and compute capability 7.0");
  if (blocks > 0x7fffffff) return "too many blocks";
  if (shared_bytes > limits.shared_bytes) return "more shared memory than this device has";
#ifdef T2L_EMULATOR
  return emu::launch(emu::Launch{blocks, 1, kThreads, shared_bytes, stream, static_cast<int>(cluster),
                                 start == Start::pdl && has_pdl(kernel)},
                     [&] { kernel(argument); });
#else
  if (shared_bytes >
      48 * 1024) {  // the maximum, not shared_bytes: the attribute is per kernel, and other threads may need more
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_bytes);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(blocks));
  launch.blockDim = dim3(kThreads);
  launch.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  launch.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2] = {};
  launch.attrs = attributes;
  if (cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[launch.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  if (start == Start::pdl && has_pdl(kernel)) {
    cudaLaunchAttribute& attribute = attributes[launch.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  void* arguments[] = {const_cast<Argument*>(&argument)};
  const cudaError_t error = cudaLaunchKernelExC(&launch, reinterpret_cast<const void*>(kernel), arguments);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#endif
}

}  // namespace t2l::cuda
