// What one engine step runs and what it returns: a batch of Extends (design section 1). Plain values.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "kernels/sampling.h"

namespace tandem {

struct WantNothing {};
struct WantSample {
  SamplingParams params;
  NoiseKey noise;
  uint32_t top_logprobs = 0;
};
struct WantCandidates {
  uint32_t count = 0;
  std::vector<uint32_t> banned_tokens;
  std::optional<NoiseKey> noise;  // given: drawn without replacement
};
// Log-probability of tokens[i] at row (run length - tokens.size() + i).
struct WantTargets {
  std::vector<uint32_t> tokens;
};
// Raw logits of the last `rows` rows.
struct WantLogits {
  uint32_t rows = 0;
};
using Want = std::variant<WantNothing, WantSample, WantCandidates, WantTargets, WantLogits>;

// How many of a run's last rows need logits.
int64_t WantedRows(const Want& want);

struct Extend {
  std::vector<uint32_t> tokens;
  std::vector<uint32_t> positions;
  std::vector<uint32_t> block_table;
  int64_t cached_tokens = 0;
  int64_t bidirectional_tokens = 0;
  // Layers [first_layer, end_layer) are run: a run may be spread over several steps. Nothing is evaluated before the last layer.
  int64_t first_layer = 0;
  int64_t end_layer = 0;
  Want want;
  // The Extend of the step before whose sample is this run's one token (what `tokens` has in its place does not matter): a step can be on its way before the
  // one that it goes on from has ended.
  std::optional<uint32_t> sampled_by;

  bool is_whole(int64_t num_layers) const { return first_layer == 0 && end_layer == num_layers; }
};

struct Step {
  uint32_t step_id = 0;
  std::vector<uint32_t> block_copies;  // from, to, from, to, ...: done first, in this order
  std::vector<Extend> extends;
};

struct SampleResult {
  uint32_t token = 0;
  float logprob = 0;
  std::vector<uint32_t> top_tokens;
  std::vector<float> top_logprobs;
};
struct TargetsResult {
  std::vector<float> logprobs;
};
struct LogitsResult {
  std::vector<float> logits;  // [rows, V]
};
// What was wanted could not be made, on rank 0 (a logit is NaN). No other Extend is touched by it, and the ranks are in step.
struct ErrorResult {
  std::string message;
};
using ExtendResult = std::variant<WantNothing, SampleResult, Candidates, TargetsResult, LogitsResult, ErrorResult>;

struct StepResult {
  uint32_t step_id = 0;
  std::vector<ExtendResult> results;  // one for each Extend on rank 0; empty on the other ranks
  int64_t compute_micros = 0;         // the whole step
  int64_t collective_micros = 0;      // of which in collectives, waiting included
  int64_t evaluate_micros = 0;        // of which in Evaluate: sampling and looking at logits; rank 0
};

// A run that earlier steps have begun and not ended: its activations are those of `tokens` tokens before layer `next_layer`.
struct PartialRun {
  int64_t tokens = 0;
  int64_t next_layer = 0;
};

// What the steps before have left for the next one.
struct StepsBefore {
  std::optional<PartialRun> under_way;
  std::vector<bool> sampled;  // whether extends[i] of the last step drew a sample
};

struct StepLimits {
  int64_t num_layers = 0;
  int64_t vocab_size = 0;
  int64_t max_sequence_length = 0;
  int64_t num_blocks = 0;
  int64_t block_size = 0;
  int64_t max_batch_tokens = 0;
};

// Throws kInvalidArgument naming the field, as in "extends[3].blockTable". Depends on the arguments alone: all ranks accept or refuse alike.
void ValidateStep(const Step& step, const StepLimits& limits, const StepsBefore& before);

// What a valid step leaves: a run is under way that stops before the last layer; else the one from before, unless this step ended it.
StepsBefore After(const Step& step, int64_t num_layers, StepsBefore before);

}  // namespace tandem
