// Linear against LinearRef, and its bits against themselves for other batch sizes and thread counts.
#include "kernels/linear.h"

#include <cmath>
#include <limits>

#include "core/error.h"
#include "core/half.h"
#include "test/kernel_test.h"

namespace tandem::test {

namespace {

const WeightType kTypes[] = {WeightType::kF32, WeightType::kF16, WeightType::kI8, WeightType::kI4};
const char* const kTypeNames[] = {"f32", "f16", "i8", "i4"};

// A random weight and what it points to. `misaligned` shifts the rows by one element (one byte for int4) and leaves odd gaps between them.
struct RandomWeight {
  RandomWeight(WeightType type, int64_t rows, int64_t cols, int64_t group_size, int64_t group_offset, uint32_t seed, bool misaligned = false);
  LinearWeight weight;
  std::vector<float> values;  // [rows, cols], what the weight stands for
  std::vector<uint8_t> bytes;
  std::vector<uint16_t> scales;
};

RandomWeight::RandomWeight(WeightType type, int64_t rows, int64_t cols, int64_t group_size, int64_t group_offset, uint32_t seed, bool misaligned) {
  const bool quantised = type == WeightType::kI8 || type == WeightType::kI4;
  const int64_t element = type == WeightType::kF32 ? 4 : type == WeightType::kF16 ? 2 : 1;
  weight.type = type;
  weight.rows = rows;
  weight.cols = cols;
  weight.row_stride = (type == WeightType::kI4 ? cols / 2 : cols * element) + (misaligned ? 3 * element : 0);
  bytes.resize(static_cast<size_t>(rows * weight.row_stride + element + 1));
  uint8_t* data = bytes.data() + (misaligned ? element : 0);
  weight.data = data;
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  if (quantised) {
    weight.group_size = group_size;
    weight.group_offset = group_offset;
    weight.groups = (cols + group_offset + group_size - 1) / group_size;
    scales.resize(static_cast<size_t>(rows * weight.groups));
    const float magnitude = type == WeightType::kI8 ? 1.0f / 64 : 1.0f / 4;
    for (uint16_t& scale : scales) scale = FloatToHalf(magnitude * (0.5f + std::abs(normal(generator))));
    weight.scales = scales.data();
  }
  for (int64_t o = 0; o < rows; ++o) {
    uint8_t* row = data + o * weight.row_stride;
    for (int64_t c = 0; c < cols; ++c) {
      const float scale = quantised ? HalfToFloat(scales[static_cast<size_t>(o * weight.groups + (c + group_offset) / group_size)]) : 0.0f;
      const int random = static_cast<int>(generator() % 256) - 128;
      float value = normal(generator);
      switch (type) {
        case WeightType::kF32: std::memcpy(row + c * 4, &value, 4); break;
        case WeightType::kF16: {
          const uint16_t half = FloatToHalf(value);
          std::memcpy(row + c * 2, &half, 2);
          value = HalfToFloat(half);
          break;
        }
        case WeightType::kI8:
          row[c] = static_cast<uint8_t>(random);
          value = static_cast<float>(random) * scale;
          break;
        case WeightType::kI4: {
          const int q = (random + 128) / 16 - 8;
          row[c / 2] = static_cast<uint8_t>(row[c / 2] | (q & 15) << (c % 2 == 0 ? 4 : 0));
          value = static_cast<float>(q) * scale;
          break;
        }
      }
      values.push_back(value);
    }
  }
}

// What rounding may do: each of the sum's cols additions and roundings moves it by half an ulp of at most the sum of the terms' magnitudes, of
// which some lane of 4 sums a quarter; the bias and the final rounding come on top.
double Bound(const RandomWeight& w, const float* x, int64_t o, float bias) {
  const LinearWeight& weight = w.weight;
  double magnitude = std::abs(bias);
  for (int64_t c = 0; c < weight.cols; ++c) magnitude += std::abs(static_cast<double>(x[c]) * w.values[static_cast<size_t>(o * weight.cols + c)]);
  const double depth = static_cast<double>(std::min<int64_t>(weight.cols, 1024)) / 4 + static_cast<double>(weight.cols) / 1024 + 8;
  return depth * magnitude * 0x1p-24 + 1e-30;
}

std::string Name(Isa isa, const LinearWeight& weight, int64_t m) {
  return std::string(IsaName(isa)) + " " + kTypeNames[static_cast<int>(weight.type)] + " rows " + std::to_string(weight.rows) + " cols " +
         std::to_string(weight.cols) + " group " + std::to_string(weight.group_size) + "+" + std::to_string(weight.group_offset) + " m " +
         std::to_string(m);
}

void CheckAgainstRef(Isa isa, const RandomWeight& w, int64_t m, bool with_bias) {
  const LinearWeight& weight = w.weight;
  const std::string name = Name(isa, weight, m);
  const int64_t x_stride = weight.cols + 5, y_stride = weight.rows + 3;
  const std::vector<float> x_memory = RandomFloats(m * x_stride + 1, 11);
  const float* x = x_memory.data() + 1;  // not aligned
  const std::vector<float> bias = RandomFloats(weight.rows, 12);
  const float* bias_or_null = with_bias ? bias.data() : nullptr;
  const float untouched = 12345.0f;
  std::vector<float> y(static_cast<size_t>(m * y_stride), untouched), expected(y);
  ThreadPool pool(2);
  Linear(isa, weight, x, m, x_stride, bias_or_null, y.data(), y_stride, pool);
  LinearRef(weight, x, m, x_stride, bias_or_null, expected.data(), y_stride);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t o = 0; o < y_stride; ++o) {
      const size_t place = static_cast<size_t>(i * y_stride + o);
      if (o >= weight.rows) {
        CHECK_EQ(y[place], untouched);
      } else {
        CHECK_NEAR(name + " y[" + std::to_string(i) + ", " + std::to_string(o) + "]", y[place], expected[place],
                   Bound(w, x + i * x_stride, o, with_bias ? bias[static_cast<size_t>(o)] : 0.0f));
      }
    }
  }
}

}  // namespace

TEST(linear_ref_reads_nibbles_and_groups_as_documented) {
  // Two rows of int4: bytes 0x1f 0x80 are the columns 1, -1, -8, 0; groups of 2 columns, of which another rank has the first two.
  const uint8_t bytes[] = {0x1f, 0x80, 0x72, 0x3e};
  const uint16_t scales[] = {FloatToHalf(9.0f), FloatToHalf(0.5f), FloatToHalf(2.0f), FloatToHalf(9.0f), FloatToHalf(1.0f), FloatToHalf(0.25f)};
  LinearWeight weight;
  weight.type = WeightType::kI4;
  weight.rows = 2;
  weight.cols = 4;
  weight.data = bytes;
  weight.row_stride = 2;
  weight.scales = scales + 1;
  weight.groups = 3;
  weight.group_size = 2;
  const float x[] = {1.0f, 10.0f, 100.0f, 1000.0f};
  const float bias[] = {0.125f, -1.0f};
  float y[2];
  LinearRef(weight, x, 1, 4, bias, y, 2);
  CHECK_EQ(y[0], 0.5f * (1.0f - 10.0f) + 2.0f * -800.0f + 0.125f);
  CHECK_EQ(y[1], 1.0f * (7.0f + 20.0f) + 0.25f * (300.0f - 2000.0f) - 1.0f);
  weight.scales = scales;
  weight.group_size = 4;
  weight.group_offset = 2;  // columns 0 and 1 are the first group's last
  LinearRef(weight, x, 1, 4, nullptr, y, 2);
  CHECK_EQ(y[0], 9.0f * (1.0f - 10.0f) + 0.5f * -800.0f);
  CHECK_EQ(y[1], 9.0f * (7.0f + 20.0f) + 1.0f * (300.0f - 2000.0f));
}

TEST(linear_ref_is_the_definition) {
  for (const WeightType type : kTypes) {
    const RandomWeight w(type, 3, 22, 8, 2, 9);
    const std::vector<float> x = RandomFloats(22, 10);
    float y[3];
    LinearRef(w.weight, x.data(), 1, 22, nullptr, y, 3);
    for (int64_t o = 0; o < 3; ++o) {
      double sum = 0.0;
      for (int64_t c = 0; c < 22; ++c) sum += static_cast<double>(x[static_cast<size_t>(c)]) * w.values[static_cast<size_t>(o * 22 + c)];
      CHECK_EQ(y[o], static_cast<float>(sum));
    }
  }
}

TEST(linear_vector_equals_ref_for_every_width) {
  ForEachIsa([](Isa isa) {
    for (const WeightType type : kTypes) {
      for (const int64_t cols : RaggedSizes()) {
        if (type == WeightType::kI4 && cols % 2 != 0) continue;
        const RandomWeight w(type, 5, cols, 1 << 20, 0, 1 + static_cast<uint32_t>(cols), cols % 3 == 0 && type != WeightType::kF32);
        for (const int64_t m : {1, 2, 3, 4, 5, 13}) CheckAgainstRef(isa, w, m, m % 2 == 0);
      }
    }
  });
}

TEST(linear_vector_equals_ref_for_every_row_count) {
  ForEachIsa([](Isa isa) {
    for (const WeightType type : kTypes) {
      for (int64_t rows = 0; rows <= 37; ++rows) {
        const RandomWeight w(type, rows, 70, 32, 6, 100 + static_cast<uint32_t>(rows));
        for (const int64_t m : {1, 2, 3, 9}) CheckAgainstRef(isa, w, m, true);
      }
    }
  });
}

TEST(linear_groups_may_lie_anywhere) {
  ForEachIsa([](Isa isa) {
    for (const WeightType type : {WeightType::kI8, WeightType::kI4}) {
      for (const int64_t cols : {2, 30, 64, 130, 1056, 2050}) {
        for (const int64_t group_size : {2, 6, 10, 16, 24, 32, 64, 100, 128, 1030}) {
          for (const int64_t offset : {int64_t{0}, int64_t{2}, group_size / 2 / 2 * 2, group_size - 2}) {
            if (offset >= group_size) continue;
            const RandomWeight w(type, 9, cols, group_size, offset, static_cast<uint32_t>(cols + group_size + offset));
            for (const int64_t m : {1, 6}) CheckAgainstRef(isa, w, m, true);
          }
        }
      }
    }
    // int8 groups and offsets may be odd
    for (const int64_t group_size : {1, 3, 17, 33}) {
      for (const int64_t offset : {int64_t{0}, group_size / 2, group_size - 1}) {
        const RandomWeight w(WeightType::kI8, 9, 131, group_size, offset, static_cast<uint32_t>(group_size + offset));
        for (const int64_t m : {1, 6}) CheckAgainstRef(isa, w, m, true);
      }
    }
  });
}

TEST(linear_rows_have_the_same_bits_in_every_batch) {
  ForEachIsa([](Isa isa) {
    for (const WeightType type : kTypes) {
      for (const int64_t cols : {62, 96, 1100, 2240}) {
        const RandomWeight w(type, 43, cols, 96, 34, 5);
        const int64_t rows = w.weight.rows, max_m = 150;
        const std::vector<float> x = RandomFloats(max_m * cols, 21), bias = RandomFloats(rows, 22);
        std::vector<float> single(static_cast<size_t>(max_m * rows)), batch(single.size());
        ThreadPool one(1), two(2), three(3);
        for (int64_t i = 0; i < max_m; ++i) Linear(isa, w.weight, x.data() + i * cols, 1, cols, bias.data(), single.data() + i * rows, rows, one);
        for (int64_t m = 1; m <= max_m; m += m < 40 ? 1 : 55) {
          for (ThreadPool* pool : {&one, &two, &three}) {
            batch.assign(batch.size(), 0.0f);
            Linear(isa, w.weight, x.data(), m, cols, bias.data(), batch.data(), rows, *pool);
            CHECK_SAME_BITS(Name(isa, w.weight, m), batch.data(), single.data(), m * rows);
          }
        }
      }
    }
  });
}

TEST(linear_does_not_hide_nan) {
  ForEachIsa([](Isa isa) {
    const RandomWeight w(WeightType::kI4, 8, 96, 32, 0, 3);
    for (const int64_t m : {1, 8}) {
      std::vector<float> x = RandomFloats(m * 96, 4), y(static_cast<size_t>(m * 8));
      x[50] = std::numeric_limits<float>::quiet_NaN();
      ThreadPool pool(1);
      Linear(isa, w.weight, x.data(), m, 96, nullptr, y.data(), 8, pool);
      for (int64_t i = 0; i < m * 8; ++i) CHECK_EQ(std::isnan(y[static_cast<size_t>(i)]), i < 8);
    }
  });
}

TEST(linear_refuses_groups_that_do_not_fit) {
  ThreadPool pool(1);
  const float x[4] = {};
  float y[2];
  RandomWeight w(WeightType::kI4, 2, 4, 4, 0, 1);
  const auto run = [&] { Linear(Isa::kGeneric, w.weight, x, 1, 4, nullptr, y, 2, pool); };
  run();
  w.weight.group_offset = 2;  // needs a second group
  CHECK_THROWS(run(), ErrorCode::kInvalidArgument);
  w.weight.group_offset = 0;
  w.weight.cols = 3;
  CHECK_THROWS(run(), ErrorCode::kInvalidArgument);
  w.weight.cols = 4;
  w.weight.group_size = 0;
  CHECK_THROWS(run(), ErrorCode::kInvalidArgument);
}

}  // namespace tandem::test
