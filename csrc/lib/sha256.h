// SHA-256 (FIPS 180-4).
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace t2l::lib {

class Sha256 {
 public:
  void update(const void* data, size_t size);
  // Ends the message; lower-case hexadecimal.
  std::string hex();

 private:
  void block(const unsigned char* data);

  uint32_t state_[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  unsigned char pending_[64] = {};
  uint64_t size_ = 0;  // bytes seen
};

}  // namespace t2l::lib
