// Layer norm, and the sum before it that a GLM layer always needs.
#pragma once

#include <cstdint>

#include "core/cpu_features.h"
#include "core/thread_pool.h"

namespace tandem {

// y[i, :] = (x - mean) / sqrt(var + eps) * weight + bias, with mean and biased variance over the row
//   x, y: [m, n] dense, may be the same memory; weight, bias: [n]
void LayerNorm(Isa isa, const float* x, int64_t m, int64_t n, const float* weight, const float* bias, float eps, float* y, ThreadPool& pool);

// GLM's residual, the normalised value times alpha plus the sub-layer's output, and the layer norm that always follows, in one pass over the rows:
//   x[i, :] = LayerNorm(alpha * x[i, :] + delta[i, :] + delta_bias)
//   x, delta: [m, n] dense, no overlap; delta_bias, weight, bias: [n]
void ResidualLayerNorm(Isa isa, float* x, float alpha, const float* delta, const float* delta_bias, int64_t m, int64_t n, const float* weight,
                       const float* bias, float eps, ThreadPool& pool);

void LayerNormRef(const float* x, int64_t m, int64_t n, const float* weight, const float* bias, float eps, float* y);
void ResidualAddRef(float* x, float alpha, const float* delta, const float* bias, int64_t m, int64_t n);

}  // namespace tandem
