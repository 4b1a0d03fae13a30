// Layer norm of fp16 rows, and the sum before it that a GLM layer always needs (kernels/layernorm.h on the device). Sums are fp32, the variance is taken
// about the mean. A row's result has the same bits whatever the other rows are.
#pragma once

#include <cstdint>

#include "kernels/cuda/device.h"

namespace tandem::cuda {

// y[i, :] = (x - mean) / sqrt(var + eps) * weight + bias, with mean and biased variance over the row
//   x, y: [m, n] fp16, rows `stride` elements apart, stride a multiple of 8 and at least n, 16-byte aligned; may be the same memory
//   weight, bias: [n] fp32, 16-byte aligned
// Columns from n on are read (they hold anything) and never written.
void LayerNorm(const __half* x, int64_t m, int64_t n, int64_t stride, const float* weight, const float* bias, float eps, __half* y, Stream stream);

// GLM's residual, the normalised value times alpha plus the sub-layer's output, and the layer norm that always follows:
//   x[i, :] = LayerNorm(alpha * x[i, :] + delta[i, :] + delta_bias)
//   x, delta: [m, n] fp16, both with `stride`, no overlap; delta_bias, weight, bias: [n] fp32, 16-byte aligned
// The sum is not rounded to fp16 before it is normalised.
void ResidualLayerNorm(__half* x, float alpha, const __half* delta, const float* delta_bias, int64_t m, int64_t n, int64_t stride, const float* weight,
                       const float* bias, float eps, Stream stream);

}  // namespace tandem::cuda
