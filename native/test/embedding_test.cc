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

TEST(embedding_looks_up_int8_rows_plain_and_packed) {
  const int64_t rows = 21, cols = 150, groups = 2;
  std::vector<int8_t> q;
  for (int64_t i = 0; i < rows * cols; ++i) q.push_back(static_cast<int8_t>(i * 37 % 256 - 128));
  std::vector<uint16_t> scales;
  for (int64_t i = 0; i < rows * groups; ++i) scales.push_back(FloatToHalf(0.01f * static_cast<float>(i + 1)));
  LinearWeight table;
  table.type = WeightType::kI8;
  table.rows = rows;
  table.cols = cols;
  table.data = q.data();
  table.row_stride = cols;
  table.scales = scales.data();
  table.groups = groups;
  table.group_size = 128;
  std::vector<uint8_t> memory(static_cast<size_t>(DescribePacked(table, nullptr).Bytes()) + 64);
  void* aligned = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
  PackRows(table, 0, rows, aligned);
  const PackedWeight packed = DescribePacked(table, aligned);
  const std::vector<uint32_t> tokens = {5, 25, 24, 4, 26};  // of rows 5 ... 25
  ThreadPool pool(2);
  std::vector<float> plain(tokens.size() * static_cast<size_t>(cols), -1.0f), same(plain);
  Embed(table, 5, tokens.data(), static_cast<int64_t>(tokens.size()), plain.data(), pool);
  Embed(packed, 5, tokens.data(), static_cast<int64_t>(tokens.size()), same.data(), pool);
  for (size_t i = 0; i < tokens.size(); ++i) {
    for (int64_t c = 0; c < cols; ++c) {
      const int64_t row = static_cast<int64_t>(tokens[i]) - 5;
      const bool own = row >= 0 && row < rows;
      const float expected = own ? static_cast<float>(q[static_cast<size_t>(row * cols + c)]) * HalfToFloat(scales[static_cast<size_t>(row * groups + c / 128)]) : 0.0f;
      CHECK_EQ(plain[i * static_cast<size_t>(cols) + static_cast<size_t>(c)], expected);
      CHECK_EQ(same[i * static_cast<size_t>(cols) + static_cast<size_t>(c)], expected);
    }
  }
}

}  // namespace tandem::test
