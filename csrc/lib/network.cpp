#include "network.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <system_error>

#include "error.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "t2l uses weights in the byte order of the file, little-endian"
#endif
static_assert(sizeof(size_t) >= sizeof(int64_t), "sizes of buffers are computed in 64 bits");

namespace t2l::lib {
namespace {

constexpr char kMagic[] = "T2L-NET\n";
constexpr uint32_t kVersion = 1;
constexpr int64_t kMaxSize = (int64_t{1} << 31) - 1, kMaxRank = int64_t{1} << 16, kMaxLayers = 4096, kMaxModules = 64;

constexpr auto make_crc_tables() {
  std::array<std::array<uint32_t, 256>, 8> tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0xedb88320u : 0u);
    tables[0][byte] = crc;
  }
  for (size_t t = 1; t < tables.size(); ++t)
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint32_t before = tables[t - 1][byte];
      tables[t][byte] = (before >> 8) ^ tables[0][before & 255];
    }
  return tables;
}

// As zlib's, eight bytes a step.
uint32_t crc32(const unsigned char* data, size_t size) {
  static constexpr auto kTables = make_crc_tables();
  uint32_t crc = ~0u;
  for (; size >= 8; data += 8, size -= 8) {
    uint64_t word;
    std::memcpy(&word, data, sizeof word);
    word ^= crc;
    crc = 0;
    for (int i = 0; i < 8; ++i) crc ^= kTables[static_cast<size_t>(7 - i)][(word >> (8 * i)) & 255];
  }
  for (; size > 0; ++data, --size) crc = (crc >> 8) ^ kTables[0][(crc ^ *data) & 255];
  return ~crc;
}

// Whether no element has all bits of the exponent, as NaN and the infinities do.
template <class Bits>
bool finite(const void* data, uint64_t count, Bits exponent) {
  bool found = false;
  const Bits* values = static_cast<const Bits*>(data);
  for (uint64_t i = 0; i < count; ++i) found |= (values[i] & exponent) == exponent;
  return !found;
}

// Hands out the records and arrays of a file, one after the other.
class Reader {
 public:
  Reader(const unsigned char* data, size_t size, const std::string& where) : data_(data), size_(size), where_(where) {}

  [[noreturn]] void bad(const std::string& what) const { throw Error(T2L_BAD_CHECKPOINT, where_ + ": " + what); }

  template <class Record>
  const Record* records(uint64_t count) {
    return reinterpret_cast<const Record*>(take(count * sizeof(Record)));
  }

  const void* array(DType type, std::initializer_list<int64_t> shape) {
    uint64_t count = 1;
    for (const int64_t n : shape)
      if (__builtin_mul_overflow(count, static_cast<uint64_t>(n), &count) || count > size_) cut();
    take((kAlignment - at_ % kAlignment) % kAlignment);
    const uint64_t begin = at_;
    const void* values = take(count * (type == DType::bf16 ? 2 : 4));
    if (!(type == DType::bf16 ? finite<uint16_t>(values, count, 0x7f80) : finite<uint32_t>(values, count, 0x7f800000)))
      bad("the array at byte " + std::to_string(begin) + " holds NaN or infinite values");
    return values;
  }
  const float* floats(std::initializer_list<int64_t> shape) { return static_cast<const float*>(array(DType::f32, shape)); }

  void end() const {
    if (at_ != size_) bad("expected " + std::to_string(at_) + " bytes by its header, got " + std::to_string(size_));
  }

 private:
  [[noreturn]] void cut() const { bad("expected more bytes by its header, got " + std::to_string(size_)); }
  const unsigned char* take(uint64_t bytes) {
    if (bytes > size_ - at_) cut();
    at_ += bytes;
    return data_ + (at_ - bytes);
  }

  const unsigned char* data_;
  const uint64_t size_;
  const std::string& where_;
  uint64_t at_ = 0;
};

const Header* read_header(Reader& reader, const unsigned char* data, size_t size, const std::string& where,
                          bool skip_checksum) {
  if (size < sizeof(Header) || std::memcmp(data, kMagic, sizeof Header::magic) != 0)
    reader.bad("expected a file that t2l export wrote");
  const Header& h = *reader.records<Header>(1);
  if (h.version != kVersion)
    throw Error(T2L_UNSUPPORTED, where + ": expected version " + std::to_string(kVersion) + " of the format, got " +
                                     std::to_string(h.version) + "; export it again");
  if (h.size != size)
    reader.bad("expected " + std::to_string(h.size) + " bytes, got " + std::to_string(size) + ": the file is damaged");
  constexpr size_t kStart = offsetof(Header, size);
  if (!skip_checksum && crc32(data + kStart, size - kStart) != h.checksum)
    reader.bad("the content does not match its checksum: the file is damaged or was edited");
  const struct {
    const char* name;
    int64_t value, least, most;
  } fields[] = {{"dtype", h.dtype, 0, 1},
                {"embed_dim", h.embed_dim, 1, kMaxSize},
                {"task_width", h.task_width, 1, kMaxSize},
                {"width", h.width, 1, kMaxSize},
                {"head_in", h.head_in, 1, kMaxSize},
                {"num_layers", h.num_layers, 1, kMaxLayers},
                {"rank", h.rank, 1, kMaxRank},
                {"num_sides", h.num_sides, 1, kMaxSides},
                {"positions", h.positions, 0, 2},
                {"head_bias", h.head_bias, 0, 1},
                {"num_modules", h.num_modules, 1, kMaxModules}};
  for (const auto& [name, value, least, most] : fields)
    if (value < least || value > most)
      reader.bad(std::string(name) + ": expected " + std::to_string(least) + " to " + std::to_string(most) + ", got " +
                 std::to_string(value));
  if (!std::isfinite(static_cast<float>(h.scaling))) reader.bad("scaling: expected a finite number");
  if (h.variant[sizeof h.variant - 1] != '\0') reader.bad("variant: expected text that ends");
  if (h.positions == 2 && h.width % 2 != 0) reader.bad("width: expected an even number with rotation, got an odd one");
  return &h;
}

// A plain name, which a caller may use as that of a file.
bool is_plain(const char* name) {
  const char* c = name;
  while ((*c >= '0' && *c <= '9') || (*c >= 'A' && *c <= 'Z') || (*c >= 'a' && *c <= 'z') || *c == '_') ++c;
  return c != name && *c == '\0';
}

const Module* read_modules(Reader& reader, const Header& h) {
  const Module* modules = reader.records<Module>(static_cast<uint64_t>(h.num_modules));
  for (const Module* m = modules; m != modules + h.num_modules; ++m) {
    const auto bad = [&](const std::string& what) { reader.bad("module " + std::to_string(m - modules) + ": " + what); };
    const auto out_of_range = [](int64_t n) { return n < 1 || n > kMaxSize; };
    if (out_of_range(m->in_features) || out_of_range(m->out_features) || m->offsets < 0 || m->offsets > 15)
      bad("a number is out of range");
    if (m->name[sizeof m->name - 1] != '\0' || m->path[sizeof m->path - 1] != '\0') bad("expected texts that end");
    if (!is_plain(m->name)) bad("name: expected ASCII letters, digits and underscores");
    for (const Module* other = modules; other != m; ++other)
      if (std::strcmp(m->name, other->name) == 0 || std::strcmp(m->path, other->path) == 0)
        bad("expected another name and path than those of module " + std::to_string(other - modules));
  }
  return modules;
}

TrunkParams read_trunk(Reader& reader, const Header& h) {
  TrunkParams trunk{};
  trunk.w_type = h.dtype == 1 ? DType::bf16 : DType::f32;
  trunk.modules = h.num_modules;
  trunk.layers = h.num_layers;
  trunk.sides = h.num_sides;
  trunk.ranks = h.positions != 0 ? h.rank : 1;
  trunk.rotary = h.positions == 2;
  trunk.t = h.task_width;
  trunk.m = h.width;
  trunk.h = h.head_in;
  const int64_t m = trunk.m, hidden = 4 * m;
  trunk.mixer_task = reader.array(trunk.w_type, {hidden, trunk.t});
  trunk.mixer_table = reader.floats({trunk.modules, trunk.layers, hidden});
  trunk.mixer_w2 = reader.array(trunk.w_type, {m, hidden});
  trunk.mixer_b2 = reader.floats({m});
  for (MlpParams& mlp : trunk.mlp) {
    const int64_t out = &mlp == &trunk.mlp[2] ? trunk.h : m;
    mlp.norm_weight = reader.floats({m});
    mlp.norm_bias = reader.floats({m});
    mlp.w1 = reader.array(trunk.w_type, {hidden, m});
    mlp.b1 = reader.floats({hidden});
    mlp.w2 = reader.array(trunk.w_type, {out, hidden});
    mlp.b2 = reader.floats({out});
  }
  if (trunk.sides == 2) trunk.side_emb = reader.floats({trunk.modules, trunk.sides, m});
  if (h.positions == 1) trunk.pos_emb = reader.floats({h.rank, m});
  return trunk;
}

HeadParams read_head(Reader& reader, const Header& h, const Module& module, const TrunkParams& trunk) {
  HeadParams head{};
  head.sides = trunk.sides;
  head.ranks = trunk.ranks;
  head.layers = trunk.layers;
  head.h = trunk.h;
  head.rank = h.rank;
  head.in = module.in_features;
  head.out_features = module.out_features;
  head.w_type = trunk.w_type;
  const int64_t wide = head.sides == 2 ? std::max(head.in, head.out_features) : head.in + head.out_features;
  const int64_t rows = head.rank / head.ranks * wide;
  head.weight = reader.array(head.w_type, {rows, head.h});
  if (h.head_bias != 0) head.bias = reader.floats({rows});
  for (int side = 0; side < kMaxSides; ++side) {
    const int64_t width = side == 0 ? head.in : head.out_features;
    const int64_t strides[3] = {head.rank * width, width, 1};
    const auto offset = [&](int bit) {
      return module.offsets >> bit & 1 ? reader.floats({head.layers, head.rank, width}) : nullptr;
    };
    head.mul[side] = offset(2 * side);
    head.add[side] = offset(2 * side + 1);
    std::copy_n(strides, 3, head.mul_stride[side]);
    std::copy_n(strides, 3, head.add_stride[side]);
    head.scale[side] = 1;
  }
  // Of a latent [tasks, modules, sides, ranks, layers, h]; what multiplies them later does so without checks.
  int64_t latents = 1;
  for (const int64_t n : {trunk.modules, head.sides, head.ranks, head.layers, head.h})
    if (__builtin_mul_overflow(latents, n, &latents)) throw std::bad_alloc();
  const int64_t per_rank = head.layers * head.h, per_side = head.ranks * per_rank;
  const int64_t strides[4] = {latents, per_side, per_rank, head.h};
  std::copy_n(strides, 4, head.latent_stride);
  return head;
}

}  // namespace

MappedFile::MappedFile(const std::string& path) {
  // Not to wait for the other end of a pipe, which is refused anyway.
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  struct stat status;
  int reason = file < 0 || ::fstat(file, &status) != 0 ? errno : 0;
  const bool regular = reason == 0 && S_ISREG(status.st_mode);
  if (regular && status.st_size > 0) {  // nothing of an empty one can be mapped
    void* memory = ::mmap(nullptr, static_cast<size_t>(status.st_size), PROT_READ, MAP_PRIVATE, file, 0);
    reason = memory == MAP_FAILED ? errno : 0;
    if (reason == 0) {
      data_ = static_cast<const unsigned char*>(memory);
      size_ = static_cast<size_t>(status.st_size);
    }
  }
  if (file >= 0) ::close(file);
  if (reason == ENOMEM) throw std::bad_alloc();
  // In the words of strerror, which for errors that the system knows are constants: safe in threads.
  if (reason != 0) throw Error(T2L_IO, path + ": " + std::generic_category().message(reason));
  if (!regular) throw Error(T2L_IO, path + ": expected a regular file, which t2l export writes");
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<unsigned char*>(data_), size_);
}

Network read_network(const unsigned char* data, size_t size, const std::string& where, bool skip_checksum) {
  Reader reader(data, size, where);
  Network net{};
  net.header = read_header(reader, data, size, where, skip_checksum);
  net.modules = read_modules(reader, *net.header);
  net.encoder_weight = reader.floats({net.header->task_width, net.header->embed_dim});
  for (const float** vector : {&net.encoder_bias, &net.encoder_norm_weight, &net.encoder_norm_bias})
    *vector = reader.floats({net.header->task_width});
  net.trunk = read_trunk(reader, *net.header);
  for (int64_t i = 0; i < net.header->num_modules; ++i)
    net.heads.push_back(read_head(reader, *net.header, net.modules[i], net.trunk));
  reader.end();
  return net;
}

}  // namespace t2l::lib
