// Files: read whole, or mapped; and the safetensors format, checked before anything is used.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace t2l::lib {

// Fails with T2L_IO: absent, unreadable, no regular file; messages name it.
// The whole file, at most `limit` bytes (else T2L_BAD_CHECKPOINT).
std::string read_file(const std::string& path, size_t limit);

// A file mapped to read.  Whoever writes to the file changes the memory.  Where the file is cut short, reading what it lost
// ends the process with SIGBUS, at any time from the constructor on: files must be replaced by renaming, as t2l_engine does.
class MappedFile {
 public:
  MappedFile() = default;
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept { swap(other); }
  MappedFile& operator=(MappedFile&& other) noexcept {
    swap(other);
    return *this;
  }
  const unsigned char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  void swap(MappedFile& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }
  const unsigned char* data_ = nullptr;
  size_t size_ = 0;
};

enum class FileType { f32, bf16, f16, f64 };
const char* type_name(FileType type);  // "F32", ... as the format says
size_t type_size(FileType type);       // bytes

struct Tensor {
  FileType type;
  std::vector<int64_t> shape;
  const unsigned char* data;  // row-major, little-endian, of any alignment
  size_t bytes;
  int64_t count() const { return static_cast<int64_t>(bytes / type_size(type)); }
};

struct Safetensors {
  std::map<std::string, Tensor> tensors;
  std::optional<std::string> checksum;  // the content's, in files that t2l_engine wrote
};

// The tensors of a safetensors file in memory; they point into it.  Throws Error, T2L_BAD_CHECKPOINT "<where>: ...". Refused
// are: a header beyond 1 MiB, types other than FileType, tensors that overlap, leave gaps or reach outside, and shapes that
// do not match their bytes.  Reads the header alone.
Safetensors parse_safetensors(const unsigned char* data, size_t size, const std::string& where);

// Throws Error (T2L_BAD_CHECKPOINT) naming the tensor unless every value is finite.
void check_finite(const Safetensors& file, const std::string& where);

// Throws Error (T2L_BAD_CHECKPOINT) where the file states a checksum that is not that of its tensors.
void check_checksum(const Safetensors& file, const std::string& where);

}  // namespace t2l::lib
