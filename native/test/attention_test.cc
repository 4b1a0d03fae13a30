#include "kernels/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "core/error.h"
#include "core/half.h"
#include "test/kernel_test.h"

namespace tandem::test {

namespace {

// A KV cache full of random numbers; what no row sees is infinite, so that reading too much shows.
struct RandomCache {
  RandomCache(KvType type, int64_t num_blocks, int64_t num_heads, int64_t block_size, int64_t head_dim, uint32_t seed) {
    const int64_t size = num_blocks * num_heads * block_size * head_dim;
    k = RandomFloats(size, seed);
    v = RandomFloats(size, seed + 1);
    kv = {k.data(), v.data(), type, num_blocks, num_heads, block_size, head_dim};
    if (type == KvType::kF32) return;
    for (std::vector<float>* values : {&k, &v}) {
      std::vector<uint16_t> halves;
      for (const float value : *values) halves.push_back(FloatToHalf(value));
      std::memcpy(values->data(), halves.data(), halves.size() * sizeof(uint16_t));
    }
  }

  void SetInfinite(uint32_t block, int64_t offset) {
    for (int64_t head = 0; head < kv.num_heads; ++head) {
      for (int64_t j = 0; j < kv.head_dim; ++j) {
        const int64_t place = ((block * kv.num_heads + head) * kv.block_size + offset) * kv.head_dim + j;
        for (std::vector<float>* values : {&k, &v}) {
          if (kv.type == KvType::kF32) {
            (*values)[static_cast<size_t>(place)] = std::numeric_limits<float>::infinity();
          } else {
            const uint16_t infinity = 0x7c00;
            std::memcpy(reinterpret_cast<char*>(values->data()) + place * 2, &infinity, 2);
          }
        }
      }
    }
  }

  std::vector<float> k, v;
  KvLayer kv;
};

std::vector<uint32_t> RandomBlockTable(int64_t num_blocks, uint32_t seed) {
  std::vector<uint32_t> table(static_cast<size_t>(num_blocks));
  std::iota(table.begin(), table.end(), 0u);
  std::shuffle(table.begin(), table.end(), std::mt19937(seed));
  return table;
}

// Weights sum to 1 and |v| is at most 5.5 or so: the scores' error (head_dim terms) acts as a relative error of the weights, the sums add
// their depth.
double Bound(int64_t head_dim, int64_t visible) {
  const double score_error = 8.0 * (static_cast<double>(head_dim) / 4 + 8) * 0x1p-24;
  return 5.5 * (score_error + (8.0 + static_cast<double>(visible)) * 0x1p-24);
}

void CheckAgainstRef(Isa isa, const RandomCache& cache, const std::vector<AttentionRow>& rows, const std::string& name) {
  const int64_t m = static_cast<int64_t>(rows.size()), width = cache.kv.num_heads * cache.kv.head_dim;
  const std::vector<float> q_memory = RandomFloats(m * width + 1, 77);
  const float* q = q_memory.data() + 1;  // not aligned
  std::vector<float> out(static_cast<size_t>(m * width)), expected(out);
  ThreadPool pool(2);
  Attention(isa, q, rows.data(), m, cache.kv, out.data(), pool);
  AttentionRef(q, rows.data(), m, cache.kv, expected.data());
  for (int64_t i = 0; i < m * width; ++i) {
    const int64_t visible = rows[static_cast<size_t>(i / width)].visible;
    CHECK_NEAR(std::string(IsaName(isa)) + " " + name + " visible " + std::to_string(visible), out[static_cast<size_t>(i)],
               expected[static_cast<size_t>(i)], Bound(cache.kv.head_dim, visible));
  }
  std::vector<float> in_place(q, q + m * width);
  Attention(isa, in_place.data(), rows.data(), m, cache.kv, in_place.data(), pool);
  CHECK_SAME_BITS(name + " in place", in_place.data(), out.data(), m * width);
}

}  // namespace

TEST(attention_vector_equals_ref_for_every_length) {
  ForEachIsa([](Isa isa) {
    for (const KvType type : {KvType::kF16, KvType::kF32}) {
      for (const int64_t block_size : {1, 5, 16, 48}) {
        const int64_t num_blocks = 100 / block_size + 3;
        RandomCache cache(type, num_blocks, 2, block_size, 20, 5);
        const std::vector<uint32_t> table = RandomBlockTable(num_blocks, 6);
        for (int64_t t = 90; t < num_blocks * block_size; ++t) cache.SetInfinite(table[static_cast<size_t>(t / block_size)], t % block_size);
        std::vector<AttentionRow> rows;
        for (int64_t visible = 1; visible <= 90; ++visible) rows.push_back({table.data(), visible});
        CheckAgainstRef(isa, cache, rows, "block size " + std::to_string(block_size));
      }
    }
  });
}

TEST(attention_vector_equals_ref_for_every_head_size) {
  ForEachIsa([](Isa isa) {
    for (const KvType type : {KvType::kF16, KvType::kF32}) {
      for (const int64_t head_dim : {1, 2, 3, 4, 7, 8, 15, 16, 17, 24, 31, 32, 33, 63, 64, 65, 96, 128, 130, 512}) {
        RandomCache cache(type, 6, 3, 16, head_dim, static_cast<uint32_t>(head_dim));
        const std::vector<uint32_t> table = RandomBlockTable(6, 1);
        for (const int64_t offset : {14, 15}) cache.SetInfinite(table[5], offset);
        CheckAgainstRef(isa, cache, {{table.data(), 17}, {table.data(), 94}, {table.data(), 17}, {table.data(), 18}, {table.data(), 1}},
                        "head size " + std::to_string(head_dim));
      }
    }
  });
}

// Causal rows, of which the first must not feel that the later ones' tokens are infinite; sequences with their own tables in between.
TEST(attention_rows_have_the_same_bits_in_every_batch) {
  ForEachIsa([](Isa isa) {
    for (const KvType type : {KvType::kF16, KvType::kF32}) {
      for (const int64_t head_dim : {24, 128}) {
        const int64_t num_blocks = 12, num_heads = 2, width = num_heads * head_dim, max_m = 40;
        RandomCache cache(type, num_blocks, num_heads, 16, head_dim, 3);
        const std::vector<uint32_t> first = RandomBlockTable(num_blocks, 1), second = RandomBlockTable(num_blocks, 2);
        std::vector<AttentionRow> rows;
        for (int64_t i = 0; i < max_m; ++i) {
          const bool of_second = i % 11 >= 7;
          rows.push_back({of_second ? second.data() : first.data(), i < 20 ? 30 + i : 1 + (i * 37) % 190});
        }
        const std::vector<float> q = RandomFloats(max_m * width, 4);
        std::vector<float> single(q.size()), batch(q.size());
        ThreadPool one(1), two(2), three(3);
        for (int64_t i = 0; i < max_m; ++i) {
          Attention(isa, q.data() + i * width, &rows[static_cast<size_t>(i)], 1, cache.kv, single.data() + i * width, one);
        }
        for (int64_t m = 1; m <= max_m; ++m) {
          for (ThreadPool* pool : {&one, &two, &three}) {
            Attention(isa, q.data(), rows.data(), m, cache.kv, batch.data(), *pool);
            CHECK_SAME_BITS(std::string(IsaName(isa)) + " m " + std::to_string(m), batch.data(), single.data(), m * width);
          }
        }
      }
    }
  });
}

// Around the borders of chunks and of the parts that threads share out, up to where parts grow; as rows of one sequence, of two in turn, and alone.
TEST(attention_of_long_rows_equals_ref_and_has_the_same_bits_however_it_is_split) {
  ForEachIsa([](Isa isa) {
    for (const KvType type : {KvType::kF16, KvType::kF32}) {
      for (const int64_t block_size : {16, 13}) {
        const int64_t num_heads = 3, head_dim = 20, width = num_heads * head_dim, most = 4100, num_blocks = most / block_size + 2;
        RandomCache cache(type, num_blocks, num_heads, block_size, head_dim, 9);
        const std::vector<uint32_t> first = RandomBlockTable(num_blocks, 1), second = RandomBlockTable(num_blocks, 2);
        std::vector<AttentionRow> of_one, in_turn;
        for (const int64_t visible : {1, 255, 256, 257, 258, 300, 511, 513, 1000, 1537, 2047, 2048, 2049, 2050, 2304, 2600, 4095, 4096, 4097, 4100}) {
          of_one.push_back({first.data(), visible});
          in_turn.push_back({in_turn.size() % 2 == 0 ? first.data() : second.data(), visible});
        }
        ThreadPool one(1), two(2), eight(8);
        for (const std::vector<AttentionRow>& rows : {of_one, in_turn}) {
          const std::string name = std::string(IsaName(isa)) + " block size " + std::to_string(block_size);
          CheckAgainstRef(isa, cache, rows, name);
          const int64_t m = static_cast<int64_t>(rows.size());
          const std::vector<float> q = RandomFloats(m * width, 4);
          std::vector<float> expected(q.size()), out(q.size());
          Attention(isa, q.data(), rows.data(), m, cache.kv, expected.data(), one);
          for (ThreadPool* pool : {&one, &two, &eight}) {
            Attention(isa, q.data(), rows.data(), m, cache.kv, out.data(), *pool);
            CHECK_SAME_BITS(name + " together", out.data(), expected.data(), m * width);
            for (int64_t i = 0; i < m; ++i) Attention(isa, q.data() + i * width, &rows[static_cast<size_t>(i)], 1, cache.kv, out.data() + i * width, *pool);
            CHECK_SAME_BITS(name + " alone", out.data(), expected.data(), m * width);
          }
        }
      }
    }
  });
}

TEST(attention_does_not_depend_on_tokens_that_a_row_does_not_see) {
  ForEachIsa([](Isa isa) {
    for (const KvType type : {KvType::kF16, KvType::kF32}) {
      RandomCache cache(type, 3, 1, 16, 32, 3);
      const std::vector<uint32_t> table = {2, 0, 1};
      std::vector<AttentionRow> rows;
      for (int64_t i = 0; i < 8; ++i) rows.push_back({table.data(), 20 + i});
      const std::vector<float> q = RandomFloats(8 * 32, 4);
      std::vector<float> before(q.size()), after(q.size());
      ThreadPool pool(1);
      Attention(isa, q.data(), rows.data(), 8, cache.kv, before.data(), pool);
      cache.SetInfinite(table[1], 8);  // token 24: rows 0 to 4 do not see it
      Attention(isa, q.data(), rows.data(), 8, cache.kv, after.data(), pool);
      CHECK_SAME_BITS(IsaName(isa), after.data(), before.data(), 5 * 32);
      for (int64_t i = 5 * 32; i < 8 * 32; ++i) CHECK(!std::isfinite(after[static_cast<size_t>(i)]));
    }
  });
}

TEST(attention_survives_scores_of_any_size) {
  ForEachIsa([](Isa isa) {
    RandomCache cache(KvType::kF32, 4, 1, 16, 16, 8);
    for (float& key : cache.k) key *= 300.0f;  // one token takes it all, and the maximum rises by more than exp can show
    const std::vector<uint32_t> table = {0, 1, 2, 3};
    std::vector<AttentionRow> rows;
    for (int64_t i = 0; i < 20; ++i) rows.push_back({table.data(), 1 + i * 3});
    const std::vector<float> q = RandomFloats(20 * 16, 4, 10.0f);
    std::vector<float> out(q.size()), expected(q.size());
    ThreadPool pool(1);
    Attention(isa, q.data(), rows.data(), 20, cache.kv, out.data(), pool);
    AttentionRef(q.data(), rows.data(), 20, cache.kv, expected.data());
    for (size_t i = 0; i < out.size(); ++i) CHECK_NEAR(IsaName(isa), out[i], expected[i], 0.05);  // scores of 10^4 carry errors of 10^-3 and more
  });
}

TEST(attention_refuses_what_it_cannot_do) {
  RandomCache cache(KvType::kF32, 4, 1, 16, 16, 8);
  const std::vector<uint32_t> table = {0, 4};
  std::vector<float> q(32), out(32);
  ThreadPool pool(1);
  const auto run = [&](std::vector<AttentionRow> rows) {
    Attention(Isa::kGeneric, q.data(), rows.data(), static_cast<int64_t>(rows.size()), cache.kv, out.data(), pool);
  };
  run({{table.data(), 16}});
  CHECK_THROWS(run({{table.data(), 17}}), ErrorCode::kInvalidArgument);
  CHECK_THROWS(run({{table.data(), 16}, {table.data(), 17}}), ErrorCode::kInvalidArgument);
  CHECK_THROWS(run({{table.data(), 0}}), ErrorCode::kInvalidArgument);
  cache.kv.head_dim = 100000;
  CHECK_THROWS(run({{table.data(), 1}}), ErrorCode::kInvalidArgument);
}

}  // namespace tandem::test
