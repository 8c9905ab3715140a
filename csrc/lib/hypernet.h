// A hypernetwork ready to generate.
#pragma once
#include <string>
#include <vector>

#include "network.h"
#include "t2l/kernels.h"
#include "t2l/t2l.h"

namespace t2l::lib {

// Constant once built: threads may share one.
class HyperNet {
 public:
  // Throws Error.
  HyperNet(const std::string& path, Isa isa, bool skip_checksum)
      : file_(path), net_(read_network(file_.data(), file_.size(), path, skip_checksum)), isa_(isa) {}

  const Header& header() const { return *net_.header; }
  const Module* modules() const { return net_.modules; }
  DType weights_type() const { return net_.trunk.w_type; }
  Isa isa() const { return isa_; }

  // As t2l_hypernet_generate.  Throws Error and std::bad_alloc.
  void generate(const float* task_emb, int64_t num_tasks, const t2l_adapter* outputs, int64_t num_outputs,
                const t2l_parallel* parallel) const;

 private:
  void check_output(const t2l_adapter& output, int64_t index, int64_t num_tasks) const;
  std::vector<float> encode(const float* task_emb, int64_t num_tasks) const;

  const MappedFile file_;
  const Network net_;
  const Isa isa_;
};

}  // namespace t2l::lib
