// Argument checks of all ops: errors name the op and the argument, with the expected and the actual value.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "t2l/params.h"
#include "t2l/strides.h"

namespace t2l::torch_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

inline std::string to_text(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "dtype #" + std::to_string(static_cast<int>(type));
  }
}

inline std::string to_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline std::string cuda_text(int32_t device) { return "cuda:" + std::to_string(device); }

inline std::string device_of(const Tensor& t) {
  return t.is_cpu() ? "cpu" : t.is_cuda() ? cuda_text(t.get_device_index()) : "a device of another kind";
}

// A call: the name of the op, for error messages, and the device all its tensors must be on.
struct Op {
  const char* name;
  bool cuda = false;
  int32_t device = 0;    // CUDA device index
  int64_t problem = -1;  // of a group, which is being checked; -1: none

  bool holds(const Tensor& t) const { return cuda ? t.is_cuda() && t.get_device_index() == device : t.is_cpu(); }
  std::string device_text() const { return cuda ? cuda_text(device) : "cpu"; }
};

// The device is that of `first`, the first tensor of the call.
template <class Backend>
Op op_of(const char* name, const Tensor& first) {
  return Backend::kCuda ? Op{name, true, first.is_cuda() ? first.get_device_index() : 0} : Op{name};
}

[[noreturn]] inline void raise(const std::string& message) {
  STD_TORCH_CHECK(false, message.c_str());
  std::abort();  // unreachable: the check throws
}

[[noreturn]] inline void fail(const Op& op, std::string_view argument, const std::string& expected, const std::string& got) {
  const std::string place = op.problem < 0 ? "" : " at problem " + std::to_string(op.problem);
  raise(std::string("t2l_engine::") + op.name + ": " + std::string(argument) + ": expected " + expected + ", got " + got +
        place);
}

constexpr int64_t kAny = -1;

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string text;
  for (int64_t size : sizes) text += (text.empty() ? "" : ", ") + (size == kAny ? std::string("*") : std::to_string(size));
  return "shape [" + text + "]";
}

inline void check_device(const Op& op, std::string_view name, const Tensor& t) {
  if (!op.holds(t)) fail(op, name, "a tensor on " + op.device_text() + " like the other arguments", device_of(t));
}

// Checks device and shape (kAny: any size).  Error messages are only built on failure: this is on the path of calls of a few
// microseconds.
inline void check_shape(const Op& op, std::string_view name, const Tensor& t, std::initializer_list<int64_t> sizes) {
  check_device(op, name, t);
  bool ok = t.dim() == static_cast<int64_t>(sizes.size());
  int64_t i = 0;
  for (int64_t size : sizes) {
    ok = ok && (size == kAny || t.size(i) == size);
    ++i;
  }
  if (!ok) fail(op, name, shape_text(sizes), to_text(t));
}

inline void check_type(const Op& op, std::string_view name, const Tensor& t, ScalarType type) {
  if (t.scalar_type() != type) fail(op, name, to_text(type), to_text(t.scalar_type()));
}

// Checks that the last stride is 1; any stride of a dimension of size 0 or 1 will do.
inline void check_rows(const Op& op, std::string_view name, const Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (t.size(last) > 1 && t.stride(last) != 1) fail(op, name, "last stride 1", "stride " + std::to_string(t.stride(last)));
}

// A tensor [..., features] as a matrix: number of rows, and elements from one to the next.
struct Rows {
  int64_t count, stride;
};

// Checks the device, that the last stride is 1, and that all rows are equally far apart.
inline Rows rows_of(const Op& op, std::string_view name, const Tensor& t) {
  check_device(op, name, t);
  if (t.dim() == 0) fail(op, name, "shape [..., features]", to_text(t));
  check_rows(op, name, t);
  Rows rows{1, t.size(t.dim() - 1)};
  for (int64_t i = t.dim() - 2; i >= 0; --i) {
    const int64_t size = t.size(i);
    if (size > 1 && rows.count == 1) rows.stride = t.stride(i);
    if (size > 1 && t.stride(i) != rows.stride * rows.count && t.numel() > 0)
      fail(op, name, "rows at one distance from each other", "strides of another layout");
    rows.count *= size;
  }
  return rows;
}

// For rows that are written: `width` elements of each.
inline void check_apart(const Op& op, std::string_view name, const Rows& rows, int64_t width) {
  if (rows.count > 1 && width > 0 && std::abs(rows.stride) < width)
    fail(op, name, "rows that do not overlap",
         "rows of " + std::to_string(width) + " elements, " + std::to_string(rows.stride) + " apart");
}

inline void check_contiguous(const Op& op, std::string_view name, const Tensor& t) {
  if (!t.is_contiguous()) fail(op, name, "a contiguous tensor", "strides of another layout");
}

// Checks that no element of an output of four dimensions shares a place with another.
inline void check_strides(const Op& op, std::string_view name, const Tensor& t) {
  int64_t strides[4], sizes[4];
  for (int i = 0; i < 4; ++i) strides[i] = t.stride(i), sizes[i] = t.size(i);
  const StrideFault fault = find_stride_fault(strides, sizes);
  if (fault.dimension >= 0)
    fail(op, name, "strides that do not overlap",
         "stride " + std::to_string(strides[fault.dimension]) + " at dimension " + std::to_string(fault.dimension) +
             ", where smaller ones span " + std::to_string(fault.span));
}

inline void check_floating(const Op& op, std::string_view name, ScalarType type) {
  if (type != ScalarType::Float && type != ScalarType::BFloat16 && type != ScalarType::Half && type != ScalarType::Double)
    fail(op, name, "float32, bfloat16, float16 or float64", to_text(type));
}

// Dtype of norms, biases and embeddings for matrices of `type`.
inline ScalarType vector_type(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

inline DType kernel_type(ScalarType type) {
  return type == ScalarType::BFloat16 ? DType::bf16 : type == ScalarType::Half ? DType::f16 : DType::f32;
}

// Dispatches to the plain-torch reference op of the same schema, for dtypes without kernels.  Returns the stack, results
// first.
template <class... Args>
std::array<StableIValue, sizeof...(Args)> call_reference(const char* name, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return stack;
}

inline Tensor tensor_of(StableIValue value) { return torch::stable::detail::to<Tensor>(value); }

}  // namespace t2l::torch_ops
