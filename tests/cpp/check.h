// What the tests share: checks that count, and a file to open.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "t2l/t2l.h"

inline int failures = 0;

inline bool check(bool truth, const char* file, int line, const std::string& what) {
  if (!truth && ++failures <= 50) std::fprintf(stderr, "%s:%d: not so: %s\n", file, line, what.c_str());
  return truth;
}

#define CHECK(truth) check(truth, __FILE__, __LINE__, #truth)
#define CHECK_SAYS(truth, what) check(truth, __FILE__, __LINE__, std::string(#truth) + ": " + (what))

// A call, which names the t2l_error `error`, must fail with this status and with this text in its message.
#define CHECK_FAILS(wanted, text, call)                                                                   \
  do {                                                                                                    \
    t2l_error error{"nothing"};                                                                           \
    const bool failed_so = (call) == (wanted);                                                            \
    CHECK_SAYS(failed_so && std::strstr(error.message, text), std::string(text) + " | " + error.message); \
  } while (false)

#define CHECK_OK(call)                                     \
  do {                                                     \
    t2l_error error{"nothing"};                            \
    const bool is_ok = (call) == T2L_OK;                   \
    CHECK_SAYS(is_ok && !error.message[0], error.message); \
  } while (false)

using Net = std::unique_ptr<t2l_hypernet, decltype(&t2l_hypernet_close)>;

inline Net open_net(const std::string& path, int32_t isa = T2L_ISA_BEST, bool skip_checksum = true) {
  t2l_hypernet* net = nullptr;
  const t2l_open_options options{isa, skip_checksum};
  CHECK_OK(t2l_hypernet_open(path.c_str(), &options, &net, &error));
  return Net(net, t2l_hypernet_close);
}

// The instruction sets to be tested here.
inline std::vector<int32_t> isas() {
  std::vector<int32_t> found;
  for (int32_t isa = T2L_ISA_GENERIC; t2l_isa_name(isa) != nullptr; ++isa)
    if (t2l_has_isa(isa)) found.push_back(isa);
  return found;
}

inline t2l_hypernet_info info_of(const Net& net) {
  t2l_hypernet_info info{};
  CHECK_OK(t2l_hypernet_get_info(net.get(), &info, &error));
  return info;
}

inline std::vector<t2l_module_info> modules_of(const Net& net) {
  std::vector<t2l_module_info> modules(static_cast<size_t>(info_of(net).num_modules));
  for (size_t i = 0; i < modules.size(); ++i)
    CHECK_OK(t2l_hypernet_get_module(net.get(), static_cast<int64_t>(i), &modules[i], &error));
  return modules;
}

// Memory for adapters, NaN at first: A and B of every module, and the records that point into them.
struct Adapters {
  std::vector<std::vector<float>> A, B;
  std::vector<t2l_adapter> outputs;
};

inline Adapters adapters_for(const Net& net, int64_t tasks) {
  const t2l_hypernet_info info = info_of(net);
  const int64_t rows = tasks * info.num_layers * info.rank;
  Adapters made;
  for (const t2l_module_info& module : modules_of(net)) {
    made.A.emplace_back(static_cast<size_t>(rows * module.in_features), std::numeric_limits<float>::quiet_NaN());
    made.B.emplace_back(static_cast<size_t>(rows * module.out_features), std::numeric_limits<float>::quiet_NaN());
    made.outputs.emplace_back();
    CHECK_OK(t2l_adapter_init(net.get(), static_cast<int64_t>(made.outputs.size()) - 1, made.A.back().data(),
                              made.B.back().data(), T2L_F32, &made.outputs.back(), &error));
  }
  return made;
}

// Numbers in [-1, 1), the same on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2 + 1) {}
  uint64_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return state_ >> 33;
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
  float number() { return static_cast<float>(bits() >> 7) / 8388608.0f - 1.0f; }
  std::vector<float> numbers(int64_t count) {
    std::vector<float> out(static_cast<size_t>(count));
    for (float& value : out) value = number();
    return out;
  }

 private:
  uint64_t state_;
};

inline float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// To nearest, ties to even; of finite values.
inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// A buffer of float32 or bfloat16, all NaN at first: what is read without having been set shows.
class Buffer {
 public:
  Buffer(int64_t count, int32_t type) : type_(type), bits16_(type == T2L_BF16 ? count : 0, 0x7fc0), floats_() {
    if (type == T2L_F32) floats_.assign(static_cast<size_t>(count), std::numeric_limits<float>::quiet_NaN());
  }
  void set(int64_t i, float value) {
    if (type_ == T2L_BF16)
      bits16_[static_cast<size_t>(i)] = to_bf16(value);
    else
      floats_[static_cast<size_t>(i)] = value;
  }
  double at(int64_t i) const {
    return type_ == T2L_BF16 ? from_bf16(bits16_[static_cast<size_t>(i)]) : floats_[static_cast<size_t>(i)];
  }
  void* data() { return type_ == T2L_BF16 ? static_cast<void*>(bits16_.data()) : floats_.data(); }
  bool same_bits(const Buffer& other, int64_t i) const {
    const size_t k = static_cast<size_t>(i);
    if (type_ == T2L_BF16) return bits16_[k] == other.bits16_[k];
    return std::memcmp(&floats_[k], &other.floats_[k], sizeof(float)) == 0;
  }

 private:
  int32_t type_;
  std::vector<uint16_t> bits16_;
  std::vector<float> floats_;
};

// Exit status of a test.
inline int result() {
  if (failures) std::fprintf(stderr, "%d checks failed\n", failures);
  return failures ? 1 : 0;
}
