#include "kernels/embedding.h"

#include "core/error.h"
#include "core/half.h"
#include "test/kernel_test.h"

namespace tandem::test {

TEST(embedding_copies_own_rows_and_zeroes_the_others) {
  for (const int64_t cols : RaggedSizes()) {
    const int64_t rows = 6;
    const uint32_t first_token = 100;
    const std::vector<float> values = RandomFloats(rows * (cols + 1), 1);
    std::vector<uint16_t> halves;
    for (const float value : values) halves.push_back(FloatToHalf(value));
    const std::vector<uint32_t> tokens = {100, 105, 99, 106, 0, 4294967295u, 103, 103};
    const int64_t m = static_cast<int64_t>(tokens.size());
    LinearWeight table;
    table.rows = rows;
    table.cols = cols;
    for (const bool half : {false, true}) {
      table.type = half ? WeightType::kF16 : WeightType::kF32;
      table.data = half ? static_cast<const void*>(halves.data()) : values.data();
      table.row_stride = (cols + 1) * (half ? 2 : 4);
      for (const int threads : {1, 3}) {
        ThreadPool pool(threads);
        std::vector<float> y(static_cast<size_t>(m * cols), -1.0f);
        Embed(table, first_token, tokens.data(), m, y.data(), pool);
        for (int64_t i = 0; i < m; ++i) {
          const int64_t row = static_cast<int64_t>(tokens[static_cast<size_t>(i)]) - first_token;
          for (int64_t c = 0; c < cols; ++c) {
            const size_t place = static_cast<size_t>(row * (cols + 1) + c);
            const float expected = row < 0 || row >= rows ? 0.0f : half ? HalfToFloat(halves[place]) : values[place];
            CHECK_EQ(y[static_cast<size_t>(i * cols + c)], expected);
          }
        }
      }
    }
  }
}

TEST(embedding_refuses_quantised_tables) {
  ThreadPool pool(1);
  LinearWeight table;
  table.type = WeightType::kI8;
  const uint32_t token = 0;
  float y = 0.0f;
  CHECK_THROWS(Embed(table, 0, &token, 1, &y, pool), ErrorCode::kInvalidArgument);
}

}  // namespace tandem::test
