// lora_add_bound_: lora_add_group_ on the slots of a server's layer.  What hardly changes from call to call is bound before,
// to a number: a layer's slots, and the batch that all layers of a model share.  A call passes the layer's number in a
// tensor, an input of a compiled graph, so that a graph kept for another process or model finds its own.
#pragma once
#include <mutex>
#include <unordered_map>

#include "lora.h"

namespace t2l::torch_ops {

// Segments as of lora_add_; for a call with another number of rows, row_adapters has the adapter of each.
struct BoundBatch {
  Tensor seg_indptr, seg_adapters, row_indptr, row_adapters;
  int64_t tokens, max_seg_len, version;
};

// x or y of a call without its address.
struct BoundRows {
  BoundRows() = default;
  BoundRows(const Op& op, const char* name, const Tensor& t)
      : rows(rows_of(op, name, t)), width(t.size(t.dim() - 1)), type(t.scalar_type()) {}
  bool operator==(const BoundRows& o) const {
    return rows.count == o.rows.count && rows.stride == o.rows.stride && width == o.width && type == o.type;
  }
  Rows rows{-1, 0};
  int64_t width = 0;
  ScalarType type = ScalarType::Float;
};

// A call that was checked: one like it differs in the addresses of x and y alone.  In a decode step the base model's weights
// have displaced a layer's tensors from the caches, and reading all their sizes again would take as long as the kernel.
struct BoundCall {
  int64_t version = 0;  // of the batch
  BoundRows x, y;
  std::vector<LoraParams> problems;
};

struct BoundLayer {
  std::vector<Tensor> lora_A, lora_B, ranks;
  Tensor scaling;
  std::vector<int64_t> offsets;
  int64_t batch;
  BoundCall last{};
};

struct Bound {
  // Never destroyed: tensors may not outlive torch.
  static Bound& all() {
    static Bound* bound = new Bound;
    return *bound;
  }
  std::mutex mutex;  // held during a call, which uses all threads anyway; never while Python runs
  std::unordered_map<int64_t, BoundBatch> batches;
  std::unordered_map<int64_t, BoundLayer> layers;
  int64_t versions = 0;
};

template <class Entry>
Entry& bound_to(const Op& op, const char* name, std::unordered_map<int64_t, Entry>& entries, int64_t number) {
  const auto found = entries.find(number);
  if (found == entries.end()) fail(op, name, "a number that is bound", std::to_string(number));
  return found->second;
}

inline int64_t number_in(const Op& op, const char* name, const Tensor& t) {
  check_shape(op, name, t, {1});
  check_type(op, name, t, ScalarType::Long);
  return *static_cast<const int64_t*>(t.const_data_ptr());
}

inline void lora_bind_batch(const Tensor& batch, const Tensor& seg_indptr, const Tensor& seg_adapters,
                            const Tensor& row_indptr, const Tensor& row_adapters, int64_t tokens, int64_t max_seg_len) {
  const int64_t number = number_in(Op{"lora_bind_batch"}, "batch", batch);
  Bound& bound = Bound::all();
  const std::lock_guard<std::mutex> lock(bound.mutex);
  bound.batches[number] = {seg_indptr, seg_adapters, row_indptr, row_adapters, tokens, max_seg_len, ++bound.versions};
}

inline void lora_bind_layer(const Tensor& layer, std::vector<Tensor> lora_A, std::vector<Tensor> lora_B,
                            const Tensor& scaling, std::vector<Tensor> ranks, std::vector<int64_t> offsets,
                            const Tensor& batch) {
  const Op op{"lora_bind_layer"};
  const int64_t number = number_in(op, "layer", layer), of = number_in(op, "batch", batch);
  Bound& bound = Bound::all();
  const std::lock_guard<std::mutex> lock(bound.mutex);
  bound.layers[number] = {lora_A, lora_B, ranks, scaling, offsets, of};
}

// A number is that of a layer or of a batch.
inline void lora_unbind(const Tensor& number) {
  const int64_t value = number_in(Op{"lora_unbind"}, "number", number);
  Bound& bound = Bound::all();
  const std::lock_guard<std::mutex> lock(bound.mutex);
  bound.layers.erase(value);
  bound.batches.erase(value);
}

template <class Backend>
void lora_add_bound(const Tensor& y, const Tensor& x, const Tensor& layer) {
  const Op op = op_of<Backend>("lora_add_bound_", y);
  const int64_t number = number_in(op, "layer", layer);
  const BoundRows x_rows(op, "x", x), y_rows(op, "y", y);
  Bound& bound = Bound::all();
  std::unique_lock<std::mutex> lock(bound.mutex);
  BoundLayer& of = bound_to(op, "layer", bound.layers, number);
  const BoundBatch& batch = bound_to(op, "batch", bound.batches, of.batch);
  if (batch.max_seg_len == 0 || of.lora_A.empty()) return;
  BoundCall& last = of.last;
  if (last.version != batch.version || !(last.x == x_rows) || !(last.y == y_rows)) {
    const int64_t rows = x_rows.rows.count;
    const bool known = rows == batch.tokens;
    if (!known && rows > batch.row_adapters.size(0))
      fail(op, "x", "at most " + std::to_string(batch.row_adapters.size(0)) + " rows", std::to_string(rows));
    const auto first = [](Tensor t, int64_t count) { return torch::stable::narrow(t, 0, 0, count); };
    const Tensor seg_indptr = known ? batch.seg_indptr : first(batch.row_indptr, rows + 1);
    const Tensor seg_adapters = known ? batch.seg_adapters : first(batch.row_adapters, rows);
    const int64_t max_seg_len = known ? batch.max_seg_len : 1;
    last.version = 0;
    last.problems = prepare_group<Backend>(op, y, x, of.lora_A, of.lora_B, of.scaling, seg_indptr, seg_adapters, max_seg_len,
                                           of.ranks, of.offsets, true);
    if (last.problems.empty()) {
      const BoundLayer copy = of;
      lock.unlock();
      call_reference("t2l_engine::lora_add_group__reference", y, x, copy.lora_A, copy.lora_B, copy.scaling, seg_indptr,
                     seg_adapters, max_seg_len, copy.ranks, copy.offsets, OptTensor());
      return;
    }
    last.version = batch.version, last.x = x_rows, last.y = y_rows;
  }
  for (size_t i = 0; i < last.problems.size(); ++i) {
    last.problems[i].x = x.const_data_ptr();
    last.problems[i].y = static_cast<char*>(y.mutable_data_ptr()) + of.offsets[i] * y.element_size();
  }
  Backend::lora(op, last.problems.data(), static_cast<int64_t>(last.problems.size()));
}

}  // namespace t2l::torch_ops
