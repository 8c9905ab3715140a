// Settings and counters, and the devices and streams of every OS thread.
#include "settings.h"

#include <cstdlib>
#include <optional>
#include <vector>

namespace t2l::emu {
namespace {

std::optional<Schedule> parse_schedule(std::string text) {
  static const std::string kEager = "+eager", kSeed = "seed=";
  Schedule schedule;
  if (text.size() > kEager.size() && text.compare(text.size() - kEager.size(), kEager.size(), kEager) == 0) {
    schedule.eager = true;
    text.resize(text.size() - kEager.size());
  }
  if (text == "forward") return schedule;
  schedule.reverse = text == "reverse";
  if (schedule.reverse) return schedule;
  const std::string digits = text.compare(0, kSeed.size(), kSeed) == 0 ? text.substr(kSeed.size()) : "";
  if (digits.empty() || digits.size() > 18 || digits.find_first_not_of("0123456789") != std::string::npos) return {};
  schedule.seed = std::strtoull(digits.c_str(), nullptr, 10);
  if (schedule.seed == 0) return {};
  return schedule;
}

thread_local int device = 0, device_of_memory = 0;
thread_local std::vector<void*> streams;  // current stream of each device

}  // namespace

Settings::Settings() {
  const auto read_count = [&](const char* name, int* count, int most) {
    const char* text = std::getenv(name);
    if (text == nullptr) return;
    *count = std::atoi(text);
    if (*count < 1 || *count > most)
      error = std::string(name) + " is not a number from 1 to " + std::to_string(most) + ": " + text;
  };
  constexpr int kAny = 1 << 20;
  read_count("T2L_EMU_NUM_SMS", &num_sms, kAny);
  read_count("T2L_EMU_MAX_CLUSTER", &max_cluster, kAny);
  read_count("T2L_EMU_SHARED_BYTES", &shared_bytes, kMaxSharedBytes);
  if (const char* text = std::getenv("T2L_EMU_SCHEDULE")) {
    const auto parsed = parse_schedule(text);
    if (parsed)
      schedule = *parsed;
    else
      error = std::string("T2L_EMU_SCHEDULE is not a schedule: ") + text;
  }
}

Settings& settings() {
  static Settings instance;
  return instance;
}

void set_schedule(const Schedule& schedule) {
  Settings& all = settings();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.schedule = schedule;
  all.launches = 0;
}

bool set_schedule(const char* text) {
  const auto schedule = parse_schedule(text);
  if (schedule) set_schedule(*schedule);
  return schedule.has_value();
}

namespace {

int read_setting(int Settings::* which) {
  Settings& all = settings();
  const std::lock_guard<std::mutex> lock(all.mutex);
  return all.*which;
}
void write_setting(int Settings::* which, int value) {
  Settings& all = settings();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.*which = value;
}

}  // namespace

int num_sms() { return read_setting(&Settings::num_sms); }
void set_num_sms(int count) { write_setting(&Settings::num_sms, count); }
int max_cluster() { return read_setting(&Settings::max_cluster); }
void set_max_cluster(int count) { write_setting(&Settings::max_cluster, count); }
int shared_bytes() { return read_setting(&Settings::shared_bytes); }
void set_shared_bytes(int bytes) { write_setting(&Settings::shared_bytes, bytes); }

int memory_device() { return device_of_memory; }
void set_memory_device(int index) { device_of_memory = index; }
int current_device() { return device; }
void set_current_device(int index) { device = index; }

void* current_stream() {
  while (streams.size() <= static_cast<size_t>(device))
    streams.push_back(reinterpret_cast<void*>((streams.size() + 1) << 12));
  return streams[device];
}
void set_current_stream(void* stream) {
  current_stream();
  streams[device] = stream;
}

Counters counters() {
  Settings& all = settings();
  const std::lock_guard<std::mutex> lock(all.mutex);
  return all.counters;
}
void reset_counters() {
  Settings& all = settings();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.counters = Counters{};
}
LaunchRecord last_launch() {
  Settings& all = settings();
  const std::lock_guard<std::mutex> lock(all.mutex);
  return all.last;
}

}  // namespace t2l::emu
