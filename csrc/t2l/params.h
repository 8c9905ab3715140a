// Parameters of the kernels: sizes, strides in elements, pointers.  No torch, no CUDA headers.
#pragma once
#include <cstdint>

namespace t2l {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };  // f16: CUDA only

constexpr int kMaxSides = 2;

// Batched LoRA: y[t] (+)= scaling[a] * B[a] (A[a] x[t]), a = the adapter of the segment of token t.
// Rows of y of adapter -1 are left as they are if `accumulate`, else set to zero.
struct LoraParams {
  const void* x;                // [tokens, in], row stride x_stride, last stride 1
  void* y;                      // [tokens, out], row stride y_stride, last stride 1
  const void* a;                // [adapters, rank, in], last stride 1
  const void* b;                // [adapters, out, rank], any strides
  const float* scaling;         // [adapters]
  const int32_t* seg_indptr;    // [segments + 1]
  const int32_t* seg_adapters;  // [segments]
  const int32_t* true_ranks;    // [adapters], the rank of each, or null: all `rank`
  int64_t tokens, in, out, rank, segments, adapters;
  int64_t max_seg_len;  // upper bound of the tokens of a segment
  int64_t x_stride, y_stride;
  int64_t a_stride_adapter, a_stride_rank;
  int64_t b_stride_adapter, b_stride_out, b_stride_rank;
  DType x_type;  // of x and y
  DType w_type;  // of a and b
  bool accumulate;
  int32_t* bad_ids;  // CUDA only: [1], counts segments whose id is out of range, which are then adapter -1; null: an error
  float* rank_vectors;  // CUDA only: [tokens, rank], gets scaling[a] * A[a] x[t] of every token with an adapter, or null
};

// Gradients of lora: `lora` as in the forward with `accumulate`, y unused.  The gradient of x is added to grad_x; tokens
// without an adapter leave it alone.  On the CPU grad_a and grad_b must be zero-initialised: adapters that no segment uses,
// and entries beyond a rank, are not written.  On CUDA all is written.
struct LoraBackwardParams {
  LoraParams lora;
  const void* grad;  // [tokens, out], dtype x_type, row stride grad_stride, last stride 1
  int64_t grad_stride;
  void* grad_x;  // [tokens, in], dtype x_type, contiguous
  void* grad_a;  // [adapters, rank, in], dtype w_type, contiguous
  void* grad_b;  // [adapters, out, rank], dtype w_type, each adapter dense, stored [out, rank] or [rank, out]
  int64_t grad_b_stride_out, grad_b_stride_rank;
};

// One MLP of the trunk: silu(W2 silu(W1 LN(x) + b1) + b2).  Matrices in the trunk's dtype, the rest float32.
struct MlpParams {
  const float* norm_weight;  // [m]
  const float* norm_bias;    // [m]
  const void* w1;            // [4m, m]
  const float* b1;           // [4m]
  const void* w2;            // [out, 4m]
  const float* b2;           // [out]
};

// Task encoder: z = LN(W e + b), all float32.
struct EncoderParams {
  const float* weight;       // [t, e], or null: z is encoded
  const float* bias;         // [t]
  const float* norm_weight;  // [t]
  const float* norm_bias;    // [t]
  int64_t e;
};

// Of the trunk and the heads, `ranks` counts latent rows of a side: 1, or one a rank (R in docs/ops.md).

// Hypernetwork trunk: latent[task, module, side, rank, layer, h].
struct TrunkParams {
  const float* z;            // [tasks, t]; with an encoder [tasks, e]
  EncoderParams encoder;     // CUDA only
  const void* mixer_task;    // [4m, t]
  const float* mixer_table;  // [modules, layers, 4m]
  const void* mixer_w2;      // [m, 4m]
  const float* mixer_b2;     // [m]
  MlpParams mlp[3];
  const float* side_emb;  // [modules, sides, m], or null
  const float* pos_emb;   // [ranks, m], or null
  void* latent;           // contiguous, dtype w_type
  int64_t tasks, modules, layers, sides, ranks;
  int64_t t, m, h;
  bool rotary;
  DType w_type;
};

// Head of one module: latent times weight^T with an epilogue, written to A and B.
struct HeadParams {
  const void* latent;  // [tasks, sides, ranks, layers, h], last stride 1
  const void* weight;  // [rows, h], contiguous
  const float* bias;   // [rows], or null
  // Side 0 is A (width = in), side 1 is B (width = out); the epilogue is y * mul + add, then * scale.
  const float* mul[kMaxSides];  // A [layers, rank, in], B [layers, out, rank], or null; any strides
  const float* add[kMaxSides];
  int64_t mul_stride[kMaxSides][3];  // layer, rank, column
  int64_t add_stride[kMaxSides][3];
  void* out[kMaxSides];              // A [tasks, layers, rank, in], B [tasks, layers, out, rank], any strides
  int64_t out_stride[kMaxSides][4];  // task, layer, rank, column
  float scale[kMaxSides];
  int64_t tasks, sides, ranks, layers, h;
  int64_t latent_stride[4];  // task, side, rank, layer
  int64_t rank, in, out_features;
  DType w_type;  // of latent and weight
  DType out_type;
};

}  // namespace t2l
