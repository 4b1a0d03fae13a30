#include "model/step.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <unordered_map>

#include "core/error.h"

namespace tandem {
namespace {

class Validator {
 public:
  explicit Validator(const StepLimits& limits) : limits_(limits) {}

  void CheckBlockCopies(const std::vector<uint32_t>& copies) {
    if (copies.size() % 2 != 0) Fail("blockCopies", "has " + std::to_string(copies.size()) + " elements, they come in pairs (from, to)");
    for (size_t i = 0; i < copies.size(); ++i) CheckBlock(Element("blockCopies", i), copies[i]);
    for (size_t i = 0; i < copies.size(); i += 2) {
      if (copies[i] == copies[i + 1]) Fail(Element("blockCopies", i), "copies block " + std::to_string(copies[i]) + " onto itself");
    }
  }

  void CheckExtend(size_t index, const Extend& extend) {
    path_ = Element("extends", index) + ".";
    const size_t length = extend.tokens.size();
    if (length == 0) Fail("tokens", "is empty, an Extend appends at least one token");
    for (size_t i = 0; i < length; ++i) CheckToken(Element("tokens", i), extend.tokens[i]);
    if (extend.positions.size() != length) {
      Fail("positions", "has " + std::to_string(extend.positions.size()) + " elements for " + std::to_string(length) + " tokens");
    }
    for (size_t i = 0; i < length; ++i) {
      if (extend.positions[i] < limits_.max_sequence_length) continue;
      Fail(Element("positions", i), std::to_string(extend.positions[i]) + ", the model takes positions below " + std::to_string(limits_.max_sequence_length));
    }
    if (extend.bidirectional_tokens < 0 || extend.bidirectional_tokens > static_cast<int64_t>(length)) {
      Fail("bidirectionalTokens", std::to_string(extend.bidirectional_tokens) + ", the run has " + std::to_string(length) + " tokens");
    }
    CheckBlockTable(index, extend);
    CheckWant(extend);
    path_.clear();
  }

  void CheckTotal(const std::vector<Extend>& extends) {
    int64_t total = 0;
    for (const Extend& extend : extends) total += static_cast<int64_t>(extend.tokens.size());
    if (total > limits_.max_batch_tokens) {
      Fail("extends", "have " + std::to_string(total) + " tokens together, maxBatchTokens is " + std::to_string(limits_.max_batch_tokens));
    }
  }

 private:
  [[noreturn]] void Fail(const std::string& field, const std::string& what) const {
    throw Error(ErrorCode::kInvalidArgument, path_ + field + ": " + what);
  }

  static std::string Element(const char* array, size_t index) { return std::string(array) + "[" + std::to_string(index) + "]"; }

  void CheckBlock(const std::string& field, uint32_t block) const {
    if (block >= limits_.num_blocks) Fail(field, "block " + std::to_string(block) + ", the cache has " + std::to_string(limits_.num_blocks) + " blocks");
  }

  void CheckToken(const std::string& field, uint32_t token) const {
    if (token >= limits_.vocab_size) Fail(field, "token " + std::to_string(token) + ", the vocabulary has " + std::to_string(limits_.vocab_size));
  }

  void CheckBlockTable(size_t index, const Extend& extend) {
    constexpr int64_t kMost = int64_t{1} << 32;
    if (extend.cached_tokens < 0 || extend.cached_tokens >= kMost) {
      Fail("cachedTokens", std::to_string(extend.cached_tokens) + " is not in 0 .. 2^32 - 1");
    }
    const int64_t total = extend.cached_tokens + static_cast<int64_t>(extend.tokens.size());
    const int64_t needed = (total + limits_.block_size - 1) / limits_.block_size;
    if (static_cast<int64_t>(extend.block_table.size()) < needed) {
      Fail("blockTable", "has " + std::to_string(extend.block_table.size()) + " blocks of " + std::to_string(limits_.block_size) + " tokens, " +
                             std::to_string(total) + " tokens need " + std::to_string(needed));
    }
    for (size_t i = 0; i < extend.block_table.size(); ++i) CheckBlock(Element("blockTable", i), extend.block_table[i]);
    // Two runs that write into the same block would race: the coordinator forgot a copy-on-write.
    for (int64_t i = extend.cached_tokens / limits_.block_size; i < needed; ++i) {
      const uint32_t block = extend.block_table[static_cast<size_t>(i)];
      const auto [at, inserted] = writers_.emplace(block, index);
      if (!inserted) {
        Fail(Element("blockTable", static_cast<size_t>(i)), "block " + std::to_string(block) + " is written by extends[" + std::to_string(at->second) + "] already");
      }
    }
  }

  void CheckWant(const Extend& extend) const {
    const int64_t rows = WantedRows(extend.want), length = static_cast<int64_t>(extend.tokens.size());
    if (const auto* sample = std::get_if<WantSample>(&extend.want)) {
      const SamplingParams& params = sample->params;
      if (!std::isfinite(params.temperature) || params.temperature < 0) Fail("want.params.temperature", "must be a number >= 0");
      if (params.top_k > limits_.vocab_size) {
        Fail("want.params.topK", std::to_string(params.top_k) + ", the vocabulary has " + std::to_string(limits_.vocab_size));
      }
      if (!(params.top_p >= 0 && params.top_p <= 1)) Fail("want.params.topP", "must be in 0 .. 1");
      CheckTokens("want.params.bannedTokens", params.banned_tokens);
      if (sample->top_logprobs > limits_.vocab_size) {
        Fail("want.topLogprobs", std::to_string(sample->top_logprobs) + ", the vocabulary has " + std::to_string(limits_.vocab_size));
      }
    } else if (const auto* candidates = std::get_if<WantCandidates>(&extend.want)) {
      if (candidates->count < 1 || candidates->count > limits_.vocab_size) {
        Fail("want.count", std::to_string(candidates->count) + " is not in 1 .. " + std::to_string(limits_.vocab_size) + ", the vocabulary");
      }
      CheckTokens("want.bannedTokens", candidates->banned_tokens);
    } else if (const auto* targets = std::get_if<WantTargets>(&extend.want)) {
      if (rows > length) Fail("want.tokens", "has " + std::to_string(rows) + " targets, the run has " + std::to_string(length) + " tokens");
      CheckTokens("want.tokens", targets->tokens);
    } else if (rows > length) {
      Fail("want.rows", std::to_string(rows) + ", the run has " + std::to_string(length) + " tokens");
    }
  }

  void CheckTokens(const char* field, const std::vector<uint32_t>& tokens) const {
    for (size_t i = 0; i < tokens.size(); ++i) CheckToken(Element(field, i), tokens[i]);
  }

  const StepLimits& limits_;
  std::string path_;
  std::unordered_map<uint32_t, size_t> writers_;
};

}  // namespace

int64_t WantedRows(const Want& want) {
  if (const auto* targets = std::get_if<WantTargets>(&want)) return static_cast<int64_t>(targets->tokens.size());
  if (const auto* logits = std::get_if<WantLogits>(&want)) return logits->rows;
  return std::holds_alternative<WantNothing>(want) ? 0 : 1;
}

void ValidateStep(const Step& step, const StepLimits& limits) {
  Validator validator(limits);
  validator.CheckBlockCopies(step.block_copies);
  validator.CheckTotal(step.extends);
  for (size_t i = 0; i < step.extends.size(); ++i) validator.CheckExtend(i, step.extends[i]);
}

}  // namespace tandem
