// The ops, registered for a backend.
#pragma once
#include <stdexcept>
#include <string>
#include <utility>

#include "hypernet.h"
#include "lora.h"

// Torch's message of the last failed call in this thread: torch 2.13 and later, whose exception names only the call.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace t2l::torch_ops {

// Calls `function`; where a torch call in it fails, the error has torch's message, such as lack of memory.
template <auto function>
struct WithTorchMessage;

template <class Result, class... Args, Result (*function)(Args...)>
struct WithTorchMessage<function> {
  static Result call(Args... args) {
    try {
      return function(std::forward<Args>(args)...);
    } catch (const std::runtime_error& error) {
      const std::string text = error.what();
      const bool of_torch = text.find("API call failed") != std::string::npos;
      if (!of_torch || !torch_exception_get_what_without_backtrace) throw;
      throw std::runtime_error(torch_exception_get_what_without_backtrace() + (" (" + text + ")"));
    }
  }
};

template <class Backend>
void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("hypernet_trunk", TORCH_BOX((&WithTorchMessage<&hypernet_trunk<Backend>>::call)));
  m.impl("hypernet_heads", TORCH_BOX((&WithTorchMessage<&hypernet_heads<Backend>>::call)));
  m.impl("hypernet_heads_out_", TORCH_BOX((&WithTorchMessage<&hypernet_heads_out<Backend>>::call)));
  m.impl("lora_delta", TORCH_BOX((&WithTorchMessage<&lora_delta<Backend>>::call)));
  m.impl("lora_backward_", TORCH_BOX((&WithTorchMessage<&lora_backward<Backend>>::call)));
  m.impl("lora_add_", TORCH_BOX((&WithTorchMessage<&lora_add<Backend>>::call)));
  m.impl("lora_add_group_", TORCH_BOX((&WithTorchMessage<&lora_add_group<Backend>>::call)));
}

}  // namespace t2l::torch_ops
