// Host side of a launch, on a device and in the emulator.
#pragma once
#include <cstdint>

#ifdef T2L_EMULATOR
#include "emu/emulator.h"
#else
#include <cuda_runtime.h>
#endif

#include "config.h"

namespace t2l::cuda {

// Multiprocessors of the current device, and what a block of it may have of shared memory.
struct DeviceLimits {
  int multiprocessors = 0;
  int shared_bytes = 0;
  const char* error = nullptr;
};

inline DeviceLimits device_limits() {
  DeviceLimits limits;
#ifdef T2L_EMULATOR
  limits.multiprocessors = emu::multiprocessors();
  limits.shared_bytes = static_cast<int>(kMaxSharedBytes);
#else
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) limits.error = cudaGetErrorString(error);
#endif
  return limits;
}

// Every kernel takes one argument: a record with its parameters and configuration.
template <class Argument>
const char* launch(void (*kernel)(Argument), int64_t grid_x, int64_t grid_y, int64_t shared_bytes, void* stream,
                   const Argument& argument) {
  if (grid_x > 0x7fffffff || grid_y > 0xffff) return "too many blocks";
#ifdef T2L_EMULATOR
  return emu::launch(emu::Launch{grid_x, static_cast<int>(grid_y), kThreads, shared_bytes, stream},
                     [&] { kernel(argument); });
#else
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  void* arguments[] = {const_cast<Argument*>(&argument)};
  const cudaError_t error =
      cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y)), dim3(kThreads), arguments,
                       static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#endif
}

}  // namespace t2l::cuda
