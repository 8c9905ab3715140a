// _core: what is no tensor op.  `t2l info`, tests and benchmarks ask it; the op path never does.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "t2l/kernels.h"

namespace {

std::string chosen() {
  t2l::Isa isa = t2l::Isa::generic;
  if (const char* error = t2l::chosen_isa(&isa)) throw pybind11::value_error(error);
  return t2l::isa_name(isa);
}

std::vector<std::string> available() {
  std::vector<std::string> names;
  for (int i = 0; i <= static_cast<int>(t2l::detected_isa()); ++i) names.push_back(t2l::isa_name(static_cast<t2l::Isa>(i)));
  return names;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Build information and instruction sets of the native library";
  m.def("chosen_isa", &chosen, "Instruction set in use: the best of this CPU, lowered by T2L_ISA (ValueError if unusable)");
  m.def("available_isas", &available, "Instruction sets this CPU can run, plainest first");
  m.def("build_info", [] {
    return std::map<std::string, std::string>{
        {"version", T2L_VERSION}, {"compiler", __VERSION__}, {"build_type", T2L_BUILD_TYPE}};
  });
}
