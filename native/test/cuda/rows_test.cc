#include "kernels/cuda/rows.h"

#include "test/cuda/device_test.h"

namespace tandem::test {

TEST(cuda_gather_rows_copies_the_rows) {
  ForEachThreadOrder([] {
    for (const int64_t columns : {1, 7, 8, 9, 64, 100, 2048, 2050, 4104}) {
      const int64_t stride = (columns + 63) / 64 * 64;
      const std::vector<__half> src = ToHalf(RandomFloats(9 * stride, static_cast<uint32_t>(columns)));
      const std::vector<uint32_t> rows = {0, 2, 3, 8};
      const DeviceArray<__half> from(src);
      const DeviceArray<uint32_t> rows_on_device(rows);
      DeviceArray<__half> to(4 * stride);
      cuda::GatherRows(from.get(), rows_on_device.get(), 4, columns, stride, to.get(), nullptr);
      const std::vector<__half> dst = to.Download();
      for (int64_t i = 0; i < 4; ++i) {
        for (int64_t c = 0; c < stride; ++c) {
          const unsigned expected = c < columns ? __half_as_ushort(src[static_cast<size_t>(rows[static_cast<size_t>(i)] * stride + c)]) : 0xffffu;
          CHECK_EQ(__half_as_ushort(dst[static_cast<size_t>(i * stride + c)]), expected);
        }
      }
    }
  });
}

TEST(cuda_samples_become_the_tokens_of_rows) {
  ForEachThreadOrder([] {
    const DeviceArray<uint32_t> sampled(std::vector<uint32_t>{7, 99, 100, 0xffffffffu, 3});
    std::vector<int32_t> from(600, -1);
    from[0] = 4, from[1] = 0, from[255] = 1, from[256] = 2, from[598] = 3;
    const DeviceArray<int32_t> from_on_device(from);
    DeviceArray<uint32_t> tokens(std::vector<uint32_t>(600, 5));
    cuda::TakeSamples(sampled.get(), from_on_device.get(), 599, 100, tokens.get(), nullptr);
    std::vector<uint32_t> expected(600, 5);
    expected[0] = 3, expected[1] = 7, expected[255] = 99, expected[256] = 0, expected[598] = 0;  // the last two are no tokens
    CHECK(tokens.Download() == expected);
  });
}

}  // namespace tandem::test
