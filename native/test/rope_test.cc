#include "kernels/rope.h"

#include <cmath>

#include "core/error.h"
#include "core/half.h"
#include "test/kernel_test.h"

namespace tandem::test {

static float RoundToHalf(float value) { return HalfToFloat(FloatToHalf(value)); }

TEST(rotary_table_in_fp32_is_the_formula) {
  for (const int64_t head_dim : {2, 6, 8, 64, 128}) {
    const RotaryTable table = MakeRotaryTable(2048, head_dim, 10000.0, RotaryPrecision::kF32);
    CHECK_EQ(table.half_dim, head_dim / 2);
    CHECK_EQ(static_cast<int64_t>(table.cos.size()), 2048 * table.half_dim);
    for (const int64_t p : {0, 1, 2, 63, 1000, 2047}) {
      for (int64_t j = 0; j < head_dim / 2; ++j) {
        const double angle = static_cast<double>(p) * std::pow(10000.0, -2.0 * static_cast<double>(j) / static_cast<double>(head_dim));
        // Roundings of the power, the quotient and the product; of the exponent, which the power multiplies by at most ln 10000 < 9.3; of the cosine.
        const double bound = angle * (3 + 9.3) * 0x1p-24 + 0x1p-24;
        const size_t place = static_cast<size_t>(p * table.half_dim + j);
        CHECK_NEAR("cos", table.cos[place], std::cos(angle), bound);
        CHECK_NEAR("sin", table.sin[place], std::sin(angle), bound);
      }
    }
  }
}

TEST(rotary_table_rounds_to_fp16_where_the_variants_do) {
  const int64_t head_dim = 64;
  const RotaryTable half = MakeRotaryTable(2048, head_dim, 10000.0, RotaryPrecision::kHalf);
  const RotaryTable half_freq = MakeRotaryTable(2048, head_dim, 10000.0, RotaryPrecision::kHalfFreq);
  for (int64_t j = 0; j < head_dim / 2; ++j) {
    // 10000^(-2j/64) = 10^(-j/8)
    const float frequency = RoundToHalf(static_cast<float>(std::pow(10.0, -static_cast<double>(j) / 8)));
    for (const int64_t p : {0, 1, 7, 100, 2047}) {
      const size_t place = static_cast<size_t>(p * head_dim / 2 + j);
      const float product = static_cast<float>(p) * frequency;
      CHECK_EQ(half_freq.cos[place], static_cast<float>(std::cos(static_cast<double>(product))));
      CHECK_EQ(half_freq.sin[place], static_cast<float>(std::sin(static_cast<double>(product))));
      CHECK_EQ(half.cos[place], RoundToHalf(static_cast<float>(std::cos(static_cast<double>(RoundToHalf(product))))));
      CHECK_EQ(half.sin[place], RoundToHalf(static_cast<float>(std::sin(static_cast<double>(RoundToHalf(product))))));
    }
  }
}

TEST(rotary_rotates_and_writes_keys_and_values) {
  ForEachIsa([](Isa isa) {
    for (const KvType type : {KvType::kF16, KvType::kF32}) {
      for (const int64_t head_dim : {2, 4, 6, 10, 16, 32, 34, 62, 64, 66, 128, 130}) {
        const int64_t m = 5, num_heads = 3, num_blocks = 4, block_size = 3, half = head_dim / 2;
        const RotaryTable table = MakeRotaryTable(50, head_dim, 10000.0, RotaryPrecision::kF32);
        const int64_t size = num_blocks * num_heads * block_size * head_dim;
        std::vector<float> k(static_cast<size_t>(size), -7.0f), v(k);  // also the memory of the fp16 cache
        const KvLayer kv{k.data(), v.data(), type, num_blocks, num_heads, block_size, head_dim};
        const auto read = [&](const std::vector<float>& memory, int64_t i) {
          return type == KvType::kF32 ? memory[static_cast<size_t>(i)] : HalfToFloat(reinterpret_cast<const uint16_t*>(memory.data())[i]);
        };
        const KvSlot slots[] = {{0, 3, 0}, {49, 0, 2}, {7, 2, 1}, {7, 3, 2}, {1, 1, 1}};
        const std::vector<float> qkv = RandomFloats(m * num_heads * 3 * head_dim + 1, static_cast<uint32_t>(head_dim));
        std::vector<float> q_out(static_cast<size_t>(m * num_heads * head_dim));
        ThreadPool pool(2);
        RotaryAndWriteKv(isa, qkv.data() + 1, m, slots, table, kv, q_out.data(), pool);
        std::vector<bool> written(static_cast<size_t>(size), false);
        for (int64_t i = 0; i < m; ++i) {
          for (int64_t head = 0; head < num_heads; ++head) {
            const float* in = qkv.data() + 1 + (i * num_heads + head) * 3 * head_dim;
            const auto rotated = [&](const float* x, int64_t j) {
              const size_t place = static_cast<size_t>(slots[i].position * half + j % half);
              const double cos = table.cos[place], sin = table.sin[place];
              return j < half ? x[j] * cos - x[j + half] * sin : x[j] * cos + x[j - half] * sin;
            };
            for (int64_t j = 0; j < head_dim; ++j) {
              const double magnitude = std::abs(in[j]) + std::abs(in[(j + half) % head_dim]);
              CHECK_NEAR("q", q_out[static_cast<size_t>((i * num_heads + head) * head_dim + j)], rotated(in, j), magnitude * 0x1p-23);
              const int64_t place = ((slots[i].block * num_heads + head) * block_size + slots[i].offset) * head_dim + j;
              written[static_cast<size_t>(place)] = true;
              const double key = rotated(in + head_dim, j);
              const double key_magnitude = std::abs(in[head_dim + j]) + std::abs(in[head_dim + (j + half) % head_dim]);
              const double half_rounding = type == KvType::kF16 ? std::abs(key) * 0x1p-11 + 0x1p-25 : 0.0;
              CHECK_NEAR("k", read(k, place), key, key_magnitude * 0x1p-23 + half_rounding);
              const float value = in[2 * head_dim + j];
              CHECK_EQ(read(v, place), type == KvType::kF16 ? RoundToHalf(value) : value);
            }
          }
        }
        const std::vector<float> untouched(2, -7.0f);  // as fp16 it reads as two numbers in turn
        for (int64_t place = 0; place < size; ++place) {
          if (written[static_cast<size_t>(place)]) continue;
          CHECK_EQ(read(k, place), read(untouched, place % 2));
          CHECK_EQ(read(v, place), read(untouched, place % 2));
        }
      }
    }
  });
}

TEST(rotary_refuses_places_outside_the_cache) {
  const RotaryTable table = MakeRotaryTable(10, 4, 10000.0, RotaryPrecision::kF32);
  std::vector<float> k(8 * 4), v(k), qkv(12), q_out(4);
  const KvLayer kv{k.data(), v.data(), KvType::kF32, 2, 1, 4, 4};
  ThreadPool pool(1);
  for (const KvSlot slot : {KvSlot{10, 0, 0}, KvSlot{0, 2, 0}, KvSlot{0, 0, 4}}) {
    CHECK_THROWS(RotaryAndWriteKv(Isa::kGeneric, qkv.data(), 1, &slot, table, kv, q_out.data(), pool), ErrorCode::kInvalidArgument);
  }
  CHECK_THROWS(MakeRotaryTable(10, 5, 10000.0, RotaryPrecision::kF32), ErrorCode::kInvalidArgument);
}

}  // namespace tandem::test
