// Build info and instruction sets as one JSON object, read through ctypes once torch has loaded the library.
#include <string>

#include "t2l/kernels.h"

namespace {

// A JSON string; what JSON would need an escape for is a question mark, as T2L_ISA may be anything.
std::string quoted(const char* value) {
  std::string text = value;
  for (char& c : text)
    if (c < ' ' || c > '~' || c == '"' || c == '\\') c = '?';
  return '"' + text + '"';
}

std::string describe() {
  std::string isas;
  for (int i = 0; i < t2l::kNumIsas; ++i)
    if (t2l::has_isa(static_cast<t2l::Isa>(i))) isas += (i ? ", " : "") + quoted(t2l::isa_name(static_cast<t2l::Isa>(i)));
  t2l::Isa isa = t2l::Isa::generic;
  const char* error = t2l::chosen_isa(&isa);
  return "{\"build\": {\"version\": " + quoted(T2L_VERSION) + ", \"build_type\": " + quoted(T2L_BUILD_TYPE) +
         ", \"compiler\": " + quoted(__VERSION__) + ", \"cuda\": " + quoted(T2L_CUDA_BUILD) +
         "}, \"instruction_sets\": {\"available\": [" + isas +
         "], \"chosen\": " + (error ? "null" : quoted(t2l::isa_name(isa))) +
         ", \"why\": " + quoted(isa == t2l::detected_isa() ? t2l::detected_why() : "T2L_ISA") +
         ", \"error\": " + (error ? quoted(error) : "null") + "}}";
}

}  // namespace

// Why T2L_ISA is unusable, or null; asks the system for matrix tiles no sooner than an op does.
extern "C" __attribute__((visibility("default"))) const char* t2l_isa_error() {
  t2l::Isa isa = t2l::Isa::generic;
  return t2l::chosen_isa(&isa);
}

// Instruction sets of this CPU; "chosen" is null and "error" set if T2L_ISA is invalid; "why" it is the chosen one.
extern "C" __attribute__((visibility("default"))) const char* t2l_about() {
  static const std::string about = describe();
  return about.c_str();
}
