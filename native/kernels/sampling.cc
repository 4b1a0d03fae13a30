// sampling.cc: from logits to a token, to candidates, or to log-probabilities. The order of the steps and their cut-offs are those of GLM-130B's
// BaseStrategy (model-spec section 4).
#include "kernels/sampling.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>

#include "core/error.h"
#include "kernels/philox.h"

#define TANDEM_VECTOR_FILE "kernels/sampling_vector.inc"
#include "kernels/vector/each_isa.inc"

namespace tandem {

namespace {

// The last counter word keeps the uses of one key apart.
enum class NoiseUse : uint32_t { kUniform = 0, kGumbel = 1 };

uint64_t RandomBits(const NoiseKey& key, uint32_t token, NoiseUse use) {
  const std::array<uint32_t, 4> words = Philox4x32({key.position, key.stream, token, static_cast<uint32_t>(use)},
                                                   {static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32)});
  return static_cast<uint64_t>(words[0]) << 32 | words[1];
}

// Results stay finite, so that no bias can do what a NaN does, or lift a token that is banned.
void ChangeLogits(const SamplingParams& params, float* logits) {
  const auto finite = [](float value) { return std::clamp(value, -std::numeric_limits<float>::max(), std::numeric_limits<float>::max()); };
  for (size_t i = 0; i < params.bias_tokens.size(); ++i) {
    float& logit = logits[params.bias_tokens[i]];
    logit = finite(logit + params.biases[i]);
  }
  if (params.repetition_penalty == 1.0f) return;
  std::vector<uint32_t> repeated(params.repeated_tokens);
  std::sort(repeated.begin(), repeated.end());
  repeated.erase(std::unique(repeated.begin(), repeated.end()), repeated.end());
  for (const uint32_t token : repeated) {
    float& logit = logits[token];
    logit = finite(logit > 0.0f ? logit / params.repetition_penalty : logit * params.repetition_penalty);
  }
}

void Ban(const std::vector<uint32_t>& banned, float logit, float* logits) {
  for (const uint32_t token : banned) logits[token] = logit;
}

void CheckLogits(const float* logits, int64_t vocab) {
  for (int64_t v = 0; v < vocab; ++v) {
    if (logits[v] <= std::numeric_limits<float>::max()) continue;  // false for NaN
    throw Error(ErrorCode::kInternal,
                "sampling: the logit of token " + std::to_string(v) + " is " + std::to_string(logits[v]) + ", not a number below infinity");
  }
}

void KeepTopK(uint32_t k, int64_t vocab, float* logits) {
  if (k == 0 || k == vocab) return;
  std::vector<float> order(logits, logits + vocab);
  std::nth_element(order.begin(), order.begin() + (k - 1), order.end(), std::greater<float>());
  const float kth = order[k - 1];
  for (int64_t v = 0; v < vocab; ++v) {
    if (logits[v] < kth) logits[v] = kBannedLogit;
  }
}

// Keeps the most probable tokens up to the first at which the probabilities, summed in descending order, exceed p; lower ids first among equals.
void KeepTopP(float p, int64_t vocab, float* logits) {
  if (p == 0.0f || p == 1.0f) return;  // a sum above 1 is a rounding error
  const float max = *std::max_element(logits, logits + vocab);
  std::vector<float> probs(static_cast<size_t>(vocab));
  double sum = 0.0;
  for (int64_t v = 0; v < vocab; ++v) sum += probs[static_cast<size_t>(v)] = std::exp(logits[v] - max);
  for (float& prob : probs) prob = static_cast<float>(prob / sum);

  // Tokens below (1 - p) / 2V have together less than 1 - p, so p is exceeded before the first of them: only the others need sorting.
  const float floor = (1.0f - p) / (2.0f * static_cast<float>(vocab));
  std::vector<uint32_t> order;
  for (int64_t v = 0; v < vocab; ++v) {
    if (probs[static_cast<size_t>(v)] >= floor) order.push_back(static_cast<uint32_t>(v));
  }
  const auto more_probable = [&](uint32_t a, uint32_t b) { return logits[a] > logits[b] || (logits[a] == logits[b] && a < b); };
  size_t kept = 0, sorted = 0;
  double cumulative = 0.0;
  while (kept < order.size()) {
    if (kept == sorted) {  // sort some more; most often the first few hundred are enough
      const size_t until = std::min(order.size(), sorted == 0 ? 512 : sorted * 8);
      if (until < order.size()) std::nth_element(order.begin() + sorted, order.begin() + until, order.end(), more_probable);
      std::sort(order.begin() + sorted, order.begin() + until, more_probable);
      sorted = until;
    }
    cumulative += probs[order[kept++]];
    if (static_cast<float>(cumulative) > p) break;
  }
  std::vector<float> survivors(static_cast<size_t>(vocab), kBannedLogit);
  for (size_t i = 0; i < kept; ++i) survivors[order[i]] = logits[order[i]];
  std::copy(survivors.begin(), survivors.end(), logits);
}

int64_t Argmax(const float* values, int64_t count) { return std::max_element(values, values + count) - values; }

// logits / temperature. Where that leaves the range in which kBannedLogit means "never" (a tiny temperature), the logits are taken relative to the
// largest one first, which is the same distribution.
void ApplyTemperature(float temperature, int64_t vocab, float* logits) {
  const float max = *std::max_element(logits, logits + vocab);
  const float scaled_max = max / temperature;
  const float shift = std::abs(scaled_max) < -kBannedLogit / 2 ? 0.0f : max;
  for (int64_t v = 0; v < vocab; ++v) logits[v] = (logits[v] - shift) / temperature;
}

}  // namespace

double Uniform(const NoiseKey& key) { return static_cast<double>(RandomBits(key, 0, NoiseUse::kUniform) >> 11) * 0x1p-53; }

double Gumbel(const NoiseKey& key, uint32_t token) {
  // 52 bits and a half, so that the number is inside (0, 1) without rounding.
  const double uniform = (static_cast<double>(RandomBits(key, token, NoiseUse::kGumbel) >> 12) + 0.5) * 0x1p-52;
  return -std::log(-std::log(uniform));
}

void CheckSamplingParams(const SamplingParams& params, int64_t vocab, const std::string& path) {
  const auto fail = [&](const std::string& field, const std::string& what) { throw Error(ErrorCode::kInvalidArgument, path + "." + field + ": " + what); };
  const auto check_tokens = [&](const char* field, const std::vector<uint32_t>& tokens) {
    for (size_t i = 0; i < tokens.size(); ++i) {
      if (tokens[i] < vocab) continue;
      fail(std::string(field) + "[" + std::to_string(i) + "]", "token " + std::to_string(tokens[i]) + ", the vocabulary has " + std::to_string(vocab));
    }
  };
  if (!std::isfinite(params.temperature) || params.temperature < 0.0f) fail("temperature", "must be a number >= 0");
  if (params.top_k > vocab) fail("topK", std::to_string(params.top_k) + ", the vocabulary has " + std::to_string(vocab));
  if (!(params.top_p >= 0.0f && params.top_p <= 1.0f)) fail("topP", "must be in 0 .. 1");
  if (params.biases.size() != params.bias_tokens.size()) {
    fail("biases", "has " + std::to_string(params.biases.size()) + " elements for " + std::to_string(params.bias_tokens.size()) + " biasTokens");
  }
  for (size_t i = 0; i < params.biases.size(); ++i) {
    if (!std::isfinite(params.biases[i])) fail("biases[" + std::to_string(i) + "]", "must be a finite number");
  }
  if (!std::isfinite(params.repetition_penalty) || params.repetition_penalty <= 0.0f) fail("repetitionPenalty", "must be a finite number > 0");
  check_tokens("bannedTokens", params.banned_tokens);
  check_tokens("biasTokens", params.bias_tokens);
  check_tokens("repeatedTokens", params.repeated_tokens);
}

void Distribution(const float* logits, int64_t vocab, const SamplingParams& params, float* probs) {
  if (vocab < 1) throw Error(ErrorCode::kInvalidArgument, "logits: there are none");
  CheckSamplingParams(params, vocab, "params");
  CheckLogits(logits, vocab);
  if (probs != logits) std::copy(logits, logits + vocab, probs);
  ChangeLogits(params, probs);
  Ban(params.banned_tokens, -std::numeric_limits<float>::infinity(), probs);
  if (params.temperature == 0.0f) {
    const int64_t best = Argmax(probs, vocab);
    std::fill(probs, probs + vocab, 0.0f);
    probs[best] = 1.0f;
    return;
  }
  ApplyTemperature(params.temperature, vocab, probs);
  Ban(params.banned_tokens, kBannedLogit, probs);
  KeepTopK(params.top_k, vocab, probs);
  KeepTopP(params.top_p, vocab, probs);
  const float max = *std::max_element(probs, probs + vocab);
  double sum = 0.0;
  for (int64_t v = 0; v < vocab; ++v) sum += probs[v] = std::exp(probs[v] - max);
  for (int64_t v = 0; v < vocab; ++v) probs[v] = static_cast<float>(probs[v] / sum);
}

uint32_t SampleToken(Isa isa, const float* logits, int64_t vocab, const SamplingParams& params, const NoiseKey& key) {
  const bool is_plain = params.banned_tokens.empty() && params.bias_tokens.empty() && params.repetition_penalty == 1.0f;
  if (params.temperature == 0.0f && is_plain && vocab > 0) {
    CheckSamplingParams(params, vocab, "params");
    float max = 0.0f, probe = 0.0f;
    TANDEM_SELECT(isa, ScanRow)(logits, vocab, &max, &probe);
    if (std::isnan(probe)) CheckLogits(logits, vocab);
    return static_cast<uint32_t>(std::find(logits, logits + vocab, max) - logits);
  }
  std::vector<float> probs(static_cast<size_t>(std::max<int64_t>(vocab, 0)));
  Distribution(logits, vocab, params, probs.data());
  const double total = std::accumulate(probs.begin(), probs.end(), 0.0);
  const double target = Uniform(key) * total;
  double cumulative = 0.0;
  for (int64_t v = 0; v < vocab; ++v) {
    cumulative += probs[static_cast<size_t>(v)];
    if (cumulative > target) return static_cast<uint32_t>(v);
  }
  return static_cast<uint32_t>(Argmax(probs.data(), vocab));
}

double LogSumExp(const float* logits, int64_t vocab) {
  if (vocab < 1) return -std::numeric_limits<double>::infinity();
  const double max = *std::max_element(logits, logits + vocab);
  if (std::isinf(max)) return max;
  double sum = 0.0;
  for (int64_t v = 0; v < vocab; ++v) sum += std::exp(logits[v] - max);
  return max + std::log(sum);
}

double LogSumExp(Isa isa, const float* logits, int64_t vocab) {
  float max = 0.0f, probe = 0.0f;
  TANDEM_SELECT(isa, ScanRow)(logits, vocab, &max, &probe);
  if (std::isnan(probe)) return LogSumExp(logits, vocab);
  return max + std::log(TANDEM_SELECT(isa, SumExp)(logits, vocab, max));
}

bool HasNaN(Isa isa, const float* logits, int64_t vocab) {
  float max = 0.0f, probe = 0.0f;
  TANDEM_SELECT(isa, ScanRow)(logits, vocab, &max, &probe);
  return std::isnan(probe) && std::any_of(logits, logits + vocab, [](float logit) { return std::isnan(logit); });
}

Candidates TopCandidates(const float* logits, int64_t vocab, const std::vector<uint32_t>& banned, int64_t count, const NoiseKey* key) {
  if (count < 0 || count > vocab) {
    throw Error(ErrorCode::kInvalidArgument,
                "sampling: " + std::to_string(count) + " candidates wanted, the vocabulary has " + std::to_string(vocab));
  }
  Candidates best;
  if (count == 0) return best;
  for (const uint32_t token : banned) {
    if (token < vocab) continue;
    throw Error(ErrorCode::kInvalidArgument, "sampling: banned token " + std::to_string(token) + ", the vocabulary has " + std::to_string(vocab));
  }
  CheckLogits(logits, vocab);
  std::vector<float> allowed(logits, logits + vocab);
  Ban(banned, kBannedLogit, allowed.data());
  const double log_sum = LogSumExp(allowed.data(), vocab);

  struct Candidate {
    float order;
    float logprob;
    uint32_t token;
  };
  const auto better = [](const Candidate& a, const Candidate& b) { return a.order > b.order || (a.order == b.order && a.token < b.token); };
  std::vector<Candidate> heap;  // its front is the worst of the best `count` so far
  heap.reserve(static_cast<size_t>(count));
  for (int64_t v = 0; v < vocab; ++v) {
    const uint32_t token = static_cast<uint32_t>(v);
    const float logprob = static_cast<float>(allowed[token] - log_sum);
    const float order = key == nullptr ? logprob : static_cast<float>(allowed[token] - log_sum + Gumbel(*key, token));
    const Candidate candidate{order, logprob, token};
    if (static_cast<int64_t>(heap.size()) == count) {
      if (!better(candidate, heap.front())) continue;
      std::pop_heap(heap.begin(), heap.end(), better);
      heap.pop_back();
    }
    heap.push_back(candidate);
    std::push_heap(heap.begin(), heap.end(), better);
  }
  std::sort_heap(heap.begin(), heap.end(), better);
  for (const Candidate& candidate : heap) {
    best.tokens.push_back(candidate.token);
    best.logprobs.push_back(candidate.logprob);
    best.keys.push_back(candidate.order);
  }
  return best;
}

}  // namespace tandem
