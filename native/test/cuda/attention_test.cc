#include "kernels/cuda/attention.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <random>

#include "core/error.h"
#include "kernels/attention.h"
#include "test/cuda/device_test.h"

namespace tandem::test {

namespace {

using cuda::CudaAttentionBatch;
using cuda::CudaAttentionRow;
using cuda::CudaAttentionTile;
using cuda::CudaKvLayer;

// A KV cache full of random numbers, on the device and, as the very numbers that the kernels see, on the host. What no one wrote is NaN.
class RandomCache {
 public:
  RandomCache(KvType type, int64_t num_blocks, int64_t num_heads, int64_t block_size, int64_t head_dim, uint32_t seed) {
    const int64_t rows = num_blocks * num_heads * block_size;
    layer_.type = type;
    layer_.num_blocks = num_blocks;
    layer_.num_heads = num_heads;
    layer_.block_size = block_size;
    layer_.head_dim = head_dim;
    layer_.k = Fill(rows, seed, &k_, &k_half_, &k_int8_, &k_scales_);
    layer_.v = Fill(rows, seed + 1, &v_, &v_half_, &v_int8_, &v_scales_);
    if (type == KvType::kI8) {
      layer_.k_scales = k_scales_->get();
      layer_.v_scales = v_scales_->get();
    }
  }

  const CudaKvLayer& layer() const { return layer_; }

  // Tokens that no row sees, from `offset` of a block on: NaN on the device.
  void Forget(uint32_t block, int64_t offset) {
    for (int64_t head = 0; head < layer_.num_heads; ++head) {
      const int64_t row = (block * layer_.num_heads + head) * layer_.block_size + offset, count = layer_.block_size - offset;
      if (layer_.type == KvType::kI8) {
        for (__half* scales : {layer_.k_scales, layer_.v_scales}) cuda::Check(cudaMemset(scales + row, 0xff, static_cast<size_t>(count) * 2), "forget");
      } else {
        for (void* values : {layer_.k, layer_.v}) {
          cuda::Check(cudaMemset(static_cast<__half*>(values) + row * layer_.head_dim, 0xff, static_cast<size_t>(count * layer_.head_dim) * 2), "forget");
        }
      }
    }
  }

  // The outputs by AttentionRef.
  std::vector<float> Reference(const std::vector<float>& q, const std::vector<CudaAttentionRow>& rows, const std::vector<uint32_t>& tables) {
    std::vector<AttentionRow> host_rows;
    for (const CudaAttentionRow& row : rows) host_rows.push_back({tables.data() + row.table_offset, row.visible});
    const KvLayer kv = {k_.data(), v_.data(), KvType::kF32, layer_.num_blocks, layer_.num_heads, layer_.block_size, layer_.head_dim};
    std::vector<float> out(q.size());
    AttentionRef(q.data(), host_rows.data(), static_cast<int64_t>(rows.size()), kv, out.data());
    return out;
  }

 private:
  void* Fill(int64_t rows, uint32_t seed, std::vector<float>* host, std::unique_ptr<DeviceArray<__half>>* halves, std::unique_ptr<DeviceArray<int8_t>>* int8s,
             std::unique_ptr<DeviceArray<__half>>* scales) {
    const int64_t head_dim = layer_.head_dim;
    *host = RoundToHalf(RandomFloats(rows * head_dim, seed));
    if (layer_.type == KvType::kF16) {
      *halves = std::make_unique<DeviceArray<__half>>(ToHalf(*host));
      return (*halves)->get();
    }
    std::vector<int8_t> quantized(host->size());
    std::vector<__half> row_scales(static_cast<size_t>(rows));
    for (int64_t row = 0; row < rows; ++row) {
      float* values = host->data() + row * head_dim;
      float largest = 0.0f;
      for (int64_t j = 0; j < head_dim; ++j) largest = std::max(largest, std::abs(values[j]));
      const __half scale = __float2half(largest / 127.0f);
      row_scales[static_cast<size_t>(row)] = scale;
      for (int64_t j = 0; j < head_dim; ++j) {
        const float q = std::clamp(std::nearbyint(values[j] / __half2float(scale)), -127.0f, 127.0f);
        quantized[static_cast<size_t>(row * head_dim + j)] = static_cast<int8_t>(q);
        values[j] = __half2float(__float2half(q * __half2float(scale)));
      }
    }
    *int8s = std::make_unique<DeviceArray<int8_t>>(quantized);
    *scales = std::make_unique<DeviceArray<__half>>(row_scales);
    return (*int8s)->get();
  }

  CudaKvLayer layer_;
  std::vector<float> k_, v_;
  std::unique_ptr<DeviceArray<__half>> k_half_, v_half_, k_scales_, v_scales_;
  std::unique_ptr<DeviceArray<int8_t>> k_int8_, v_int8_;
};

enum class Way { kSplit, kWhole, kBuilt };

// Tiles of at most `most` rows of one table each.
std::vector<CudaAttentionTile> TilesOf(const std::vector<CudaAttentionRow>& rows, uint32_t most) {
  std::vector<CudaAttentionTile> tiles;
  for (uint32_t i = 0; i < rows.size(); ++i) {
    if (i > 0 && rows[i].table_offset == rows[i - 1].table_offset && tiles.back().row_count < most) {
      ++tiles.back().row_count;
    } else {
      tiles.push_back({i, 1, i});
    }
  }
  return tiles;
}

struct Problem {
  std::vector<CudaAttentionRow> rows;
  std::vector<uint32_t> tables;

  // One sequence's rows, over blocks drawn from those that are left of the cache.
  void Add(RandomCache& cache, const std::vector<uint32_t>& visible, uint32_t* next_block, const std::vector<uint32_t>& shuffled) {
    const auto block_size = static_cast<uint32_t>(cache.layer().block_size);
    const uint32_t longest = *std::max_element(visible.begin(), visible.end()), offset = static_cast<uint32_t>(tables.size());
    for (uint32_t first = 0; first < longest; first += block_size) tables.push_back(shuffled[(*next_block)++]);
    if (longest % block_size != 0) cache.Forget(tables.back(), longest % block_size);
    for (const uint32_t sees : visible) rows.push_back({offset, sees});
  }
};

std::vector<uint32_t> Shuffled(int64_t count, uint32_t seed) {
  std::vector<uint32_t> values(static_cast<size_t>(count));
  std::iota(values.begin(), values.end(), 0u);
  std::shuffle(values.begin(), values.end(), std::mt19937(seed));
  return values;
}

// Rows lie q_stride apart, with more columns than the heads have; what is behind them must stay as it is.
std::vector<float> Run(const RandomCache& cache, const Problem& problem, const std::vector<float>& q, Way way, uint32_t most_rows, bool in_place = false) {
  const CudaKvLayer& kv = cache.layer();
  const int64_t m = static_cast<int64_t>(problem.rows.size()), width = kv.num_heads * kv.head_dim;
  const int64_t q_stride = (width + 63) / 64 * 64 + 64, out_stride = in_place ? q_stride : q_stride + 64;
  std::vector<__half> q_rows(static_cast<size_t>(m * q_stride), __ushort_as_half(0x7e01));
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < width; ++j) q_rows[static_cast<size_t>(i * q_stride + j)] = __float2half(q[static_cast<size_t>(i * width + j)]);
  }
  DeviceArray<__half> q_device(q_rows), out_device(m * out_stride);
  DeviceArray<CudaAttentionRow> rows(problem.rows);
  DeviceArray<uint32_t> tables(problem.tables);
  CudaAttentionBatch batch;
  batch.q = q_device.get();
  batch.out = in_place ? q_device.get() : out_device.get();
  batch.q_stride = q_stride;
  batch.out_stride = out_stride;
  batch.rows = rows.get();
  batch.tables = tables.get();
  batch.kv = kv;

  std::vector<CudaAttentionTile> split, whole;
  if (way == Way::kBuilt) BuildAttentionTiles(problem.rows, kv.head_dim, &split, &whole);
  if (way == Way::kSplit) split = TilesOf(problem.rows, most_rows);
  if (way == Way::kWhole) whole = TilesOf(problem.rows, most_rows);
  split.push_back({0, 0, 0});  // as where a graph has more tiles than the batch
  whole.push_back({0, 0, 0});
  DeviceArray<CudaAttentionTile> split_device(split), whole_device(whole);
  uint32_t longest = 0;
  for (const CudaAttentionRow& row : problem.rows) longest = std::max(longest, row.visible);
  const int64_t max_parts = (longest + cuda::kAttentionPart - 1) / cuda::kAttentionPart + 1;
  DeviceArray<char> scratch(cuda::AttentionScratchBytes(m, max_parts, kv.num_heads, kv.head_dim));
  if (way != Way::kWhole) AttentionSplit(batch, split_device.get(), split_device.size(), m, max_parts, scratch.get(), nullptr);
  if (way != Way::kSplit) AttentionWhole(batch, whole_device.get(), whole_device.size(), nullptr);
  scratch.Download();

  const std::vector<__half> out_rows = in_place ? q_device.Download() : out_device.Download();
  std::vector<float> out;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < out_stride; ++j) {
      const __half value = out_rows[static_cast<size_t>(i * out_stride + j)];
      if (j < width) {
        out.push_back(__half2float(value));
      } else if (__half_as_ushort(value) != (in_place ? 0x7e01 : 0xffff)) {
        Fail(__FILE__, __LINE__, "a padding column was written");
      }
    }
  }
  return out;
}

// The weights, rounded to halves (2^-11 of each, in either direction: sqrt(visible) of 1 / visible each, or all of one), and the output, rounded once; the
// scores are fp32 sums of head_dim products of around 1. |v| is at most 5.
double Bound(int64_t head_dim) { return 5.0 * (0x1p-11 + 0x1p-12 + 8.0 * (static_cast<double>(head_dim) / 4 + 8) * 0x1p-24); }

void CheckNearReference(const std::string& what, const std::vector<float>& out, const std::vector<float>& expected, const Problem& problem, int64_t head_dim) {
  const size_t width = out.size() / problem.rows.size();
  for (size_t i = 0; i < out.size(); ++i) {
    const std::string row = " row " + std::to_string(i / width) + " visible " + std::to_string(problem.rows[i / width].visible);
    CHECK_NEAR(what + row, out[i], expected[i], Bound(head_dim));
  }
}

const char* NameOf(KvType type) { return type == KvType::kF16 ? "fp16" : "int8"; }

}  // namespace

TEST(cuda_attention_equals_ref_for_every_head_size) {
  for (const KvType type : {KvType::kF16, KvType::kI8}) {
    for (const int64_t head_dim : {8, 16, 24, 32, 40, 64, 72, 96, 128, 136, 192, 256}) {
      RandomCache cache(type, 30, 2, 16, head_dim, static_cast<uint32_t>(head_dim));
      const std::vector<uint32_t> shuffled = Shuffled(30, 3);
      uint32_t next_block = 0;
      Problem problem;
      problem.Add(cache, {1, 15, 16, 17, 33}, &next_block, shuffled);
      problem.Add(cache, {270, 64, 255, 256, 257}, &next_block, shuffled);
      problem.Add(cache, {31}, &next_block, shuffled);
      const std::vector<float> q = RoundToHalf(RandomFloats(static_cast<int64_t>(problem.rows.size()) * 2 * head_dim, 5));
      const std::vector<float> expected = cache.Reference(q, problem.rows, problem.tables);
      ForEachThreadOrder([&] {
        const std::string name = std::string(NameOf(type)) + " head size " + std::to_string(head_dim);
        const std::vector<float> split = Run(cache, problem, q, Way::kSplit, 1), whole = Run(cache, problem, q, Way::kWhole, 32);
        CheckNearReference(name, split, expected, problem, head_dim);
        CHECK_SAME_BITS(name, whole.data(), split.data(), static_cast<int64_t>(split.size()));
      });
    }
  }
}

// Decode, a few rows at a time and long runs, in place and not, all with one row's bits.
TEST(cuda_attention_rows_have_the_same_bits_in_every_batch) {
  for (const KvType type : {KvType::kF16, KvType::kI8}) {
    for (const int64_t head_dim : {32, 128}) {
      for (const int64_t block_size : head_dim == 32 ? std::vector<int64_t>{8, 16, 64} : std::vector<int64_t>{16}) {
        const int64_t num_heads = head_dim == 32 ? 3 : 1, width = num_heads * head_dim, num_blocks = 2400 / block_size;
        RandomCache cache(type, num_blocks, num_heads, block_size, head_dim, 3);
        const std::vector<uint32_t> shuffled = Shuffled(num_blocks, 8);
        uint32_t next_block = 0;
        Problem problem;
        std::vector<uint32_t> context(70, 300), ragged;  // a bidirectional prefix and what follows; then rows of any length
        for (uint32_t i = 0; i < 7; ++i) context.push_back(301 + i);
        for (const uint32_t sees : {1u, 15u, 16u, 17u, 63u, 64u, 65u, 255u, 256u, 257u, 511u, 513u, 700u, 1u, 1000u, 2u, 999u}) ragged.push_back(sees);
        problem.Add(cache, context, &next_block, shuffled);
        problem.Add(cache, ragged, &next_block, shuffled);
        problem.Add(cache, {257}, &next_block, shuffled);
        problem.Add(cache, {129}, &next_block, shuffled);
        problem.Add(cache, {7, 8, 9}, &next_block, shuffled);
        // A fork: the blocks of the first sequence, then one of its own.
        const auto offset = static_cast<uint32_t>(problem.tables.size());
        for (uint32_t i = 0; i < 256 / block_size; ++i) problem.tables.push_back(problem.tables[i]);
        problem.tables.push_back(shuffled[next_block++]);
        problem.rows.push_back({offset, 260});

        const int64_t m = static_cast<int64_t>(problem.rows.size());
        const std::vector<float> q = RoundToHalf(RandomFloats(m * width, 4));
        const std::vector<float> expected = cache.Reference(q, problem.rows, problem.tables);
        const std::string name = std::string(NameOf(type)) + " head size " + std::to_string(head_dim) + " block size " + std::to_string(block_size);
        std::vector<float> alone;
        for (int64_t i = 0; i < m; ++i) {
          const Problem one = {{problem.rows[static_cast<size_t>(i)]}, problem.tables};
          const std::vector<float> row = Run(cache, one, std::vector<float>(q.begin() + i * width, q.begin() + (i + 1) * width), Way::kSplit, 1);
          alone.insert(alone.end(), row.begin(), row.end());
        }
        CheckNearReference(name, alone, expected, problem, head_dim);
        ForEachThreadOrder([&] {
          const std::vector<float> whole = Run(cache, problem, q, Way::kWhole, 64), split = Run(cache, problem, q, Way::kSplit, 16);
          const std::vector<float> whole_37 = Run(cache, problem, q, Way::kWhole, 37), built = Run(cache, problem, q, Way::kBuilt, 0, true);
          CHECK_SAME_BITS(name + " whole", whole.data(), alone.data(), m * width);
          CHECK_SAME_BITS(name + " split", split.data(), alone.data(), m * width);
          CHECK_SAME_BITS(name + " other tiles", whole_37.data(), alone.data(), m * width);
          CHECK_SAME_BITS(name + " built, in place", built.data(), alone.data(), m * width);
        });
      }
    }
  }
}

// One token takes it all, and the maximum rises by more than an exponential can show. fp16 outputs of values around 1; scores of 10^3 carry 10^-3.
TEST(cuda_attention_survives_scores_of_any_size) {
  RandomCache cache(KvType::kF16, 40, 2, 16, 64, 8);
  const std::vector<uint32_t> shuffled = Shuffled(40, 1);
  uint32_t next_block = 0;
  Problem problem;
  std::vector<uint32_t> visible;
  for (uint32_t i = 0; i < 20; ++i) visible.push_back(1 + i * 30);
  problem.Add(cache, visible, &next_block, shuffled);
  for (const float scale : {0.0f, 100.0f, 1000.0f}) {
    const std::vector<float> q = RoundToHalf(RandomFloats(20 * 2 * 64, 4, scale));
    const std::vector<float> expected = cache.Reference(q, problem.rows, problem.tables);
    const std::vector<float> whole = Run(cache, problem, q, Way::kWhole, 64), split = Run(cache, problem, q, Way::kSplit, 1);
    for (size_t i = 0; i < whole.size(); ++i) CHECK_NEAR("scale " + std::to_string(scale), whole[i], expected[i], 0.02);
    CHECK_SAME_BITS("split", split.data(), whole.data(), static_cast<int64_t>(whole.size()));
  }
}

// The grid of a captured launch holds for longer rows, other rows and fewer of them: all that changes is read from device memory.
TEST(cuda_attention_in_a_graph_follows_its_sequences) {
  const int64_t head_dim = 32, m = 3, max_parts = 3, q_stride = 64;
  RandomCache cache(KvType::kF16, 50, 1, 16, head_dim, 8);
  const std::vector<uint32_t> tables = Shuffled(50, 1);
  const std::vector<float> q = RoundToHalf(RandomFloats(m * head_dim, 4));
  std::vector<float> q_rows(m * q_stride, 0.0f);
  for (int64_t i = 0; i < m; ++i) std::copy_n(q.begin() + i * head_dim, head_dim, q_rows.begin() + i * q_stride);
  DeviceArray<__half> q_device(ToHalf(q_rows)), out(m * q_stride);
  DeviceArray<CudaAttentionRow> rows(m);
  DeviceArray<CudaAttentionTile> tiles(m);
  DeviceArray<uint32_t> tables_device(tables);
  DeviceArray<char> scratch(cuda::AttentionScratchBytes(m, max_parts, 1, head_dim));
  CudaAttentionBatch batch;
  batch.q = q_device.get();
  batch.out = out.get();
  batch.q_stride = batch.out_stride = q_stride;
  batch.rows = rows.get();
  batch.tables = tables_device.get();
  batch.kv = cache.layer();
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  cuda::Check(cudaStreamCreate(&stream), "stream");
  cuda::Check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "begin");
  AttentionSplit(batch, tiles.get(), m, m, max_parts, scratch.get(), stream);
  cuda::Check(cudaStreamEndCapture(stream, &graph), "end");
  cuda::Check(cudaGraphInstantiate(&executable, graph, 0), "instantiate");
  const std::vector<std::vector<CudaAttentionRow>> steps = {{{0, 5}, {7, 256}, {2, 600}}, {{0, 6}, {7, 257}, {2, 1}}, {{9, 600}, {1, 768}}};
  for (const std::vector<CudaAttentionRow>& now : steps) {
    std::vector<CudaAttentionRow> all_rows(m, {0, 1});
    std::vector<CudaAttentionTile> all_tiles(m, {0, 0, 0});
    for (uint32_t i = 0; i < now.size(); ++i) {
      all_rows[i] = now[i];
      all_tiles[i] = {i, 1, i};
    }
    rows.Upload(all_rows);
    tiles.Upload(all_tiles);
    out.Poison();
    cuda::Check(cudaDeviceSynchronize(), "uploads");
    cuda::Check(cudaGraphLaunch(executable, stream), "launch");
    Sync(stream);
    const std::vector<float> q_now(q.begin(), q.begin() + static_cast<int64_t>(now.size()) * head_dim);
    const std::vector<float> result = ToFloat(out.Download()), expected = cache.Reference(q_now, now, tables);
    for (int64_t i = 0; i < m * head_dim; ++i) {
      const float value = result[static_cast<size_t>(i / head_dim * q_stride + i % head_dim)];
      if (i < static_cast<int64_t>(expected.size())) {
        CHECK_NEAR("row " + std::to_string(i / head_dim), value, expected[static_cast<size_t>(i)], Bound(head_dim));
      } else {
        CHECK(std::isnan(value));
      }
    }
  }
  cuda::Check(cudaGraphExecDestroy(executable), "destroy");
  cuda::Check(cudaGraphDestroy(graph), "destroy");
  cuda::Check(cudaStreamDestroy(stream), "destroy");
}

TEST(cuda_attention_tiles_follow_the_runs) {
  std::vector<CudaAttentionRow> rows;
  for (const auto& [offset, count] : std::vector<std::pair<uint32_t, int>>{{0, 1}, {5, 16}, {9, 17}, {11, 130}, {2, 3}}) {
    for (int i = 0; i < count; ++i) rows.push_back({offset, 1});
  }
  std::vector<CudaAttentionTile> split, whole;
  BuildAttentionTiles(rows, 128, &split, &whole);
  const auto text = [](const std::vector<CudaAttentionTile>& tiles) {
    std::string result;
    for (const CudaAttentionTile& tile : tiles) {
      result += std::to_string(tile.first_row) + "+" + std::to_string(tile.row_count) + "@" + std::to_string(tile.first_slot) + " ";
    }
    return result;
  };
  CHECK_EQ(text(split), std::string("0+1@0 1+16@1 164+3@17 "));
  CHECK_EQ(text(whole), std::string("17+17@0 34+64@0 98+64@0 162+2@0 "));
}

TEST(cuda_attention_refuses_what_it_cannot_do) {
  DeviceArray<CudaAttentionTile> tile(std::vector<CudaAttentionTile>{{0, 0, 0}});
  const auto run = [&](int64_t head_dim, int64_t block_size) {
    CudaAttentionBatch batch;
    batch.kv.num_blocks = 4;
    batch.kv.num_heads = 1;
    batch.kv.head_dim = head_dim;
    batch.kv.block_size = block_size;
    AttentionWhole(batch, tile.get(), 1, nullptr);
    AttentionSplit(batch, tile.get(), 1, 1, 1, nullptr, nullptr);
  };
  run(16, 16);
  CHECK_THROWS(run(12, 16), ErrorCode::kInvalidArgument);
  CHECK_THROWS(run(0, 16), ErrorCode::kInvalidArgument);
  CHECK_THROWS(run(264, 16), ErrorCode::kInvalidArgument);
  CHECK_THROWS(run(16, 12), ErrorCode::kInvalidArgument);
  CHECK_THROWS(run(16, 0), ErrorCode::kInvalidArgument);
  CHECK_THROWS(run(16, int64_t{1} << 31), ErrorCode::kInvalidArgument);
}

}  // namespace tandem::test
