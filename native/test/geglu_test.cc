#include "kernels/geglu.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "test/kernel_test.h"

namespace tandem::test {

// |u1 * gelu(u2)|'s allowed error: a few ulps of the normal distribution function near 1, times what it multiplies.
static double Bound(float linear, float gate) { return std::abs(static_cast<double>(linear) * gate) * 3e-7 + 1e-37; }

TEST(geglu_vector_equals_ref_for_every_width) {
  ForEachIsa([](Isa isa) {
    ThreadPool pool(2);
    for (const int64_t f : RaggedSizes()) {
      const int64_t m = 3;
      const std::vector<float> memory = RandomFloats(m * 2 * f + 1, 1 + static_cast<uint32_t>(f), 2.0f);
      const float* u = memory.data() + 1;  // not aligned
      std::vector<float> y(static_cast<size_t>(m * f)), expected(y);
      Geglu(isa, u, m, f, y.data(), pool);
      GegluRef(u, m, f, expected.data());
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < f; ++j) {
          const size_t p = static_cast<size_t>(i * f + j);
          CHECK_NEAR(std::string(IsaName(isa)) + " f " + std::to_string(f), y[p], expected[p], Bound(u[i * 2 * f + j], u[i * 2 * f + f + j]));
        }
      }
      if (f == 0) continue;
      std::vector<float> in_place(u, u + 2 * f);
      Geglu(isa, in_place.data(), 1, f, in_place.data(), pool);
      CHECK_SAME_BITS("in place", in_place.data(), y.data(), f);
    }
  });
}

TEST(geglu_is_exact_over_the_whole_range) {
  ForEachIsa([](Isa isa) {
    ThreadPool pool(1);
    std::vector<float> gates;
    for (float x = -40.0f; x < 40.0f; x += 0.00171f) gates.push_back(x);
    const float below = std::nextafterf(1.5f, 0.0f);  // the two formulas meet at 1.5
    for (const float x : {0.0f, -0.0f, 1e-40f, 1e-20f, -1e-7f, below, 1.5f, -below, -1.5f, 1e10f, -1e10f, 3e38f, -3e38f}) gates.push_back(x);
    const int64_t f = static_cast<int64_t>(gates.size());
    std::vector<float> u(gates.size(), 1.0f), y(gates.size()), expected(gates.size());
    u.insert(u.end(), gates.begin(), gates.end());
    Geglu(isa, u.data(), 1, f, y.data(), pool);
    GegluRef(u.data(), 1, f, expected.data());
    for (size_t j = 0; j < gates.size(); ++j) {
      CHECK_NEAR(std::string(IsaName(isa)) + " gelu(" + std::to_string(gates[j]) + ")", y[j], expected[j], Bound(1.0f, gates[j]));
    }
  });
}

TEST(geglu_quantized_has_the_bits_of_geglu_and_then_quantize_rows) {
  ForEachIsa([](Isa isa) {
    ThreadPool pool(2);
    for (const int64_t f : RaggedSizes()) {
      for (const int64_t m : {int64_t{1}, 1 + f % 30}) {
        const ColumnSegments segments(f, 50 + f / 2, f / 5);
        const std::vector<float> u = RandomFloats(m * 2 * f, 1 + static_cast<uint32_t>(f), 2.0f);
        std::vector<float> y(static_cast<size_t>(m * f));
        const size_t bytes = static_cast<size_t>(QuantizedBytes(segments, m));
        std::vector<uint8_t> memory(bytes + 64, 0xa5), expected_memory(memory);
        const auto aligned = [](std::vector<uint8_t>& of) { return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(of.data()) + 63) / 64 * 64); };
        Geglu(isa, u.data(), m, f, y.data(), pool);
        QuantizeRows(isa, segments, y.data(), m, f, aligned(expected_memory), pool);
        GegluQuantized(isa, segments, u.data(), m, aligned(memory), pool);
        CHECK(std::memcmp(aligned(memory), aligned(expected_memory), bytes) == 0);
      }
    }
  });
}

TEST(geglu_rows_have_the_same_bits_in_every_batch) {
  ForEachIsa([](Isa isa) {
    for (const int64_t f : {5, 48, 1500}) {
      const int64_t max_m = 40;
      const std::vector<float> u = RandomFloats(max_m * 2 * f, 3);
      std::vector<float> single(static_cast<size_t>(max_m * f)), batch(single);
      ThreadPool one(1), two(2), three(3);
      for (int64_t i = 0; i < max_m; ++i) Geglu(isa, u.data() + i * 2 * f, 1, f, single.data() + i * f, one);
      for (int64_t m = 1; m <= max_m; ++m) {
        for (ThreadPool* pool : {&one, &two, &three}) {
          Geglu(isa, u.data(), m, f, batch.data(), *pool);
          CHECK_SAME_BITS("m " + std::to_string(m), batch.data(), single.data(), m * f);
        }
      }
    }
  });
}

TEST(geglu_does_not_hide_nan) {
  ForEachIsa([](Isa isa) {
    ThreadPool pool(1);
    const float nan = std::numeric_limits<float>::quiet_NaN();
    for (const int64_t f : {3, 20}) {
      std::vector<float> u(static_cast<size_t>(2 * f), 1.0f), y(static_cast<size_t>(f));
      u[1] = nan;
      u[static_cast<size_t>(2 * f - 1)] = nan;
      Geglu(isa, u.data(), 1, f, y.data(), pool);
      for (int64_t j = 0; j < f; ++j) CHECK_EQ(std::isnan(y[static_cast<size_t>(j)]), j == 1 || j == f - 1);
    }
  });
}

}  // namespace tandem::test
