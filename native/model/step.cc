#include "model/step.h"

#include <algorithm>
#include <string>
#include <unordered_map>

#include "core/error.h"

namespace tandem {
namespace {

class Validator {
 public:
  Validator(const StepLimits& limits, const StepsBefore& before) : limits_(limits), before_(before) {}

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
    if (extend.sampled_by) {
      CheckSampledBy(*extend.sampled_by, length);
    } else {
      for (size_t i = 0; i < length; ++i) CheckToken(Element("tokens", i), extend.tokens[i]);
    }
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
    CheckLayers(index, extend);
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

  void CheckSampledBy(uint32_t extend, size_t length) const {
    if (length != 1) Fail("sampledBy", "is given for a run of " + std::to_string(length) + " tokens, a sample is one");
    const size_t count = before_.sampled.size();
    if (extend >= count) Fail("sampledBy", std::to_string(extend) + ", the step before had " + std::to_string(count) + " Extends");
    if (!before_.sampled[extend]) Fail("sampledBy", std::to_string(extend) + ", which drew no sample in the step before");
  }

  void CheckLayers(size_t index, const Extend& extend) {
    const auto layer = [](int64_t number) { return std::to_string(number); };
    if (extend.end_layer < 1 || extend.end_layer > limits_.num_layers) {
      Fail("endLayer", layer(extend.end_layer) + " is not in 1 .. " + layer(limits_.num_layers) + ", the model's layers");
    }
    if (extend.first_layer < 0 || extend.first_layer >= extend.end_layer) {
      Fail("firstLayer", layer(extend.first_layer) + ", the run ends before layer " + layer(extend.end_layer));
    }
    if (extend.is_whole(limits_.num_layers)) return;
    if (partial_) {
      Fail("firstLayer", "a part of the layers, as of extends[" + std::to_string(*partial_) + "] already; one Extend of a step may be run in part");
    }
    partial_ = index;
    if (extend.first_layer == 0) return;
    const std::optional<PartialRun>& under_way = before_.under_way;
    if (!under_way) Fail("firstLayer", layer(extend.first_layer) + ", but no run is under way; begin one at layer 0");
    if (extend.first_layer != under_way->next_layer) {
      Fail("firstLayer", layer(extend.first_layer) + ", the run under way goes on at layer " + layer(under_way->next_layer));
    }
    if (static_cast<int64_t>(extend.tokens.size()) != under_way->tokens) {
      Fail("tokens", "has " + std::to_string(extend.tokens.size()) + " elements, the run under way has " + std::to_string(under_way->tokens) + " tokens");
    }
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
      CheckSamplingParams(sample->params, limits_.vocab_size, path_ + "want.params");
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
  const StepsBefore& before_;
  std::string path_;
  std::unordered_map<uint32_t, size_t> writers_;
  std::optional<size_t> partial_;  // the Extend that is run in part
};

}  // namespace

int64_t WantedRows(const Want& want) {
  if (const auto* targets = std::get_if<WantTargets>(&want)) return static_cast<int64_t>(targets->tokens.size());
  if (const auto* logits = std::get_if<WantLogits>(&want)) return logits->rows;
  return std::holds_alternative<WantNothing>(want) ? 0 : 1;
}

void ValidateStep(const Step& step, const StepLimits& limits, const StepsBefore& before) {
  Validator validator(limits, before);
  validator.CheckBlockCopies(step.block_copies);
  validator.CheckTotal(step.extends);
  for (size_t i = 0; i < step.extends.size(); ++i) validator.CheckExtend(i, step.extends[i]);
}

StepsBefore After(const Step& step, int64_t num_layers, StepsBefore before) {
  before.sampled.clear();
  for (const Extend& extend : step.extends) {
    before.sampled.push_back(extend.end_layer == num_layers && std::holds_alternative<WantSample>(extend.want));
    if (extend.is_whole(num_layers)) continue;
    before.under_way.reset();
    if (extend.end_layer < num_layers) before.under_way = PartialRun{static_cast<int64_t>(extend.tokens.size()), extend.end_layer};
  }
  return before;
}

}  // namespace tandem
