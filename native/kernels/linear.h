// Linear layers y = x W^T + b with fp32 activations and fp32, fp16, INT8 or INT4 weights.
#pragma once

#include <cstdint>

#include "core/cpu_features.h"
#include "core/thread_pool.h"

namespace tandem {

enum class WeightType { kF32, kF16, kI8, kI4 };

// One rank's share of a linear layer's weight, [rows, cols] row-major; owns nothing.
struct LinearWeight {
  WeightType type = WeightType::kF32;
  int64_t rows = 0;
  int64_t cols = 0;              // even for kI4
  const void* data = nullptr;    // 64-byte aligned
  int64_t row_stride = 0;        // bytes from row to row
  // Quantised types: W[o, c] = float(q[o, c]) * float(scales[o * groups + (c + group_offset) / group_size]), the product rounded to fp32.
  const uint16_t* scales = nullptr;  // fp16 [rows, groups]
  int64_t groups = 0;
  int64_t group_size = 0;    // columns that share a scale
  int64_t group_offset = 0;  // columns of the first group that lie before column 0 (another rank's); even for kI4
};

// y[i, o] = bias[o] + sum_c x[i, c] * W[o, c]
//   x: [m, cols], rows x_stride floats apart; y: [m, rows], rows y_stride floats apart, must not overlap x; bias: [rows] or null
// Batch invariant: y[i, :] has the same bits whatever m and the other rows are, and whatever the number of threads.
void Linear(Isa isa, const LinearWeight& weight, const float* x, int64_t m, int64_t x_stride, const float* bias, float* y, int64_t y_stride,
            ThreadPool& pool);

// Throws kInvalidArgument if the groups do not hold the columns, or an int4 row would begin or end within a byte.
void CheckWeight(const LinearWeight& weight);

// q[o, c] and its scale, of a quantised weight.
int QuantizedAt(const LinearWeight& weight, int64_t o, int64_t c);
float ScaleAt(const LinearWeight& weight, int64_t o, int64_t c);

// out[c] = W[o, c], [cols], of any type
void DequantizeRow(const LinearWeight& weight, int64_t o, float* out);

// The definition: double sums, one element at a time.
void LinearRef(const LinearWeight& weight, const float* x, int64_t m, int64_t x_stride, const float* bias, float* y, int64_t y_stride);

}  // namespace tandem
