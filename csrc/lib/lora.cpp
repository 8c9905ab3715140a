#include "lora.h"

#include <string>

#include "isa.h"
#include "parallel.h"

namespace t2l::lib {
namespace {

constexpr int64_t kMaxRank = int64_t{1} << 16, kMaxSize = int64_t{1} << 31, kMaxReach = int64_t{1} << 60;

std::string at(int64_t value, const char* what, int64_t index) {
  return std::to_string(value) + " at " + what + " " + std::to_string(index);
}

void check_size(const char* name, int64_t value, int64_t limit) {
  if (value < 0 || value >= limit) invalid(name, "a size in [0, " + std::to_string(limit) + ")", std::to_string(value));
}

void check_memory(const char* name, const void* pointer, bool used, size_t alignment) {
  if (!used) return;
  if (pointer == nullptr) invalid(name, "memory", "NULL");
  if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0)
    invalid(name, "an address aligned to " + std::to_string(alignment) + " bytes", "another");
}

// Between entries of a dimension of `count`, of an array whose other dimensions reach over `reach` elements so far.
void check_stride(const char* name, int64_t stride, int64_t count, int64_t least, int64_t& reach) {
  if (count < 2) return;
  if (stride < least) invalid(name, "at least " + std::to_string(least), std::to_string(stride));
  int64_t more = 0;
  if (__builtin_mul_overflow(stride, count - 1, &more) || __builtin_add_overflow(reach, more, &reach) || reach > kMaxReach)
    invalid(name, "strides that reach over at most 2^60 elements", std::to_string(stride));
}

void check_segments(const t2l_lora& l) {
  const int32_t* bounds = l.seg_indptr;
  if (bounds[0] != 0) invalid("seg_indptr", "0 first", std::to_string(bounds[0]));
  if (bounds[l.num_segments] != l.num_tokens)
    invalid("seg_indptr", "the number of tokens " + std::to_string(l.num_tokens) + " last",
            std::to_string(bounds[l.num_segments]));
  for (int64_t s = 0; s < l.num_segments; ++s) {
    if (bounds[s + 1] < bounds[s])
      invalid("seg_indptr", "segments of 0 or more tokens", at(int64_t{bounds[s + 1]} - bounds[s], "segment", s));
    if (l.seg_adapters[s] < -1 || l.seg_adapters[s] >= l.num_adapters)
      invalid("seg_adapters", "ids in [-1, " + std::to_string(l.num_adapters) + ")", at(l.seg_adapters[s], "segment", s));
  }
}

void check(const t2l_lora& l, DType x_type, DType w_type) {
  check_size("num_tokens", l.num_tokens, kMaxSize);
  check_size("in_features", l.in_features, kMaxSize);
  check_size("out_features", l.out_features, kMaxSize);
  check_size("num_adapters", l.num_adapters, kMaxSize);
  check_size("num_segments", l.num_segments, kMaxSize);
  check_size("rank", l.rank, kMaxRank + 1);
  const size_t x_size = x_type == DType::bf16 ? 2 : 4, w_size = w_type == DType::bf16 ? 2 : 4;
  const bool weights = l.num_adapters > 0 && l.rank > 0;
  check_memory("y", l.y, l.num_tokens > 0 && l.out_features > 0, x_size);
  check_memory("x", l.x, l.num_tokens > 0 && l.in_features > 0, x_size);
  check_memory("lora_A", l.lora_A, weights && l.in_features > 0, w_size);
  check_memory("lora_B", l.lora_B, weights && l.out_features > 0, w_size);
  check_memory("scaling", l.scaling, l.num_adapters > 0, alignof(float));
  check_memory("seg_indptr", l.seg_indptr, true, alignof(int32_t));
  check_memory("seg_adapters", l.seg_adapters, l.num_segments > 0, alignof(int32_t));
  int64_t x_reach = l.in_features, y_reach = l.out_features;
  if (l.in_features > 0) check_stride("x_stride", l.x_stride, l.num_tokens, l.in_features, x_reach);
  check_stride("y_stride", l.y_stride, l.num_tokens, l.out_features, y_reach);
  if (weights && l.in_features > 0) {
    int64_t reach = l.in_features;
    check_stride("A_stride[0]", l.A_stride[0], l.num_adapters, 1, reach);
    check_stride("A_stride[1]", l.A_stride[1], l.rank, 1, reach);
  }
  if (weights) {
    int64_t reach = 1;
    check_stride("B_stride[0]", l.B_stride[0], l.num_adapters, 1, reach);
    check_stride("B_stride[1]", l.B_stride[1], l.out_features, 1, reach);
    check_stride("B_stride[2]", l.B_stride[2], l.rank, 1, reach);
  }
  check_segments(l);
  if (l.ranks == nullptr) return;
  check_memory("ranks", l.ranks, l.num_adapters > 0, alignof(int32_t));
  for (int64_t i = 0; i < l.num_adapters; ++i)
    if (l.ranks[i] < 0 || l.ranks[i] > l.rank)
      invalid("ranks", "values in [0, " + std::to_string(l.rank) + "]", at(l.ranks[i], "adapter", i));
}

}  // namespace

DType type_of(const char* name, int32_t type) {
  if (type != T2L_F32 && type != T2L_BF16) invalid(name, "T2L_F32 or T2L_BF16", std::to_string(type));
  return type == T2L_BF16 ? DType::bf16 : DType::f32;
}

Isa isa_of(int32_t isa) {
  if (isa == T2L_ISA_BEST) return detected_isa();
  if (!is_isa(isa)) invalid("isa", "a t2l_isa", std::to_string(isa));
  const Isa wanted = kernel_isa(isa);
  if (!has_isa(wanted))  // without the name of another: to tell the best asks for tiles
    throw Error(T2L_UNSUPPORTED,
                std::string("isa: expected one that this CPU has and this process may use, got ") + isa_name(wanted));
  return wanted;
}

void lora_add(const t2l_lora& l, const t2l_parallel* caller) {
  Parallel parallel(caller);
  const Isa isa = isa_of(l.isa);
  LoraParams p{};
  p.x_type = type_of("x_dtype", l.x_dtype);
  p.w_type = type_of("w_dtype", l.w_dtype);
  check(l, p.x_type, p.w_type);
  if (l.num_tokens == 0 || l.out_features == 0) return;
  p.x = l.x;
  p.y = l.y;
  p.a = l.lora_A;
  p.b = l.lora_B;
  p.scaling = l.scaling;
  p.seg_indptr = l.seg_indptr;
  p.seg_adapters = l.seg_adapters;
  p.true_ranks = l.ranks;
  p.tokens = l.num_tokens;
  p.in = l.in_features;
  p.out = l.out_features;
  p.rank = l.rank;
  p.segments = l.num_segments;
  p.adapters = l.num_adapters;
  p.max_seg_len = l.num_tokens;
  p.y_stride = l.y_stride;
  if (l.in_features > 0) {  // else x and A may be NULL, to which nothing may be added
    p.x_stride = l.x_stride;
    p.a_stride_adapter = l.A_stride[0];
    p.a_stride_rank = l.A_stride[1];
  }
  p.b_stride_adapter = l.B_stride[0];
  p.b_stride_out = l.B_stride[1];
  p.b_stride_rank = l.B_stride[2];
  p.accumulate = true;
  lora(&p, 1, isa, parallel.get());
}

}  // namespace t2l::lib
