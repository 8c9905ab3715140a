// Failures inside the library: exceptions here, a status and a message beyond the C boundary.
#pragma once
#include <stdexcept>
#include <string>

#include "t2l/t2l.h"

namespace t2l::lib {

class Error : public std::runtime_error {
 public:
  Error(t2l_status status, const std::string& message) : std::runtime_error(message), status(status) {}
  const t2l_status status;
};

[[noreturn]] inline void invalid(const std::string& argument, const std::string& expected, const std::string& got) {
  throw Error(T2L_INVALID_ARGUMENT, argument + ": expected " + expected + ", got " + got);
}

// Text out of a file, quoted: printable ASCII as it is, the rest as \xNN, cut to a bounded length.
inline std::string quoted(const std::string& text) {
  constexpr size_t kLongest = 80;
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string out = "'";
  for (size_t i = 0; i < text.size() && i < kLongest; ++i) {
    const unsigned char c = static_cast<unsigned char>(text[i]);
    if (c >= 0x20 && c < 0x7f)
      out += static_cast<char>(c);
    else
      out += {'\\', 'x', kDigits[c >> 4], kDigits[c & 15]};
  }
  return out + (text.size() > kLongest ? "...'" : "'");
}

}  // namespace t2l::lib
