#include "kernels/quantize_weights.h"

#include <algorithm>

#include "core/half.h"
#include "test/kernel_test.h"

namespace tandem::test {

namespace {

// Halves of all magnitudes: random bits without the infinities and NaNs, times 2^-shift for every other row so that scales get subnormal.
std::vector<uint16_t> RandomHalves(int64_t rows, int64_t cols, uint32_t seed) {
  std::mt19937 generator(seed);
  std::vector<uint16_t> halves;
  for (int64_t i = 0; i < rows * cols; ++i) {
    const uint32_t bits = generator();
    const uint16_t limit = i / std::max<int64_t>(cols, 1) % 2 == 0 ? 0x7c00 : 0x0800;
    halves.push_back(static_cast<uint16_t>(((bits & 0x7fff) % limit) | ((bits >> 16) & 0x8000)));
  }
  return halves;
}

}  // namespace

TEST(quantize_weights_is_its_definition_for_every_instruction_set) {
  ForEachIsa([](Isa isa) {
    for (const int bits : {8, 4}) {
      for (const int64_t group_size : RaggedSizes()) {
        if (group_size == 0 || (bits == 4 && group_size % 2 != 0)) continue;
        for (const int64_t groups : {1, 3}) {
          const int64_t rows = 4, cols = groups * group_size;
          const std::vector<uint16_t> w = RandomHalves(rows, cols, static_cast<uint32_t>(cols));
          const size_t bytes = static_cast<size_t>(rows * cols * bits / 8);
          std::vector<uint8_t> q(bytes + 1, 0xaa), q_ref(bytes + 1, 0xaa);
          std::vector<uint16_t> scales(static_cast<size_t>(rows * groups)), scales_ref(scales);
          CHECK_EQ(QuantizeWeights(isa, w.data(), rows, cols, groups, bits, q.data(), scales.data()), -1);
          CHECK_EQ(QuantizeWeightsRef(w.data(), rows, cols, groups, bits, q_ref.data(), scales_ref.data()), -1);
          CHECK(q == q_ref);
          CHECK(scales == scales_ref);
          CHECK_EQ(static_cast<int>(q[bytes]), 0xaa);
        }
      }
    }
  });
}

// Every weight against every scale that the largest weight of the group can make, in steps.
TEST(quantize_weights_rounds_every_half_as_its_definition) {
  ForEachIsa([](Isa isa) {
    for (const uint16_t largest : {0x0001, 0x0041, 0x03ff, 0x0400, 0x07ff, 0x1801, 0x2345, 0x3c00, 0x5bcd, 0x7bff}) {
      std::vector<uint16_t> w;
      for (uint16_t half = 0; half <= largest; ++half) {
        w.push_back(half);
        w.push_back(half | 0x8000);
      }
      const int64_t cols = static_cast<int64_t>(w.size());
      for (const int bits : {8, 4}) {
        std::vector<uint8_t> q(w.size()), q_ref(w.size());
        uint16_t scale = 0, scale_ref = 0;
        QuantizeWeights(isa, w.data(), 1, cols, 1, bits, q.data(), &scale);
        QuantizeWeightsRef(w.data(), 1, cols, 1, bits, q_ref.data(), &scale_ref);
        CHECK_EQ(scale, scale_ref);
        CHECK(q == q_ref);
      }
    }
  });
}

TEST(quantize_weights_finds_the_row_that_is_not_finite) {
  ForEachIsa([](Isa isa) {
    for (const uint16_t bad : {0x7c00, 0xfc00, 0x7e01, 0xffff}) {
      std::vector<uint16_t> w(5 * 48, 0x3c00);
      w[3 * 48 + 31] = bad;
      std::vector<uint8_t> q(w.size());
      std::vector<uint16_t> scales(10);
      CHECK_EQ(QuantizeWeights(isa, w.data(), 5, 48, 2, 8, q.data(), scales.data()), 3);
      CHECK_EQ(QuantizeWeightsRef(w.data(), 5, 48, 2, 8, q.data(), scales.data()), 3);
    }
  });
}

}  // namespace tandem::test
