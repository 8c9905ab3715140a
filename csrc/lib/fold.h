// Arithmetic that runs once, when a checkpoint is opened, and for the task encoder: float32 in and out, sums in double.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "t2l/params.h"

namespace t2l::lib {

using Floats = std::vector<float>;

inline float widened(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

// To bfloat16, to nearest, ties to even; of finite values.
inline uint16_t narrowed(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Elements of memory of any alignment, as float32.
inline Floats as_floats(const void* data, DType type, int64_t count) {
  Floats out(static_cast<size_t>(count));
  if (out.empty()) return out;
  if (type == DType::f32) {
    std::memcpy(out.data(), data, out.size() * sizeof(float));
    return out;
  }
  for (size_t i = 0; i < out.size(); ++i) {
    uint16_t bits;
    std::memcpy(&bits, static_cast<const char*>(data) + i * sizeof bits, sizeof bits);
    out[i] = widened(bits);
  }
  return out;
}

// LayerNorm of every row of x [rows, width], in place.
inline void layer_norm(Floats& x, int64_t width, const float* weight, const float* bias) {
  constexpr double kEps = 1e-5;
  for (float* row = x.data(); row != x.data() + x.size(); row += width) {
    double mean = 0, variance = 0;
    for (int64_t j = 0; j < width; ++j) mean += row[j];
    mean /= static_cast<double>(width);
    for (int64_t j = 0; j < width; ++j) variance += (row[j] - mean) * (row[j] - mean);
    const double scale = 1 / std::sqrt(variance / static_cast<double>(width) + kEps);
    for (int64_t j = 0; j < width; ++j) row[j] = static_cast<float>((row[j] - mean) * scale * weight[j] + bias[j]);
  }
}

// x [rows, depth] times the transpose of `depth` columns of weight [cols, stride] from its pointer on: [rows, cols].
inline std::vector<double> product(const float* x, int64_t rows, int64_t depth, const float* weight, int64_t stride,
                                   int64_t cols) {
  std::vector<double> out(static_cast<size_t>(rows * cols));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < cols; ++c) {
      double sum = 0;
      for (int64_t k = 0; k < depth; ++k) sum += static_cast<double>(x[i * depth + k]) * weight[c * stride + k];
      out[static_cast<size_t>(i * cols + c)] = sum;
    }
  return out;
}

// silu(weight x + bias) for every row of x, which is first rounded to the type of the weight, as the kernels do.
inline Floats silu_linear(Floats x, int64_t depth, const Floats& weight, DType type, const float* bias, int64_t cols) {
  if (type == DType::bf16)
    for (float& v : x) v = widened(narrowed(v));
  const std::vector<double> sums =
      product(x.data(), static_cast<int64_t>(x.size()) / depth, depth, weight.data(), depth, cols);
  Floats out(sums.size());
  for (size_t i = 0; i < out.size(); ++i) {
    const double v = sums[i] + bias[i % static_cast<size_t>(cols)];
    out[i] = static_cast<float>(v / (1 + std::exp(-v)));
  }
  return out;
}

}  // namespace t2l::lib
