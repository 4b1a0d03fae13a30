// Weights of a rank, and whole engines over a small random model. That the logits are the specification's is checked against a double-precision forward
// pass in binding/engine.test.ts; here, that shards are the right pieces, and that batches, splits, threads and instruction sets change nothing.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/half.h"
#include "model/engine.h"
#include "test/test.h"

namespace tandem {
namespace {

const std::atomic<bool> kNotCancelled{false};
constexpr int64_t kLayers = 4;

// A random model in one file, removed at the end.
class ModelFile {
 public:
  explicit ModelFile(WeightType type) : type_(type) {
    shape.num_layers = kLayers;
    shape.hidden_size = 48;
    shape.num_attention_heads = 4;
    shape.inner_hidden_size = 56;
    shape.vocab_size = 132;
    shape.max_sequence_length = 128;
    char path[] = "/tmp/tandem-glm-test-XXXXXX";
    const int descriptor = mkstemp(path);
    path_ = path;
    const int64_t h = shape.hidden_size, f = shape.inner_hidden_size;
    Floats("transformer.word_embeddings.weight", {shape.vocab_size, h}, 0.5f);
    for (int64_t layer = 0; layer < shape.num_layers; ++layer) {
      const std::string prefix = "transformer.layers." + std::to_string(layer) + ".";
      for (const char* norm : {"input_layernorm", "post_attention_layernorm"}) {
        Floats(prefix + norm + ".weight", {h}, 1.0f);
        Floats(prefix + norm + ".bias", {h}, 0.2f);
      }
      Linear(prefix + "attention.query_key_value", 3 * h, h, 6);
      Linear(prefix + "attention.dense", h, h, 6);
      Linear(prefix + "mlp.dense_h_to_4h", 2 * f, h, 6);
      Linear(prefix + "mlp.dense_4h_to_h", h, f, 7);
    }
    Floats("transformer.final_layernorm.weight", {h}, 1.0f);
    Floats("transformer.final_layernorm.bias", {h}, 0.2f);
    const ssize_t written = write(descriptor, bytes_.data(), bytes_.size());
    close(descriptor);
    if (written != static_cast<ssize_t>(bytes_.size())) throw std::runtime_error("cannot write " + path_);
  }
  ~ModelFile() { unlink(path_.c_str()); }

  ModelShape shape;
  std::vector<TensorSource> tensors;

 private:
  void Add(const std::string& name, TensorType type, std::vector<int64_t> dims, const void* data, size_t bytes) {
    bytes_.push_back('x');  // tensors begin at odd offsets too
    tensors.push_back({name, path_, static_cast<int64_t>(bytes_.size()), type, std::move(dims)});
    bytes_.append(static_cast<const char*>(data), bytes);
  }

  void Floats(const std::string& name, std::vector<int64_t> dims, float scale) {
    int64_t count = 1;
    for (const int64_t dim : dims) count *= dim;
    std::uniform_real_distribution<float> uniform(-scale, scale);
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = uniform(random_);
    if (type_ == WeightType::kF32) {
      Add(name, TensorType::kF32, std::move(dims), values.data(), values.size() * 4);
      return;
    }
    std::vector<uint16_t> halves;
    for (const float value : values) halves.push_back(FloatToHalf(value));
    Add(name, TensorType::kF16, std::move(dims), halves.data(), halves.size() * 2);
  }

  void Linear(const std::string& name, int64_t rows, int64_t columns, int64_t groups) {
    Floats(name + ".bias", {rows}, 0.2f);
    if (type_ == WeightType::kF32 || type_ == WeightType::kF16) {
      Floats(name + ".weight", {rows, columns}, 0.3f);
      return;
    }
    const bool int4 = type_ == WeightType::kI4;
    std::vector<uint8_t> data(static_cast<size_t>(int4 ? rows * columns / 2 : rows * columns));
    for (uint8_t& byte : data) byte = static_cast<uint8_t>(random_());
    std::vector<uint16_t> scales(static_cast<size_t>(rows * groups));
    for (uint16_t& scale : scales) scale = FloatToHalf((int4 ? 0.04f : 0.0025f) * (1 + static_cast<float>(random_() % 100) / 100));
    Add(name + ".qweight", int4 ? TensorType::kU8 : TensorType::kI8, {rows, int4 ? columns / 2 : columns}, data.data(), data.size());
    Add(name + ".scales", TensorType::kF16, {rows, groups}, scales.data(), scales.size() * 2);
  }

  const WeightType type_;
  std::string path_, bytes_;
  std::mt19937 random_{17};
};

constexpr WeightType kTypes[] = {WeightType::kF32, WeightType::kF16, WeightType::kI8, WeightType::kI4};
const char* TypeName(WeightType type) {
  const char* names[] = {"fp32", "fp16", "int8", "int4"};
  return names[static_cast<int>(type)];
}

float Element(const LinearWeight& w, int64_t row, int64_t column) {
  const uint8_t* data = static_cast<const uint8_t*>(w.data) + row * w.row_stride;
  if (w.type == WeightType::kF32) return reinterpret_cast<const float*>(data)[column];
  if (w.type == WeightType::kF16) return HalfToFloat(reinterpret_cast<const uint16_t*>(data)[column]);
  int q = static_cast<int8_t>(data[w.type == WeightType::kI8 ? column : column / 2]);
  if (w.type == WeightType::kI4) q = static_cast<int8_t>((column % 2 == 0 ? q & 0xf0 : q * 16) & 0xff) >> 4;
  return static_cast<float>(q) * HalfToFloat(w.scales[row * w.groups + (column + w.group_offset) / w.group_size]);
}

// Element [row, column] of the shard is [row_of(row), first_column + column] of the whole.
void CheckShard(const OwnedLinear& whole, const OwnedLinear& shard, int64_t rows, const std::function<int64_t(int64_t)>& row_of, int64_t first_column,
                int64_t columns) {
  CHECK_EQ(shard.weight.rows, rows);
  CHECK_EQ(shard.weight.cols, columns);
  CHECK_EQ(reinterpret_cast<uintptr_t>(shard.weight.data) % 64, uintptr_t{0});
  CHECK_EQ(shard.weight.row_stride % 64, int64_t{0});
  int64_t wrong = 0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) wrong += Element(shard.weight, r, c) != Element(whole.weight, row_of(r), first_column + c);
  }
  CHECK_EQ(wrong, int64_t{0});
}

EngineOptions Options(const ModelFile& file, int rank, int world_size, int threads) {
  static std::atomic<int> count{0};
  EngineOptions options;
  options.model = file.shape;
  options.tensors = file.tensors;
  options.shard = {rank, world_size};
  options.threads = threads;
  options.kv_blocks = 64;
  options.kv_block_size = 4;
  options.max_batch_tokens = 200;
  options.communicator = {"glm-test-" + std::to_string(getpid()) + "-" + std::to_string(count), 20000};
  if (rank == world_size - 1) ++count;
  return options;
}

Extend RandomRun(uint32_t seed, int64_t length, int64_t cached, uint32_t first_block, Want want) {
  std::mt19937 random(seed);
  Extend extend;
  for (int64_t i = 0; i < length; ++i) {
    extend.tokens.push_back(random() % 132);
    extend.positions.push_back(static_cast<uint32_t>(cached + i));
  }
  for (int64_t i = 0; i * 4 < cached + length; ++i) extend.block_table.push_back(first_block + static_cast<uint32_t>(i));
  extend.cached_tokens = cached;
  extend.bidirectional_tokens = length > 1 ? length - 1 : 0;
  extend.end_layer = kLayers;
  extend.want = std::move(want);
  return extend;
}

// A prefill, a decode, and a batch of both kinds; all the logits one after another.
std::vector<float> RunSteps(Engine& engine) {
  std::vector<float> logits;
  const auto run = [&](Step step) {
    for (const ExtendResult& result : engine.Run(step).results) {
      if (const auto* rows = std::get_if<LogitsResult>(&result)) logits.insert(logits.end(), rows->logits.begin(), rows->logits.end());
    }
  };
  run({1, {}, {RandomRun(1, 9, 0, 0, WantLogits{9})}});
  run({2, {}, {RandomRun(2, 1, 9, 0, WantLogits{1})}});
  run({3, {2, 40}, {RandomRun(3, 70, 0, 10, WantLogits{70}), RandomRun(4, 1, 10, 0, WantLogits{1}), RandomRun(5, 3, 0, 30, WantNothing{})}});
  WantSample sample;
  sample.top_logprobs = 3;
  run({4, {}, {RandomRun(6, 1, 3, 30, sample), RandomRun(7, 2, 70, 10, WantTargets{{1, 2}}), RandomRun(8, 1, 11, 0, WantCandidates{2, {}, {}})}});
  return logits;
}

std::vector<float> RunGroup(const ModelFile& file, int world_size, int threads, std::optional<Isa> isa, KvType kv_type,
                            const std::function<std::vector<float>(Engine&)>& steps = RunSteps) {
  std::vector<EngineOptions> options;
  for (int rank = 0; rank < world_size; ++rank) {
    options.push_back(Options(file, rank, world_size, threads));
    options.back().isa = isa;
    options.back().kv_type = kv_type;
  }
  std::vector<float> logits;
  std::vector<std::thread> ranks;
  std::atomic<int> failed{0};
  for (int rank = 0; rank < world_size; ++rank) {
    ranks.emplace_back([&, rank] {
      try {
        Engine engine(options[static_cast<size_t>(rank)], kNotCancelled);
        std::vector<float> mine = steps(engine);
        if (rank == 0) logits = std::move(mine);
      } catch (const std::exception& error) {
        std::printf("  rank %d: %s\n", rank, error.what());
        ++failed;
      }
    });
  }
  for (std::thread& rank : ranks) rank.join();
  CHECK_EQ(failed.load(), 0);
  return logits;
}

double MaxDifference(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size() || a.empty()) return INFINITY;
  double most = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double difference = std::abs(static_cast<double>(a[i]) - b[i]);
    if (!(difference <= most)) most = difference;
  }
  return most;
}

Extend Layers(Extend extend, int64_t first_layer, int64_t end_layer) {
  extend.first_layer = first_layer;
  extend.end_layer = end_layer;
  return extend;
}

// Logits of a run of 37 tokens that is cut behind layer i where bit i of `cuts` is set, of a token behind it, and of a sequence that decodes meanwhile: in
// the same steps, or in steps between. Always in that order.
std::vector<float> Sliced(Engine& engine, unsigned cuts, bool with_others) {
  std::vector<ExtendResult> results[4];  // of the run, the token behind it, the other sequence, a short run
  const auto run = [&](const std::vector<std::pair<size_t, Extend>>& what) {
    Step step{1, {}, {}};
    for (const auto& [which, extend] : what) step.extends.push_back(extend);
    std::vector<ExtendResult> answers = engine.Run(step).results;
    for (size_t i = 0; i < answers.size(); ++i) results[what[i].first].push_back(std::move(answers[i]));
  };
  const Extend sliced = RandomRun(1, 37, 0, 0, WantLogits{37});
  int64_t decoded = 0;
  const auto decode = [&] {
    const int64_t cached = decoded == 0 ? 0 : 4 + decoded;
    return RandomRun(static_cast<uint32_t>(10 + decoded++), cached == 0 ? 5 : 1, cached, 20, WantLogits{1});
  };
  for (int64_t first = 0, end = 1; end <= kLayers; ++end) {
    if (end < kLayers && (cuts >> (end - 1) & 1) == 0) continue;
    const Extend part = Layers(sliced, first, end);
    first = end;
    if (with_others) {
      // At the front, in the middle, or at the end.
      std::vector<std::pair<size_t, Extend>> step = {{2, decode()}, {3, RandomRun(static_cast<uint32_t>(50 + end), 2, 0, 40, WantNothing{})}};
      step.insert(step.begin() + end % 3, {0, part});
      run(step);
    } else {
      run({{0, part}});
      run({{2, decode()}});
    }
  }
  while (decoded < kLayers) run({{2, decode()}});
  run({{1, RandomRun(2, 1, 37, 0, WantLogits{1})}});

  std::vector<float> logits;
  for (size_t which = 0; which < 3; ++which) {
    const std::vector<ExtendResult>& some = results[which];
    for (size_t i = 0; i < some.size(); ++i) {
      CHECK_EQ(std::holds_alternative<WantNothing>(some[i]), which == 0 && i + 1 < some.size());
      if (const auto* rows = std::get_if<LogitsResult>(&some[i])) logits.insert(logits.end(), rows->logits.begin(), rows->logits.end());
    }
  }
  return logits;
}

}  // namespace

TEST(glm_shards_are_the_right_pieces) {
  ThreadPool pool(2);
  for (const WeightType type : kTypes) {
    const ModelFile file(type);
    const int64_t h = file.shape.hidden_size, f = file.shape.inner_hidden_size, vocab = file.shape.vocab_size;
    const Weights whole = LoadWeights(file.shape, {0, 1}, file.tensors, {}, pool, kNotCancelled);
    for (const int world_size : {1, 2, 4}) {
      for (int rank = 0; rank < world_size; ++rank) {
        LoadProgress progress;
        const Weights shard = LoadWeights(file.shape, {rank, world_size}, file.tensors, {}, pool, kNotCancelled, &progress);
        CHECK(progress.total_bytes.load() > 0);
        CHECK_EQ(progress.done_bytes.load(), progress.total_bytes.load());
        const int64_t local_f = f / world_size;
        const auto block = [&](int64_t rows) { return [=](int64_t row) { return rank * (rows / world_size) + row; }; };
        const auto same = [](int64_t row) { return row; };
        const auto halves = [=](int64_t row) { return row < local_f ? rank * local_f + row : f + rank * local_f + row - local_f; };
        CheckShard(whole.word_embeddings, shard.word_embeddings, vocab / world_size, block(vocab), 0, h);
        for (size_t i = 0; i < whole.layers.size(); ++i) {
          const LayerWeights &a = whole.layers[i], &b = shard.layers[i];
          CheckShard(a.query_key_value, b.query_key_value, 3 * h / world_size, block(3 * h), 0, h);
          CheckShard(a.dense, b.dense, h, same, rank * h / world_size, h / world_size);
          CheckShard(a.dense_h_to_4h, b.dense_h_to_4h, 2 * local_f, halves, 0, h);
          CheckShard(a.dense_4h_to_h, b.dense_4h_to_h, h, same, rank * local_f, local_f);
          for (int64_t r = 0; r < 2 * local_f; ++r) {
            CHECK_EQ(b.dense_h_to_4h_bias[static_cast<size_t>(r)], a.dense_h_to_4h_bias[static_cast<size_t>(halves(r))]);
          }
          for (int64_t r = 0; r < 3 * h / world_size; ++r) {
            CHECK_EQ(b.query_key_value_bias[static_cast<size_t>(r)], a.query_key_value_bias[static_cast<size_t>(block(3 * h)(r))]);
          }
          CHECK(a.dense_bias == b.dense_bias && a.input_layernorm.weight == b.input_layernorm.weight);
        }
      }
    }
  }
}

TEST(glm_int4_columns_cannot_be_split_inside_a_byte) {
  const ModelFile file(WeightType::kI4);
  ThreadPool pool(1);
  std::vector<TensorSource> tensors = file.tensors;
  ModelShape shape = file.shape;
  shape.inner_hidden_size = 28;  // 7 columns for each of 4 ranks
  for (TensorSource& tensor : tensors) {
    if (tensor.name.find("dense_h_to_4h") != std::string::npos) tensor.shape[0] = 56;
    if (tensor.name.find("dense_4h_to_h.qweight") != std::string::npos) tensor.shape[1] = 14;
  }
  try {
    LoadWeights(shape, {0, 4}, tensors, {}, pool, kNotCancelled);
    CHECK(false);
  } catch (const Error& error) {
    CHECK(error.code() == ErrorCode::kCheckpoint);
    CHECK(std::string(error.what()).find("INT4 columns come in pairs") != std::string::npos);
  }
}

TEST(glm_threads_do_not_change_the_bits) {
  for (const WeightType type : kTypes) {
    const ModelFile file(type);
    const std::vector<float> one = RunGroup(file, 1, 1, std::nullopt, KvType::kF16), three = RunGroup(file, 1, 3, std::nullopt, KvType::kF16);
    CHECK_EQ(one.size(), three.size());
    CHECK_SAME_BITS(TypeName(type), one.data(), three.data(), static_cast<int64_t>(one.size()));
    CHECK(MaxDifference(one, std::vector<float>(one.size())) > 0.5);
  }
}

// An fp32 cache: in fp16 a value at a rounding border could fall to either side.
TEST(glm_ranks_and_instruction_sets_agree) {
  constexpr double kBound = 1e-4;  // logits of size ~2 after four layers of fp32 sums; measured: a few 1e-6
  for (const WeightType type : kTypes) {
    const ModelFile file(type);
    const std::vector<float> one = RunGroup(file, 1, 1, std::nullopt, KvType::kF32);
    for (const int world_size : {2, 4}) CHECK_NEAR(TypeName(type), MaxDifference(one, RunGroup(file, world_size, 1, std::nullopt, KvType::kF32)), 0, kBound);
    for (const Isa isa : {Isa::kGeneric, Isa::kAvx2, Isa::kNeon}) {
      if (!IsaSupported(isa)) {
        test::Skip(std::string("no ") + IsaName(isa));
        continue;
      }
      CHECK_NEAR(TypeName(type), MaxDifference(one, RunGroup(file, 2, 2, isa, KvType::kF32)), 0, kBound);
    }
  }
}

TEST(glm_rank_that_fails_while_loading_ends_the_others) {
  const ModelFile file(WeightType::kF16);
  EngineOptions good = Options(file, 0, 2, 1), bad = Options(file, 1, 2, 1);
  bad.tensors.pop_back();
  std::thread failing([&] { CHECK_THROWS(Engine(bad, kNotCancelled), ErrorCode::kCheckpoint); });
  Engine engine(good, kNotCancelled);
  failing.join();
  try {
    engine.Run({1, {}, {RandomRun(1, 3, 0, 0, WantNothing{})}});
    CHECK(false);
  } catch (const Error& error) {
    CHECK(error.code() == ErrorCode::kAborted);
  }
}

// Every way to cut four layers, beside sequences that decode, or in steps of its own with whole runs between: the same bits.
TEST(glm_layer_slices_do_not_change_the_bits) {
  for (const WeightType type : {WeightType::kF32, WeightType::kI4}) {
    const ModelFile file(type);
    for (const int world_size : {1, 2}) {
      const auto run = [&](const std::function<std::vector<float>(Engine&)>& steps) {
        return RunGroup(file, world_size, 2, std::nullopt, KvType::kF16, steps);
      };
      const std::vector<float> whole = run([](Engine& engine) { return Sliced(engine, 0, false); });
      CHECK(MaxDifference(whole, std::vector<float>(whole.size())) > 0.5);
      for (const bool with_others : {false, true}) {
        const std::vector<float> all = run([&](Engine& engine) {
          std::vector<float> logits;
          for (unsigned cuts = 0; cuts < 1u << (kLayers - 1); ++cuts) {
            // What the last round left in these blocks is what this one should write: overwrite it.
            engine.Run({1, {}, {RandomRun(99, 40, 0, 0, WantNothing{}), RandomRun(98, 40, 0, 20, WantNothing{})}});
            const std::vector<float> some = Sliced(engine, cuts, with_others);
            logits.insert(logits.end(), some.begin(), some.end());
          }
          return logits;
        });
        for (size_t first = 0; first < all.size() || first == 0; first += whole.size()) {
          const std::string what = std::string(TypeName(type)) + ", cuts " + std::to_string(first / whole.size());
          CHECK(first + whole.size() <= all.size());
          if (first + whole.size() <= all.size()) CHECK_SAME_BITS(what, all.data() + first, whole.data(), static_cast<int64_t>(whole.size()));
        }
        CHECK_EQ(all.size(), whole.size() << (kLayers - 1));
      }
    }
  }
}

TEST(glm_layer_slices_that_do_not_go_on_are_refused) {
  const ModelFile file(WeightType::kF32);
  Engine engine(Options(file, 0, 1, 1), kNotCancelled);
  const Extend run = RandomRun(1, 9, 0, 0, WantLogits{2}), other = RandomRun(2, 5, 0, 10, WantNothing{});
  const auto refused = [&](const std::vector<Extend>& extends, const std::string& message) {
    try {
      engine.Run({1, {}, extends});
      test::Fail(__FILE__, __LINE__, "not refused: " + message);
    } catch (const Error& error) {
      CHECK(error.code() == ErrorCode::kInvalidArgument);
      CHECK_EQ(std::string(error.what()), message);
    }
  };
  const std::vector<float> expected = std::get<LogitsResult>(engine.Run({1, {}, {run}}).results[0]).logits;
  engine.Run({1, {}, {RandomRun(3, 9, 0, 0, WantNothing{})}});

  refused({Layers(run, 0, 0)}, "extends[0].endLayer: 0 is not in 1 .. 4, the model's layers");
  refused({Layers(run, 0, 5)}, "extends[0].endLayer: 5 is not in 1 .. 4, the model's layers");
  refused({Layers(run, 2, 2)}, "extends[0].firstLayer: 2, the run ends before layer 2");
  refused({Layers(run, -1, 2)}, "extends[0].firstLayer: -1, the run ends before layer 2");
  refused({Layers(run, 1, 4)}, "extends[0].firstLayer: 1, but no run is under way; begin one at layer 0");
  const std::string second = "extends[1].firstLayer: a part of the layers, as of extends[0] already; one Extend of a step may be run in part";
  refused({Layers(run, 0, 1), Layers(other, 0, 2)}, second);

  CHECK(std::holds_alternative<WantNothing>(engine.Run({2, {}, {Layers(run, 0, 2)}}).results[0]));
  for (int again = 0; again < 2; ++again) {  // a refused step leaves everything as it was
    refused({Layers(run, 1, 4)}, "extends[0].firstLayer: 1, the run under way goes on at layer 2");
    refused({Layers(run, 3, 4)}, "extends[0].firstLayer: 3, the run under way goes on at layer 2");
    refused({other, Layers(RandomRun(1, 8, 0, 0, WantNothing{}), 2, 4)}, "extends[1].tokens: has 8 elements, the run under way has 9 tokens");
    refused({Layers(run, 2, 4), Layers(other, 0, 1)}, second);
    Extend wrong = other;
    wrong.tokens[0] = 1000;
    refused({Layers(run, 2, 4), wrong}, "extends[1].tokens[0]: token 1000, the vocabulary has 132");
  }
  engine.Run({3, {}, {other}});  // whole runs do not touch it
  const std::vector<float> logits = std::get<LogitsResult>(engine.Run({4, {}, {Layers(run, 2, 4)}}).results[0]).logits;
  CHECK_EQ(logits.size(), expected.size());
  CHECK_SAME_BITS("after refused steps", logits.data(), expected.data(), static_cast<int64_t>(expected.size()));
  refused({Layers(run, 2, 4)}, "extends[0].firstLayer: 2, but no run is under way; begin one at layer 0");

  // Another run takes the place of the one under way.
  engine.Run({5, {}, {Layers(run, 0, 3)}});
  engine.Run({6, {}, {Layers(other, 0, 1)}});
  refused({Layers(run, 3, 4)}, "extends[0].firstLayer: 3, the run under way goes on at layer 1");
  engine.Run({7, {}, {Layers(other, 1, 4)}});
  refused({Layers(run, 3, 4)}, "extends[0].firstLayer: 3, but no run is under way; begin one at layer 0");
}

TEST(glm_carry_is_part_of_the_workspace) {
  const ModelFile file(WeightType::kF32);
  const auto workspace = [&](int64_t tokens) {
    EngineOptions options = Options(file, 0, 1, 1);
    options.max_batch_tokens = tokens;
    return Engine(options, kNotCancelled).memory().workspace_bytes;
  };
  const int64_t h = file.shape.hidden_size, f = file.shape.inner_hidden_size;
  CHECK_EQ(workspace(200) - workspace(100), 100 * 4 * (3 * h + std::max(3 * h, 2 * f) + std::max(h, f)));
}

// The reported log-probabilities are the model's own, whatever is done to the logits before drawing.
TEST(glm_logit_changes_choose_the_token_and_nothing_else) {
  const ModelFile file(WeightType::kF32);
  Engine engine(Options(file, 0, 1, 1), kNotCancelled);
  WantSample plain, changed;
  plain.params.temperature = changed.params.temperature = 0.0f;
  plain.top_logprobs = changed.top_logprobs = 132;
  changed.params.bias_tokens = {77};
  changed.params.biases = {100.0f};
  const std::vector<ExtendResult> results = engine.Run({1, {}, {RandomRun(1, 6, 0, 0, plain), RandomRun(1, 6, 0, 10, changed)}}).results;
  const auto &one = std::get<SampleResult>(results[0]), &other = std::get<SampleResult>(results[1]);
  CHECK(one.token != 77 && one.token == one.top_tokens[0]);
  CHECK_EQ(other.token, 77u);
  CHECK(one.top_tokens == other.top_tokens);
  CHECK_SAME_BITS("top log-probabilities", other.top_logprobs.data(), one.top_logprobs.data(), 132);
  const auto at = std::find(one.top_tokens.begin(), one.top_tokens.end(), 77u);
  CHECK_EQ(other.logprob, one.top_logprobs[static_cast<size_t>(at - one.top_tokens.begin())]);
}

// A value of token 5 is beyond fp16, so the cache holds an infinity, and what attends to it is NaN: only that Extend fails, also one of many rows, and
// ranks stay in step.
TEST(glm_nan_logits_fail_their_extend_alone) {
  const ModelFile file(WeightType::kF32);
  const auto poke = [&](const std::string& name, int64_t row, int64_t column, float value) {
    for (const TensorSource& tensor : file.tensors) {
      if (tensor.name != name) continue;
      const int64_t columns = tensor.shape.size() == 2 ? tensor.shape[1] : 0;
      std::FILE* model = std::fopen(tensor.file.c_str(), "r+b");
      std::fseek(model, static_cast<long>(tensor.offset + (row * columns + column) * 4), SEEK_SET);
      std::fwrite(&value, 4, 1, model);
      std::fclose(model);
    }
  };
  // The first component of token 5 is the largest of all by far, also when it is normalised: 6.9 where others have 1.7 at most.
  const std::string attention = "transformer.layers.0.attention.query_key_value", norm = "transformer.layers.0.input_layernorm";
  poke("transformer.word_embeddings.weight", 5, 0, 100.0f);
  poke(norm + ".weight", 0, 0, 1.0f);
  poke(norm + ".bias", 0, 0, 0.0f);
  poke(attention + ".weight", 2 * 12, 0, 3e4f);  // the first value of the first head

  const auto run = [](uint32_t seed, int64_t length, uint32_t first_block, bool is_bad, Want want) {
    Extend extend = RandomRun(seed, length, 0, first_block, std::move(want));
    std::replace(extend.tokens.begin(), extend.tokens.end(), 5u, 6u);
    if (is_bad) extend.tokens[1] = 5;
    return extend;
  };
  for (const int world_size : {1, 2}) {
    const auto steps = [&](Engine& engine) {
      const bool first_rank = !engine.Run({1, {}, {run(1, 3, 0, false, WantSample{})}}).results.empty();
      const StepResult result = engine.Run({2,
                                            {},
                                            {run(2, 3, 0, false, WantLogits{3}), run(3, 3, 8, true, WantSample{}), run(4, 90, 10, true, WantLogits{90}),
                                             run(5, 3, 40, true, WantNothing{}), run(6, 3, 42, false, WantLogits{3})}});
      const std::vector<ExtendResult> after = engine.Run({3, {}, {run(7, 3, 0, false, WantLogits{1})}}).results;
      std::vector<float> logits;
      if (!first_rank) return logits;
      CHECK_EQ(result.results.size(), size_t{5});
      for (const size_t bad : {1, 2}) {
        const auto* error = std::get_if<ErrorResult>(&result.results[bad]);
        CHECK(error != nullptr && error->message == "a logit is NaN: the weights or the KV cache are damaged");
      }
      CHECK(std::holds_alternative<WantNothing>(result.results[3]));
      for (const ExtendResult& good : {result.results[0], result.results[4], after[0]}) {
        for (const float logit : std::get<LogitsResult>(good).logits) logits.push_back(logit);
      }
      return logits;
    };
    const std::vector<float> logits = RunGroup(file, world_size, 2, std::nullopt, KvType::kF16, steps);
    CHECK_EQ(logits.size(), size_t{7 * 132});
    for (const float logit : logits) CHECK(std::isfinite(logit));
  }
}

}  // namespace tandem
