// _core: roofline probes for benchmarks (memory bandwidth of this machine).  Not part of wheels.
#include <pybind11/pybind11.h>

#include "t2l/kernels.h"
#include "t2l/probe.h"

namespace {

t2l::Isa chosen() {
  t2l::Isa isa = t2l::Isa::generic;
  if (const char* error = t2l::chosen_isa(&isa)) throw pybind11::value_error(error);
  return isa;
}

// Addresses as from Tensor.data_ptr(): this module does not depend on torch.
void read_memory(uintptr_t address, int64_t num_bytes, int64_t repeats) {
  const t2l::Isa isa = chosen();
  const pybind11::gil_scoped_release others_run;
  t2l::probe_read(reinterpret_cast<const void*>(address), num_bytes, repeats, isa);
}

void copy_memory(uintptr_t target, uintptr_t source, int64_t num_bytes, int64_t repeats) {
  const t2l::Isa isa = chosen();
  const pybind11::gil_scoped_release others_run;
  t2l::probe_copy(reinterpret_cast<void*>(target), reinterpret_cast<const void*>(source), num_bytes, repeats, isa);
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Roofline probes of this machine";
  m.def("read_memory", &read_memory, pybind11::arg("address"), pybind11::arg("num_bytes"), pybind11::arg("repeats"),
        "Reads num_bytes at address, rounded down to cache lines (64 bytes), repeats times, on one thread");
  m.def("copy_memory", &copy_memory, pybind11::arg("target"), pybind11::arg("source"), pybind11::arg("num_bytes"),
        pybind11::arg("repeats"),
        "Copies num_bytes from source to target, rounded down to cache lines (64 bytes), repeats times, on one thread");
}
