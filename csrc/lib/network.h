// The file that `t2l export` writes, mapped and checked: the kernels use its arrays where they lie.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "t2l/params.h"

namespace t2l::lib {

// A file mapped to read.  Whoever writes to the file changes the memory.  Where the file is cut short, reading what it lost
// ends the process with SIGBUS, at any time from the constructor on: files must be replaced by renaming, as t2l_engine does.
class MappedFile {
 public:
  // Throws Error, T2L_IO, naming the file: absent, unreadable, no regular file.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  const unsigned char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  const unsigned char* data_ = nullptr;
  size_t size_ = 0;
};

// The beginning of a file; t2l_engine/hypernetwork/export.py writes the same fields.
struct Header {
  char magic[8];
  uint32_t version;
  uint32_t checksum;  // CRC-32 of all that follows it
  uint64_t size;      // of the file, bytes
  char variant[24];   // ends with a zero byte
  double scaling;
  int64_t dtype;  // of matrices: 0 float32, 1 bfloat16
  int64_t embed_dim, task_width, width, head_in, num_layers, rank, num_sides;
  int64_t positions;  // how a rank enters the trunk: 0 not, 1 by pos_emb, 2 by rotation
  int64_t head_bias;  // 0 or 1
  int64_t num_modules;
};

// One for each module after the header; arrays follow, each from the next multiple of kAlignment bytes on.
struct Module {
  int64_t in_features, out_features;
  int64_t offsets;            // bits: 1 mul_A, 2 add_A, 4 mul_B, 8 add_B
  char name[264], path[264];  // end with a zero byte
};
static_assert(sizeof(Header) == 144 && sizeof(Module) == 552, "records lie in the file without padding");
constexpr uint64_t kAlignment = 64;

// A network whose pointers lead into the memory of its file.
struct Network {
  const Header* header;
  const Module* modules;
  const float* encoder_weight;  // [t, embed_dim]
  const float* encoder_bias;    // [t], and so the LayerNorm's
  const float* encoder_norm_weight;
  const float* encoder_norm_bias;
  TrunkParams trunk;              // without z, latent and tasks
  std::vector<HeadParams> heads;  // without latent, outputs and tasks; scales are 1
};

// `data`: of 8-byte alignment; `where`: how messages call it.  Throws Error: T2L_BAD_CHECKPOINT, where a size or a number is
// out of range, the arrays do not fill the file, one holds NaN or infinite values, or (unless skipped) the checksum is
// another; T2L_UNSUPPORTED, where the file is of another version.
Network read_network(const unsigned char* data, size_t size, const std::string& where, bool skip_checksum);

}  // namespace t2l::lib
