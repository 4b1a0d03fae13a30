#include "kernels/cuda/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <random>
#include <string>

#include "core/error.h"
#include "test/cuda/device_test.h"

namespace tandem::test {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// One request as the CPU takes it.
struct Wanted {
  cuda::SamplingKind kind;
  int64_t row = 0;
  SamplingParams params = {};
  uint32_t count = 0;
  std::optional<NoiseKey> key = {};
  uint32_t target = 0;
};

struct Evaluated {
  std::vector<cuda::SamplingResult> results;
  std::vector<std::string> errors;  // "" for none
  std::vector<uint32_t> tokens;
};

Evaluated Evaluate(const std::vector<float>& logits, int64_t stride, int64_t vocab, const std::vector<Wanted>& wanted) {
  cuda::SamplingBatch batch(vocab);
  for (const Wanted& want : wanted) {
    switch (want.kind) {
      case cuda::SamplingKind::kNothing: batch.AddNothing(); break;
      case cuda::SamplingKind::kSample: batch.AddSample(want.row, want.params, want.key.value_or(NoiseKey{}), want.count); break;
      case cuda::SamplingKind::kCandidates: batch.AddCandidates(want.row, want.count, want.params.banned_tokens, want.key ? &*want.key : nullptr); break;
      case cuda::SamplingKind::kTarget: batch.AddTarget(want.row, want.target); break;
    }
  }
  std::vector<unsigned char> packed(static_cast<size_t>(batch.RequestBytes()));
  batch.Pack(packed.data());
  const DeviceArray<float> logits_on_device(logits);
  const DeviceArray<unsigned char> requests(packed);
  DeviceArray<unsigned char> scratch(cuda::SamplingScratchBytes(batch.count(), vocab)), results(batch.ResultBytes());
  DeviceArray<uint32_t> tokens(batch.count());
  cuda::EvaluateRequests(logits_on_device.get(), stride, vocab, requests.get(), batch.count(), batch.has_noise(), scratch.get(), results.get(), tokens.get(),
                         nullptr);
  const std::vector<unsigned char> read = results.Download();
  scratch.Download();  // looks at the guard behind it
  CHECK_EQ(std::memcmp(logits_on_device.Download().data(), logits.data(), logits.size() * sizeof(float)), 0);
  Evaluated evaluated;
  evaluated.tokens = tokens.Download();
  for (int64_t i = 0; i < batch.count(); ++i) {
    evaluated.results.emplace_back();
    evaluated.errors.emplace_back();
    try {
      evaluated.results.back() = batch.Read(read.data(), i);
    } catch (const Error& error) {
      CHECK(error.code() == ErrorCode::kInternal);
      evaluated.errors.back() = error.what();
    }
  }
  return evaluated;
}

std::string Describe(const Wanted& want, int64_t vocab) {
  const SamplingParams& p = want.params;
  return "vocabulary " + std::to_string(vocab) + ", temperature " + std::to_string(p.temperature) + ", top k " + std::to_string(p.top_k) + ", top p " +
         std::to_string(p.top_p) + ", banned " + std::to_string(p.banned_tokens.size()) + ", biased " + std::to_string(p.bias_tokens.size()) + ", repeated " +
         std::to_string(p.repeated_tokens.size()) + ", count " + std::to_string(want.count) + (want.key ? ", noise" : "");
}

// fp32 exponentials on one side or both: a few ulps of the largest terms, and the result's own rounding.
void CheckLogProb(const std::string& what, float logprob, double expected) {
  if (static_cast<double>(logprob) == expected) return;  // -infinity too
  CHECK_NEAR(what, logprob, expected, std::isinf(expected) ? 0.0 : 1e-6 + std::abs(expected) * 0x1p-23);
}

// Against the functions that the CPU backend calls.
void CheckAgainstCpu(const std::vector<float>& logits, int64_t stride, int64_t vocab, const std::vector<Wanted>& wanted, const Evaluated& evaluated) {
  for (size_t i = 0; i < wanted.size(); ++i) {
    const Wanted& want = wanted[i];
    const cuda::SamplingResult& result = evaluated.results[i];
    const float* row = logits.data() + want.row * stride;
    const std::string what = Describe(want, vocab);
    CHECK_EQ(evaluated.errors[i], "");
    if (want.kind != cuda::SamplingKind::kSample) CHECK_EQ(evaluated.tokens[i], 0xffffffffu);
    const auto check_ranked = [&](const Candidates& expected) {
      CHECK_EQ(result.ranked.tokens.size(), expected.tokens.size());
      for (size_t j = 0; j < std::min(expected.tokens.size(), result.ranked.tokens.size()); ++j) {
        if (result.ranked.tokens[j] != expected.tokens[j]) {
          // Equal after rounding on one side and not on the other?
          CheckLogProb(what + ": key of place " + std::to_string(j), result.ranked.keys[j], expected.keys[j]);
          Fail(__FILE__, __LINE__, what + ": place " + std::to_string(j) + " has token " + std::to_string(result.ranked.tokens[j]) + ", on the CPU " +
                                       std::to_string(expected.tokens[j]));
        }
        CheckLogProb(what + ": log-probability", result.ranked.logprobs[j], expected.logprobs[j]);
        CheckLogProb(what + ": key", result.ranked.keys[j], expected.keys[j]);
      }
    };
    if (want.kind == cuda::SamplingKind::kSample) {
      const uint32_t token = SampleToken(Isa::kGeneric, row, vocab, want.params, want.key.value_or(NoiseKey{}));
      if (result.token != token) {
        Fail(__FILE__, __LINE__, what + ": token " + std::to_string(result.token) + ", on the CPU " + std::to_string(token));
      }
      CHECK_EQ(evaluated.tokens[i], result.token);
      const double logprob = row[token] - LogSumExp(row, vocab);
      CheckLogProb(what + ": log-probability", result.logprob, logprob);
      check_ranked(TopCandidates(row, vocab, {}, want.count, nullptr));
    } else if (want.kind == cuda::SamplingKind::kCandidates) {
      check_ranked(TopCandidates(row, vocab, want.params.banned_tokens, want.count, want.key ? &*want.key : nullptr));
    } else if (want.kind == cuda::SamplingKind::kTarget) {
      const double logprob = row[want.target] - LogSumExp(row, vocab);
      CheckLogProb(what + ": log-probability", result.logprob, logprob);
    }
  }
}

void Check(const std::vector<float>& logits, int64_t stride, int64_t vocab, const std::vector<Wanted>& wanted) {
  CheckAgainstCpu(logits, stride, vocab, wanted, Evaluate(logits, stride, vocab, wanted));
}

class Random {
 public:
  explicit Random(uint32_t seed) : generator_(seed) {}
  uint32_t Below(uint32_t end) { return static_cast<uint32_t>(generator_() % end); }
  bool OneIn(uint32_t n) { return Below(n) == 0; }
  float Normal(float scale) { return std::normal_distribution<float>(0.0f, scale)(generator_); }
  float Unit() { return static_cast<float>(Below(1 << 24)) * 0x1p-24f; }
  template <typename T>
  T OneOf(std::initializer_list<T> values) { return values.begin()[Below(static_cast<uint32_t>(values.size()))]; }
  std::vector<uint32_t> Tokens(uint32_t count, int64_t vocab) {
    std::vector<uint32_t> tokens;
    for (uint32_t i = 0; i < count; ++i) tokens.push_back(Below(static_cast<uint32_t>(vocab)));
    return tokens;
  }

 private:
  std::mt19937 generator_;
};

// Logits as they come, with ties, nearly all equal, far apart, with impossible tokens.
std::vector<float> SomeLogits(Random& random, int64_t count) {
  const float scale = random.OneOf({0.0f, 0.01f, 1.0f, 3.0f, 3.0f, 40.0f, 1000.0f});
  const float step = random.OneOf({0.0f, 0.0f, 0.25f, 2.0f});
  const float offset = random.OneOf({0.0f, 0.0f, -50.0f, 1000.0f});
  const bool has_impossible = random.OneIn(8);
  std::vector<float> logits;
  for (int64_t i = 0; i < count; ++i) {
    float logit = random.Normal(scale) + offset;
    if (step > 0.0f) logit = std::round(logit / step) * step;
    if (has_impossible && i > 0 && random.OneIn(4)) logit = -kInfinity;
    logits.push_back(logit);
  }
  return logits;
}

SamplingParams SomeParams(Random& random, int64_t vocab) {
  SamplingParams params;
  const uint32_t v = static_cast<uint32_t>(vocab);
  params.temperature = random.OneOf({1.0f, 1.0f, 0.7f, 1.3f, 0.05f, 1e-4f, 1e-30f, 50.0f, 0.0f});
  params.top_k = std::min(v, random.OneOf({0u, 0u, 1u, 2u, 10u, 40u, v / 2, v - 1, v}));
  params.top_p = random.OneOf({0.0f, 0.0f, 1.0f, 1e-6f, 0.3f, 0.5f, 0.7f, 0.9f, 0.999f, 0.9999999f, random.Unit()});
  if (random.OneIn(3)) params.banned_tokens = random.Tokens(1 + random.Below(5), vocab);
  if (random.OneIn(40)) params.banned_tokens = random.Tokens(4 * v, vocab);  // nearly all, or all
  if (random.OneIn(3)) {
    params.bias_tokens = random.Tokens(1 + random.Below(6), vocab);
    if (random.OneIn(2)) params.bias_tokens.push_back(params.bias_tokens[0]);
    for (size_t i = 0; i < params.bias_tokens.size(); ++i) params.biases.push_back(random.OneIn(10) ? random.OneOf({3e38f, -3e38f}) : random.Normal(3.0f));
  }
  if (random.OneIn(3)) {
    params.repetition_penalty = random.OneOf({1.0f, 1.2f, 0.5f, 1e30f});
    params.repeated_tokens = random.Tokens(1 + random.Below(20), vocab);
  }
  return params;
}

Wanted SomeWant(Random& random, int64_t row, int64_t vocab) {
  Wanted want;
  want.row = row;
  want.params = SomeParams(random, vocab);
  want.key = NoiseKey{random.Below(1000) * 0x123456789ull, random.Below(100), random.Below(3000)};
  const uint32_t most = static_cast<uint32_t>(std::min<int64_t>(vocab, cuda::kMaxDeviceCandidates));
  want.count = random.OneIn(2) ? 0 : std::min(most, random.OneOf({1u, 2u, 5u, 20u, most}));
  switch (random.Below(10)) {
    default: want.kind = cuda::SamplingKind::kSample; break;
    case 0:
    case 1:
      want.kind = cuda::SamplingKind::kCandidates;
      if (random.OneIn(2)) want.key.reset();
      break;
    case 2:
      want.kind = cuda::SamplingKind::kTarget;
      want.target = random.Below(static_cast<uint32_t>(vocab));
      break;
    case 3: want.kind = cuda::SamplingKind::kNothing; break;
  }
  return want;
}

// The CPU has no defined answer where all tokens that are left have -infinity: then it compares NaN.
bool IsDefined(const Wanted& want, const float* row, int64_t vocab) {
  std::vector<bool> banned(static_cast<size_t>(vocab), false), raised(banned);
  for (const uint32_t token : want.params.banned_tokens) banned[token] = true;
  for (const uint32_t token : want.params.bias_tokens) raised[token] = true;
  if (want.params.repetition_penalty != 1.0f) {
    for (const uint32_t token : want.params.repeated_tokens) raised[token] = true;
  }
  bool is_all_banned = true;
  for (int64_t v = 0; v < vocab; ++v) {
    const size_t place = static_cast<size_t>(v);
    if (!banned[place]) is_all_banned = false;
    if (!banned[place] && (raised[place] || row[v] > -kInfinity)) return true;
  }
  return is_all_banned;
}

std::vector<Wanted> SomeWants(Random& random, const std::vector<float>& logits, int64_t rows, int64_t stride, int64_t vocab) {
  std::vector<Wanted> wanted;
  while (static_cast<int64_t>(wanted.size()) < rows) {
    const int64_t row = static_cast<int64_t>(wanted.size());
    const Wanted want = SomeWant(random, row, vocab);
    if (IsDefined(want, logits.data() + row * stride, vocab)) wanted.push_back(want);
  }
  return wanted;
}

std::vector<float> RowsOfLogits(Random& random, int64_t rows, int64_t stride) {
  std::vector<float> logits;
  for (int64_t row = 0; row < rows; ++row) {
    const std::vector<float> more = SomeLogits(random, stride);
    logits.insert(logits.end(), more.begin(), more.end());
  }
  return logits;
}

void CheckSame(const cuda::SamplingResult& a, const cuda::SamplingResult& b) {
  CHECK_EQ(a.token, b.token);
  CHECK_SAME_BITS("log-probability", &a.logprob, &b.logprob, 1);
  CHECK(a.ranked.tokens == b.ranked.tokens);
  CHECK_SAME_BITS("log-probabilities", a.ranked.logprobs.data(), b.ranked.logprobs.data(), static_cast<int64_t>(a.ranked.logprobs.size()));
  CHECK_SAME_BITS("keys", a.ranked.keys.data(), b.ranked.keys.data(), static_cast<int64_t>(a.ranked.keys.size()));
}

}  // namespace

TEST(cuda_sampling_equals_the_cpu_for_random_requests) {
  ForEachThreadOrder([] {
    Random random(1);
    for (const int64_t vocab : {1, 2, 3, 7, 31, 32, 33, 100, 127, 500, 1000, 2000}) {
      const int64_t rows = vocab < 500 ? 24 : 16, stride = vocab + random.Below(40);
      const std::vector<float> logits = RowsOfLogits(random, rows, stride);
      Check(logits, stride, vocab, SomeWants(random, logits, rows, stride, vocab));
    }
  });
}

// Several slices of a row, and a last one that is not whole.
TEST(cuda_sampling_equals_the_cpu_for_large_vocabularies) {
  ForEachThreadOrder([] {
    Random random(2);
    for (const int64_t vocab : {4096, 4097, 20000}) {
      const int64_t rows = 5, stride = vocab + 3;
      const std::vector<float> logits = RowsOfLogits(random, rows, stride);
      Check(logits, stride, vocab, SomeWants(random, logits, rows, stride, vocab));
    }
  });
}

TEST(cuda_sampling_equals_the_cpu_for_the_vocabulary_of_glm_130b) {
  const int64_t vocab = 150528;
  Random random(3);
  std::vector<float> logits;
  for (int64_t i = 0; i < 2 * vocab; ++i) logits.push_back(random.Normal(i < vocab ? 3.0f : 0.5f));
  Wanted top_k_and_p = {cuda::SamplingKind::kSample, 0, {0.9f, 40, 0.9f, {5, 6}}, 10, NoiseKey{1, 2, 3}};
  Wanted plain = {cuda::SamplingKind::kSample, 0, {}, 0, NoiseKey{4, 5, 6}};
  Wanted greedy = {cuda::SamplingKind::kSample, 1, {0.0f}, 0, NoiseKey{}};
  Wanted flat_top_p = {cuda::SamplingKind::kSample, 1, {1.0f, 0, 0.7f}, 0, NoiseKey{7, 8, 9}};  // more tokens than are taken out of a row
  Wanted noisy = {cuda::SamplingKind::kCandidates, 0, {}, 32, NoiseKey{1, 1, 1}};
  Check(logits, vocab, vocab, {top_k_and_p, plain, greedy, flat_top_p, noisy});
}

// All tokens alike: what is kept is decided by ids, and whether a sum is above p by its last bit.
TEST(cuda_sampling_keeps_the_lower_ids_among_equals) {
  ForEachThreadOrder([] {
    std::vector<Wanted> wanted;
    const int64_t vocab = 10;
    for (const float p : {0.05f, 0.1f, 0.2f, 0.3f, 0.4f, 0.5f, 0.6f, 0.7f, 0.8f, 0.9f, 0.95f, 0.9999999f}) {
      for (uint32_t i = 0; i < 4; ++i) wanted.push_back({cuda::SamplingKind::kSample, 0, {1.0f, i == 3 ? 5u : 0u, p}, 4, NoiseKey{i, 0, 0}});
    }
    for (uint32_t i = 0; i < 8; ++i) wanted.push_back({cuda::SamplingKind::kSample, 1, {1.0f, 2, 0.0f}, 0, NoiseKey{i, 1, 0}});
    wanted.push_back({cuda::SamplingKind::kSample, 0, {0.0f}, 0, NoiseKey{}});
    wanted.push_back({cuda::SamplingKind::kCandidates, 0, {1.0f, 0, 0.0f, {0, 3, 3}}, 5, {}});
    std::vector<float> logits(20, 2.5f);
    logits[3] = -0.0f, logits[4] = 0.0f;
    for (size_t v : {10, 12, 15, 19}) logits[v] = 1.0f;
    for (size_t v : {3, 4}) logits[v] = 2.5f;
    Check(logits, vocab, vocab, wanted);
  });
}

TEST(cuda_sampling_takes_zero_and_minus_zero_as_equal) {
  const std::vector<float> logits = {-1.0f, -0.0f, 0.0f, -0.0f};
  std::vector<Wanted> wanted = {{cuda::SamplingKind::kSample, 0, {0.0f}, 4, NoiseKey{}}, {cuda::SamplingKind::kCandidates, 0, {}, 4, {}}};
  for (uint32_t i = 0; i < 20; ++i) wanted.push_back({cuda::SamplingKind::kSample, 0, {1.0f, 1, 0.0f}, 0, NoiseKey{i, 1, 0}});
  Check(logits, 4, 4, wanted);
}

// The same tokens in all lists, at other places of each: greedy tells the orders apart.
TEST(cuda_sampling_changes_logits_in_the_order_of_the_cpu) {
  ForEachThreadOrder([] {
    const uint32_t vocab = 100;
    std::vector<float> logits(vocab, 1.0f);
    std::vector<Wanted> wanted;
    for (const uint32_t token : {0u, 1u, 50u, 99u}) {
      SamplingParams biased_then_divided = {0.0f};
      for (uint32_t v = 0; v < vocab; ++v) biased_then_divided.bias_tokens.push_back(v);
      biased_then_divided.biases.assign(vocab, 0.0f);
      biased_then_divided.biases[token] = 5.0f;  // 6 / 100, below the others; 1 / 100 + 5 is above them
      biased_then_divided.repetition_penalty = 100.0f;
      biased_then_divided.repeated_tokens = {token};
      wanted.push_back({cuda::SamplingKind::kSample, 0, biased_then_divided, 0, {}});
      biased_then_divided.bias_tokens = {token};
      biased_then_divided.biases = {5.0f};
      for (uint32_t v = 0; v < token; ++v) biased_then_divided.repeated_tokens.push_back(v);
      wanted.push_back({cuda::SamplingKind::kSample, 0, biased_then_divided, 0, {}});
      SamplingParams all_banned = {0.0f};  // the first; a token that is penalised after its ban becomes finite
      for (uint32_t v = 0; v < vocab; ++v) all_banned.banned_tokens.push_back(v);
      all_banned.repetition_penalty = 2.0f;
      all_banned.repeated_tokens = {token};
      wanted.push_back({cuda::SamplingKind::kSample, 0, all_banned, 0, {}});
      SamplingParams twice = {0.0f};  // 1 + 1e8 - 1e8 is 0 in fp32, and 1e8 is added first
      twice.bias_tokens = {token, (token + 1) % vocab, token};
      twice.biases = {1e8f, -0.5f, -1e8f};
      wanted.push_back({cuda::SamplingKind::kSample, 0, twice, 0, {}});
    }
    Check(logits, vocab, vocab, wanted);
  });
}

// Many draws from one row, so that a wrong token of a narrow distribution has little chance to stay unseen.
TEST(cuda_sampling_draws_what_the_cpu_draws) {
  const int64_t vocab = 50;
  const std::vector<float> logits = RandomFloats(vocab, 1, 2.0f);
  std::vector<Wanted> wanted;
  for (uint32_t i = 0; i < 600; ++i) {
    wanted.push_back({cuda::SamplingKind::kSample, 0, {1.0f, i % 3 == 0 ? 20u : 0u, i % 2 == 0 ? 0.8f : 0.0f}, 0, NoiseKey{7, 3, i}});
  }
  Check(logits, vocab, vocab, wanted);
}

TEST(cuda_sampling_rows_have_the_same_bits_in_every_batch) {
  ForEachThreadOrder([] {
    for (const int64_t vocab : {300, 5000}) {
      Random random(4);
      const int64_t rows = 8;
      const std::vector<float> logits = RowsOfLogits(random, rows, vocab);
      const std::vector<Wanted> wanted = SomeWants(random, logits, rows, vocab, vocab);
      const Evaluated all = Evaluate(logits, vocab, vocab, wanted);
      for (size_t i = 0; i < wanted.size(); ++i) CheckSame(Evaluate(logits, vocab, vocab, {wanted[i]}).results[0], all.results[i]);
    }
  });
}

TEST(cuda_sampling_says_which_rows_have_no_answer) {
  ForEachThreadOrder([] {
    const int64_t vocab = 5000;
    std::vector<float> logits = RandomFloats(3 * vocab, 1);
    logits[static_cast<size_t>(vocab + 4711)] = kInfinity;
    logits[static_cast<size_t>(vocab + 4900)] = kInfinity;
    logits[static_cast<size_t>(2 * vocab + 4999)] = std::numeric_limits<float>::quiet_NaN();
    std::vector<Wanted> wanted;
    for (int64_t row = 0; row < 3; ++row) {
      wanted.push_back({cuda::SamplingKind::kSample, row, {}, 3, NoiseKey{1, 2, 3}});
      wanted.push_back({cuda::SamplingKind::kSample, row, {0.0f}, 0, NoiseKey{}});
      wanted.push_back({cuda::SamplingKind::kCandidates, row, {}, 5, NoiseKey{1, 2, 3}});
      wanted.push_back({cuda::SamplingKind::kTarget, row, {}, 0, {}, 7});
    }
    const Evaluated evaluated = Evaluate(logits, vocab, vocab, wanted);
    for (size_t i = 0; i < 4; ++i) CHECK_EQ(evaluated.errors[i], "");
    for (size_t i = 4; i < 7; ++i) CHECK_EQ(evaluated.errors[i], "sampling: the logit of token 4711 is inf, not a number below infinity");
    CHECK_EQ(evaluated.errors[7], "");  // nothing against log-probabilities next to infinity
    CHECK_EQ(evaluated.results[7].logprob, -kInfinity);
    for (size_t i = 8; i < 12; ++i) CHECK_EQ(evaluated.errors[i], "a logit is NaN: the weights or the KV cache are damaged");
  });
}

TEST(cuda_sampling_refuses_what_the_device_does_not_do) {
  cuda::SamplingBatch batch(1000);
  CHECK_THROWS(batch.AddCandidates(0, cuda::kMaxDeviceCandidates + 1, {}, nullptr), ErrorCode::kInvalidArgument);
  CHECK_THROWS(batch.AddCandidates(0, 1, {1000}, nullptr), ErrorCode::kInvalidArgument);
  CHECK_THROWS(batch.AddSample(0, {}, {}, cuda::kMaxDeviceCandidates + 1), ErrorCode::kInvalidArgument);
  CHECK_THROWS(batch.AddSample(0, {1.0f, 1001}, {}, 0), ErrorCode::kInvalidArgument);
  CHECK_THROWS(batch.AddTarget(0, 1000), ErrorCode::kInvalidArgument);
  CHECK_EQ(batch.count(), 0);
  CHECK_THROWS(cuda::EvaluateRequests(nullptr, 0, 0, nullptr, 1, false, nullptr, nullptr, nullptr, nullptr), ErrorCode::kInvalidArgument);
}

}  // namespace tandem::test
