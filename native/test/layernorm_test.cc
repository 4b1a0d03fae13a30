#include "kernels/layernorm.h"

#include <cmath>
#include <limits>

#include "test/kernel_test.h"

namespace tandem::test {

TEST(layernorm_vector_equals_ref) {
  ForEachIsa([](Isa isa) {
    ThreadPool pool(2);
    for (const int64_t n : RaggedSizes()) {
      for (const float offset : {0.0f, 3.0f, -1000.0f}) {
        const int64_t m = 3;
        std::vector<float> memory = RandomFloats(m * n + 1, 1 + static_cast<uint32_t>(n));
        float* x = memory.data() + 1;  // not aligned
        for (int64_t i = 0; i < m * n; ++i) x[i] += offset;
        const std::vector<float> weight = RandomFloats(n, 2), bias = RandomFloats(n, 3);
        std::vector<float> y(static_cast<size_t>(m * n)), expected(y);
        LayerNorm(isa, x, m, n, weight.data(), bias.data(), 1e-5f, y.data(), pool);
        LayerNormRef(x, m, n, weight.data(), bias.data(), 1e-5f, expected.data());
        for (int64_t i = 0; i < m; ++i) {
          // The inputs' own rounding is half an ulp of the offset, seen through the division by the row's standard deviation.
          double mean = 0.0, variance = 0.0;
          for (int64_t c = 0; c < n; ++c) mean += x[i * n + c] / static_cast<double>(n);
          for (int64_t c = 0; c < n; ++c) variance += (x[i * n + c] - mean) * (x[i * n + c] - mean) / static_cast<double>(n);
          const double deviation = std::sqrt(variance + 1e-5);
          for (int64_t c = 0; c < n; ++c) {
            const size_t place = static_cast<size_t>(i * n + c);
            const double normalised = std::abs((x[place] - mean) / deviation);
            const double relative = (16.0 + static_cast<double>(n) / 4) * 0x1p-24;
            const double bound = std::abs(weight[static_cast<size_t>(c)]) * (normalised * relative + 4 * std::abs(offset) * 0x1p-24 / deviation) +
                                 std::abs(expected[place]) * 0x1p-23 + 1e-6;
            const std::string name = std::string(IsaName(isa)) + " n " + std::to_string(n) + " offset " + std::to_string(offset);
            CHECK_NEAR(name + " c " + std::to_string(c), y[place], expected[place], bound);
          }
        }
        LayerNorm(isa, x, m, n, weight.data(), bias.data(), 1e-5f, x, pool);
        CHECK_SAME_BITS("in place", x, y.data(), m * n);
      }
    }
  });
}

TEST(layernorm_of_a_constant_row_is_the_bias) {
  ForEachIsa([](Isa isa) {
    ThreadPool pool(1);
    const std::vector<float> x(100, 1234.567f), weight = RandomFloats(100, 1), bias = RandomFloats(100, 2);
    std::vector<float> y(100);
    LayerNorm(isa, x.data(), 1, 100, weight.data(), bias.data(), 1e-5f, y.data(), pool);
    for (size_t c = 0; c < 100; ++c) CHECK_NEAR(IsaName(isa), y[c], bias[c], 1e-3 * std::abs(weight[c]) + 1e-6);
  });
}

TEST(residual_layernorm_equals_ref) {
  ForEachIsa([](Isa isa) {
    ThreadPool pool(2);
    for (const int64_t n : RaggedSizes()) {
      const int64_t m = 3;
      const float alpha = 11.832159f;
      const std::vector<float> x = RandomFloats(m * n + 1, 1), delta = RandomFloats(m * n, 2), delta_bias = RandomFloats(n, 3);
      const std::vector<float> weight = RandomFloats(n, 4), bias = RandomFloats(n, 5);
      std::vector<float> y(x), sums(x), expected(x);
      ResidualLayerNorm(isa, y.data() + 1, alpha, delta.data(), delta_bias.data(), m, n, weight.data(), bias.data(), 1e-5f, pool);
      ResidualAddRef(sums.data() + 1, alpha, delta.data(), delta_bias.data(), m, n);
      LayerNormRef(sums.data() + 1, m, n, weight.data(), bias.data(), 1e-5f, expected.data() + 1);
      CHECK_EQ(y[0], x[0]);
      for (int64_t i = 0; i < m; ++i) {
        const float* row = sums.data() + 1 + i * n;
        double mean = 0.0, variance = 0.0, largest = 0.0;
        for (int64_t c = 0; c < n; ++c) mean += row[c] / static_cast<double>(n);
        for (int64_t c = 0; c < n; ++c) variance += (row[c] - mean) * (row[c] - mean) / static_cast<double>(n);
        const double deviation = std::sqrt(variance + 1e-5);
        for (int64_t c = 0; c < n; ++c) largest = std::max(largest, std::abs(static_cast<double>(row[c])));
        // A sum is off by a few roundings of terms no larger than alpha and 2; every one of them moves mean and deviation.
        const double sum_error = 4 * (largest + alpha + 2) * 0x1p-24;
        for (int64_t c = 0; c < n; ++c) {
          const double normalised = std::abs((row[c] - mean) / deviation);
          const double error = (sum_error * (2 + normalised) / deviation + normalised * (16.0 + static_cast<double>(n) / 4) * 0x1p-24);
          const size_t p = static_cast<size_t>(i * n + c + 1);
          CHECK_NEAR(IsaName(isa), y[p], expected[p], std::abs(weight[static_cast<size_t>(c)]) * error + std::abs(expected[p]) * 0x1p-23 + 1e-6);
        }
      }
    }
  });
}

TEST(layernorm_rows_have_the_same_bits_in_every_batch) {
  ForEachIsa([](Isa isa) {
    for (const int64_t n : {7, 64, 1000}) {
      const int64_t max_m = 40;
      const std::vector<float> x = RandomFloats(max_m * n, 1), weight = RandomFloats(n, 2), bias = RandomFloats(n, 3);
      std::vector<float> single(x.size()), single_residual(x), batch(x.size());
      ThreadPool one(1), two(2), three(3);
      for (int64_t i = 0; i < max_m; ++i) {
        LayerNorm(isa, x.data() + i * n, 1, n, weight.data(), bias.data(), 1e-5f, single.data() + i * n, one);
        ResidualLayerNorm(isa, single_residual.data() + i * n, 5.5f, single.data() + i * n, bias.data(), 1, n, weight.data(), bias.data(), 1e-5f, one);
      }
      for (int64_t m = 1; m <= max_m; ++m) {
        for (ThreadPool* pool : {&one, &two, &three}) {
          LayerNorm(isa, x.data(), m, n, weight.data(), bias.data(), 1e-5f, batch.data(), *pool);
          CHECK_SAME_BITS("layer norm, m " + std::to_string(m), batch.data(), single.data(), m * n);
          std::vector<float> residual(x);
          ResidualLayerNorm(isa, residual.data(), 5.5f, single.data(), bias.data(), m, n, weight.data(), bias.data(), 1e-5f, *pool);
          CHECK_SAME_BITS("residual, m " + std::to_string(m), residual.data(), single_residual.data(), m * n);
        }
      }
    }
  });
}

TEST(layernorm_does_not_hide_nan) {
  ForEachIsa([](Isa isa) {
    ThreadPool pool(1);
    for (const int64_t n : {5, 33}) {
      std::vector<float> x = RandomFloats(n, 1), y(x);
      const std::vector<float> ones(static_cast<size_t>(n), 1.0f);
      x[static_cast<size_t>(n - 1)] = std::numeric_limits<float>::quiet_NaN();
      LayerNorm(isa, x.data(), 1, n, ones.data(), ones.data(), 1e-5f, y.data(), pool);
      for (const float value : y) CHECK(std::isnan(value));
    }
  });
}

}  // namespace tandem::test
