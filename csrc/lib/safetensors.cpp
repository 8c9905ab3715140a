#include "safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>

#include "error.h"
#include "json.h"
#include "sha256.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "t2l uses weights in the byte order of the file, little-endian"
#endif

namespace t2l::lib {
namespace {

constexpr size_t kMaxHeader = size_t{1} << 20;
constexpr size_t kMaxDimensions = 64;
constexpr char kChecksum[] = "t2l_engine.sha256";

// A file opened to read; its size.
class OpenFile {
 public:
  explicit OpenFile(const std::string& path) : path_(path) {
    // Not to wait for the other end of a pipe, which is refused anyway.
    handle_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (handle_ < 0) fail();
    struct stat status;
    if (::fstat(handle_, &status) != 0) {
      const int reason = errno;
      ::close(handle_);
      errno = reason;
      fail();
    }
    if (!S_ISREG(status.st_mode)) {
      ::close(handle_);
      throw Error(T2L_IO, path + ": expected a regular file");
    }
    size_ = static_cast<uint64_t>(status.st_size);
  }
  ~OpenFile() { ::close(handle_); }
  OpenFile(const OpenFile&) = delete;
  OpenFile& operator=(const OpenFile&) = delete;

  // Of errno, in the words of strerror, which for errors that the system knows are constants: safe in threads.
  [[noreturn]] void fail() const { throw Error(T2L_IO, path_ + ": " + std::generic_category().message(errno)); }
  int handle() const { return handle_; }
  uint64_t size() const { return size_; }

 private:
  const std::string& path_;
  int handle_ = -1;
  uint64_t size_ = 0;
};

[[noreturn]] void bad(const std::string& where, const std::string& what) {
  throw Error(T2L_BAD_CHECKPOINT, where + ": " + what);
}

FileType type_of(const Json& entry, const std::string& where, const std::string& key) {
  const Json* field = entry.find("dtype");
  if (field == nullptr || field->string() == nullptr) bad(where, key + ": expected a dtype");
  const std::string& name = *field->string();
  for (const FileType type : {FileType::f32, FileType::bf16, FileType::f16, FileType::f64})
    if (name == type_name(type)) return type;
  bad(where, key + ": expected dtype F32, BF16, F16 or F64, got " + quoted(name));
}

// The list of sizes `name` of an entry; negative and fractional ones are none.
std::vector<int64_t> sizes_of(const Json& entry, const char* name, const std::string& where, const std::string& key) {
  const Json* field = entry.find(name);
  if (field == nullptr || field->array() == nullptr) bad(where, key + ": expected a list " + name);
  if (field->array()->size() > kMaxDimensions) bad(where, key + ": " + name + ": expected fewer entries");
  std::vector<int64_t> out;
  for (const Json& item : *field->array()) {
    if (item.integer() == nullptr || *item.integer() < 0)
      bad(where, key + ": " + name + ": expected sizes, got " + shown(item));
    out.push_back(*item.integer());
  }
  return out;
}

Tensor tensor_of(const Json& entry, const unsigned char* data, uint64_t size, const std::string& where,
                 const std::string& key) {
  if (entry.object() == nullptr) bad(where, key + ": expected an object");
  Tensor tensor{type_of(entry, where, key), sizes_of(entry, "shape", where, key), nullptr, 0};
  const std::vector<int64_t> offsets = sizes_of(entry, "data_offsets", where, key);
  if (offsets.size() != 2 || offsets[0] > offsets[1] || static_cast<uint64_t>(offsets[1]) > size)
    bad(where, key + ": data_offsets: expected a range within the " + std::to_string(size) + " bytes of tensors");
  tensor.data = data + offsets[0];
  tensor.bytes = static_cast<size_t>(offsets[1] - offsets[0]);
  uint64_t bytes = type_size(tensor.type);
  bool fits = true;
  for (const int64_t n : tensor.shape) fits = fits && !__builtin_mul_overflow(bytes, static_cast<uint64_t>(n), &bytes);
  if (!fits || bytes != tensor.bytes)
    bad(where, key + ": its shape does not match its " + std::to_string(tensor.bytes) + " bytes");
  return tensor;
}

// Every byte belongs to exactly one tensor.
void check_layout(const std::map<std::string, Tensor>& tensors, const unsigned char* data, uint64_t size,
                  const std::string& where) {
  std::vector<std::pair<const Tensor*, const std::string*>> order;
  for (const auto& [key, tensor] : tensors) order.emplace_back(&tensor, &key);
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
    return std::make_pair(a.first->data, a.first->bytes) < std::make_pair(b.first->data, b.first->bytes);
  });
  uint64_t end = 0;
  for (const auto& [tensor, key] : order) {
    const uint64_t start = static_cast<uint64_t>(tensor->data - data);
    if (start != end)
      bad(where, quoted(*key) + ": it " + (start < end ? "overlaps another tensor" : "leaves a gap before it"));
    end = start + tensor->bytes;
  }
  if (end != size) bad(where, std::to_string(size - end) + " bytes belong to no tensor");
}

// All ones in the exponent: infinite or NaN.
template <class Word>
bool finite(const Tensor& tensor, Word exponent) {
  constexpr int64_t kBlock = 4096;
  const int64_t count = tensor.count();
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t end = std::min(count, first + kBlock);
    bool wrong = false;
    for (int64_t i = first; i < end; ++i) {
      Word bits;
      std::memcpy(&bits, tensor.data + i * sizeof bits, sizeof bits);
      wrong |= (bits & exponent) == exponent;
    }
    if (wrong) return false;
  }
  return true;
}

bool finite(const Tensor& tensor) {
  switch (tensor.type) {
    case FileType::f64:
      return finite<uint64_t>(tensor, uint64_t{0x7ff} << 52);
    case FileType::f32:
      return finite<uint32_t>(tensor, 0x7f800000u);
    case FileType::bf16:
      return finite<uint16_t>(tensor, uint16_t{0x7f80});
    default:
      return finite<uint16_t>(tensor, uint16_t{0x7c00});
  }
}

// As torch prints it.
const char* torch_name(FileType type) {
  static constexpr const char* kNames[] = {"torch.float32", "torch.bfloat16", "torch.float16", "torch.float64"};
  return kNames[static_cast<int>(type)];
}

// As Python prints a tuple.
std::string tuple(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

}  // namespace

std::string read_file(const std::string& path, size_t limit) {
  const OpenFile file(path);
  std::string content(limit + 1, '\0');
  size_t size = 0;
  while (size < content.size()) {
    const ssize_t got = ::read(file.handle(), &content[size], content.size() - size);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) file.fail();
    if (got == 0) break;
    size += static_cast<size_t>(got);
  }
  if (size > limit) bad(path, "expected at most " + std::to_string(limit) + " bytes, got more");
  content.resize(size);
  return content;
}

MappedFile::MappedFile(const std::string& path) {
  const OpenFile file(path);
  if (file.size() == 0) return;  // nothing to map
  if (file.size() > SIZE_MAX / 2) throw Error(T2L_IO, path + ": larger than the address space");
  void* memory = ::mmap(nullptr, static_cast<size_t>(file.size()), PROT_READ, MAP_PRIVATE, file.handle(), 0);
  if (memory == MAP_FAILED) file.fail();
  data_ = static_cast<const unsigned char*>(memory);
  size_ = static_cast<size_t>(file.size());
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<unsigned char*>(data_), size_);
}

const char* type_name(FileType type) {
  static constexpr const char* kNames[] = {"F32", "BF16", "F16", "F64"};
  return kNames[static_cast<int>(type)];
}

size_t type_size(FileType type) {
  static constexpr size_t kSizes[] = {4, 2, 2, 8};
  return kSizes[static_cast<int>(type)];
}

Safetensors parse_safetensors(const unsigned char* data, size_t size, const std::string& where) {
  uint64_t length = 0;
  if (size < sizeof length) bad(where, "no safetensors file: expected 8 bytes and more, got " + std::to_string(size));
  std::memcpy(&length, data, sizeof length);
  if (length > kMaxHeader)
    bad(where, "no safetensors file: its header claims more than " + std::to_string(kMaxHeader) + " bytes");
  if (length > size - sizeof length) bad(where, "no safetensors file: its header claims more bytes than the file has");
  const std::string_view text(reinterpret_cast<const char*>(data) + sizeof length, static_cast<size_t>(length));
  const Json header = parse_json(text, where + ": header");
  if (header.object() == nullptr) bad(where, "no safetensors file: its header is no object");
  data += sizeof length + length;
  size -= sizeof length + static_cast<size_t>(length);

  Safetensors file;
  for (const auto& [key, entry] : *header.object()) {
    if (key != "__metadata__") {
      file.tensors.emplace(key, tensor_of(entry, data, size, where, quoted(key)));
      continue;
    }
    if (entry.object() == nullptr) bad(where, "__metadata__: expected an object of texts, got " + shown(entry));
    for (const auto& [name, value] : *entry.object()) {
      if (value.string() == nullptr) bad(where, "__metadata__: " + quoted(name) + ": expected text, got " + shown(value));
      if (name == kChecksum) file.checksum = *value.string();
    }
  }
  check_layout(file.tensors, data, size, where);
  return file;
}

void check_finite(const Safetensors& file, const std::string& where) {
  for (const auto& [key, tensor] : file.tensors)
    if (!finite(tensor)) bad(where, quoted(key) + ": holds NaN or infinite values");
}

void check_checksum(const Safetensors& file, const std::string& where) {
  if (!file.checksum) return;
  Sha256 digest;
  for (const auto& [key, tensor] : file.tensors) {
    std::string head = key;
    head += '\0';
    head += torch_name(tensor.type);
    head += '\0';
    head += tuple(tensor.shape);
    head += '\0';
    digest.update(head.data(), head.size());
    digest.update(tensor.data, tensor.bytes);
  }
  if (digest.hex() != *file.checksum)
    bad(where, std::string("the content does not match its checksum ") + kChecksum + ": the file is damaged or was edited");
}

}  // namespace t2l::lib
