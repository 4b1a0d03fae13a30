// PackedLinear and QuantizeRows: the bits of their definitions for every instruction set, batch and number of threads; the definition against LinearRef.
#include "kernels/packed_linear.h"

#include <cmath>
#include <limits>

#include "core/error.h"
#include "core/half.h"
#include "test/kernel_test.h"

namespace tandem::test {

namespace {

const WeightType kTypes[] = {WeightType::kI8, WeightType::kI4};

// A random weight, what it points to, and its packed form.
struct PackedCase {
  PackedCase(WeightType type, int64_t rows, int64_t cols, int64_t group_size, int64_t group_offset, uint32_t seed);
  void Pack();
  std::string Name(Isa isa, int64_t m) const;

  LinearWeight weight;
  PackedWeight packed;
  std::vector<uint8_t> bytes;
  std::vector<uint16_t> scales;

 private:
  std::vector<uint8_t> packed_memory_;
};

// The first byte of `memory` that is 64-byte aligned; `bytes` follow.
uint8_t* Aligned(std::vector<uint8_t>& memory, int64_t bytes) {
  memory.assign(static_cast<size_t>(bytes + 64), 0xa5);
  return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

PackedCase::PackedCase(WeightType type, int64_t rows, int64_t cols, int64_t group_size, int64_t group_offset, uint32_t seed) {
  std::mt19937 generator(seed);
  weight.type = type;
  weight.rows = rows;
  weight.cols = cols;
  weight.row_stride = (type == WeightType::kI4 ? cols / 2 : cols) + 3;  // rows begin at any byte
  weight.group_size = group_size;
  weight.group_offset = group_offset;
  weight.groups = (cols + group_offset + group_size - 1) / group_size;
  bytes.resize(static_cast<size_t>(rows * weight.row_stride + 1));
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(generator());
  scales.resize(static_cast<size_t>(rows * weight.groups + 1));
  std::uniform_real_distribution<float> scale(0.001f, 0.03f);
  for (uint16_t& half : scales) half = FloatToHalf(scale(generator));
  weight.data = bytes.data() + 1;
  weight.scales = scales.data();
  Pack();
}

void PackedCase::Pack() {
  const int64_t size = DescribePacked(weight, nullptr).Bytes();
  packed = DescribePacked(weight, Aligned(packed_memory_, size));
  PackRows(weight, 0, weight.rows, const_cast<uint8_t*>(packed.data));
}

std::string PackedCase::Name(Isa isa, int64_t m) const {
  return std::string(IsaName(isa)) + (weight.type == WeightType::kI8 ? " i8" : " i4") + " rows " + std::to_string(weight.rows) + " cols " +
         std::to_string(weight.cols) + " group " + std::to_string(weight.group_size) + "+" + std::to_string(weight.group_offset) + " m " +
         std::to_string(m);
}

std::vector<float> Run(Isa isa, const PackedCase& w, const float* x, int64_t m, int64_t x_stride, const float* bias, int64_t y_stride, ThreadPool& pool) {
  std::vector<uint8_t> memory;
  uint8_t* quantized = Aligned(memory, QuantizedBytes(w.packed.segments, m));
  std::vector<float> y(static_cast<size_t>(m * y_stride), 12345.0f);
  QuantizeRows(isa, w.packed.segments, x, m, x_stride, quantized, pool);
  PackedLinear(isa, w.packed, quantized, m, bias, y.data(), y_stride, pool);
  return y;
}

// The bits of the definition, and nothing written besides y.
void CheckAgainstRef(Isa isa, const PackedCase& w, int64_t m, bool with_bias) {
  const int64_t x_stride = w.weight.cols + 5, y_stride = w.weight.rows + 3;
  const std::vector<float> x = RandomFloats(m * x_stride + 1, 11), bias = RandomFloats(w.weight.rows, 12);
  const float* bias_or_null = with_bias ? bias.data() : nullptr;
  ThreadPool pool(2);
  const std::vector<float> y = Run(isa, w, x.data() + 1, m, x_stride, bias_or_null, y_stride, pool);
  std::vector<float> expected(y.size(), 12345.0f);
  PackedLinearRef(w.weight, x.data() + 1, m, x_stride, bias_or_null, expected.data(), y_stride);
  CHECK_SAME_BITS(w.Name(isa, m), y.data(), expected.data(), m * y_stride);
}

}  // namespace

TEST(segments_begin_at_every_128_columns_and_every_group) {
  const auto list = [](const ColumnSegments& segments) {
    std::string text;
    for (auto s = segments.First(); s.begin < segments.cols; s.Next()) {
      text += std::to_string(s.begin) + "-" + std::to_string(s.end) + "/" + std::to_string(s.group) + " ";
    }
    return text;
  };
  CHECK_EQ(list(ColumnSegments(300, 1000, 0)), "0-128/0 128-256/0 256-300/0 ");
  CHECK_EQ(list(ColumnSegments(300, 200, 150)), "0-50/0 50-128/1 128-250/1 250-256/2 256-300/2 ");
  CHECK_EQ(list(ColumnSegments(256, 128, 64)), "0-64/0 64-128/1 128-192/1 192-256/2 ");
  CHECK_EQ(list(ColumnSegments(0, 128, 64)), "");
  const ColumnSegments segments(300, 200, 150);
  CHECK_EQ(segments.count, 5);
  CHECK_EQ(segments.cols_in_eights, 56 + 80 + 128 + 8 + 48);
  CHECK_EQ(segments.cols_in_fours, 52 + 80 + 124 + 8 + 44);
}

TEST(tiles_cover_every_row_once_and_are_even) {
  for (int64_t m = 1; m <= 100; ++m) {
    CHECK_EQ(TileBegin(m, 0), 0);
    CHECK_EQ(TileBegin(m, NumTiles(m)), m);
    for (int64_t tile = 0; tile < NumTiles(m); ++tile) {
      const int64_t rows = TileBegin(m, tile + 1) - TileBegin(m, tile);
      CHECK(rows >= m / NumTiles(m) && rows <= kTileTokens);
      for (int64_t row = TileBegin(m, tile); row < TileBegin(m, tile + 1); ++row) CHECK_EQ(TileOf(m, row), tile);
    }
  }
}

TEST(quantize_segment_ref_is_the_definition) {
  const float x[] = {-2.0f, 1.0f, 0.5f, 3.0f / 127, 1.0f / 127, 0.0f};
  int8_t q[6];
  float scale;
  QuantizeSegmentRef(x, 6, q, &scale);
  CHECK_EQ(scale, 2.0f / 127);
  const int8_t expected[] = {-127, 64, 32, 2, 0, 0};  // 63.5, 31.75, 1.5 and 0.5: ties to even
  for (int i = 0; i < 6; ++i) CHECK_EQ(static_cast<int>(q[i]), static_cast<int>(expected[i]));
  const float tiny[] = {1e-38f, -9e-31f};
  QuantizeSegmentRef(tiny, 2, q, &scale);
  CHECK_EQ(scale, 0.0f);
  CHECK_EQ(static_cast<int>(q[1]), 0);
}

TEST(quantize_rows_has_the_bits_of_its_definition) {
  ForEachIsa([](Isa isa) {
    for (const int64_t cols : RaggedSizes()) {
      for (const int64_t group_size : {int64_t{1} << 20, int64_t{128}, int64_t{50}}) {
        const ColumnSegments segments(cols, group_size, group_size / 4);
        const int64_t m = 1 + cols % 30, x_stride = cols + 3;
        std::vector<float> x = RandomFloats(m * x_stride + 1, static_cast<uint32_t>(cols));
        for (size_t i = 0; i < x.size(); i += 7) x[i] *= 0x1p-100f;
        if (cols > 0) {  // a row each: zeros, numbers near the ends of the range, infinity, NaN
          const auto row = [&](int64_t i) { return x.data() + 1 + i % m * x_stride; };
          std::fill(row(0), row(0) + cols, 0.0f);
          for (int64_t c = 0; c < cols; ++c) row(1)[c] *= 0x1p120f;
          for (int64_t c = 0; c < cols; ++c) row(2)[c] *= 0x1p-100f;
          row(3)[cols - 1] = -std::numeric_limits<float>::infinity();
          row(4)[cols / 2] = std::numeric_limits<float>::quiet_NaN();
          row(5)[cols / 3] = std::numeric_limits<float>::max();
        }
        std::vector<uint8_t> memory;
        uint8_t* quantized = Aligned(memory, QuantizedBytes(segments, m));
        ThreadPool pool(2);
        QuantizeRows(isa, segments, x.data() + 1, m, x_stride, quantized, pool);
        for (int64_t tile = 0; tile < NumTiles(m); ++tile) {
          const int64_t first = TileBegin(m, tile), rows = TileBegin(m, tile + 1) - first;
          const uint8_t* place = quantized + QuantizedBytes(segments, first);
          for (auto s = segments.First(); s.begin < cols; s.Next(), place += rows * kQuantizedSegmentBytes) {
            for (int64_t i = 0; i < rows; ++i) {
              int8_t expected[kSegmentColumns] = {};
              float scale;
              int32_t sum = 0;
              QuantizeSegmentRef(x.data() + 1 + (first + i) * x_stride + s.begin, s.length(), expected, &scale);
              for (const int8_t q : expected) sum += q;
              const std::string name = std::string(IsaName(isa)) + " cols " + std::to_string(cols) + " from " + std::to_string(s.begin);
              const float* scales = reinterpret_cast<const float*>(place + rows * kSegmentColumns);
              CHECK(std::memcmp(place + i * kSegmentColumns, expected, sizeof expected) == 0);
              CHECK_SAME_BITS(name, scales + i, &scale, 1);
              CHECK_EQ(reinterpret_cast<const int32_t*>(scales + rows)[i], sum);
            }
          }
        }
      }
    }
  });
}

// Each activation is off by at most half a step of its segment; the fp32 roundings of the segments' sums come on top.
TEST(packed_linear_ref_is_near_the_exact_product) {
  for (const WeightType type : kTypes) {
    const PackedCase w(type, 19, 700, 100, 30, 7);
    const std::vector<float> x = RandomFloats(3 * 700, 8), bias = RandomFloats(19, 9);
    std::vector<float> y(3 * 19), exact(3 * 19);
    PackedLinearRef(w.weight, x.data(), 3, 700, bias.data(), y.data(), 19);
    LinearRef(w.weight, x.data(), 3, 700, bias.data(), exact.data(), 19);
    for (int64_t i = 0; i < 3; ++i) {
      for (int64_t o = 0; o < 19; ++o) {
        double bound = 0.0, magnitude = std::abs(bias[static_cast<size_t>(o)]);
        for (auto s = w.packed.segments.First(); s.begin < 700; s.Next()) {
          float maximum = 0.0f;
          for (int64_t c = s.begin; c < s.end; ++c) maximum = std::max(maximum, std::abs(x[static_cast<size_t>(i * 700 + c)]));
          for (int64_t c = s.begin; c < s.end; ++c) {
            const double weight = std::abs(QuantizedAt(w.weight, o, c) * static_cast<double>(ScaleAt(w.weight, o, c)));
            bound += weight * maximum / 127 * 0.50001;
            magnitude += weight * maximum;
          }
        }
        bound += static_cast<double>(w.packed.segments.count + 3) * magnitude * 0x1p-24;
        const size_t place = static_cast<size_t>(i * 19 + o);
        CHECK_NEAR("y", y[place], exact[place], bound);
      }
    }
  }
}

TEST(packed_rows_are_dequantised_to_the_same_bits) {
  for (const WeightType type : kTypes) {
    for (const int64_t cols : {2, 30, 128, 318}) {
      for (const int64_t group_size : {6, 64, 500}) {
        const PackedCase w(type, 37, cols, group_size, group_size / 4 * 2, static_cast<uint32_t>(cols));
        for (int64_t o = 0; o < 37; ++o) {
          std::vector<float> row(static_cast<size_t>(cols)), expected(row);
          DequantizeRow(w.packed, o, row.data());
          for (int64_t c = 0; c < cols; ++c) {
            expected[static_cast<size_t>(c)] = static_cast<float>(QuantizedAt(w.weight, o, c)) * ScaleAt(w.weight, o, c);
          }
          CHECK_SAME_BITS(w.Name(Isa::kGeneric, 1), row.data(), expected.data(), cols);
        }
      }
    }
  }
}

TEST(packing_by_ranges_of_rows_is_packing) {
  for (const WeightType type : kTypes) {
    const PackedCase w(type, 75, 142, 32, 6, 3);
    std::vector<uint8_t> memory;
    uint8_t* to = Aligned(memory, w.packed.Bytes());
    for (const int64_t begin : {48, 0, 16}) PackRows(w.weight, begin, begin == 0 ? 16 : begin == 16 ? 48 : 75, to);
    for (int64_t o = 0; o < 75; ++o) {
      float row[142], expected[142];
      DequantizeRow({w.packed.type, 75, w.packed.groups, w.packed.segments, to}, o, row);
      DequantizeRow(w.packed, o, expected);
      CHECK_SAME_BITS("row " + std::to_string(o), row, expected, 142);
    }
  }
}

TEST(packed_linear_has_the_bits_of_its_definition_for_every_width) {
  ForEachIsa([](Isa isa) {
    for (const WeightType type : kTypes) {
      for (const int64_t cols : RaggedSizes()) {
        if (type == WeightType::kI4 && cols % 2 != 0) continue;
        const PackedCase w(type, 21, cols, 1 << 20, 0, 1 + static_cast<uint32_t>(cols));
        for (const int64_t m : {1, 2, 13}) CheckAgainstRef(isa, w, m, m % 2 == 0);
      }
    }
  });
}

TEST(packed_linear_has_the_bits_of_its_definition_for_every_batch_and_row_count) {
  ForEachIsa([](Isa isa) {
    for (const WeightType type : kTypes) {
      for (int64_t rows = 0; rows <= 67; rows += rows < 35 ? 1 : 16) {
        const PackedCase w(type, rows, 270, 96, 6, 100 + static_cast<uint32_t>(rows));
        for (const int64_t m : {1, 3, 9}) CheckAgainstRef(isa, w, m, true);
      }
      const PackedCase w(type, 43, 270, 96, 6, 99);
      for (int64_t m = 0; m <= 40; ++m) CheckAgainstRef(isa, w, m, m % 2 == 0);
    }
  });
}

TEST(packed_linear_groups_may_lie_anywhere) {
  ForEachIsa([](Isa isa) {
    for (const WeightType type : kTypes) {
      for (const int64_t cols : {2, 30, 130, 1056}) {
        for (const int64_t group_size : {2, 6, 10, 16, 32, 64, 100, 128, 256, 1030}) {
          for (const int64_t offset : {int64_t{0}, int64_t{2}, group_size / 2 / 2 * 2, group_size - 2}) {
            if (offset >= group_size) continue;
            const PackedCase w(type, 17, cols, group_size, offset, static_cast<uint32_t>(cols + group_size + offset));
            for (const int64_t m : {1, 5}) CheckAgainstRef(isa, w, m, true);
          }
        }
      }
    }
    for (const int64_t group_size : {1, 3, 17, 33}) {  // odd ones, of INT8
      for (const int64_t offset : {int64_t{0}, group_size / 2, group_size - 1}) {
        const PackedCase w(WeightType::kI8, 17, 131, group_size, offset, static_cast<uint32_t>(group_size + offset));
        for (const int64_t m : {1, 5}) CheckAgainstRef(isa, w, m, true);
      }
    }
  });
}

// Sums of the largest products, of either sign, that a kernel may meet: nothing saturates.
TEST(packed_linear_takes_the_extremes) {
  ForEachIsa([](Isa isa) {
    for (const WeightType type : kTypes) {
      PackedCase w(type, 33, 256, 128, 0, 1);
      for (const int pattern : {0x00, 0x80, 0x7f, 0x88, 0x77, 0xff, 0x87, 0x78}) {
        std::fill(w.bytes.begin(), w.bytes.end(), static_cast<uint8_t>(pattern));
        w.Pack();
        for (const int signs : {0, 1, 2, 3}) {  // of x: all +, alternating, in pairs, all -
          for (const int64_t m : {1, 5, 12}) {  // the same row m times
            std::vector<float> x(static_cast<size_t>(m * 256)), expected(static_cast<size_t>(m * 33));
            for (size_t c = 0; c < x.size(); ++c) x[c] = signs == 3 || (signs == 1 && c % 2 != 0) || (signs == 2 && c % 4 >= 2) ? -1.0f : 1.0f;
            ThreadPool pool(1);
            const std::vector<float> y = Run(isa, w, x.data(), m, 256, nullptr, 33, pool);
            PackedLinearRef(w.weight, x.data(), m, 256, nullptr, expected.data(), 33);
            CHECK_SAME_BITS(w.Name(isa, m) + " bytes " + std::to_string(pattern) + " signs " + std::to_string(signs), y.data(), expected.data(), m * 33);
          }
        }
      }
    }
  });
}

// More rows of weights than a kernel may keep sums of, and all on one thread.
TEST(packed_linear_has_the_bits_of_its_definition_for_many_rows) {
  ForEachIsa([](Isa isa) {
    for (const WeightType type : kTypes) {
      const PackedCase w(type, 2100, 142, 1 << 20, 0, 31);
      const std::vector<float> x = RandomFloats(17 * 142, 32), bias = RandomFloats(2100, 33);
      std::vector<float> expected(17 * 2100);
      ThreadPool pool(1);
      for (const int64_t m : {1, 7, 17}) {
        const std::vector<float> y = Run(isa, w, x.data(), m, 142, bias.data(), 2100, pool);
        PackedLinearRef(w.weight, x.data(), m, 142, bias.data(), expected.data(), 2100);
        CHECK_SAME_BITS(w.Name(isa, m), y.data(), expected.data(), m * 2100);
      }
    }
  });
}

TEST(packed_linear_rows_have_the_same_bits_in_every_batch) {
  ForEachIsa([](Isa isa) {
    for (const WeightType type : kTypes) {
      for (const int64_t cols : {62, 1100}) {
        const PackedCase w(type, 91, cols, 96, 34, 5);
        const int64_t rows = w.weight.rows, max_m = 150;
        const std::vector<float> x = RandomFloats(max_m * cols, 21), bias = RandomFloats(rows, 22);
        std::vector<float> single(static_cast<size_t>(max_m * rows));
        ThreadPool one(1), two(2), three(3);
        PackedLinearRef(w.weight, x.data(), max_m, cols, bias.data(), single.data(), rows);
        for (int64_t m = 1; m <= max_m; m += m < 40 ? 1 : 55) {
          for (ThreadPool* pool : {&one, &two, &three}) {
            const std::vector<float> batch = Run(isa, w, x.data(), m, cols, bias.data(), rows, *pool);
            CHECK_SAME_BITS(w.Name(isa, m), batch.data(), single.data(), m * rows);
          }
        }
      }
    }
  });
}

TEST(packed_linear_keeps_nan_and_infinity_in_their_row) {
  ForEachIsa([](Isa isa) {
    for (const WeightType type : kTypes) {
      for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
        const PackedCase w(type, 20, 296, 96, 0, 3);
        for (const int64_t m : {1, 8, 14}) {
          std::vector<float> x = RandomFloats(m * 296, 4), expected(static_cast<size_t>(m * 20));
          PackedLinearRef(w.weight, x.data(), m, 296, nullptr, expected.data(), 20);
          x[static_cast<size_t>((m - 1) * 296 + 290)] = bad;
          ThreadPool pool(1);
          const std::vector<float> y = Run(isa, w, x.data(), m, 296, nullptr, 20, pool);
          CHECK_SAME_BITS(w.Name(isa, m), y.data(), expected.data(), (m - 1) * 20);
          for (int64_t o = 0; o < 20; ++o) CHECK(std::isnan(y[static_cast<size_t>((m - 1) * 20 + o)]));
        }
      }
    }
  });
}

TEST(packed_linear_refuses_what_cannot_be_packed) {
  PackedCase w(WeightType::kI4, 2, 4, 4, 0, 1);
  w.weight.group_offset = 2;  // needs a second group
  CHECK_THROWS(DescribePacked(w.weight, nullptr), ErrorCode::kInvalidArgument);
  w.weight.group_offset = 0;
  w.weight.type = WeightType::kF16;
  CHECK_THROWS(DescribePacked(w.weight, nullptr), ErrorCode::kInvalidArgument);
}

}  // namespace tandem::test
