// Files from strangers: whatever a file says, it is refused with a status and a message, or what was read can be used.  It
// is read from memory of its exact size, so that a sanitizer sees a step beyond.
#include <sys/stat.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>

#include "check.h"
#include "lib/error.h"
#include "lib/network.h"

namespace {

using t2l::lib::Header;
using t2l::lib::Module;
using Bytes = std::vector<unsigned char>;

constexpr size_t kModules = sizeof(Header);

Bytes bytes_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return Bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
}

// Message of the Error that reading throws, after its status; "" where it throws none.
std::string refusal(const Bytes& bytes, bool skip_checksum = true) {
  try {
    t2l::lib::read_network(bytes.data(), bytes.size(), "file", skip_checksum);
    return "";
  } catch (const t2l::lib::Error& e) {
    return std::string(t2l_status_name(e.status)) + ": " + e.what();
  }
}

void check_refused(const std::string& text, const std::string& got) {
  CHECK_SAYS(got.find(text) != std::string::npos, text + " | " + got);
}

template <class T>
Bytes with(Bytes bytes, size_t at, T value) {
  std::memcpy(bytes.data() + at, &value, sizeof value);
  return bytes;
}

// Of an edited file, whose checksum no longer fits: that it is refused, or generates.
void check_refused_or_used(const Bytes& bytes) {
  if (!refusal(bytes).empty()) return;
  std::ofstream("edited.t2l", std::ios::binary).write(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  const Net net = open_net("edited.t2l");
  if (net == nullptr) return;
  for (const t2l_module_info& module : modules_of(net))
    CHECK(std::strlen(module.name) < sizeof Module::name && std::strlen(module.path) < sizeof Module::path);
  const Adapters made = adapters_for(net, 1);
  const std::vector<float> task_emb(static_cast<size_t>(info_of(net).embed_dim), 0.5f);
  CHECK_OK(
      t2l_hypernet_generate(net.get(), task_emb.data(), 1, made.outputs.data(), info_of(net).num_modules, nullptr, &error));
}

void test_sizes(const Bytes& sound, size_t records) {
  std::vector<size_t> sizes;
  for (size_t n = 0; n < records + 100; ++n) sizes.push_back(n);
  for (size_t n = records + 100; n < sound.size(); n += sound.size() / 50) sizes.push_back(n);
  sizes.push_back(sound.size() - 1);
  for (const size_t n : sizes) {
    Bytes cut(sound.begin(), sound.begin() + static_cast<ptrdiff_t>(n));
    cut.shrink_to_fit();
    check_refused(n < sizeof(Header) ? "expected a file that t2l export wrote" : ": the file is damaged", refusal(cut));
    if (n < sizeof(Header)) continue;
    cut = with(cut, offsetof(Header, size), uint64_t{n});  // it owns up to its size
    cut.shrink_to_fit();
    check_refused("expected more bytes by its header, got " + std::to_string(n), refusal(cut));
  }
  Bytes longer = sound;
  longer.push_back(0);
  check_refused("expected " + std::to_string(sound.size()) + " bytes, got", refusal(longer));
  longer = with(longer, offsetof(Header, size), uint64_t{longer.size()});
  check_refused("bytes by its header, got " + std::to_string(longer.size()), refusal(longer));
}

// A bit that flips is noticed wherever it is; and without the checksum it does no harm.
void test_flips(const Bytes& sound, size_t records) {
  Random random(1);
  for (size_t n = 0; n < records + 200; ++n) {
    const size_t at = n < records ? n : static_cast<size_t>(random.below(static_cast<int64_t>(sound.size())));
    Bytes flipped = sound;
    flipped[at] = static_cast<unsigned char>(flipped[at] ^ (1 << random.below(8)));
    CHECK_SAYS(!refusal(flipped, false).empty(), std::to_string(at));
    if (n % 8 == 0) check_refused_or_used(flipped);
  }
}

void test_numbers(const Bytes& sound, size_t records) {
  const int64_t values[] = {-1,    0,     1,         2,         3,         16,        64,        65,        4096,     4097,
                            65536, 65537, INT32_MAX, 1ll << 31, 1ll << 32, 1ll << 61, 1ll << 62, INT64_MAX, INT64_MIN};
  std::vector<size_t> places;
  for (size_t at = offsetof(Header, scaling); at < kModules; at += 8) places.push_back(at);
  for (size_t module = kModules; module < records; module += sizeof(Module))
    for (const size_t at : {offsetof(Module, in_features), offsetof(Module, out_features), offsetof(Module, offsets)})
      places.push_back(module + at);
  for (const size_t at : places)
    for (const int64_t value : values) check_refused_or_used(with(sound, at, value));
  Random random(2);
  for (int i = 0; i < 2000; ++i) {
    Bytes edited = sound;
    for (int64_t edits = 1 + random.below(3); edits > 0; --edits)
      edited = with(edited, places[static_cast<size_t>(random.below(static_cast<int64_t>(places.size())))],
                    values[random.below(std::size(values))]);
    check_refused_or_used(edited);
  }
}

void test_messages(const Bytes& sound, size_t records) {
  const struct {
    size_t at;
    int64_t value;
    const char* what;
  } numbers[] = {
      {offsetof(Header, dtype), 2, "bad checkpoint: file: dtype: expected 0 to 1, got 2"},
      {offsetof(Header, rank), 65537, "rank: expected 1 to 65536, got 65537"},
      {offsetof(Header, num_layers), 4097, "num_layers: expected 1 to 4096, got 4097"},
      {offsetof(Header, num_modules), 0, "num_modules: expected 1 to 64, got 0"},
      {offsetof(Header, num_sides), 3, "num_sides: expected 1 to 2, got 3"},
      {offsetof(Header, embed_dim), -1, "embed_dim: expected 1 to 2147483647, got -1"},
      {offsetof(Header, head_in), int64_t{1} << 30, "expected more bytes by its header"},
      {kModules + sizeof(Module) + offsetof(Module, offsets), 16, "module 1: a number is out of range"},
      {kModules + offsetof(Module, in_features), 0, "module 0: a number is out of range"},
  };
  for (const auto& [at, value, what] : numbers) check_refused(what, refusal(with(sound, at, value)));
  const Bytes rotated = with(sound, offsetof(Header, positions), int64_t{2});
  check_refused("width: expected an even number", refusal(with(rotated, offsetof(Header, width), int64_t{127})));
  for (const double scaling : {std::nan(""), HUGE_VAL, -HUGE_VAL, 1e300})
    check_refused("scaling: expected a finite number", refusal(with(sound, offsetof(Header, scaling), scaling)));
  check_refused("variant: expected text that ends", refusal(with(sound, offsetof(Header, variant) + 23, 'x')));
  for (const size_t at : {offsetof(Module, name), offsetof(Module, path)})
    check_refused("module 0: expected texts that end", refusal(with(sound, kModules + at + 263, 'x')));
  for (const char c : {'/', '.', '\0', '\xff'})
    check_refused("module 1: name: expected ASCII letters, digits and underscores",
                  refusal(with(sound, kModules + sizeof(Module) + offsetof(Module, name), c)));
  for (const size_t at : {offsetof(Module, name), offsetof(Module, path)}) {
    Bytes twice = sound;
    std::memcpy(twice.data() + kModules + sizeof(Module) + at, twice.data() + kModules + at, sizeof Module::name);
    check_refused("module 1: expected another name and path than those of module 0", refusal(twice));
  }
  check_refused("unsupported: file: expected version 1 of the format, got 2; export it again",
                refusal(with(sound, offsetof(Header, version), uint32_t{2})));
  check_refused("expected a file that t2l export wrote", refusal(with(sound, 0, 'x')));

  // Values: of the task encoder's arrays, in float32, and of the matrix that follows them, in bfloat16.
  Header header;
  std::memcpy(&header, sound.data(), sizeof header);
  const auto after = [](size_t at, int64_t floats) {
    return (at + sizeof(float) * static_cast<size_t>(floats) + 63) / 64 * 64;
  };
  const size_t first = after(records, 0);
  size_t matrix = after(first, header.task_width * header.embed_dim);
  for (int i = 0; i < 3; ++i) matrix = after(matrix, header.task_width);
  const uint16_t infinity = 0xff80;
  check_refused("the array at byte " + std::to_string(first) + " holds NaN or infinite values",
                refusal(with(sound, first, std::numeric_limits<float>::quiet_NaN())));
  check_refused("the array at byte " + std::to_string(matrix) + " holds NaN or infinite values",
                refusal(with(sound, matrix + 2, infinity)));
  const Bytes other = with(sound, first, 0.25f);
  check_refused("the content does not match its checksum", refusal(other, false));
  CHECK(refusal(other).empty() && refusal(sound, false).empty());
}

void test_paths() {
  const auto open = [](const std::string& path) {
    t2l_hypernet* net = nullptr;
    t2l_error error;
    const t2l_status status = t2l_hypernet_open(path.c_str(), nullptr, &net, &error);
    CHECK(net == nullptr);
    return std::string(t2l_status_name(status)) + ": " + error.message;
  };
  check_refused("file not readable: t2l_hypernet_open: nowhere: No such file", open("nowhere"));
  std::filesystem::create_directories("folder");
  check_refused("file not readable: t2l_hypernet_open: folder: expected a regular file", open("folder"));
  ::mkfifo("pipe", 0600);
  check_refused("file not readable: t2l_hypernet_open: pipe: expected a regular file", open("pipe"));
  std::ofstream("empty").flush();
  check_refused("bad checkpoint: t2l_hypernet_open: empty: expected a file that t2l export wrote", open("empty"));
}

}  // namespace

int main(int argc, char** argv) {
  const Bytes sound = bytes_of(argc > 1 ? argv[1] : "");
  if (!CHECK(sound.size() > kModules && refusal(sound, false).empty())) return result();
  const size_t records =
      kModules + sizeof(Module) * static_cast<size_t>(reinterpret_cast<const Header*>(sound.data())->num_modules);
  test_sizes(sound, records);
  test_flips(sound, records);
  test_numbers(sound, records);
  test_messages(sound, records);
  test_paths();
  return result();
}
