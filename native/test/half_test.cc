// core/half.h against the definition of binary16, and the vector conversions against core/half.h.
#include "core/half.h"

#include <cmath>
#include <limits>

#include "kernels/embedding.h"
#include "kernels/rope.h"
#include "test/kernel_test.h"

namespace tandem::test {

// sign * 1.mantissa * 2^(exponent - 15), in doubles
static double HalfValue(uint16_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const double sign = half & 0x8000 ? -1.0 : 1.0;
  if (exponent == 31) return mantissa == 0 ? sign * std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
  return sign * (exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25));
}

TEST(half_every_value_converts_to_float_and_back) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    const float value = HalfToFloat(half);
    if (std::isnan(HalfValue(half))) {
      CHECK(std::isnan(value));
      CHECK_EQ(FloatToHalf(value), half | 0x200);
    } else {
      CHECK_EQ(static_cast<double>(value), HalfValue(half));
      CHECK_EQ(std::signbit(value), (half & 0x8000) != 0);
      CHECK_EQ(FloatToHalf(value), half);
    }
  }
}

TEST(half_rounds_to_nearest_and_ties_to_even) {
  for (uint32_t bits = 0; bits < 0x7c00; ++bits) {
    const uint16_t lower = static_cast<uint16_t>(bits), upper = static_cast<uint16_t>(bits + 1);
    const double upper_value = upper == 0x7c00 ? 65536.0 : HalfValue(upper);  // infinity begins where the next value would be
    const float middle = static_cast<float>((HalfValue(lower) + upper_value) / 2);  // 12 bits: exact
    CHECK_EQ(FloatToHalf(middle), lower % 2 == 0 ? lower : upper);
    CHECK_EQ(FloatToHalf(std::nextafterf(middle, 0.0f)), lower);
    CHECK_EQ(FloatToHalf(std::nextafterf(middle, 1e9f)), upper);
    CHECK_EQ(FloatToHalf(-middle), (lower % 2 == 0 ? lower : upper) | 0x8000);
  }
  CHECK_EQ(FloatToHalf(1e30f), 0x7c00);
  CHECK_EQ(FloatToHalf(-std::numeric_limits<float>::infinity()), 0xfc00);
  CHECK_EQ(FloatToHalf(1e-30f), 0);
  CHECK_EQ(FloatToHalf(-std::numeric_limits<float>::denorm_min()), 0x8000);
}

TEST(half_vector_loads_convert_every_value) {
  std::vector<uint16_t> halves(65536);
  for (uint32_t bits = 0; bits < 65536; ++bits) halves[bits] = static_cast<uint16_t>(bits);
  LinearWeight table;
  table.type = WeightType::kF16;
  table.data = halves.data();
  table.cols = 65536 - 3;  // ends inside a vector
  table.rows = 1;
  table.row_stride = table.cols * 2;
  std::vector<float> y(static_cast<size_t>(table.cols));
  const uint32_t token = 0;
  ThreadPool pool(1);
  Embed(table, 0, &token, 1, y.data(), pool);
  for (int64_t c = 0; c < table.cols; ++c) {
    const float expected = HalfToFloat(halves[static_cast<size_t>(c)]);
    CHECK_SAME_BITS("half " + std::to_string(c), &y[static_cast<size_t>(c)], &expected, 1);
  }
}

// As fp16 weights, 16 to a row, picked out one by one.
TEST(half_vector_loads_convert_every_finite_value_on_every_isa) {
  ForEachIsa([](Isa isa) {
    std::vector<uint16_t> halves;
    for (uint32_t bits = 0; bits < 65536; ++bits) {
      if ((bits & 0x7c00) != 0x7c00) halves.push_back(static_cast<uint16_t>(bits));
    }
    LinearWeight weight;
    weight.type = WeightType::kF16;
    weight.data = halves.data();
    weight.cols = 16;
    weight.rows = static_cast<int64_t>(halves.size()) / 16;
    weight.row_stride = 32;
    std::vector<float> y(static_cast<size_t>(weight.rows));
    ThreadPool pool(1);
    for (int64_t c = 0; c < 16; ++c) {
      float x[16] = {};
      x[c] = 1.0f;
      Linear(isa, weight, x, 1, 16, nullptr, y.data(), weight.rows, pool);
      for (int64_t o = 0; o < weight.rows; ++o) CHECK_EQ(y[static_cast<size_t>(o)], HalfToFloat(halves[static_cast<size_t>(o * 16 + c)]));
    }
    // A row of zeros and one special value.
    for (const uint16_t special : {0x7c00, 0xfc00, 0x7c01, 0xfe00}) {
      halves.assign(16, 0);
      halves[6] = special;
      weight.rows = 1;
      const std::vector<float> ones(16, 1.0f);
      Linear(isa, weight, ones.data(), 1, 16, nullptr, y.data(), 1, pool);
      if ((special & 0x3ff) == 0) {
        CHECK_EQ(y[0], HalfToFloat(special));
      } else {
        CHECK(std::isnan(y[0]));
      }
    }
  });
}

// The V part of a KV write is nothing but a conversion.
TEST(half_vector_stores_round_like_the_scalar) {
  ForEachIsa([](Isa isa) {
    ThreadPool pool(1);
    for (const int64_t head_dim : {2, 6, 16, 34, 128}) {
      const RotaryTable table = MakeRotaryTable(1, head_dim, 10000.0, RotaryPrecision::kF32);
      std::vector<uint16_t> k(static_cast<size_t>(head_dim)), v(k);
      const KvLayer kv{k.data(), v.data(), KvType::kF16, 1, 1, 1, head_dim};
      std::vector<float> q_out(static_cast<size_t>(head_dim));
      std::mt19937 generator(7);
      for (int round = 0; round < 200; ++round) {
        std::vector<float> qkv(static_cast<size_t>(3 * head_dim));
        for (float& value : qkv) {
          const uint32_t bits = (generator() & 0x8fffffff) + (round % 2 == 0 ? 0x30000000u : 0x38000000u);  // subnormal halves up to overflow
          std::memcpy(&value, &bits, sizeof value);
        }
        const KvSlot slot{0, 0, 0};
        RotaryAndWriteKv(isa, qkv.data(), 1, &slot, table, kv, q_out.data(), pool);
        for (int64_t j = 0; j < head_dim; ++j) CHECK_EQ(v[static_cast<size_t>(j)], FloatToHalf(qkv[static_cast<size_t>(2 * head_dim + j)]));
      }
    }
  });
}

}  // namespace tandem::test
