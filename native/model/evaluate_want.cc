#include "model/evaluate_want.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>

#include "core/error.h"

namespace tandem {
namespace {

SampleResult Sample(Isa isa, const float* logits, int64_t vocab, const WantSample& want) {
  SampleResult result;
  result.token = SampleToken(isa, logits, vocab, want.params, want.noise);
  const double log_sum = LogSumExp(isa, logits, vocab);
  result.logprob = static_cast<float>(logits[result.token] - log_sum);
  if (want.top_logprobs > 0) {
    Candidates top = TopCandidates(logits, vocab, {}, want.top_logprobs, nullptr);
    result.top_tokens = std::move(top.tokens);
    for (const uint32_t token : result.top_tokens) result.top_logprobs.push_back(static_cast<float>(logits[token] - log_sum));
  }
  return result;
}

}  // namespace

ExtendResult EmptyResult(const Want& want, int64_t vocab) {
  const size_t rows = static_cast<size_t>(WantedRows(want));
  if (std::holds_alternative<WantSample>(want)) return SampleResult{};
  if (std::holds_alternative<WantCandidates>(want)) return Candidates{};
  if (std::holds_alternative<WantTargets>(want)) return TargetsResult{std::vector<float>(rows)};
  if (std::holds_alternative<WantLogits>(want)) return LogitsResult{std::vector<float>(rows * static_cast<size_t>(vocab))};
  return WantNothing{};
}

void EvaluateRow(Isa isa, const float* logits, int64_t vocab, const Want& want, int64_t index, ExtendResult& result) {
  if (std::holds_alternative<ErrorResult>(result)) return;
  if (HasNaN(isa, logits, vocab)) {
    throw Error(ErrorCode::kInternal, "a logit is NaN: the weights or the KV cache are damaged");
  }
  if (const auto* sample = std::get_if<WantSample>(&want)) {
    std::get<SampleResult>(result) = Sample(isa, logits, vocab, *sample);
  } else if (const auto* candidates = std::get_if<WantCandidates>(&want)) {
    const NoiseKey* key = candidates->noise ? &*candidates->noise : nullptr;
    std::get<Candidates>(result) = TopCandidates(logits, vocab, candidates->banned_tokens, candidates->count, key);
  } else if (const auto* targets = std::get_if<WantTargets>(&want)) {
    const float logit = logits[targets->tokens[static_cast<size_t>(index)]];
    std::get<TargetsResult>(result).logprobs[static_cast<size_t>(index)] = static_cast<float>(logit - LogSumExp(isa, logits, vocab));
  } else if (std::holds_alternative<WantLogits>(want)) {
    std::memcpy(std::get<LogitsResult>(result).logits.data() + index * vocab, logits, static_cast<size_t>(vocab) * sizeof(float));
  }
}

}  // namespace tandem
