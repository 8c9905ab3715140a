// What this library is, as one JSON object.  No op: Python reads it through ctypes once torch has loaded the library.
#include <string>

#include "t2l/kernels.h"

namespace {

std::string text(const char* value) { return '"' + std::string(value) + '"'; }

std::string describe() {
  std::string isas;
  for (int i = 0; i <= static_cast<int>(t2l::detected_isa()); ++i)
    isas += (i ? ", " : "") + text(t2l::isa_name(static_cast<t2l::Isa>(i)));
  t2l::Isa isa = t2l::Isa::generic;
  const char* error = t2l::chosen_isa(&isa);
  return "{\"build\": {\"version\": " + text(T2L_VERSION) + ", \"build_type\": " + text(T2L_BUILD_TYPE) +
         ", \"compiler\": " + text(__VERSION__) + ", \"cuda\": " + text(T2L_CUDA_BUILD) +
         "}, \"instruction_sets\": {\"available\": [" + isas +
         "], \"chosen\": " + (error ? "null" : text(t2l::isa_name(isa))) + ", \"error\": " + (error ? text(error) : "null") +
         "}}";
}

}  // namespace

// Instruction sets plainest first; "chosen" is null where T2L_ISA is unusable, and "error" says why.
extern "C" __attribute__((visibility("default"))) const char* t2l_about() {
  static const std::string made = describe();
  return made.c_str();
}
