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

}  // namespace t2l::lib
