// Registration of the ops for CPU tensors.
#include <limits>
#include <string>

#include "bound.h"
#include "ops.h"
#include "t2l/kernels.h"

namespace t2l::torch_ops {
namespace {

// The instruction set in use, read once; an invalid T2L_ISA fails every call.
Isa isa(const Op& op) {
  static const struct Choice {
    Choice() {
      if (const char* message = chosen_isa(&isa)) error = message;
    }
    Isa isa = Isa::generic;
    std::string error;  // a copy: the message is the thread's
  } choice;
  if (!choice.error.empty()) fail(op, "environment", "a usable T2L_ISA", choice.error.c_str());
  return choice.isa;
}

// Runs on torch's intra-op thread pool.
void run_parallel(void*, int64_t count, int64_t grain, RangeBody body, void* context) {
  torch::stable::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { body(begin, end, context); });
}
constexpr ParallelFor parallel{run_parallel, nullptr};

struct Cpu {
  static constexpr bool kCuda = false;
  static constexpr bool kReadsIds = true;
  static constexpr bool kEncodes = false;
  static constexpr int64_t kMaxRank = std::numeric_limits<int64_t>::max();
  static constexpr int64_t kMaxTrunkWidth = std::numeric_limits<int64_t>::max();

  static bool covers(ScalarType type) { return type == ScalarType::Float || type == ScalarType::BFloat16; }
  static void lora(const Op& op, const LoraParams* problems, int64_t count) {
    t2l::lora(problems, count, isa(op), parallel);
  }
  // The kernels of gradients do not write all of it.
  static Tensor new_output(const Tensor& like, const std::vector<int64_t>& sizes) {
    return torch::stable::new_zeros(like, sizes);
  }
  static void lora_backward(const Op& op, const LoraBackwardParams& p, const Tensor&, const Tensor&) {
    t2l::lora_backward(p, isa(op), parallel);
  }
  static void hypernet_trunk(const Op& op, const TrunkParams& p) { t2l::hypernet_trunk(p, isa(op), parallel); }
  static void hypernet_heads(const Op& op, const HeadParams* modules, int64_t count) {
    for (int64_t i = 0; i < count; ++i) t2l::hypernet_head(modules[i], isa(op), parallel);
  }
  static void touch_output(void* data, int64_t bytes) { t2l::touch_output(data, bytes, parallel); }
};

}  // namespace
}  // namespace t2l::torch_ops

STABLE_TORCH_LIBRARY_IMPL(t2l_engine, CPU, m) {
  using namespace t2l::torch_ops;
  register_ops<Cpu>(m);
  m.impl("lora_bind_batch", TORCH_BOX(&lora_bind_batch));
  m.impl("lora_bind_layer", TORCH_BOX(&lora_bind_layer));
  m.impl("lora_unbind", TORCH_BOX(&lora_unbind));
  m.impl("lora_add_bound_", TORCH_BOX((&WithTorchMessage<&lora_add_bound<Cpu>>::call)));
}
