// CUDA linear layers against LinearRef, and their bits against themselves for other numbers of rows and other kernels.
#include "kernels/cuda/linear.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "core/error.h"
#include "core/half.h"
#include "kernels/cuda/linear_kernels.h"
#include "kernels/cuda/linear_warpgroup.h"
#include "test/cuda/device_test.h"

namespace tandem::test {

namespace {

using cuda::DeviceWeight;
using cuda::GemmTile;
using cuda::WeightScaling;

struct Shape {
  WeightType type;
  int64_t rows, cols, group_size, group_offset;
};

std::string Name(const Shape& shape) {
  const char* const types[] = {"f32", "f16", "i8", "i4"};
  return std::string(types[static_cast<int>(shape.type)]) + " rows " + std::to_string(shape.rows) + " cols " + std::to_string(shape.cols) + " group " +
         std::to_string(shape.group_size) + "+" + std::to_string(shape.group_offset);
}

int64_t RoundUp(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

LinearWeight Describe(const Shape& shape) {
  LinearWeight weight;
  weight.type = shape.type;
  weight.rows = shape.rows;
  weight.cols = shape.cols;
  if (shape.type == WeightType::kI8 || shape.type == WeightType::kI4) {
    weight.group_size = shape.group_size;
    weight.group_offset = shape.group_offset;
    weight.groups = (shape.cols + shape.group_offset + shape.group_size - 1) / shape.group_size;
  }
  return weight;
}

// A random weight on the host, and packed on the device.
struct TestWeight {
  TestWeight(const Shape& shape, uint32_t seed);

  Shape shape;
  LinearWeight host;
  std::vector<uint8_t> bytes;
  std::vector<uint16_t> scales;
  DeviceWeight packed;
  std::unique_ptr<DeviceArray<uint8_t>> memory;
  std::vector<float> values;  // [rows, cols], what the packed weight stands for
};

TestWeight::TestWeight(const Shape& of, uint32_t seed) : shape(of), host(Describe(of)) {
  const bool quantised = host.groups > 0;
  const int64_t element = host.type == WeightType::kF32 ? 4 : host.type == WeightType::kF16 ? 2 : 1;
  host.row_stride = (host.type == WeightType::kI4 ? host.cols / 2 : host.cols * element) + 3 * element;
  bytes.assign(static_cast<size_t>(host.rows * host.row_stride), 0x5a);
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < host.rows * host.groups; ++i) {
    scales.push_back(FloatToHalf((host.type == WeightType::kI8 ? 1.0f / 64 : 1.0f / 4) * (0.5f + std::abs(normal(generator)))));
  }
  for (int64_t o = 0; o < host.rows; ++o) {
    uint8_t* row = bytes.data() + o * host.row_stride;
    for (int64_t c = 0; c < host.cols; ++c) {
      const float value = normal(generator);
      const uint16_t half = FloatToHalf(value);
      const auto random = static_cast<uint8_t>(generator() >> 24);
      switch (host.type) {
        case WeightType::kF32: std::memcpy(row + c * 4, &value, 4); break;
        case WeightType::kF16: std::memcpy(row + c * 2, &half, 2); break;
        case WeightType::kI8: row[c] = random; break;
        case WeightType::kI4: row[c / 2] = c % 2 == 0 ? random : static_cast<uint8_t>((row[c / 2] & 0xf0) | (random & 15)); break;
      }
    }
  }
  host.data = bytes.data();
  host.scales = scales.data();

  packed = cuda::DescribeDeviceWeight(host);
  memory = std::make_unique<DeviceArray<uint8_t>>(cuda::DeviceWeightBytes(packed));
  packed.data = memory->get();
  constexpr int64_t kRowsAtOnce = 48;
  for (int64_t begin = 0; begin < host.rows; begin += kRowsAtOnce) {
    const int64_t rows = std::min(kRowsAtOnce, host.rows - begin);
    const DeviceArray<uint8_t> staged(std::vector<uint8_t>(bytes.begin() + begin * host.row_stride, bytes.begin() + (begin + rows) * host.row_stride));
    const DeviceArray<uint16_t> staged_scales(std::vector<uint16_t>(scales.begin() + begin * host.groups, scales.begin() + (begin + rows) * host.groups));
    cuda::PackRows(packed, begin, rows, staged.get(), host.row_stride, quantised ? staged_scales.get() : nullptr, nullptr);
    Sync();
  }

  values.resize(static_cast<size_t>(host.rows * host.cols));
  for (int64_t o = 0; o < host.rows; ++o) DequantizeRow(host, o, values.data() + o * host.cols);
  if (packed.scaling != WeightScaling::kPerPart) values = RoundToHalf(values);
}

// x: [m, cols] with zeros up to a multiple of 64 and NaN behind
struct TestRows {
  TestRows(int64_t m_rows, int64_t cols, uint32_t seed) : m(m_rows), stride(RoundUp(cols, 64) + 64), values(RandomFloats(m * cols, seed)) {
    values = RoundToHalf(values);
    std::vector<__half> padded(static_cast<size_t>(m * stride), __float2half(std::numeric_limits<float>::quiet_NaN()));
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t c = 0; c < RoundUp(cols, 64); ++c) {
        padded[static_cast<size_t>(i * stride + c)] = __float2half(c < cols ? values[static_cast<size_t>(i * cols + c)] : 0.0f);
      }
    }
    device = std::make_unique<DeviceArray<__half>>(padded);
  }
  const __half* Row(int64_t i) const { return device->get() + i * stride; }

  int64_t m, stride;
  std::vector<float> values;  // [m, cols]
  std::unique_ptr<DeviceArray<__half>> device;
};

using Product = std::function<void(const cuda::LinearCall&)>;

cuda::LinearCall Call(const TestWeight& w, const __half* x, int64_t m, int64_t x_stride, const float* bias, float* y, int64_t y_stride) {
  return cuda::LinearCall{w.packed, x, m, x_stride, cuda::Output{y, y_stride, bias, static_cast<int>(w.packed.rows), false}, nullptr};
}

struct NamedProduct {
  std::string name;
  Product run;
};

// Every kernel that can multiply m rows.
std::vector<NamedProduct> Products(const TestWeight& w, int64_t m) {
  std::vector<NamedProduct> products;
  if (m <= cuda::kMaxDecodeRows) {
    for (const int row_tiles : {1, 2, 4}) {
      if ((row_tiles == 1 && m > 8) || (row_tiles == 4 && w.packed.type == WeightType::kF16)) continue;
      products.push_back({"decode " + std::to_string(row_tiles), [=](const cuda::LinearCall& call) { cuda::LaunchDecode(call, row_tiles); }});
    }
  }
  for (const int token_tiles : cuda::kStreamTokenTiles) {
    if (cuda::CanStream(w.packed, token_tiles)) {
      products.push_back({"stream " + std::to_string(token_tiles), [=](const cuda::LinearCall& call) { cuda::LaunchStream(call, token_tiles); }});
    }
  }
  for (const GemmTile tile : cuda::kGemmTiles) {
    products.push_back({"gemm " + std::to_string(cuda::TileOutputRows(tile)) + "x" + std::to_string(cuda::TileTokens(tile)),
                        [=](const cuda::LinearCall& call) { cuda::LaunchGemm(call, tile); }});
  }
  for (const cuda::WarpgroupTile tile : cuda::kWarpgroupTiles) {
    if (!cuda::CanRunWarpgroups(tile, w.packed.type)) continue;
    const auto scratch = std::make_shared<DeviceArray<uint8_t>>(cuda::WarpgroupScratchBytes(w.packed, m));
    products.push_back({"warpgroups " + std::to_string(cuda::TileOutputRows(tile)),
                        [=](const cuda::LinearCall& call) { cuda::LaunchWarpgroups(call, tile, scratch->get()); }});
  }
  return products;
}

// y = product(x), [m, rows]; fails where something else is written or something is not.
std::vector<float> Run(const std::string& name, const Product& product, const TestWeight& w, const __half* x, int64_t m, int64_t x_stride,
                       const float* bias) {
  const int64_t rows = w.shape.rows, y_stride = rows + 5;
  DeviceArray<float> y(m * y_stride);
  product(Call(w, x, m, x_stride, bias, y.get(), y_stride));
  const std::vector<float> with_padding = y.Download();
  std::vector<float> result;
  bool untouched = true;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t o = 0; o < y_stride; ++o) {
      const float value = with_padding[static_cast<size_t>(i * y_stride + o)];
      if (o < rows) {
        result.push_back(value);
      } else {
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        untouched = untouched && bits == 0xffffffffu;
      }
    }
  }
  if (!untouched) Fail(__FILE__, __LINE__, name + ": wrote between the rows of y");
  return result;
}

// LinearRef of the values that the packed weight stands for. The bound: an fp32 sum of as many terms as a part has, and of parts, may lose an ulp of the sum of
// the terms' magnitudes at each, as tensor cores cut off rather than round.
void CheckAgainstRef(const std::string& name, const TestWeight& w, const TestRows& x, const std::vector<float>& bias, const std::vector<float>& y) {
  const int64_t rows = w.shape.rows, cols = w.shape.cols;
  LinearWeight values;
  values.rows = rows;
  values.cols = cols;
  values.data = w.values.data();
  values.row_stride = cols * 4;
  std::vector<float> expected(static_cast<size_t>(x.m * rows));
  LinearRef(values, x.values.data(), x.m, cols, bias.empty() ? nullptr : bias.data(), expected.data(), rows);
  const double depth = static_cast<double>(std::min<int64_t>(cols, RoundUp(cols, 64) / w.packed.parts + 64) + 16);
  for (int64_t i = 0; i < x.m; ++i) {
    for (int64_t o = 0; o < rows; ++o) {
      double magnitude = bias.empty() ? 0.0 : std::abs(bias[static_cast<size_t>(o)]);
      for (int64_t c = 0; c < cols; ++c) {
        magnitude += std::abs(static_cast<double>(x.values[static_cast<size_t>(i * cols + c)]) * w.values[static_cast<size_t>(o * cols + c)]);
      }
      const auto place = static_cast<size_t>(i * rows + o);
      CHECK_NEAR(name + " y[" + std::to_string(i) + ", " + std::to_string(o) + "]", y[place], expected[place], depth * magnitude * 0x1p-23 + 1e-30);
    }
  }
}

void CheckShape(const Shape& shape, const std::vector<int64_t>& row_counts, bool with_bias) {
  const TestWeight w(shape, static_cast<uint32_t>(shape.rows * 1000 + shape.cols));
  const std::vector<float> bias = with_bias ? RandomFloats(shape.rows, 3) : std::vector<float>();
  const DeviceArray<float> device_bias(bias);
  for (const int64_t m : row_counts) {
    const TestRows x(m, shape.cols, static_cast<uint32_t>(m));
    std::vector<float> first;
    for (const NamedProduct& product : Products(w, m)) {
      const std::string name = Name(shape) + " m " + std::to_string(m) + " " + product.name;
      const std::vector<float> y = Run(name, product.run, w, x.Row(0), m, x.stride, with_bias ? device_bias.get() : nullptr);
      if (first.empty()) {
        first = y;
        CheckAgainstRef(name, w, x, bias, y);
      } else {
        CHECK_SAME_BITS(name, y.data(), first.data(), m * shape.rows);
      }
    }
  }
}

}  // namespace

TEST(cuda_linear_equals_ref_for_ragged_shapes_of_unquantised_weights) {
  for (const WeightType type : {WeightType::kF16, WeightType::kF32}) {
    int64_t m = 1;
    for (const int64_t cols : {1, 15, 16, 63, 64, 65, 130, 300}) {
      CheckShape({type, cols % 2 == 0 ? 37 : 5, cols, 0, 0}, {m}, cols % 3 == 0);
      m = m % 17 + 3;
    }
    for (const int64_t rows : {1, 15, 16, 17, 64, 65, 130, 270}) CheckShape({type, rows, 70, 0, 0}, {rows % 17 + 1}, rows % 2 == 0);
  }
}

TEST(cuda_linear_equals_ref_for_ragged_shapes_of_quantised_weights) {
  for (const WeightType type : {WeightType::kI8, WeightType::kI4}) {
    int64_t m = 1;
    for (const int64_t cols : {2, 14, 64, 66, 130, 300, 578}) {
      CheckShape({type, cols % 4 == 0 ? 37 : 5, cols, 1 << 20, 0}, {m}, cols % 3 == 0);
      m = m % 17 + 3;
    }
    for (const int64_t rows : {1, 15, 16, 17, 64, 65, 130, 270}) CheckShape({type, rows, 70, 128, 0}, {rows % 17 + 1}, rows % 2 == 0);
  }
}

TEST(cuda_linear_equals_ref_for_every_kind_of_groups) {
  for (const WeightType type : {WeightType::kI8, WeightType::kI4}) {
    int64_t m = 2;
    for (const int64_t group_size : {32, 64, 96, 128, 192, 512}) {
      for (const int64_t offset : {int64_t{0}, group_size / 4 * 2, group_size == 192 ? int64_t{64} : int64_t{6}}) {
        CheckShape({type, 20, group_size == 512 ? 1024 : 448, group_size, offset}, {m}, true);
        m = m % 16 + 5;
      }
    }
  }
}

TEST(cuda_linear_equals_ref_for_every_number_of_rows) {
  CheckShape({WeightType::kI4, 70, 256, 128, 0}, {1, 2, 7, 8, 9, 16, 17, 40, 70, 130}, true);
  CheckShape({WeightType::kI8, 70, 256, 128, 64}, {1, 8, 9, 16, 17, 70}, true);
  CheckShape({WeightType::kF16, 70, 200, 0, 0}, {1, 8, 9, 16, 17, 130}, true);
}

// 8 parts, some an unlike number of chunks long, more than a ring and than the stages hold.
TEST(cuda_linear_equals_ref_for_long_rows) {
  CheckShape({WeightType::kI4, 18, 131 * 64, 1 << 20, 0}, {3}, true);
  CheckShape({WeightType::kI8, 18, 12288, 1536, 0}, {3}, true);
  CheckShape({WeightType::kI4, 18, 8320, 128, 0}, {9}, true);
  CheckShape({WeightType::kF16, 18, 128 * 64 - 3, 0, 0}, {9}, true);
}

// 8 parts of 2 chunks; more units of the streaming kernel than an emulated device has processors, the last one not whole.
TEST(cuda_linear_equals_ref_for_more_units_than_blocks) {
  CheckShape({WeightType::kI4, 450, 1024, 128, 0}, {1, 9, 40}, true);
  CheckShape({WeightType::kI8, 450, 1024, 128, 0}, {20}, false);
}

TEST(cuda_linear_has_the_same_bits_in_every_order_of_threads) {
  for (const Shape& shape : {Shape{WeightType::kI4, 150, 704, 1 << 20, 0}, Shape{WeightType::kI8, 150, 704, 128, 0}, Shape{WeightType::kF16, 150, 704, 0, 0}}) {
    const TestWeight w(shape, 7);
    const TestRows x(70, shape.cols, 8);
    for (const int64_t m : {1, 11, 70}) {
      std::vector<float> first;
      ForEachThreadOrder([&] {
        for (const NamedProduct& product : Products(w, m)) {
          const std::string name = Name(shape) + " m " + std::to_string(m) + " " + product.name;
          const std::vector<float> y = Run(name, product.run, w, x.Row(0), m, x.stride, nullptr);
          if (first.empty()) first = y;
          CHECK_SAME_BITS(name, y.data(), first.data(), m * shape.rows);
        }
      });
    }
  }
}

TEST(cuda_linear_rows_have_the_same_bits_alone_and_among_many) {
  for (const Shape& shape : {Shape{WeightType::kI4, 43, 640, 1 << 20, 0}, Shape{WeightType::kI4, 43, 640, 128, 64}, Shape{WeightType::kI8, 43, 640, 1 << 20, 0},
                             Shape{WeightType::kF16, 43, 640, 0, 0}}) {
    const TestWeight w(shape, 5);
    const int64_t rows = shape.rows, max_m = 130;
    const TestRows x(max_m, shape.cols, 21);
    const DeviceArray<float> bias(RandomFloats(rows, 22));
    DeviceArray<uint8_t> scratch(cuda::LinearScratchBytes(w.packed, max_m));
    const auto linear = [&](const cuda::LinearCall& call) {
      cuda::Linear(call.weight, call.x, call.m, call.x_stride, call.output.bias, static_cast<float*>(call.output.y), call.output.stride, call.stream,
                   scratch.get());
    };
    std::vector<float> single;
    for (int64_t i = 0; i < max_m; ++i) {
      const std::vector<float> y = Run(Name(shape), linear, w, x.Row(i), 1, x.stride, bias.get());
      single.insert(single.end(), y.begin(), y.end());
    }
    for (const int64_t m : {2, 3, 5, 8, 9, 16, 17, 33, 64, 130}) {
      const std::vector<float> y = Run(Name(shape), linear, w, x.Row(0), m, x.stride, bias.get());
      CHECK_SAME_BITS(Name(shape) + " m " + std::to_string(m), y.data(), single.data(), m * rows);
    }
  }
}

TEST(cuda_linear_rounds_to_half_and_leaves_the_padding) {
  const Shape shape{WeightType::kI4, 50, 192, 64, 0};
  const TestWeight w(shape, 31);
  const DeviceArray<float> bias(RandomFloats(shape.rows, 32));
  for (const int64_t m : {1, 12, 20}) {
    const TestRows x(m, shape.cols, 33);
    DeviceArray<float> y(m * shape.rows);
    DeviceArray<__half> y_half(m * 64);
    cuda::Linear(w.packed, x.Row(0), m, x.stride, bias.get(), y.get(), shape.rows, nullptr);
    cuda::Linear(w.packed, x.Row(0), m, x.stride, bias.get(), y_half.get(), 64, nullptr);
    const std::vector<float> expected = y.Download();
    const std::vector<__half> halves = y_half.Download();
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t o = 0; o < 64; ++o) {
        const uint16_t bits = __half_as_ushort(halves[static_cast<size_t>(i * 64 + o)]);
        CHECK_EQ(bits, o < shape.rows ? FloatToHalf(expected[static_cast<size_t>(i * shape.rows + o)]) : uint16_t{0xffff});
      }
    }
  }
}

TEST(cuda_linear_does_not_hide_or_spread_nan) {
  const Shape shape{WeightType::kI4, 20, 192, 64, 0};
  const TestWeight w(shape, 41);
  for (const int64_t m : {3, 20}) {
    const TestRows x(m, shape.cols, 42);
    const std::vector<__half> nan = ToHalf({std::numeric_limits<float>::quiet_NaN()});
    cuda::Check(cudaMemcpy(x.device->get() + x.stride + 100, nan.data(), sizeof(__half), cudaMemcpyHostToDevice), "a NaN");
    for (const NamedProduct& product : Products(w, m)) {
      const std::vector<float> y = Run(product.name, product.run, w, x.Row(0), m, x.stride, nullptr);
      for (int64_t i = 0; i < m * shape.rows; ++i) CHECK_EQ(std::isnan(y[static_cast<size_t>(i)]), i / shape.rows == 1);
    }
  }
}

TEST(cuda_embed_reads_rows_of_packed_tables) {
  for (const Shape& shape : {Shape{WeightType::kF16, 70, 100, 0, 0}, Shape{WeightType::kF32, 70, 128, 0, 0}, Shape{WeightType::kI8, 70, 200, 1 << 20, 0},
                             Shape{WeightType::kI8, 70, 576, 128, 64}, Shape{WeightType::kI4, 70, 576, 128, 0}, Shape{WeightType::kI4, 70, 1024, 256, 0},
                             Shape{WeightType::kI4, 70, 66, 22, 4}}) {
    const TestWeight w(shape, 51);
    const uint32_t first_token = 1000;
    std::vector<uint32_t> tokens = {1000, 1069, 1007, 999, 1008, 1070, 0, 0xffffffffu, 1031, 1007};
    for (uint32_t token = 1010; token < 1030; ++token) tokens.push_back(token);
    const auto m = static_cast<int64_t>(tokens.size()), stride = RoundUp(shape.cols, 64);
    const DeviceArray<uint32_t> device_tokens(tokens);
    DeviceArray<__half> y(m * stride);
    cuda::Embed(w.packed, first_token, device_tokens.get(), m, y.get(), stride, nullptr);
    const std::vector<__half> result = y.Download();
    for (int64_t i = 0; i < m; ++i) {
      const int64_t row = int64_t{tokens[static_cast<size_t>(i)]} - first_token;
      for (int64_t c = 0; c < stride; ++c) {
        const uint16_t bits = __half_as_ushort(result[static_cast<size_t>(i * stride + c)]);
        uint16_t expected = c < shape.cols ? 0 : 0xffff;
        if (c < shape.cols && row >= 0 && row < shape.rows) expected = FloatToHalf(w.values[static_cast<size_t>(row * shape.cols + c)]);
        CHECK_EQ(bits, expected);
      }
    }
  }
}

TEST(cuda_random_weights_are_finite_and_keep_magnitudes) {
  for (const Shape& shape : {Shape{WeightType::kF16, 64, 512, 0, 0}, Shape{WeightType::kI8, 64, 512, 1 << 20, 0}, Shape{WeightType::kI4, 64, 512, 128, 0}}) {
    std::vector<std::vector<float>> drawn;
    for (const uint64_t seed : {1, 1, 2}) {
      DeviceWeight weight = cuda::DescribeDeviceWeight(Describe(shape));
      DeviceArray<uint8_t> memory(cuda::DeviceWeightBytes(weight));
      weight.data = memory.get();
      cuda::RandomWeight(weight, seed, nullptr);
      std::vector<uint32_t> tokens;
      for (uint32_t row = 0; row < shape.rows; ++row) tokens.push_back(row);
      const DeviceArray<uint32_t> device_tokens(tokens);
      DeviceArray<__half> y(shape.rows * shape.cols);
      cuda::Embed(weight, 0, device_tokens.get(), shape.rows, y.get(), shape.cols, nullptr);
      drawn.push_back(ToFloat(y.Download()));
      double sum = 0.0, squares = 0.0;
      for (const float value : drawn.back()) {
        sum += value;
        squares += static_cast<double>(value) * value;
      }
      const double count = static_cast<double>(shape.rows * shape.cols), expected = 1.0 / static_cast<double>(shape.cols);
      CHECK_NEAR(Name(shape) + " mean square", squares / count, expected, 0.2 * expected);
      CHECK_NEAR(Name(shape) + " mean", sum / count, 0.0, 0.2 * std::sqrt(expected));
    }
    CHECK(drawn[0] == drawn[1]);
    CHECK(drawn[0] != drawn[2]);
  }
}

TEST(cuda_linear_packs_glm_130b_as_it_is_quantised) {
  struct Case {
    int64_t rows, cols, group_size, group_offset;
    WeightScaling scaling;
    int64_t parts;
  };
  const Case cases[] = {
      {36864, 12288, 12288, 0, WeightScaling::kPerPart, 8},  // split by rows: one group
      {12288, 12288, 1536, 0, WeightScaling::kPerPart, 8},   // split by columns over 8 ranks
      {12288, 32768, 4096, 0, WeightScaling::kPerPart, 8},
      {12288, 3072, 1536, 0, WeightScaling::kPerPart, 4},  // a quarter of the columns
      {12288, 8192, 4096, 0, WeightScaling::kPerPart, 8},
      {12288, 6144, 768, 0, WeightScaling::kPerPart, 8},  // 8 parts where 4 do not fit the groups
      {12288, 12288, 128, 0, WeightScaling::kPerChunk, 8},
      {12288, 768, 256, 128, WeightScaling::kPerChunk, 4},
      {12288, 768, 384, 192, WeightScaling::kPerPart, 4},
      {48, 96, 32, 0, WeightScaling::kNone, 2},
  };
  for (const WeightType type : {WeightType::kI8, WeightType::kI4}) {
    for (const Case& c : cases) {
      const DeviceWeight weight = cuda::DescribeDeviceWeight(Describe({type, c.rows, c.cols, c.group_size, c.group_offset}));
      CHECK(weight.scaling == c.scaling);
      CHECK_EQ(weight.parts, c.parts);
      CHECK(weight.type == (c.scaling == WeightScaling::kNone ? WeightType::kF16 : type));
    }
    const DeviceWeight weight = cuda::DescribeDeviceWeight(Describe({type, 12288, 12288, 1536, 0}));
    const int64_t bits = type == WeightType::kI8 ? 8 : 4;
    CHECK_EQ(cuda::DeviceWeightBytes(weight), 12288 * 12288 / 8 * bits + 12288 * 8 * 2);
    CHECK_EQ(cuda::DeviceWeightReadBytes(weight), cuda::DeviceWeightBytes(weight));
  }
}

TEST(cuda_linear_refuses_what_does_not_fit) {
  CHECK_THROWS(cuda::DescribeDeviceWeight(Describe({WeightType::kF16, 0, 64, 0, 0})), ErrorCode::kInvalidArgument);
  CHECK_THROWS(cuda::DescribeDeviceWeight(Describe({WeightType::kF16, 64, 0, 0, 0})), ErrorCode::kInvalidArgument);
  LinearWeight too_few_groups = Describe({WeightType::kI4, 16, 128, 64, 0});
  too_few_groups.groups = 1;
  CHECK_THROWS(cuda::DescribeDeviceWeight(too_few_groups), ErrorCode::kInvalidArgument);
  CHECK_THROWS(cuda::DescribeDeviceWeight(Describe({WeightType::kI4, 16, 33, 64, 0})), ErrorCode::kInvalidArgument);
  const TestWeight w({WeightType::kF16, 40, 64, 0, 0}, 61);
  for (const auto& range : {std::pair<int64_t, int64_t>{8, 32}, {0, 24}, {32, 16}, {0, 0}, {-16, 16}}) {
    CHECK_THROWS(cuda::PackRows(w.packed, range.first, range.second, w.bytes.data(), w.host.row_stride, nullptr, nullptr), ErrorCode::kInvalidArgument);
  }
}

}  // namespace tandem::test
