// Registration of the ops for CUDA tensors or, with T2L_EMULATOR, for CPU tensors with the kernels run by the emulator.
#ifdef T2L_EMULATOR
#include <cstring>

#include "emu/emulator.h"
#else
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#include "ops.h"
#include "t2l/cuda_kernels.h"

namespace t2l::torch_ops {
namespace {

// Guard: makes the device of the call's tensors current; `stream` is torch's current stream of that device.
#ifdef T2L_EMULATOR
class OnDevice {
 public:
  explicit OnDevice(const Op&) : before_(emu::current_device()) { emu::set_current_device(emu::memory_device()); }
  ~OnDevice() { emu::set_current_device(before_); }
  OnDevice(const OnDevice&) = delete;
  void* stream() const { return emu::current_stream(); }

 private:
  int before_;
};
#else
using CurrentStream = AOTITorchError (*)(int32_t device, void** stream);

// Looked up at run time, so that this library also loads with a CPU-only torch.
CurrentStream find_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return library ? reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
}

class OnDevice {
 public:
  explicit OnDevice(const Op& op) : guard_(op.device) {
    static const CurrentStream current = find_current_stream();
    if (current == nullptr) fail(op, "stream", "a torch with CUDA", "one without aoti_torch_get_current_cuda_stream");
    TORCH_ERROR_CODE_CHECK(current(op.device, &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};
#endif

void check_launch(const Op& op, const char* error) {
  if (error != nullptr) raise(std::string("t2l_engine::") + op.name + ": launch: " + error);
}

struct Cuda {
#ifdef T2L_EMULATOR
  static constexpr bool kCuda = false;
#else
  static constexpr bool kCuda = true;
#endif
  static constexpr bool kReadsIds = false;
  static constexpr bool kEncodes = true;
  static constexpr int64_t kMaxRank = cuda::kMaxRank;
  static constexpr int64_t kMaxTrunkWidth = cuda::kMaxTrunkWidth;

  static bool covers(ScalarType type) {
    return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
  }
  static void lora(const Op& op, const LoraParams* problems, int64_t count) {
    check_launch(op, cuda::lora(problems, count, OnDevice(op).stream()));
  }
  // The kernels of gradients write all of it; the emulator fills it with NaN first.
  static Tensor new_output(const Tensor& like, const std::vector<int64_t>& sizes) {
    Tensor fresh = torch::stable::new_empty(like, sizes);
#ifdef T2L_EMULATOR
    if (fresh.numel())
      std::memset(fresh.mutable_data_ptr(), 0xff, static_cast<size_t>(fresh.numel() * fresh.element_size()));
#endif
    return fresh;
  }
  static void lora_backward(const Op& op, LoraBackwardParams p, const Tensor& lora_B, const Tensor& scaling) {
    Tensor by_rank = torch::stable::transpose(lora_B, 1, 2);
    if (p.lora.b_stride_out != 1) {
      Tensor copy = torch::stable::new_empty(lora_B, {p.lora.adapters, p.lora.rank, p.lora.out});
      by_rank = torch::stable::copy_(copy, by_rank);
      p.lora.b = by_rank.const_data_ptr();
      p.lora.b_stride_adapter = by_rank.stride(0), p.lora.b_stride_rank = by_rank.stride(1), p.lora.b_stride_out = 1;
    }
    const Tensor workspace = new_output(scaling, {2, p.lora.tokens, p.lora.rank});
    check_launch(op, cuda::lora_backward(p, static_cast<float*>(workspace.mutable_data_ptr()), OnDevice(op).stream()));
  }
  static void hypernet_trunk(const Op& op, const TrunkParams& p) {
    check_launch(op, cuda::hypernet_trunk(p, OnDevice(op).stream()));
  }
  static void hypernet_heads(const Op& op, const HeadParams* modules, int64_t count) {
    check_launch(op, cuda::hypernet_head(modules, count, OnDevice(op).stream()));
  }
  static void touch_output(void*, int64_t) {}  // device memory has no page faults to pre-empt
};

}  // namespace
}  // namespace t2l::torch_ops

#ifdef T2L_EMULATOR
STABLE_TORCH_LIBRARY_IMPL(t2l_engine, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(t2l_engine, CUDA, m) {
#endif
  t2l::torch_ops::register_ops<t2l::torch_ops::Cuda>(m);
}
