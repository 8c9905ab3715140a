// A hypernetwork ready to generate: a checkpoint's weights, mapped, and what does not depend on the task, folded.
#pragma once
#include <deque>
#include <string>
#include <vector>

#include "checkpoint.h"
#include "fold.h"
#include "t2l/kernels.h"
#include "t2l/t2l.h"

namespace t2l::lib {

// Constant once built: threads may share one.
class HyperNet {
 public:
  // Throws Error.
  HyperNet(const std::string& folder, Isa isa, bool skip_checksum);
  // Its records point into itself.
  HyperNet(const HyperNet&) = delete;
  HyperNet& operator=(const HyperNet&) = delete;

  const HyperNetConfig& config() const { return checkpoint_.config; }
  DType weights_type() const { return checkpoint_.matrix_type(); }
  Isa isa() const { return isa_; }

  // As t2l_hypernet_generate.  Throws Error and std::bad_alloc.
  void generate(const float* task_emb, int64_t num_tasks, const t2l_adapter* outputs, int64_t num_outputs,
                const t2l_parallel* parallel) const;

 private:
  const float* vector(const std::string& key);
  const void* matrix(const std::string& key);
  Floats floats(const std::string& key) const;
  Floats embedding(const std::string& key, int64_t width);
  const float* keep(Floats values);
  const void* keep_as(const Floats& values, DType type);

  void fold_task_encoder();
  void fold_mixer();
  void fold_trunk();
  void fold_head(size_t index);
  void fold_offsets(const Module& module, HeadParams& head);

  Floats encode(const float* task_emb, int64_t num_tasks) const;

  const Checkpoint checkpoint_;
  const Isa isa_;
  std::deque<Floats> kept_;  // a deque: what is in it stays where it is
  std::deque<std::vector<uint16_t>> kept_bf16_;
  Floats encoder_weight_;
  const float *encoder_bias_ = nullptr, *encoder_norm_weight_ = nullptr, *encoder_norm_bias_ = nullptr;
  TrunkParams trunk_{};
  std::vector<HeadParams> heads_;  // without latent and outputs
};

}  // namespace t2l::lib
