// What config.json of a native checkpoint says of the hypernetwork.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "json.h"

namespace t2l::lib {

struct Module {
  std::string name, path;
  int64_t in_features = 0, out_features = 0;
};

struct HyperNetConfig {
  std::string variant;  // L, M, S-learnable or S-rotary
  std::vector<Module> modules;
  int64_t num_layers = 0, rank = 0, embed_dim = 0, latent_size = 0, head_in_size = 0;
  double scaling = 0;  // resolved: a number
  double output_scale = 1;
  bool head_bias = true;

  int64_t task_width() const { return latent_size / 2; }
  int64_t part_width() const { return latent_size / 4; }  // of the depth input, and of the module input
  int64_t width() const { return task_width() + 2 * part_width(); }
  bool rotary() const { return variant == "S-rotary"; }
  bool learnable() const { return variant == "S-learnable"; }
  int64_t num_sides() const { return variant == "L" ? 1 : 2; }
  int64_t num_ranks() const { return rotary() || learnable() ? rank : 1; }
  int64_t head_rows(const Module& module) const;
};

// `json`: the whole file; `where`: how messages call it.  Throws Error: T2L_BAD_CHECKPOINT naming the field,
// T2L_UNSUPPORTED for variants and task encoders that only the Python package computes.
HyperNetConfig read_config(const Json& json, const std::string& where);

}  // namespace t2l::lib
