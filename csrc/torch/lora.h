// lora_delta, lora_backward_, lora_add_ and lora_add_group_ as templates over a backend (cpu.cpp, cuda.cpp):
//   kCuda             tensors are on a CUDA device
//   kReadsIds         segments, ids and ranks are readable on the host, so their values are checked
//   covers, kMaxRank  dtypes and ranks with kernels; other calls go to the reference
//   kEncodes          the trunk's kernel encodes tasks
#pragma once
#include <algorithm>
#include <tuple>

#include "checks.h"

namespace t2l::torch_ops {

inline void check_segment_shapes(const Op& op, const Tensor& seg_indptr, const Tensor& seg_adapters) {
  check_type(op, "seg_indptr", seg_indptr, ScalarType::Int);
  check_type(op, "seg_adapters", seg_adapters, ScalarType::Int);
  check_shape(op, "seg_adapters", seg_adapters, {kAny});
  const int64_t segments = seg_adapters.size(0);
  check_shape(op, "seg_indptr", seg_indptr, {segments + 1});
  check_contiguous(op, "seg_indptr", seg_indptr);
  check_contiguous(op, "seg_adapters", seg_adapters);
}

// `ids_too`: else those out of range are no error.
inline void check_segment_values(const Op& op, const Tensor& seg_indptr, const Tensor& seg_adapters, int64_t tokens,
                                 int64_t adapters, int64_t max_seg_len, bool ids_too) {
  const int64_t segments = seg_adapters.size(0);
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
    if (ids_too && (ids[s] < -1 || ids[s] >= adapters))
      fail(op, "seg_adapters", "ids in [-1, " + std::to_string(adapters) + ")",
           std::to_string(ids[s]) + " at segment " + std::to_string(s));
  }
}

// The ids of a call that counts those out of range: as they are or, on a backend that reads them, copied with -1 for these.
class GoodIds {
 public:
  GoodIds(const Op& op, const OptTensor& bad_ids) {
    if (!bad_ids) return;
    check_shape(op, "bad_ids", *bad_ids, {1});
    check_type(op, "bad_ids", *bad_ids, ScalarType::Int);
    count_ = static_cast<int32_t*>(bad_ids->mutable_data_ptr());
  }
  bool expects_all() const { return count_ == nullptr; }
  // After the checks of all problems; valid as long as this object.
  template <class Backend>
  void apply(LoraParams* problems, size_t count) {
    if (count_ == nullptr) return;
    const LoraParams& p = problems[0];
    const auto is_bad = [&](int32_t id) { return id < -1 || id >= p.adapters; };
    if (Backend::kReadsIds) {
      ids_.assign(p.seg_adapters, p.seg_adapters + p.segments);
      *count_ += static_cast<int32_t>(std::count_if(ids_.begin(), ids_.end(), is_bad));
      std::replace_if(ids_.begin(), ids_.end(), is_bad, -1);
      for (size_t i = 0; i < count; ++i) problems[i].seg_adapters = ids_.data();
    } else {
      for (size_t i = 0; i < count; ++i) problems[i].bad_ids = count_;
    }
  }

 private:
  int32_t* count_ = nullptr;
  std::vector<int32_t> ids_;
};

// The sizes of x [..., in_features], with `features` instead.
inline std::vector<int64_t> sizes_of(const Tensor& x, int64_t features) {
  std::vector<int64_t> sizes(x.dim(), features);
  for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes[i] = x.size(i);
  return sizes;
}

// Checks the arguments and fills the parameters, except y.  `y`, called `name` in errors: a tensor of the shape of the
// result or, with `group`, wider; the caller sets p.y to its columns.  `all_ids`: an id out of range is an error.
template <class Backend>
LoraParams prepare_lora(const Op& op, const char* name, const Tensor& y, const Tensor& x, const Tensor& lora_A,
                        const Tensor& lora_B, const Tensor& scaling, const Tensor& seg_indptr, const Tensor& seg_adapters,
                        int64_t max_seg_len, const OptTensor& ranks, bool group = false, bool all_ids = true) {
  const Rows x_rows = rows_of(op, "x", x), y_rows = rows_of(op, name, y);
  check_shape(op, "lora_A", lora_A, {kAny, kAny, x.size(x.dim() - 1)});
  const int64_t adapters = lora_A.size(0), rank = lora_A.size(1);
  check_shape(op, "lora_B", lora_B, {adapters, kAny, rank});
  check_shape(op, "scaling", scaling, {adapters});
  const ScalarType x_type = x.scalar_type(), w_type = lora_A.scalar_type();
  check_floating(op, "x", x_type);
  check_floating(op, "lora_A", w_type);
  check_type(op, name, y, x_type);
  check_type(op, "lora_B", lora_B, w_type);
  check_type(op, "scaling", scaling, ScalarType::Float);
  if (y_rows.count != x_rows.count || (!group && y.size(y.dim() - 1) != lora_B.size(1)))
    fail(op, name, shape_text(sizes_of(x, group ? kAny : lora_B.size(1))), to_text(y));
  check_rows(op, "lora_A", lora_A);
  check_contiguous(op, "scaling", scaling);
  check_segment_shapes(op, seg_indptr, seg_adapters);
  if (Backend::kReadsIds) check_segment_values(op, seg_indptr, seg_adapters, x_rows.count, adapters, max_seg_len, all_ids);
  if (seg_adapters.size(0) == 0 && x_rows.count > 0)
    fail(op, "seg_adapters", "segments of all " + std::to_string(x_rows.count) + " tokens", "none");
  if (max_seg_len < 0) fail(op, "max_seg_len", ">= 0", std::to_string(max_seg_len));
  if (ranks) {
    check_type(op, "ranks", *ranks, ScalarType::Int);
    check_shape(op, "ranks", *ranks, {adapters});
    check_contiguous(op, "ranks", *ranks);
    const int32_t* values = static_cast<const int32_t*>(ranks->const_data_ptr());
    for (int64_t i = 0; Backend::kReadsIds && i < adapters; ++i)
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
  p.true_ranks = ranks ? static_cast<const int32_t*>(ranks->const_data_ptr()) : nullptr;
  p.tokens = x_rows.count;
  p.in = x.size(x.dim() - 1);
  p.out = lora_B.size(1);
  p.rank = rank;
  p.segments = seg_adapters.size(0);
  p.adapters = adapters;
  p.max_seg_len = max_seg_len;
  p.x_stride = x_rows.stride;
  p.y_stride = y_rows.stride;
  p.a_stride_adapter = lora_A.stride(0);
  p.a_stride_rank = lora_A.stride(1);
  p.b_stride_adapter = lora_B.stride(0);
  p.b_stride_out = lora_B.stride(1);
  p.b_stride_rank = lora_B.stride(2);
  p.x_type = kernel_type(x_type);
  p.w_type = kernel_type(w_type);
  return p;
}

template <class Backend>
bool covered(const Tensor& x, const Tensor& lora_A) {
  return Backend::covers(x.scalar_type()) && Backend::covers(lora_A.scalar_type()) && lora_A.size(1) <= Backend::kMaxRank;
}

template <class Backend>
Tensor lora_delta(const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, const Tensor& scaling,
                  const Tensor& seg_indptr, const Tensor& seg_adapters, int64_t max_seg_len, const OptTensor& ranks) {
  const Op op = op_of<Backend>("lora_delta", x);
  rows_of(op, "x", x);
  check_shape(op, "lora_B", lora_B, {kAny, kAny, kAny});
  Tensor y = torch::stable::new_empty(x, sizes_of(x, lora_B.size(1)));
  LoraParams p = prepare_lora<Backend>(op, "y", y, x, lora_A, lora_B, scaling, seg_indptr, seg_adapters, max_seg_len, ranks);
  p.y = y.mutable_data_ptr();
  if (!covered<Backend>(x, lora_A))
    return tensor_of(call_reference("t2l_engine::lora_delta_reference", x, lora_A, lora_B, scaling, seg_indptr, seg_adapters,
                                    max_seg_len, ranks)[0]);
  p.accumulate = false;
  Backend::lora(op, &p, 1);
  return y;
}

template <class Backend>
std::tuple<Tensor, Tensor> lora_backward(const Tensor& grad_x, const Tensor& grad, const Tensor& x, const Tensor& lora_A,
                                         const Tensor& lora_B, const Tensor& scaling, const Tensor& seg_indptr,
                                         const Tensor& seg_adapters, int64_t max_seg_len, const OptTensor& ranks) {
  const Op op = op_of<Backend>("lora_backward_", grad);
  LoraBackwardParams q{};
  q.lora = prepare_lora<Backend>(op, "grad", grad, x, lora_A, lora_B, scaling, seg_indptr, seg_adapters, max_seg_len, ranks);
  check_type(op, "grad_x", grad_x, x.scalar_type());
  check_device(op, "grad_x", grad_x);
  const std::vector<int64_t> sizes = sizes_of(x, x.size(x.dim() - 1));
  if (sizes_of(grad_x, grad_x.dim() ? grad_x.size(grad_x.dim() - 1) : 0) != sizes)
    fail(op, "grad_x", shape_text(sizes), to_text(grad_x));
  check_contiguous(op, "grad_x", grad_x);
  if (!covered<Backend>(x, lora_A)) {
    const auto results = call_reference("t2l_engine::lora_backward__reference", grad_x, grad, x, lora_A, lora_B, scaling,
                                        seg_indptr, seg_adapters, max_seg_len, ranks);
    return {tensor_of(results[0]), tensor_of(results[1])};
  }
  const int64_t adapters = lora_A.size(0), rank = lora_A.size(1), out = lora_B.size(1);
  // Same storage order as lora_B, so that autograd need not transpose it.
  const bool by_rank = lora_B.stride(1) == 1;
  Tensor grad_A = Backend::new_output(lora_A, {adapters, rank, lora_A.size(2)});
  Tensor grad_B = by_rank ? torch::stable::transpose(Backend::new_output(lora_B, {adapters, rank, out}), 1, 2)
                          : Backend::new_output(lora_B, {adapters, out, rank});
  q.lora.accumulate = true;
  q.grad = grad.const_data_ptr();
  q.grad_stride = q.lora.y_stride;
  q.grad_x = grad_x.mutable_data_ptr();
  q.grad_a = grad_A.mutable_data_ptr();
  q.grad_b = grad_B.mutable_data_ptr();
  q.grad_b_stride_out = by_rank ? 1 : rank;
  q.grad_b_stride_rank = by_rank ? out : 1;
  Backend::lora_backward(op, q, lora_B, scaling);
  return {grad_A, grad_B};
}

template <class Backend>
void lora_add(const Tensor& y, const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, const Tensor& scaling,
              const Tensor& seg_indptr, const Tensor& seg_adapters, int64_t max_seg_len, const OptTensor& ranks,
              const OptTensor& bad_ids) {
  const Op op = op_of<Backend>("lora_add_", y);
  GoodIds ids(op, bad_ids);
  const Rows rows = rows_of(op, "y", y);
  check_apart(op, "y", rows, y.size(y.dim() - 1));
  LoraParams p = prepare_lora<Backend>(op, "y", y, x, lora_A, lora_B, scaling, seg_indptr, seg_adapters, max_seg_len, ranks,
                                       false, ids.expects_all());
  p.y = y.mutable_data_ptr();
  if (!covered<Backend>(x, lora_A)) {
    call_reference("t2l_engine::lora_add__reference", y, x, lora_A, lora_B, scaling, seg_indptr, seg_adapters, max_seg_len,
                   ranks, bad_ids);
    return;
  }
  p.accumulate = true;
  ids.apply<Backend>(&p, 1);
  Backend::lora(op, &p, 1);
}

// Checks the arguments of lora_add_group_ and fills the parameters; empty: the reference has to run.
template <class Backend>
std::vector<LoraParams> prepare_group(Op op, const Tensor& y, const Tensor& x, const std::vector<Tensor>& lora_A,
                                      const std::vector<Tensor>& lora_B, const Tensor& scaling, const Tensor& seg_indptr,
                                      const Tensor& seg_adapters, int64_t max_seg_len, const std::vector<Tensor>& ranks,
                                      const std::vector<int64_t>& offsets, bool all_ids) {
  const size_t count = lora_A.size();
  const auto listed = [&](const char* name, size_t got) {
    if (got != count || count == 0)
      fail(op, name, "one entry a problem, as many as lora_A and at least one",
           std::to_string(got) + " for " + std::to_string(count) + " entries of lora_A");
  };
  listed("lora_B", lora_B.size());
  listed("ranks", ranks.size());
  listed("offsets", offsets.size());
  const Rows rows = rows_of(op, "y", y);
  const int64_t columns = y.size(y.dim() - 1);
  check_apart(op, "y", rows, columns);
  std::vector<LoraParams> problems;
  int64_t end = 0;
  bool all_covered = true;
  for (size_t i = 0; i < count; ++i) {
    op.problem = static_cast<int64_t>(i);
    problems.push_back(prepare_lora<Backend>(op, "y", y, x, lora_A[i], lora_B[i], scaling, seg_indptr, seg_adapters,
                                             max_seg_len, ranks[i], true, all_ids));
    check_type(op, "lora_A", lora_A[i], lora_A[0].scalar_type());
    if (offsets[i] < end || offsets[i] > columns - problems[i].out)
      fail(op, "offsets", "rising columns of y " + to_text(y) + " that do not overlap",
           "columns " + std::to_string(offsets[i]) + " to " + std::to_string(offsets[i] + problems[i].out));
    end = offsets[i] + problems[i].out;
    problems[i].y = static_cast<char*>(y.mutable_data_ptr()) + offsets[i] * y.element_size();
    problems[i].accumulate = true;
    all_covered = all_covered && covered<Backend>(x, lora_A[i]);
  }
  if (!all_covered) problems.clear();
  return problems;
}

template <class Backend>
void lora_add_group(const Tensor& y, const Tensor& x, std::vector<Tensor> lora_A, std::vector<Tensor> lora_B,
                    const Tensor& scaling, const Tensor& seg_indptr, const Tensor& seg_adapters, int64_t max_seg_len,
                    std::vector<Tensor> ranks, std::vector<int64_t> offsets, const OptTensor& bad_ids) {
  const Op op = op_of<Backend>("lora_add_group_", y);
  GoodIds ids(op, bad_ids);
  std::vector<LoraParams> problems = prepare_group<Backend>(op, y, x, lora_A, lora_B, scaling, seg_indptr, seg_adapters,
                                                            max_seg_len, ranks, offsets, ids.expects_all());
  if (problems.empty()) {
    call_reference("t2l_engine::lora_add_group__reference", y, x, lora_A, lora_B, scaling, seg_indptr, seg_adapters,
                   max_seg_len, ranks, offsets, bad_ids);
    return;
  }
  ids.apply<Backend>(problems.data(), problems.size());
  Backend::lora(op, problems.data(), static_cast<int64_t>(problems.size()));
}

}  // namespace t2l::torch_ops
