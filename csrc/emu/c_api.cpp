// C API of the emulator's host side, for ctypes.
#include <string>

#include "emulator.h"

#define T2L_EMU_EXPORT extern "C" __attribute__((visibility("default")))

namespace emu = t2l::emu;

// 0; or 1, without effect, if the text is not a schedule.
T2L_EMU_EXPORT int t2l_emu_set_schedule(const char* text) { return emu::set_schedule(text) ? 0 : 1; }

// SMs of a device, at least 1.
T2L_EMU_EXPORT void t2l_emu_set_num_sms(int count) { emu::set_num_sms(count); }

// Bytes of shared memory that a block may have, 227 KiB at most.
T2L_EMU_EXPORT void t2l_emu_set_shared_bytes(int bytes) { emu::set_shared_bytes(bytes); }

// Blocks of the largest cluster, at least 1.
T2L_EMU_EXPORT void t2l_emu_set_max_cluster(int count) { emu::set_max_cluster(count); }

T2L_EMU_EXPORT void t2l_emu_reset_counters() { emu::reset_counters(); }

// "read", "written", "flops" or "launches" since the last reset; -1 for another name.
T2L_EMU_EXPORT int64_t t2l_emu_counter(const char* name) {
  const emu::Counters now = emu::counters();
  const std::string wanted = name;
  return wanted == "read"       ? now.read
         : wanted == "written"  ? now.written
         : wanted == "flops"    ? now.flops
         : wanted == "launches" ? now.launches
                                : -1;
}

// "grid_x", "grid_y", "cluster", "pdl", "shared_bytes", "device" or "stream" of the latest launch; -1 for another name.
T2L_EMU_EXPORT int64_t t2l_emu_last_launch(const char* name) {
  const emu::LaunchRecord last = emu::last_launch();
  const std::string wanted = name;
  return wanted == "grid_x"         ? last.launch.grid_x
         : wanted == "grid_y"       ? last.launch.grid_y
         : wanted == "cluster"      ? last.launch.cluster
         : wanted == "pdl"          ? last.launch.pdl
         : wanted == "shared_bytes" ? last.launch.shared_bytes
         : wanted == "device"       ? last.device
         : wanted == "stream"       ? static_cast<int64_t>(reinterpret_cast<uintptr_t>(last.launch.stream))
                                    : -1;
}

T2L_EMU_EXPORT int t2l_emu_current_device() { return emu::current_device(); }

// The current stream of this OS thread's current device.
T2L_EMU_EXPORT void t2l_emu_set_stream(void* stream) { emu::set_current_stream(stream); }

// The device that owns the memory of this OS thread's calls; initially 0.
T2L_EMU_EXPORT void t2l_emu_set_memory_device(int device) { emu::set_memory_device(device); }
