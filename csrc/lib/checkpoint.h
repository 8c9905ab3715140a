// A native checkpoint folder: config.json and hypernet.safetensors, opened and checked.
#pragma once
#include <string>

#include "config.h"
#include "safetensors.h"
#include "t2l/params.h"

namespace t2l::lib {

class Checkpoint {
 public:
  // Throws Error.  Every key that the configuration asks for is there, no other (but those under "reference."), each of its
  // shape; all else is T2L_BAD_CHECKPOINT.  Each is of type F32 or BF16, all matrices of one; else T2L_UNSUPPORTED.
  Checkpoint(const std::string& folder, bool skip_checksum);

  const HyperNetConfig config;
  // The tensor of a key that the constructor found; null for an absent offset.
  const Tensor* find(const std::string& key) const;
  const Tensor& at(const std::string& key) const { return *find(key); }
  DType matrix_type() const { return matrix_type_; }

 private:
  void check_keys(const std::string& where);
  void check_types(const std::string& where);
  void check_deviations(const std::string& where) const;

  MappedFile file_;
  Safetensors contents_;
  DType matrix_type_ = DType::f32;
};

// Offsets of the last step: per module, "offsets.<module>.<name>_A" and "..._B".
constexpr const char* kOffsetNames[] = {"std", "mean", "add"};

}  // namespace t2l::lib
