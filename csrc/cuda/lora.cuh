// Batched LoRA in one launch: y[t] (+)= scaling[a] * B[a] (A[a] x[t]).
//
// A block takes a chunk of tokens that share an adapter and a slice of the outputs of one member.  Its eight warps share the
// features of x: warp w multiplies blocks w, w + 8, ... of 64 bytes.  The partial rank vectors meet in shared memory, in the
// order of the warps; every block of a chunk makes the rank vectors anew, since A comes from L2 and nothing has to be waited
// for.  Then each warp expands 64 outputs at a time.  The order of every sum depends on the features and the rank alone, so
// a token's bits depend neither on its neighbours nor on how the work is cut: a decode step and a prefill agree.
//
// Chunks: with few single rows, one block a row reads its id where it is.  Otherwise each block counts the tokens of every
// adapter, finds its chunk and lists its tokens, wherever they stand in the batch: a counting sort of which each block does
// its part, with no memory besides its own and no launch before this one.
#pragma once
#include "config.h"
#include "fragments.cuh"

namespace t2l::device {

using cuda::kBins;
using cuda::kThreads;
using cuda::kTileOutputs;
using cuda::kWarps;

struct LoraLaunch {
  LoraParams member[cuda::kMaxGroup];
  int count;
  cuda::LoraConfig config;
};

// ---- which tokens

// Sum of the values of the threads before this one; the sum of all in *total.
T2L_DEVICE int scan_block(int value, int* scratch, int* total) {
  int sum = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int below = shuffle_up(sum, distance);
    if (lane_index() >= distance) sum += below;
  }
  if (lane_index() == 31) scratch[warp_index()] = sum;
  block_barrier();
  int before = sum - value, all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp_index()) before += scratch[w];
    all += scratch[w];
  }
  block_barrier();  // before scratch is used again
  *total = all;
  return before;
}

// Tokens of segment s if it belongs to `adapter`, else none.
T2L_DEVICE int tokens_of(const LoraParams& p, int64_t s, int adapter) {
  return s < p.segments && p.seg_adapters[s] == adapter ? p.seg_indptr[s + 1] - p.seg_indptr[s] : 0;
}

T2L_DEVICE void check_adapter(const LoraParams& p, int adapter) {
  require(adapter >= -1 && adapter < p.adapters, "seg_adapters: an id out of range");
}

// Adds the tokens of every segment whose adapter is among kBins from `first` on.  Bin 0 of all is adapter -1.
T2L_DEVICE void count_tokens(const LoraParams& p, int64_t first, int* bins) {
  for (int i = thread_index(); i < kBins; i += kThreads) bins[i] = 0;
  block_barrier();
  for (int64_t s = thread_index(); s < p.segments; s += kThreads) {
    const int adapter = p.seg_adapters[s], begin = p.seg_indptr[s], end = p.seg_indptr[s + 1];
    check_adapter(p, adapter);
    require(begin <= end && (s > 0 || begin == 0) && (s + 1 < p.segments ? end <= p.tokens : end == p.tokens),
            "seg_indptr: not rising from 0 to the number of tokens");
    require(end - begin <= p.max_seg_len, "seg_indptr: a segment of more than max_seg_len tokens");
    const int64_t bin = int64_t{adapter} + 1 - first;
    if (bin >= 0 && bin < kBins && !(adapter < 0 && p.accumulate)) atomic_add(&bins[bin], end - begin);
  }
  block_barrier();
}

struct Chunk {
  int adapter, count;
};

// The `index`th chunk of the batch and its tokens; count 0 when there are fewer chunks.  Chunks are numbered by adapter,
// then by the order of its tokens.
T2L_DEVICE Chunk find_chunk(const LoraParams& p, int64_t index, int size, int* scratch, int* bins, int* tokens) {
  constexpr int kPerThread = kBins / kThreads;
  int* found = scratch + kWarps;  // adapter, its chunk, its tokens
  int64_t before = 0;             // chunks of adapters below `first`
  for (int64_t first = 0;; first += kBins) {
    if (first > p.adapters) return Chunk{-1, 0};
    count_tokens(p, first, bins);
    int chunks[kPerThread], mine = 0, total;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      chunks[i] = (bins[thread_index() * kPerThread + i] + size - 1) / size;
      mine += chunks[i];
    }
    int64_t place = before + scan_block(mine, scratch, &total);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (index >= place && index < place + chunks[i]) {
        const int bin = thread_index() * kPerThread + i;
        found[0] = static_cast<int>(first + bin) - 1;
        found[1] = static_cast<int>(index - place);
        found[2] = bins[bin];
      }
      place += chunks[i];
    }
    before += total;
    block_barrier();  // found is written; bins are free again
    if (index < before) break;
  }
  const int adapter = found[0], start = found[1] * size;
  const int count = static_cast<int>(cuda::lesser(size, found[2] - start));
  int seen = 0;  // tokens of this adapter in earlier segments
  for (int64_t s = 0; seen < start + count; s += kThreads) {
    int total;
    const int length = tokens_of(p, s + thread_index(), adapter);
    const int place = seen + scan_block(length, scratch, &total);
    const int from = place > start ? place : start, until = place + length < start + count ? place + length : start + count;
    for (int i = from; i < until; ++i) tokens[i - start] = p.seg_indptr[s + thread_index()] + (i - place);
    seen += total;
  }
  block_barrier();
  return Chunk{adapter, count};
}

// ---- shrink

T2L_DEVICE bool is_aligned(const void* data, int64_t stride, int64_t element) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * element % 16 == 0;
}

// Where a row of x or A begins, and 16 bytes of it as operands of type T.
template <class T>
struct RowReader {
  T2L_DEVICE RowReader(const void* data, int64_t stride, DType type, int64_t size)
      : data_(data), stride_(stride), size_(size), type_(type), aligned_(is_aligned(data, stride, sizeof(T))) {}
  T2L_DEVICE Quad at(int64_t row, int64_t k) const {
    return load_features(static_cast<const T*>(data_) + row * stride_, k, size_, aligned_);
  }
  const void* data_;
  int64_t stride_, size_;
  DType type_;
  bool aligned_;
};
template <>
struct RowReader<float> {
  T2L_DEVICE RowReader(const void* data, int64_t stride, DType type, int64_t size)
      : data_(data),
        stride_(stride),
        size_(size),
        type_(type),
        aligned_(type == DType::f32 && is_aligned(data, stride, sizeof(float))) {}
  T2L_DEVICE Quad at(int64_t row, int64_t k) const {
    if (type_ == DType::f32) return load_features(static_cast<const float*>(data_) + row * stride_, k, size_, aligned_);
    Quad q = zero_quad();
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (k + i < size_) q.word[i] = float_to_bits(load_float(data_, row * stride_ + k + i, type_));
    return q;
  }
  const void* data_;
  int64_t stride_, size_;
  DType type_;
  bool aligned_;
};

// Partial rank vectors of this warp's share of the features: ranks [first_rank, first_rank + 8 * NT) of every token.
template <class T, int MT, int NT>
T2L_DEVICE void shrink(const LoraParams& p, int adapter, int64_t rank, int64_t first_rank, const int* tokens, int count,
                       float* partial) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  const RowReader<T> x(p.x, p.x_stride, p.x_type, p.in);
  const char* a_data = static_cast<const char*>(p.a) + adapter * p.a_stride_adapter * (p.w_type == DType::f32 ? 4 : 2);
  const RowReader<T> a(a_data, p.a_stride_rank, p.w_type, p.in);
  int token[MT][2];
#pragma unroll
  for (int mt = 0; mt < MT; ++mt)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * mt + 8 * half + g;
      token[mt][half] = row < count ? tokens[row] : -1;
    }
  float sum[MT][NT][4] = {};
  constexpr int64_t kStep = Traits<T>::kPerBlock;
#pragma unroll(sizeof(T) == 4 || MT * NT > 4 ? 1 : NT > 2 ? 2 : 4 / MT)
  for (int64_t block = warp_index(); block * kStep < p.in; block += kWarps) {
    const int64_t k = block * kStep + t * Traits<T>::kPerQuad;
    Quad tokens_x[MT][2], ranks_a[NT];
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      const int64_t row = first_rank + 8 * nt + g;
      ranks_a[nt] = row < rank ? a.at(row, k) : zero_quad();
    }
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        tokens_x[mt][half] = token[mt][half] >= 0 ? x.at(token[mt][half], k) : zero_quad();
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) multiply_quads(sum[mt][nt], tokens_x[mt][0], tokens_x[mt][1], ranks_a[nt], T());
  }
  float* mine = partial + static_cast<int64_t>(warp_index()) * (16 * MT) * (8 * NT);
#pragma unroll
  for (int mt = 0; mt < MT; ++mt)
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int i = 0; i < 4; ++i) mine[(16 * mt + g + 8 * (i / 2)) * (8 * NT) + 8 * nt + 2 * t + i % 2] = sum[mt][nt][i];
}

// ---- expand

// Weights of ranks `j` and j + 1 for outputs [o, o + 8).
template <class T>
T2L_DEVICE void load_weights(const LoraParams& p, const char* b, int64_t rank, int64_t j, int64_t o, float (&first)[8],
                             float (&second)[8]) {
  const int64_t size = p.w_type == DType::f32 ? 4 : 2;
  const bool whole = o + 8 <= p.out, both = j + 1 < rank;
  if (whole && both && p.b_stride_out == 1 && p.w_type != DType::f32 && sizeof(T) == 2 &&
      is_aligned(b, p.b_stride_rank, size)) {  // [rank, out] storage
    unpack(load_quad(b + (j * p.b_stride_rank + o) * 2), T(), first);
    unpack(load_quad(b + ((j + 1) * p.b_stride_rank + o) * 2), T(), second);
    return;
  }
  if (whole && both && p.b_stride_rank == 1 && p.w_type != DType::f32 && sizeof(T) == 2 &&
      reinterpret_cast<uintptr_t>(b) % 4 == 0 && p.b_stride_out % 2 == 0) {  // [out, rank] storage: two ranks a load
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t word = load_one(reinterpret_cast<const uint32_t*>(b + ((o + i) * p.b_stride_out + j) * 2));
      Quad q = zero_quad();
      q.word[0] = word;
      float two[8];
      unpack(q, T(), two);
      first[i] = two[0];
      second[i] = two[1];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const bool inside = o + i < p.out;
    first[i] = inside && j < rank ? load_float(b, (o + i) * p.b_stride_out + j * p.b_stride_rank, p.w_type) : 0.0f;
    second[i] = inside && both ? load_float(b, (o + i) * p.b_stride_out + (j + 1) * p.b_stride_rank, p.w_type) : 0.0f;
  }
}

// y[o, o + 8) (+)= v
template <class T>
T2L_DEVICE void update_outputs(const LoraParams& p, int64_t token, int64_t o, float (&v)[8]) {
  const int64_t size = p.x_type == DType::f32 ? 4 : 2;
  char* row = static_cast<char*>(p.y) + token * p.y_stride * size;
  const bool dense = o + 8 <= p.out && is_aligned(p.y, p.y_stride, size);
  if (dense && sizeof(T) == 2) {
    if (p.accumulate) {
      float before[8];
      unpack(load_quad_mutable(row + o * 2), T(), before);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = before[i] + v[i];
    }
    store_quad(row + o * 2, pack(v, T()));
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (o + i < p.out) {
      if (p.accumulate) v[i] = load_float(row, o + i, p.x_type) + v[i];
      store_float(row, o + i, p.x_type, v[i]);
    }
}

// A 16-bit weight is a number of 11 bits as it is.
template <class T>
T2L_DEVICE Split split_weight(float weight, T) {
  return Split{weight, 0.0f};
}
T2L_DEVICE Split split_weight(float weight, float) { return split(weight); }

// Outputs [first, last) of every token of the chunk.  Column n of product i stands for output 8 n + i of 64, so that a lane
// ends with 16 outputs in a row; registers of one operand stand for ranks 2t and 2t + 1 of eight.
template <class T, int MT>
T2L_DEVICE void expand(const LoraParams& p, int adapter, int64_t rank, const int* tokens, int count, const float* v,
                       int64_t v_stride, int64_t first, int64_t last) {
  constexpr bool kExact = sizeof(T) == 2;
  const int g = lane_index() / 4, t = lane_index() % 4;
  const char* b = static_cast<const char*>(p.b) + adapter * p.b_stride_adapter * (p.w_type == DType::f32 ? 4 : 2);
  for (int64_t o = first + warp_index() * kTileOutputs; o < last; o += kWarps * kTileOutputs)
    for (int mt = 0; mt < MT && 16 * mt < count; ++mt) {
      float sum[8][4] = {};
      const float* low_row = v + (16 * mt + g) * v_stride;
      const float* high_row = low_row + 8 * v_stride;
      for (int64_t j = 2 * t; j - 2 * t < rank; j += 8) {
        float weights[2][8];
        load_weights<T>(p, b, rank, j, o + 8 * g, weights[0], weights[1]);
        const Split left[4] = {split(low_row[j]), split(high_row[j]), split(low_row[j + 1]), split(high_row[j + 1])};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const Split right[2] = {split_weight(weights[0][i], T()), split_weight(weights[1][i], T())};
          multiply_split<kExact>(sum[i], left, right);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * mt + 8 * half + g;
        if (row >= count) continue;
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          float values[8];
#pragma unroll
          for (int i = 0; i < 8; ++i) values[i] = sum[i][2 * half + column];
          update_outputs<T>(p, tokens[row], o + 16 * t + 8 * column, values);
        }
      }
    }
}

// Tokens without an adapter here: their outputs are zero unless something is added to.
template <class T>
T2L_DEVICE void write_zeros(const LoraParams& p, const int* tokens, int count, int64_t first, int64_t last) {
  for (int row = 0; row < count; ++row)
    for (int64_t o = first + 8 * thread_index(); o < last; o += 8 * kThreads) {
      float zeros[8] = {};
      update_outputs<T>(p, tokens[row], o, zeros);
    }
}

// Asks for all weights of an adapter that the block is going to read, so that their latencies overlap.
T2L_DEVICE void prefetch_weights(const LoraParams& p, int adapter, int64_t rank, int64_t first, int64_t last) {
  constexpr int64_t kLine = 128;
  const int64_t size = cuda::bytes_of(p.w_type), lines = cuda::ceil_div(p.in * size, kLine);
  const char* a = static_cast<const char*>(p.a) + adapter * p.a_stride_adapter * size;
  for (int64_t i = thread_index(); i < rank * lines; i += kThreads)
    prefetch(a + i / lines * p.a_stride_rank * size + i % lines * kLine);
  const bool by_rank = p.b_stride_out == 1;  // [rank, out] storage: rows of outputs; else rows of ranks
  const char* b = static_cast<const char*>(p.b) + (adapter * p.b_stride_adapter + first * p.b_stride_out) * size;
  const int64_t rows = by_rank ? rank : last - first, stride = by_rank ? p.b_stride_rank : p.b_stride_out;
  const int64_t row_lines = by_rank ? cuda::ceil_div((last - first) * size, kLine) : 1;
  for (int64_t i = thread_index(); i < rows * row_lines; i += kThreads)
    prefetch(b + i / row_lines * stride * size + i % row_lines * kLine);
}

template <class T, int MT, int NT>
T2L_KERNEL(kThreads, cuda::lora_blocks(sizeof(T), MT, NT))
lora_kernel(T2L_ARGUMENT(LoraLaunch) launch) {
  const cuda::LoraConfig& c = launch.config;
  SharedMemory shared;
  int* scratch = shared.take<int>(16);
  int* tokens = shared.take<int>(16 * MT);
  int* bins = shared.take<int>(kBins);
  float* partial = shared.take<float>(kWarps * (16 * MT) * (8 * NT));
  float* v = shared.take<float>(16 * MT * c.v_stride);
  int slice = block_index_y(), index = 0;
  for (; index + 1 < launch.count; ++index) {
    const int slices = static_cast<int>(cuda::ceil_div(launch.member[index].out, c.outputs));
    if (slice < slices) break;
    slice -= slices;
  }
  const LoraParams& p = launch.member[index];
  const int64_t first = slice * c.outputs, last = cuda::lesser(first + c.outputs, p.out);
  Chunk chunk;
  if (c.direct) {
    chunk = Chunk{p.seg_adapters[block_index_x()], 1};
    check_adapter(p, chunk.adapter);
    require(p.seg_indptr[block_index_x() + 1] == block_index_x() + 1, "seg_indptr: not one token a segment");
    if (thread_index() == 0) tokens[0] = static_cast<int>(block_index_x());
    block_barrier();
  } else {
    chunk = find_chunk(p, block_index_x(), 16 * MT, scratch, bins, tokens);
  }
  if (chunk.count == 0) return;
  const int64_t rank = chunk.adapter < 0 ? 0 : p.ranks ? p.ranks[chunk.adapter] : p.rank;
  require(rank >= 0 && rank <= p.rank, "ranks: a rank out of range");
  if (rank == 0) {
    if (!p.accumulate) write_zeros<T>(p, tokens, chunk.count, first, last);
    return;
  }
  const float scaling = p.scaling[chunk.adapter];
  prefetch_weights(p, chunk.adapter, rank, first, last);
  for (int64_t first_rank = 0; first_rank < rank; first_rank += 8 * NT) {
    shrink<T, MT, NT>(p, chunk.adapter, rank, first_rank, tokens, chunk.count, partial);
    block_barrier();
    for (int i = thread_index(); i < 16 * MT * 8 * NT; i += kThreads) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += partial[w * (16 * MT) * (8 * NT) + i];
      v[i / (8 * NT) * c.v_stride + first_rank + i % (8 * NT)] = sum * scaling;
    }
    block_barrier();  // the next pass writes partial again; then v is whole
  }
  expand<T, MT>(p, chunk.adapter, rank, tokens, chunk.count, v, c.v_stride, first, last);
}

}  // namespace t2l::device
