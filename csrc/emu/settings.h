// Process-wide settings and counters of the emulator.
#pragma once
#include <cstdint>
#include <mutex>
#include <string>

#include "emulator.h"

namespace t2l::emu {

struct Settings {
  Settings();  // from the environment

  std::string error;  // of the environment variables; fails every launch
  std::mutex mutex;   // guards all that follows
  Schedule schedule;
  int num_sms = 132, max_cluster = 8, shared_bytes = kMaxSharedBytes;
  uint64_t launches = 0;  // since the schedule was set
  Counters counters{};
  LaunchRecord last{};
};

Settings& settings();

}  // namespace t2l::emu
