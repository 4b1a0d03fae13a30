#include "kernels/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>
#include <utility>

#include "core/error.h"
#include "kernels/philox.h"
#include "test/kernel_test.h"

namespace tandem::test {

namespace {

std::vector<float> Probs(const std::vector<float>& logits, const SamplingParams& params) {
  std::vector<float> probs(logits.size());
  Distribution(logits.data(), static_cast<int64_t>(logits.size()), params, probs.data());
  return probs;
}

SamplingParams Changing(SamplingParams params, std::vector<uint32_t> bias_tokens, std::vector<float> biases, float penalty, std::vector<uint32_t> repeated) {
  params.bias_tokens = std::move(bias_tokens);
  params.biases = std::move(biases);
  params.repetition_penalty = penalty;
  params.repeated_tokens = std::move(repeated);
  return params;
}

std::vector<uint32_t> Survivors(const std::vector<float>& probs) {
  std::vector<uint32_t> survivors;
  for (size_t v = 0; v < probs.size(); ++v) {
    if (probs[v] > 0.0f) survivors.push_back(static_cast<uint32_t>(v));
  }
  return survivors;
}

void CheckIs(const char* what, const std::vector<float>& probs, const std::vector<uint32_t>& survivors) {
  CHECK_EQ(Survivors(probs).size(), survivors.size());
  if (Survivors(probs) != survivors) Fail(__FILE__, __LINE__, std::string("other survivors than expected: ") + what);
  CHECK_NEAR(what, std::accumulate(probs.begin(), probs.end(), 0.0), 1.0, 1e-6 * static_cast<double>(probs.size()));
}

// Section 4 of the model specification, word by word, in doubles and with whole sorts.
std::vector<double> DistributionRef(const std::vector<float>& logits, const SamplingParams& params) {
  std::vector<double> l(logits.begin(), logits.end());
  for (size_t i = 0; i < params.bias_tokens.size(); ++i) {
    double& value = l[params.bias_tokens[i]];
    value = static_cast<float>(value + params.biases[i]);
  }
  for (const uint32_t token : std::set<uint32_t>(params.repeated_tokens.begin(), params.repeated_tokens.end())) {
    l[token] = static_cast<float>(l[token] > 0 ? l[token] / params.repetition_penalty : l[token] * params.repetition_penalty);
  }
  for (double& value : l) value = static_cast<float>(value / params.temperature);
  for (const uint32_t token : params.banned_tokens) l[token] = kBannedLogit;
  const auto softmax = [](const std::vector<double>& values) {
    const double max = *std::max_element(values.begin(), values.end());
    std::vector<double> probs;
    for (const double value : values) probs.push_back(std::exp(value - max));
    const double sum = std::accumulate(probs.begin(), probs.end(), 0.0);
    for (double& prob : probs) prob /= sum;
    return probs;
  };
  if (params.top_k > 0) {
    std::vector<double> sorted(l);
    std::sort(sorted.begin(), sorted.end(), std::greater<double>());
    for (double& value : l) value = value < sorted[params.top_k - 1] ? kBannedLogit : value;
  }
  if (params.top_p > 0.0f) {
    std::vector<size_t> order(l.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return l[a] > l[b]; });
    const std::vector<double> probs = softmax(l);
    double before = 0.0;
    for (const size_t v : order) {
      if (before > params.top_p) l[v] = kBannedLogit;
      before += probs[v];
    }
  }
  return softmax(l);
}

}  // namespace

// The known answers that come with the authors' own implementation (Random123, kat_vectors).
TEST(philox_gives_the_known_answers) {
  const auto check = [](std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key, std::array<uint32_t, 4> expected) {
    const std::array<uint32_t, 4> words = Philox4x32(counter, key);
    for (size_t i = 0; i < 4; ++i) CHECK_EQ(words[i], expected[i]);
  };
  check({0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  const uint32_t ones = 0xffffffff;
  check({ones, ones, ones, ones}, {ones, ones}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  check({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}, {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

TEST(noise_depends_on_every_part_of_its_key) {
  const NoiseKey key{1, 2, 3};
  CHECK_EQ(Uniform(key), Uniform(NoiseKey{1, 2, 3}));
  for (const NoiseKey& other : {NoiseKey{2, 2, 3}, NoiseKey{1ull << 32 | 1, 2, 3}, NoiseKey{1, 3, 3}, NoiseKey{1, 2, 4}, NoiseKey{1, 3, 2}}) {
    CHECK(Uniform(key) != Uniform(other));
    CHECK(Gumbel(key, 5) != Gumbel(other, 5));
  }
  CHECK(Gumbel(key, 5) != Gumbel(key, 6));
}

TEST(noise_has_its_distribution) {
  const int count = 100000;
  double uniform_sum = 0.0, uniform_squares = 0.0, gumbel_sum = 0.0, gumbel_squares = 0.0;
  for (int i = 0; i < count; ++i) {
    const NoiseKey key{42, 7, static_cast<uint32_t>(i)};
    const double u = Uniform(key), g = Gumbel(key, 3);
    CHECK(u >= 0.0 && u < 1.0 && std::isfinite(g));
    uniform_sum += u;
    uniform_squares += u * u;
    gumbel_sum += g;
    gumbel_squares += g * g;
  }
  // Five standard errors of each mean.
  CHECK_NEAR("mean of uniform", uniform_sum / count, 0.5, 5 * std::sqrt(1.0 / 12 / count));
  CHECK_NEAR("mean square of uniform", uniform_squares / count, 1.0 / 3, 5 * std::sqrt(4.0 / 45 / count));
  const double gamma = 0.57721566490153286, variance = 1.6449340668482264;
  CHECK_NEAR("mean of Gumbel", gumbel_sum / count, gamma, 5 * std::sqrt(variance / count));
  CHECK_NEAR("mean square of Gumbel", gumbel_squares / count, variance + gamma * gamma, 0.1);
}

TEST(distribution_follows_the_specification) {
  std::mt19937 generator(1);
  for (int round = 0; round < 400; ++round) {
    const int64_t vocab = round < 300 ? 1 + static_cast<int64_t>(generator() % 80) : 3000 + static_cast<int64_t>(generator() % 3000);
    std::vector<float> logits = RandomFloats(vocab, generator(), round % 3 == 0 ? 0.3f : 3.0f);
    if (round % 4 == 0) {
      for (float& logit : logits) logit = std::round(logit * 2) / 2;  // many ties
    }
    SamplingParams params;
    params.temperature = std::vector<float>{1.0f, 0.5f, 1.7f}[generator() % 3];
    params.top_k = generator() % 2 == 0 ? 0 : 1 + generator() % static_cast<uint32_t>(vocab);
    params.top_p = std::vector<float>{0.0f, 0.1f, 0.7f, 0.95f, 0.9999f}[generator() % 5];
    for (uint32_t i = generator() % 4; i > 0 && vocab > 8; --i) params.banned_tokens.push_back(generator() % static_cast<uint32_t>(vocab));
    if (round % 2 == 0) {
      for (uint32_t i = generator() % 20; i > 0; --i) params.bias_tokens.push_back(generator() % static_cast<uint32_t>(vocab));
      params.biases = RandomFloats(static_cast<int64_t>(params.bias_tokens.size()), generator(), 2.0f);
      params.repetition_penalty = std::vector<float>{1.0f, 0.7f, 1.2f, 2.5f}[generator() % 4];
      for (uint32_t i = generator() % 60; i > 0; --i) params.repeated_tokens.push_back(generator() % static_cast<uint32_t>(vocab));
    }
    const std::vector<float> probs = Probs(logits, params);
    const std::vector<double> expected = DistributionRef(logits, params);
    for (size_t v = 0; v < probs.size(); ++v) {
      CHECK_NEAR("round " + std::to_string(round) + " token " + std::to_string(v), probs[v], expected[v], 1e-6 * expected[v] + 1e-12);
      CHECK_EQ(probs[v] == 0.0f, expected[v] < 1e-45);
    }
  }
}

TEST(distribution_cuts_where_the_original_does) {
  const std::vector<float> ties = {1.0f, 3.0f, 2.0f, 2.0f, 2.0f, 0.0f};
  CheckIs("top-k keeps ties", Probs(ties, {1.0f, 2, 0.0f, {}}), {1, 2, 3, 4});
  CheckIs("top-k of a banned token", Probs(ties, {1.0f, 1, 0.0f, {1}}), {2, 3, 4});
  CheckIs("top-k of all", Probs(ties, {1.0f, 6, 0.0f, {}}), {0, 1, 2, 3, 4, 5});
  const std::vector<float> halves = {std::log(0.25f), std::log(0.5f), std::log(0.125f), std::log(0.125f)};
  CheckIs("the token that crosses p stays", Probs(halves, {1.0f, 0, 0.6f, {}}), {0, 1});
  CheckIs("the first token always stays", Probs(halves, {1.0f, 0, 0.01f, {}}), {1});
  CheckIs("p of the renormalised top-k", Probs(halves, {1.0f, 2, 0.7f, {}}), {0, 1});
  CheckIs("p of 1 is no limit", Probs(halves, {1.0f, 0, 1.0f, {}}), {0, 1, 2, 3});
  CheckIs("equal logits: lower ids stay", Probs(std::vector<float>(8, 1.0f), {1.0f, 0, 0.3f, {}}), {0, 1, 2});
  CheckIs("temperature 0 is greedy", Probs(ties, {0.0f, 0, 0.0f, {1}}), {2});
}

TEST(distribution_never_gives_a_banned_token_a_chance) {
  for (const float temperature : {0.0f, 1e-30f, 1e-6f, 1.0f, 100.0f}) {
    for (const float offset : {0.0f, -100.0f, 50.0f}) {
      std::vector<float> logits = RandomFloats(40, 3);
      for (float& logit : logits) logit += offset;
      const std::vector<float> probs = Probs(logits, {temperature, 0, 0.0f, {4, 17}});
      CHECK_EQ(probs[4], 0.0f);
      CHECK_EQ(probs[17], 0.0f);
      CHECK_NEAR("sum", std::accumulate(probs.begin(), probs.end(), 0.0), 1.0, 1e-5);
    }
  }
}

TEST(logit_changes_are_biases_then_the_repetition_penalty) {
  const auto greedy = [](const std::vector<float>& logits, const SamplingParams& params) {
    return SampleToken(BestIsa(), logits.data(), static_cast<int64_t>(logits.size()), params, NoiseKey{});
  };
  // Log-probabilities show the changed logits, up to a constant; token 0 is not changed.
  const auto changed = [](const std::vector<float>& logits, const SamplingParams& params, uint32_t token) {
    const std::vector<float> probs = Probs(logits, params);
    return std::log(static_cast<double>(probs[token])) - std::log(static_cast<double>(probs[0])) + logits[0];
  };
  const std::vector<float> logits = {0.5f, 3.0f, -2.0f, 0.0f, 1.0f};
  SamplingParams params = Changing({}, {2, 4, 4}, {1.0f, 0.25f, 0.5f}, 2.0f, {1, 2, 3, 4, 1, 1});
  CHECK_NEAR("positive: divided, once", changed(logits, params, 1), 1.5, 1e-6);
  CHECK_NEAR("biased, then negative: multiplied", changed(logits, params, 2), -2.0, 1e-6);
  CHECK_NEAR("zero stays", changed(logits, params, 3), 0.0, 1e-6);
  CHECK_NEAR("biased twice, then divided", changed(logits, params, 4), 0.875, 1e-6);

  params.temperature = 0.0f;
  CHECK_EQ(greedy(logits, params), 1u);
  params.repetition_penalty = 4.0f;
  CHECK_EQ(greedy(logits, params), 1u);  // 0.75 against 0.5
  params.repetition_penalty = 8.0f;
  CHECK_EQ(greedy(logits, params), 0u);
  params.banned_tokens.push_back(0);
  CHECK_EQ(greedy(logits, params), 1u);
}

TEST(logit_changes_that_change_nothing_keep_the_bits) {
  const std::vector<float> logits = RandomFloats(300, 11);
  for (const float temperature : {0.0f, 0.8f}) {
    const std::vector<float> plain = Probs(logits, {temperature, 20, 0.9f, {3}});
    const SamplingParams params = Changing({temperature, 20, 0.9f, {3}}, {5}, {0.0f}, 1.0f, {1, 2, 299});
    CHECK_SAME_BITS("no change", Probs(logits, params).data(), plain.data(), 300);
  }
}

TEST(logit_changes_of_any_size_give_a_distribution_without_banned_tokens) {
  constexpr float kMost = std::numeric_limits<float>::max();
  for (const float temperature : {0.0f, 1e-30f, 1.0f, 100.0f}) {
    for (const float bias : {kMost, -kMost, 1e6f, -1e6f}) {
      for (const float penalty : {1.0f, 1e-38f, 1e38f}) {
        const std::vector<float> logits = {1.0f, -2.0f, 3e38f, -3e38f, 5.0f, 0.0f};
        const std::vector<float> biases = {bias, bias, bias, bias, kMost};
        const std::vector<float> probs = Probs(logits, Changing({temperature, 3, 0.9f, {4, 5}}, {0, 1, 2, 3, 4}, biases, penalty, {0, 1, 2, 3, 4, 5}));
        CHECK_NEAR("sum", std::accumulate(probs.begin(), probs.end(), 0.0), 1.0, 1e-5);
        CHECK_EQ(probs[4], 0.0f);
        CHECK_EQ(probs[5], 0.0f);
      }
    }
  }
}

TEST(distribution_may_overwrite_the_logits) {
  std::vector<float> logits = RandomFloats(100, 3);
  const SamplingParams params{0.8f, 20, 0.9f, {3}};
  const std::vector<float> probs = Probs(logits, params);
  Distribution(logits.data(), 100, params, logits.data());
  CHECK_SAME_BITS("in place", logits.data(), probs.data(), 100);
}

TEST(sampling_refuses_bad_parameters_and_logits) {
  std::vector<float> logits = {1.0f, 2.0f, 3.0f};
  const auto run = [&](const SamplingParams& params) { SampleToken(BestIsa(), logits.data(), 3, params, NoiseKey{}); };
  const float nan = std::numeric_limits<float>::quiet_NaN();
  CHECK_THROWS(run({-1.0f, 0, 0.0f, {}}), ErrorCode::kInvalidArgument);
  CHECK_THROWS(run({nan, 0, 0.0f, {}}), ErrorCode::kInvalidArgument);
  CHECK_THROWS(run({1.0f, 4, 0.0f, {}}), ErrorCode::kInvalidArgument);
  CHECK_THROWS(run({1.0f, 0, 1.5f, {}}), ErrorCode::kInvalidArgument);
  CHECK_THROWS(run({1.0f, 0, nan, {}}), ErrorCode::kInvalidArgument);
  CHECK_THROWS(run({1.0f, 0, 0.0f, {3}}), ErrorCode::kInvalidArgument);
  const auto changed = [&](std::vector<uint32_t> bias_tokens, std::vector<float> biases, float penalty, std::vector<uint32_t> repeated) {
    run(Changing({}, std::move(bias_tokens), std::move(biases), penalty, std::move(repeated)));
  };
  const float infinity = std::numeric_limits<float>::infinity();
  changed({0}, {1.0f}, 1.5f, {2});
  CHECK_THROWS(changed({0}, {}, 1.0f, {}), ErrorCode::kInvalidArgument);
  CHECK_THROWS(changed({}, {1.0f}, 1.0f, {}), ErrorCode::kInvalidArgument);
  CHECK_THROWS(changed({3}, {1.0f}, 1.0f, {}), ErrorCode::kInvalidArgument);
  CHECK_THROWS(changed({0, 1}, {1.0f, nan}, 1.0f, {}), ErrorCode::kInvalidArgument);
  CHECK_THROWS(changed({0}, {-infinity}, 1.0f, {}), ErrorCode::kInvalidArgument);
  for (const float penalty : {0.0f, -1.0f, nan, infinity}) CHECK_THROWS(changed({}, {}, penalty, {}), ErrorCode::kInvalidArgument);
  CHECK_THROWS(changed({}, {}, 1.0f, {0, 3}), ErrorCode::kInvalidArgument);
  CHECK_THROWS(TopCandidates(logits.data(), 3, {3}, 1, nullptr), ErrorCode::kInvalidArgument);
  CHECK_THROWS(TopCandidates(logits.data(), 3, {}, 4, nullptr), ErrorCode::kInvalidArgument);
  CHECK_THROWS(TopCandidates(logits.data(), 3, {}, -1, nullptr), ErrorCode::kInvalidArgument);
  logits[1] = nan;
  CHECK_THROWS(run({1.0f, 0, 0.0f, {}}), ErrorCode::kInternal);
  CHECK_THROWS(run({0.0f, 0, 0.0f, {}}), ErrorCode::kInternal);
  CHECK_THROWS(TopCandidates(logits.data(), 3, {}, 1, nullptr), ErrorCode::kInternal);
}

TEST(sample_token_draws_from_the_distribution) {
  const std::vector<float> logits = {0.0f, 1.0f, -1.0f, 2.0f, 0.5f, 1.0f};
  const SamplingParams params{1.3f, 4, 0.0f, {1}};
  const std::vector<float> probs = Probs(logits, params);
  const int count = 40000;
  std::vector<int> drawn(6, 0);
  for (int i = 0; i < count; ++i) ++drawn[SampleToken(BestIsa(), logits.data(), 6, params, NoiseKey{9, 1, static_cast<uint32_t>(i)})];
  for (size_t v = 0; v < 6; ++v) {
    const double p = probs[v];
    CHECK_NEAR("share of token " + std::to_string(v), drawn[v] / static_cast<double>(count), p, 5 * std::sqrt(p * (1 - p) / count));
  }
  CHECK_EQ(SampleToken(BestIsa(), logits.data(), 6, params, NoiseKey{9, 1, 5}), SampleToken(BestIsa(), logits.data(), 6, params, NoiseKey{9, 1, 5}));
}

TEST(greedy_takes_the_lowest_id_among_equals) {
  const std::vector<float> logits = {1.0f, 5.0f, 5.0f, 7.0f};
  CHECK_EQ(SampleToken(BestIsa(), logits.data(), 4, {0.0f, 0, 0.0f, {}}, NoiseKey{}), 3u);
  CHECK_EQ(SampleToken(BestIsa(), logits.data(), 4, {0.0f, 0, 0.0f, {3}}, NoiseKey{}), 1u);
}

TEST(log_sum_exp_is_stable) {
  const std::vector<float> logits = {1000.0f, 1000.0f, -1000.0f};
  CHECK_NEAR("large", LogSumExp(logits.data(), 3), 1000.0 + std::log(2.0), 1e-12);
  const std::vector<float> small = RandomFloats(1000, 1);
  double sum = 0.0;
  for (const float logit : small) sum += std::exp(static_cast<double>(logit));
  CHECK_NEAR("small", LogSumExp(small.data(), 1000), std::log(sum), 1e-12);
}

TEST(log_sum_exp_of_each_instruction_set_agrees_with_its_definition) {
  for (const Isa isa : kAllIsas) {
    if (!IsaSupported(isa)) continue;
    for (int64_t count = 1; count <= 70; ++count) {
      std::vector<float> logits = RandomFloats(count + 1, static_cast<uint32_t>(count));
      for (float& logit : logits) logit *= 20.0f;
      const float* unaligned = logits.data() + 1;
      CHECK_NEAR("log sum", LogSumExp(isa, unaligned, count), LogSumExp(unaligned, count), 1e-6);
      CHECK_EQ(static_cast<int64_t>(SampleToken(isa, unaligned, count, {0.0f, 0, 0.0f, {}}, NoiseKey{})), std::max_element(unaligned, unaligned + count) - unaligned);
      CHECK(!HasNaN(isa, unaligned, count));
      logits[static_cast<size_t>(1 + count / 2)] = -std::numeric_limits<float>::infinity();
      CHECK(!HasNaN(isa, unaligned, count));
      if (count > 1) CHECK_NEAR("with a token that is impossible", LogSumExp(isa, unaligned, count), LogSumExp(unaligned, count), 1e-6);
      logits[static_cast<size_t>(1 + count / 2)] = std::numeric_limits<float>::quiet_NaN();
      CHECK(HasNaN(isa, unaligned, count));
    }
  }
}

TEST(top_candidates_are_the_largest_in_order) {
  std::vector<float> logits = RandomFloats(500, 5);
  for (float& logit : logits) logit = std::round(logit * 8) / 8;  // ties
  const std::vector<uint32_t> banned = {static_cast<uint32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin()), 3};
  std::vector<float> allowed(logits);
  for (const uint32_t token : banned) allowed[token] = kBannedLogit;
  const double log_sum = LogSumExp(allowed.data(), 500);
  const NoiseKey key{1, 2, 3};
  for (const NoiseKey* noise : {static_cast<const NoiseKey*>(nullptr), &key}) {
    std::vector<float> keys(500);
    for (uint32_t v = 0; v < 500; ++v) keys[v] = static_cast<float>(allowed[v] - log_sum + (noise ? Gumbel(*noise, v) : 0.0));
    std::vector<uint32_t> order(500);
    std::iota(order.begin(), order.end(), 0u);
    std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return keys[a] > keys[b]; });
    for (const int64_t count : {0, 1, 2, 32, 499, 500}) {
      const Candidates best = TopCandidates(logits.data(), 500, banned, count, noise);
      CHECK_EQ(static_cast<int64_t>(best.tokens.size()), count);
      CHECK_EQ(static_cast<int64_t>(best.logprobs.size()), count);
      CHECK_EQ(static_cast<int64_t>(best.keys.size()), count);
      for (size_t i = 0; i < best.tokens.size(); ++i) {
        CHECK_EQ(best.tokens[i], order[i]);
        CHECK_EQ(best.keys[i], keys[order[i]]);
        CHECK_EQ(best.logprobs[i], static_cast<float>(allowed[order[i]] - log_sum));
      }
    }
  }
}

// The first of the noisy order is a draw from softmax.
TEST(top_candidates_with_noise_draw_from_softmax) {
  const std::vector<float> logits = {0.0f, 1.0f, -1.0f, 2.0f};
  const std::vector<float> probs = Probs(logits, {1.0f, 0, 0.0f, {}});
  const int count = 40000;
  std::vector<int> drawn(4, 0);
  for (int i = 0; i < count; ++i) {
    const NoiseKey key{3, 1, static_cast<uint32_t>(i)};
    ++drawn[TopCandidates(logits.data(), 4, {}, 1, &key).tokens[0]];
  }
  for (size_t v = 0; v < 4; ++v) {
    const double p = probs[v];
    CHECK_NEAR("share of token " + std::to_string(v), drawn[v] / static_cast<double>(count), p, 5 * std::sqrt(p * (1 - p) / count));
  }
}

}  // namespace tandem::test
