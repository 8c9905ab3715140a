// lora_delta, its backward, lora_add_ and lora_add_group_ on CPU.
#include <tuple>

#include "checks.h"

namespace t2l::torch_ops {
namespace {

// Segments are read on the host here, so their values are checked too.
void check_segments(const char* op, const Tensor& seg_indptr, const Tensor& seg_adapters, int64_t tokens, int64_t adapters,
                    int64_t max_seg_len) {
  check_type(op, "seg_indptr", seg_indptr, ScalarType::Int);
  check_type(op, "seg_adapters", seg_adapters, ScalarType::Int);
  check_shape(op, "seg_adapters", seg_adapters, {kAny});
  const int64_t segments = seg_adapters.size(0);
  check_shape(op, "seg_indptr", seg_indptr, {segments + 1});
  check_contiguous(op, "seg_indptr", seg_indptr);
  check_contiguous(op, "seg_adapters", seg_adapters);
  const int32_t* bounds = static_cast<const int32_t*>(seg_indptr.const_data_ptr());
  const int32_t* ids = static_cast<const int32_t*>(seg_adapters.const_data_ptr());
  if (bounds[0] != 0) fail(op, "seg_indptr", "0 first", std::to_string(bounds[0]));
  if (bounds[segments] != tokens)
    fail(op, "seg_indptr", "the number of tokens " + std::to_string(tokens) + " last", std::to_string(bounds[segments]));
  for (int64_t s = 0; s < segments; ++s) {
    const int64_t length = static_cast<int64_t>(bounds[s + 1]) - bounds[s];
    if (length < 0 || length > max_seg_len)
      fail(op, "seg_indptr", "segments of 0 to max_seg_len = " + std::to_string(max_seg_len) + " tokens",
           std::to_string(length) + " at segment " + std::to_string(s));
    if (ids[s] < -1 || ids[s] >= adapters)
      fail(op, "seg_adapters", "ids in [-1, " + std::to_string(adapters) + ")",
           std::to_string(ids[s]) + " at segment " + std::to_string(s));
  }
}

// `y`, called `name`: what has the shape of the result.  `group`: it is wider than this linear's output; the caller moves
// p.y to its columns.
LoraParams prepare(const char* op, const char* name, const Tensor& y, const Tensor& x, const Tensor& lora_A,
                   const Tensor& lora_B, const Tensor& scaling, const Tensor& seg_indptr, const Tensor& seg_adapters,
                   int64_t max_seg_len, const OptTensor& ranks, bool group = false) {
  check_shape(op, "x", x, {kAny, kAny});
  check_shape(op, "lora_A", lora_A, {kAny, kAny, x.size(1)});
  const int64_t adapters = lora_A.size(0), rank = lora_A.size(1);
  check_shape(op, "lora_B", lora_B, {adapters, kAny, rank});
  check_shape(op, "scaling", scaling, {adapters});
  check_shape(op, name, y, {x.size(0), group ? kAny : lora_B.size(1)});
  check_floating(op, "x", x);
  check_floating(op, "lora_A", lora_A);
  check_type(op, name, y, x.scalar_type());
  check_type(op, "lora_B", lora_B, lora_A.scalar_type());
  check_type(op, "scaling", scaling, ScalarType::Float);
  check_rows(op, "x", x);
  check_rows(op, name, y);
  check_rows(op, "lora_A", lora_A);
  check_contiguous(op, "scaling", scaling);
  check_segments(op, seg_indptr, seg_adapters, x.size(0), adapters, max_seg_len);
  if (ranks) {
    check_type(op, "ranks", *ranks, ScalarType::Int);
    check_shape(op, "ranks", *ranks, {adapters});
    check_contiguous(op, "ranks", *ranks);
    const int32_t* values = static_cast<const int32_t*>(ranks->const_data_ptr());
    for (int64_t i = 0; i < adapters; ++i)
      if (values[i] < 0 || values[i] > rank)
        fail(op, "ranks", "values in [0, " + std::to_string(rank) + "]",
             std::to_string(values[i]) + " at adapter " + std::to_string(i));
  }
  LoraParams p{};
  p.x = x.const_data_ptr();
  p.a = lora_A.const_data_ptr();
  p.b = lora_B.const_data_ptr();
  p.scaling = static_cast<const float*>(scaling.const_data_ptr());
  p.seg_indptr = static_cast<const int32_t*>(seg_indptr.const_data_ptr());
  p.seg_adapters = static_cast<const int32_t*>(seg_adapters.const_data_ptr());
  p.ranks = ranks ? static_cast<const int32_t*>(ranks->const_data_ptr()) : nullptr;
  p.tokens = x.size(0);
  p.in = x.size(1);
  p.out = lora_B.size(1);
  p.rank = rank;
  p.segments = seg_adapters.size(0);
  p.x_stride = x.stride(0);
  p.y_stride = y.stride(0);
  p.a_stride_adapter = lora_A.stride(0);
  p.a_stride_rank = lora_A.stride(1);
  p.b_stride_adapter = lora_B.stride(0);
  p.b_stride_out = lora_B.stride(1);
  p.b_stride_rank = lora_B.stride(2);
  p.x_type = kernel_type(x.scalar_type());
  p.w_type = kernel_type(lora_A.scalar_type());
  return p;
}

bool covered(const Tensor& x, const Tensor& lora_A) {
  return native_type(x.scalar_type()) && native_type(lora_A.scalar_type());
}

Tensor lora_delta(const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, const Tensor& scaling,
                  const Tensor& seg_indptr, const Tensor& seg_adapters, int64_t max_seg_len, const OptTensor& ranks) {
  const char* op = "lora_delta";
  check_shape(op, "x", x, {kAny, kAny});
  check_shape(op, "lora_B", lora_B, {kAny, kAny, kAny});
  Tensor y = torch::stable::new_empty(x, {x.size(0), lora_B.size(1)});
  LoraParams p = prepare(op, "y", y, x, lora_A, lora_B, scaling, seg_indptr, seg_adapters, max_seg_len, ranks);
  p.y = y.mutable_data_ptr();
  if (!covered(x, lora_A))
    return tensor_of(call_reference("t2l_engine::lora_delta_reference", x, lora_A, lora_B, scaling, seg_indptr, seg_adapters,
                                    max_seg_len, ranks)[0]);
  p.accumulate = false;
  lora(&p, 1, isa(op), parallel);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> lora_delta_backward(const Tensor& grad, const Tensor& x, const Tensor& lora_A,
                                                       const Tensor& lora_B, const Tensor& scaling, const Tensor& seg_indptr,
                                                       const Tensor& seg_adapters, int64_t max_seg_len,
                                                       const OptTensor& ranks) {
  const char* op = "lora_delta_backward";
  LoraBackwardParams q{};
  q.lora = prepare(op, "grad", grad, x, lora_A, lora_B, scaling, seg_indptr, seg_adapters, max_seg_len, ranks);
  if (!covered(x, lora_A)) {
    const auto results = call_reference("t2l_engine::lora_delta_backward_reference", grad, x, lora_A, lora_B, scaling,
                                        seg_indptr, seg_adapters, max_seg_len, ranks);
    return {tensor_of(results[0]), tensor_of(results[1]), tensor_of(results[2])};
  }
  const int64_t adapters = lora_A.size(0), rank = lora_A.size(1), out = lora_B.size(1);
  // Stored as lora_B is, so that autograd need not turn it.
  const bool by_rank = lora_B.stride(1) == 1;
  Tensor grad_x = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  Tensor grad_A = torch::stable::new_zeros(lora_A, {adapters, rank, lora_A.size(2)});
  Tensor grad_B = by_rank ? torch::stable::transpose(torch::stable::new_zeros(lora_B, {adapters, rank, out}), 1, 2)
                          : torch::stable::new_zeros(lora_B, {adapters, out, rank});
  q.grad = grad.const_data_ptr();
  q.grad_stride = grad.stride(0);
  q.grad_x = grad_x.mutable_data_ptr();
  q.grad_a = grad_A.mutable_data_ptr();
  q.grad_b = grad_B.mutable_data_ptr();
  q.grad_b_stride_out = by_rank ? 1 : rank;
  q.grad_b_stride_rank = by_rank ? out : 1;
  lora_backward(q, isa(op), parallel);
  return {grad_x, grad_A, grad_B};
}

void lora_add(const Tensor& y, const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, const Tensor& scaling,
              const Tensor& seg_indptr, const Tensor& seg_adapters, int64_t max_seg_len, const OptTensor& ranks) {
  const char* op = "lora_add_";
  LoraParams p = prepare(op, "y", y, x, lora_A, lora_B, scaling, seg_indptr, seg_adapters, max_seg_len, ranks);
  p.y = y.mutable_data_ptr();
  if (!covered(x, lora_A)) {
    call_reference("t2l_engine::lora_add__reference", y, x, lora_A, lora_B, scaling, seg_indptr, seg_adapters, max_seg_len,
                   ranks);
    return;
  }
  p.accumulate = true;
  lora(&p, 1, isa(op), parallel);
}

void lora_add_group(const Tensor& y, const Tensor& x, std::vector<Tensor> lora_A, std::vector<Tensor> lora_B,
                    const Tensor& scaling, const Tensor& seg_indptr, const Tensor& seg_adapters, int64_t max_seg_len,
                    std::vector<Tensor> ranks, std::vector<int64_t> offsets) {
  const char* op = "lora_add_group_";
  const size_t count = lora_A.size();
  const auto listed = [&](const char* name, size_t got) {
    if (got != count || count == 0)
      fail(op, name, "one entry a member, as many as lora_A and at least one",
           std::to_string(got) + " for " + std::to_string(count) + " entries of lora_A");
  };
  listed("lora_B", lora_B.size());
  listed("ranks", ranks.size());
  listed("offsets", offsets.size());
  check_shape(op, "y", y, {kAny, kAny});
  std::vector<LoraParams> members;
  int64_t end = 0;
  for (size_t i = 0; i < count; ++i) {
    members.push_back(
        prepare(op, "y", y, x, lora_A[i], lora_B[i], scaling, seg_indptr, seg_adapters, max_seg_len, ranks[i], true));
    check_type(op, "lora_A", lora_A[i], lora_A[0].scalar_type());
    if (offsets[i] < end || offsets[i] > y.size(1) - members[i].out)
      fail(op, "offsets", "rising columns of y " + to_text(y) + " that do not overlap",
           "columns " + std::to_string(offsets[i]) + " to " + std::to_string(offsets[i] + members[i].out) + " at member " +
               std::to_string(i));
    end = offsets[i] + members[i].out;
    members[i].y = static_cast<char*>(y.mutable_data_ptr()) + offsets[i] * y.element_size();
    members[i].accumulate = true;
  }
  if (!covered(x, lora_A[0])) {
    call_reference("t2l_engine::lora_add_group__reference", y, x, lora_A, lora_B, scaling, seg_indptr, seg_adapters,
                   max_seg_len, ranks, offsets);
    return;
  }
  lora(members.data(), static_cast<int64_t>(count), isa(op), parallel);
}

}  // namespace
}  // namespace t2l::torch_ops

STABLE_TORCH_LIBRARY_IMPL(t2l_engine, CPU, m) {
  m.impl("lora_delta", TORCH_BOX(&t2l::torch_ops::lora_delta));
  m.impl("lora_delta_backward", TORCH_BOX(&t2l::torch_ops::lora_delta_backward));
  m.impl("lora_add_", TORCH_BOX(&t2l::torch_ops::lora_add));
  m.impl("lora_add_group_", TORCH_BOX(&t2l::torch_ops::lora_add_group));
}
