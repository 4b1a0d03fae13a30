// From one row of logits to a token, to candidates, or to log-probabilities (model-spec section 4; orders and cut-offs are the original's).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/cpu_features.h"

namespace tandem {

constexpr float kBannedLogit = -65504.0f;

// Key of the counter-based generator (Philox 4x32-10): the same key gives the same numbers, whatever else runs.
struct NoiseKey {
  uint64_t seed = 0;
  uint32_t stream = 0;
  uint32_t position = 0;
};

// Uniform in [0, 1) with 53 bits, one draw for a key; and Gumbel noise of one token for a key.
double Uniform(const NoiseKey& key);
double Gumbel(const NoiseKey& key, uint32_t token);

struct SamplingParams {
  float temperature = 1.0f;  // 0: argmax, the lowest id among equals
  uint32_t top_k = 0;        // 0: off; ties at the k-th value all stay; k > V is an error
  float top_p = 0.0f;        // 0: off; the token that crosses p stays
  std::vector<uint32_t> banned_tokens = {};
  // Changes of the logits, in this order and before all of the above.
  std::vector<uint32_t> bias_tokens = {};  // biases[i] is added to the logit of bias_tokens[i]
  std::vector<float> biases = {};
  // CTRL (Keskar et al. 2019), section 4.1: a positive logit of a repeated token is divided by it, a negative one multiplied; 1: off. However often a token
  // is listed, it is penalised once.
  float repetition_penalty = 1.0f;
  std::vector<uint32_t> repeated_tokens = {};
};

// Throws kInvalidArgument naming the field, as in "<path>.topK": values out of range, tokens outside the vocabulary.
void CheckSamplingParams(const SamplingParams& params, int64_t vocab, const std::string& path);

// probs[v]: what SampleToken draws from. logits, probs: [vocab], may be the same memory. Throws kInvalidArgument.
void Distribution(const float* logits, int64_t vocab, const SamplingParams& params, float* probs);

// One draw by inverting the cumulative sum in the order of token ids. Greedy at temperature 0. Throws kInvalidArgument; kInternal if a logit is NaN.
uint32_t SampleToken(Isa isa, const float* logits, int64_t vocab, const SamplingParams& params, const NoiseKey& key);

// log(sum(exp(logits))) in double: the definition. And with float32 exponentials, 1e-6 from it at most.
double LogSumExp(const float* logits, int64_t vocab);
double LogSumExp(Isa isa, const float* logits, int64_t vocab);

bool HasNaN(Isa isa, const float* logits, int64_t vocab);

// The `count` tokens with the largest log-softmax(logits with banned set to kBannedLogit), or, where key is given, with the largest log-softmax + Gumbel
// noise: draws without replacement from softmax. Best first; among equals the lower id. keys[i] is what they are ordered by.
struct Candidates {
  std::vector<uint32_t> tokens;
  std::vector<float> logprobs;
  std::vector<float> keys;
};
Candidates TopCandidates(const float* logits, int64_t vocab, const std::vector<uint32_t>& banned, int64_t count, const NoiseKey* key);

}  // namespace tandem
