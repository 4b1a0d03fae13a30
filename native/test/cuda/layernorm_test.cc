#include "kernels/cuda/layernorm.h"

#include <cmath>
#include <limits>

#include "kernels/layernorm.h"
#include "test/cuda/device_test.h"

namespace tandem::test {

namespace {

int64_t StrideOf(int64_t n) { return (n + 63) / 64 * 64; }

// [m, n] as rows `stride` apart, what is between them `padding`.
std::vector<__half> Strided(const std::vector<float>& values, int64_t m, int64_t n, int64_t stride, float padding) {
  std::vector<__half> rows(static_cast<size_t>(m * stride), __float2half(padding));
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t c = 0; c < n; ++c) rows[static_cast<size_t>(i * stride + c)] = __float2half(values[static_cast<size_t>(i * n + c)]);
  }
  return rows;
}

std::vector<int64_t> Sizes() {
  // Around a thread's 8 columns; two groups for a thread (above 8192, GLM-130B's 12288); and rows that are read anew (above 16384).
  return {1, 2, 7, 8, 9, 24, 63, 64, 100, 256, 257, 1000, 4104, 8200, 12288, 16391};
}

// The reference in double on what the kernel reads, and how far fp32 sums and the rounding to fp16 may be from it.
void CheckNorm(const std::string& what, const std::vector<float>& sums, int64_t m, int64_t n, int64_t stride, const std::vector<float>& weight,
               const std::vector<float>& bias, double sum_rounding, const std::vector<__half>& y, const __half untouched) {
  std::vector<float> expected(sums.size());
  LayerNormRef(sums.data(), m, n, weight.data(), bias.data(), 1e-5f, expected.data());
  for (int64_t i = 0; i < m; ++i) {
    double mean = 0.0, variance = 0.0, largest = 0.0;
    for (int64_t c = 0; c < n; ++c) mean += sums[static_cast<size_t>(i * n + c)] / static_cast<double>(n);
    for (int64_t c = 0; c < n; ++c) {
      const double x = sums[static_cast<size_t>(i * n + c)];
      variance += (x - mean) * (x - mean) / static_cast<double>(n);
      largest = std::max(largest, std::abs(x));
    }
    const double deviation = std::sqrt(variance + 1e-5);
    for (int64_t c = 0; c < n; ++c) {
      const size_t place = static_cast<size_t>(i * n + c);
      const double normalised = std::abs((sums[place] - mean) / deviation);
      const double error = (largest * 32 * 0x1p-24 + sum_rounding) * (2 + normalised) / deviation + normalised * 64 * 0x1p-24;
      const double bound = std::abs(weight[static_cast<size_t>(c)]) * error + std::abs(expected[place]) * 0x1.1p-11 + 0x1p-24;
      CHECK_NEAR(what + " row " + std::to_string(i) + " column " + std::to_string(c), __half2float(y[static_cast<size_t>(i * stride + c)]), expected[place], bound);
    }
    for (int64_t c = n; c < stride; ++c) CHECK_EQ(std::memcmp(&y[static_cast<size_t>(i * stride + c)], &untouched, sizeof untouched), 0);
  }
}

}  // namespace

TEST(cuda_layernorm_equals_ref) {
  ForEachThreadOrder([] {
    for (const int64_t n : Sizes()) {
      const int64_t m = n > 2000 ? 2 : 3, stride = StrideOf(n) + (n % 3 == 0 ? 64 : 0);
      for (const float offset : {0.0f, 30.0f}) {
        if (n > 2000 && offset == 0.0f) continue;
        std::vector<float> x = RandomFloats(m * n, static_cast<uint32_t>(n));
        for (float& value : x) value += offset;
        x = RoundToHalf(x);
        const std::vector<float> weight = RandomFloats(n, 2), bias = RandomFloats(n, 3);
        const DeviceArray<float> weight_on_device(weight), bias_on_device(bias);
        const DeviceArray<__half> in(Strided(x, m, n, stride, 0.0f));
        DeviceArray<__half> out(m * stride);
        cuda::LayerNorm(in.get(), m, n, stride, weight_on_device.get(), bias_on_device.get(), 1e-5f, out.get(), nullptr);
        const std::vector<__half> y = out.Download();
        CheckNorm("n " + std::to_string(n), x, m, n, stride, weight, bias, 0.0, y, __ushort_as_half(0xffff));

        DeviceArray<__half> both(Strided(x, m, n, stride, 0.0f));
        cuda::LayerNorm(both.get(), m, n, stride, weight_on_device.get(), bias_on_device.get(), 1e-5f, both.get(), nullptr);
        const std::vector<__half> in_place = both.Download();
        for (int64_t i = 0; i < m; ++i) CHECK_EQ(std::memcmp(&in_place[static_cast<size_t>(i * stride)], &y[static_cast<size_t>(i * stride)], static_cast<size_t>(2 * n)), 0);
      }
    }
  });
}

TEST(cuda_residual_layernorm_equals_ref) {
  ForEachThreadOrder([] {
    for (const int64_t n : Sizes()) {
      const int64_t m = n > 2000 ? 2 : 3, stride = StrideOf(n);
      const float alpha = 11.832159f;
      const std::vector<float> x = RoundToHalf(RandomFloats(m * n, 1)), delta = RoundToHalf(RandomFloats(m * n, 2));
      const std::vector<float> delta_bias = RandomFloats(n, 3), weight = RandomFloats(n, 4), bias = RandomFloats(n, 5);
      const DeviceArray<float> delta_bias_on_device(delta_bias), weight_on_device(weight), bias_on_device(bias);
      DeviceArray<__half> x_on_device(Strided(x, m, n, stride, 0.0f));
      const DeviceArray<__half> delta_on_device(Strided(delta, m, n, stride, 7.0f));
      cuda::ResidualLayerNorm(x_on_device.get(), alpha, delta_on_device.get(), delta_bias_on_device.get(), m, n, stride, weight_on_device.get(),
                              bias_on_device.get(), 1e-5f, nullptr);
      std::vector<float> sums(x);
      ResidualAddRef(sums.data(), alpha, delta.data(), delta_bias.data(), m, n);
      CheckNorm("n " + std::to_string(n), sums, m, n, stride, weight, bias, 60 * 0x1p-23, x_on_device.Download(), __float2half(0.0f));
    }
  });
}

TEST(cuda_layernorm_rows_have_the_same_bits_in_every_batch) {
  ForEachThreadOrder([] {
    for (const int64_t n : {7, 64, 1000, 9000, 17000}) {
      const int64_t m = 4, stride = StrideOf(n);
      const std::vector<__half> x = Strided(RandomFloats(m * n, 1), m, n, stride, 0.0f), delta = Strided(RandomFloats(m * n, 2), m, n, stride, 0.0f);
      const DeviceArray<float> weight(RandomFloats(n, 3)), bias(RandomFloats(n, 4));
      const auto run = [&](int64_t first, int64_t count) {
        const auto rows = [&](const std::vector<__half>& all) {
          return std::vector<__half>(all.begin() + first * stride, all.begin() + (first + count) * stride);
        };
        DeviceArray<__half> in(rows(x)), residual(rows(x)), out(count * stride);
        const DeviceArray<__half> added(rows(delta));
        cuda::LayerNorm(in.get(), count, n, stride, weight.get(), bias.get(), 1e-5f, out.get(), nullptr);
        cuda::ResidualLayerNorm(residual.get(), 5.5f, added.get(), bias.get(), count, n, stride, weight.get(), bias.get(), 1e-5f, nullptr);
        std::vector<__half> both = out.Download();
        const std::vector<__half> second = residual.Download();
        both.insert(both.end(), second.begin(), second.end());
        return both;
      };
      const std::vector<__half> all = run(0, m);
      for (int64_t i = 0; i < m; ++i) {
        const std::vector<__half> alone = run(i, 1);
        CHECK_EQ(std::memcmp(&alone[0], &all[static_cast<size_t>(i * stride)], static_cast<size_t>(2 * n)), 0);
        CHECK_EQ(std::memcmp(&alone[static_cast<size_t>(stride)], &all[static_cast<size_t>((m + i) * stride)], static_cast<size_t>(2 * n)), 0);
      }
    }
  });
}

TEST(cuda_layernorm_does_not_hide_nan) {
  for (const int64_t n : {5, 33, 9000}) {
    std::vector<float> x = RandomFloats(n, 1);
    x[static_cast<size_t>(n - 1)] = std::numeric_limits<float>::quiet_NaN();
    const DeviceArray<float> ones(std::vector<float>(static_cast<size_t>(n), 1.0f));
    DeviceArray<__half> rows(Strided(x, 1, n, StrideOf(n), 0.0f));
    cuda::LayerNorm(rows.get(), 1, n, StrideOf(n), ones.get(), ones.get(), 1e-5f, rows.get(), nullptr);
    const std::vector<float> y = ToFloat(rows.Download());
    for (int64_t c = 0; c < n; ++c) CHECK(std::isnan(y[static_cast<size_t>(c)]));
  }
}

}  // namespace tandem::test
