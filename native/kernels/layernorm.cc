// layernorm.cc: layer norm and GLM's residual sum. The Ref functions are the definition; the others stay within the bounds of layernorm_test.cc.
#include "kernels/layernorm.h"

#include <algorithm>
#include <cmath>
#include <functional>

#define TANDEM_VECTOR_FILE "kernels/layernorm_vector.inc"
#include "kernels/vector/each_isa.inc"

namespace tandem {

namespace {

// Rows of which a thread takes at least so many elements, as less costs more to hand out than to do.
int64_t RowGrain(int64_t n) { return std::max<int64_t>(1, 4096 / std::max<int64_t>(n, 1)); }

}  // namespace

void LayerNormRef(const float* x, int64_t m, int64_t n, const float* weight, const float* bias, float eps, float* y) {
  for (int64_t i = 0; i < m; ++i) {
    double mean = 0.0, variance = 0.0;
    for (int64_t c = 0; c < n; ++c) mean += x[i * n + c];
    mean /= static_cast<double>(n);
    for (int64_t c = 0; c < n; ++c) variance += (x[i * n + c] - mean) * (x[i * n + c] - mean);
    variance /= static_cast<double>(n);
    const double inverse = 1.0 / std::sqrt(variance + eps);
    for (int64_t c = 0; c < n; ++c) y[i * n + c] = static_cast<float>((x[i * n + c] - mean) * inverse * weight[c] + bias[c]);
  }
}

void ResidualAddRef(float* x, float alpha, const float* delta, const float* bias, int64_t m, int64_t n) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t c = 0; c < n; ++c) {
      x[i * n + c] = static_cast<float>(static_cast<double>(alpha) * x[i * n + c] + delta[i * n + c] + bias[c]);
    }
  }
}

void LayerNorm(Isa isa, const float* x, int64_t m, int64_t n, const float* weight, const float* bias, float eps, float* y, ThreadPool& pool) {
  const auto layer_norm_row = TANDEM_SELECT(isa, LayerNormRow);
  const auto body = [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) layer_norm_row(x + i * n, n, weight, bias, eps, y + i * n);
  };
  pool.ParallelFor(m, RowGrain(n), std::cref(body));
}

void ResidualLayerNorm(Isa isa, float* x, float alpha, const float* delta, const float* delta_bias, int64_t m, int64_t n, const float* weight,
                       const float* bias, float eps, ThreadPool& pool) {
  const auto residual_add_row = TANDEM_SELECT(isa, ResidualAddRow);
  const auto layer_norm_row = TANDEM_SELECT(isa, LayerNormRow);
  const auto body = [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      residual_add_row(x + i * n, alpha, delta + i * n, delta_bias, n);
      layer_norm_row(x + i * n, n, weight, bias, eps, x + i * n);
    }
  };
  pool.ParallelFor(m, RowGrain(n), std::cref(body));
}

}  // namespace tandem
