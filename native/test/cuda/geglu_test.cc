#include "kernels/cuda/geglu.h"

#include <cmath>

#include "kernels/geglu.h"
#include "test/cuda/device_test.h"

namespace tandem::test {

TEST(cuda_geglu_equals_ref) {
  ForEachThreadOrder([] {
    for (const int64_t f : {1, 3, 8, 15, 16, 24, 63, 64, 100, 257, 1000, 2048, 2056, 5000}) {
      const int64_t m = 3, u_stride = (2 * f + 63) / 64 * 64, y_stride = (f + 63) / 64 * 64;
      const std::vector<float> u = RoundToHalf(RandomFloats(m * u_stride, static_cast<uint32_t>(f), 3.0f));
      const DeviceArray<__half> in(ToHalf(u));
      DeviceArray<__half> out(m * y_stride);
      cuda::Geglu(in.get(), m, f, u_stride, out.get(), y_stride, nullptr);
      const std::vector<__half> y = out.Download();
      for (int64_t i = 0; i < m; ++i) {
        std::vector<float> expected(static_cast<size_t>(f));
        GegluRef(u.data() + i * u_stride, 1, f, expected.data());
        for (int64_t j = 0; j < f; ++j) {
          // 1 + erf(x) is off by a few ulps of 1, also where it is small.
          const double linear = u[static_cast<size_t>(i * u_stride + j)], x = u[static_cast<size_t>(i * u_stride + f + j)];
          const double bound = std::abs(expected[static_cast<size_t>(j)]) * 0x1.01p-11 + std::abs(linear * x) * 0x1p-22 + 0x1p-24;
          CHECK_NEAR("f " + std::to_string(f), __half2float(y[static_cast<size_t>(i * y_stride + j)]), expected[static_cast<size_t>(j)], bound);
        }
        for (int64_t j = f; j < y_stride; ++j) CHECK_EQ(__half_as_ushort(y[static_cast<size_t>(i * y_stride + j)]), 0xffff);
        DeviceArray<__half> alone(y_stride);
        cuda::Geglu(in.get() + i * u_stride, 1, f, u_stride, alone.get(), y_stride, nullptr);
        CHECK_EQ(std::memcmp(alone.Download().data(), y.data() + i * y_stride, static_cast<size_t>(2 * y_stride)), 0);
      }
    }
  });
}

}  // namespace tandem::test
