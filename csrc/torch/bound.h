// lora_add_bound_: lora_add_group_ on the slots of a server's layer.  What hardly changes from call to call is bound before, to
// a number: a layer's slots, and the batch that all layers of a model share.  A call passes the layer's number in a tensor, an
// input of a compiled graph, so that a graph kept for another process or model finds its own.
#pragma once
#include <memory>
#include <mutex>
#include <unordered_map>

#include "lora.h"

namespace t2l::torch_ops {

// Segments as of lora_add_; for a call with another number of rows, row_adapters has the adapter of each.
struct BoundBatch {
  Tensor seg_indptr, seg_adapters, row_indptr, row_adapters;
  int64_t tokens, max_seg_len;
};

struct BoundLayer {
  std::vector<Tensor> lora_A, lora_B, ranks;
  Tensor scaling;
  std::vector<int64_t> offsets;
  int64_t batch;
};

// Entries stay as they are while a call uses them.
template <class Entry>
class BoundTable {
 public:
  // Never destroyed: tensors may not outlive torch.
  static BoundTable& all() {
    static BoundTable* table = new BoundTable;
    return *table;
  }
  void set(int64_t number, Entry entry) {
    const std::lock_guard<std::mutex> lock(mutex_);
    entries_[number] = std::make_shared<const Entry>(std::move(entry));
  }
  void erase(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    entries_.erase(number);
  }
  std::shared_ptr<const Entry> find(const Op& op, const char* name, int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = entries_.find(number);
    if (found == entries_.end()) fail(op, name, "a number that is bound", std::to_string(number));
    return found->second;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<const Entry>> entries_;
};

inline int64_t number_in(const Op& op, const char* name, const Tensor& t) {
  check_shape(op, name, t, {1});
  check_type(op, name, t, ScalarType::Long);
  return *static_cast<const int64_t*>(t.const_data_ptr());
}

inline void lora_bind_batch(const Tensor& batch, const Tensor& seg_indptr, const Tensor& seg_adapters,
                            const Tensor& row_indptr, const Tensor& row_adapters, int64_t tokens, int64_t max_seg_len) {
  const int64_t number = number_in(Op{"lora_bind_batch"}, "batch", batch);
  BoundTable<BoundBatch>::all().set(number, {seg_indptr, seg_adapters, row_indptr, row_adapters, tokens, max_seg_len});
}

inline void lora_bind_layer(const Tensor& layer, std::vector<Tensor> lora_A, std::vector<Tensor> lora_B,
                            const Tensor& scaling, std::vector<Tensor> ranks, std::vector<int64_t> offsets,
                            const Tensor& batch) {
  const Op op{"lora_bind_layer"};
  const int64_t of = number_in(op, "batch", batch);
  BoundTable<BoundLayer>::all().set(number_in(op, "layer", layer), {lora_A, lora_B, ranks, scaling, offsets, of});
}

// A number is that of a layer or of a batch.
inline void lora_unbind(const Tensor& number) {
  const int64_t value = number_in(Op{"lora_unbind"}, "number", number);
  BoundTable<BoundLayer>::all().erase(value);
  BoundTable<BoundBatch>::all().erase(value);
}

template <class Backend>
void lora_add_bound(const Tensor& y, const Tensor& x, const Tensor& layer) {
  const Op op = op_of<Backend>("lora_add_bound_", y);
  const auto bound = BoundTable<BoundLayer>::all().find(op, "layer", number_in(op, "layer", layer));
  const auto batch = BoundTable<BoundBatch>::all().find(op, "batch", bound->batch);
  if (batch->max_seg_len == 0 || bound->lora_A.empty()) return;
  const int64_t rows = rows_of(op, "x", x).count;
  const bool known = rows == batch->tokens;
  if (!known && rows > batch->row_adapters.size(0))
    fail(op, "x", "at most " + std::to_string(batch->row_adapters.size(0)) + " rows", std::to_string(rows));
  const auto first = [](const Tensor& t, int64_t count) {
    Tensor all = t;
    return torch::stable::narrow(all, 0, 0, count);
  };
  lora_add_group<Backend>(y, x, bound->lora_A, bound->lora_B, bound->scaling,
                          known ? batch->seg_indptr : first(batch->row_indptr, rows + 1),
                          known ? batch->seg_adapters : first(batch->row_adapters, rows),
                          known ? batch->max_seg_len : 1, bound->ranks, bound->offsets, std::nullopt);
}

}  // namespace t2l::torch_ops
