#include "model/glm.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "core/error.h"
#include "model/evaluate_want.h"

namespace tandem {
namespace {

// The rows of one step and the layers that they run through.
struct Plan {
  Batch batch;
  // Rows that need logits, and where each belongs.
  std::vector<int64_t> wanted_rows;     // of the batch, ascending
  std::vector<LogitsRow> wanted_parts;  // wanted_rows[i] is wanted row parts[i].index of extends[parts[i].extend]; parts[i].row is not set yet
  // The first rows run through all layers, those of the run that is not whole, if there is one, through [first_layer, end_layer).
  int64_t whole_rows = 0;
  int64_t partial_rows = 0;
  int64_t first_layer = 0;
  int64_t end_layer = 0;
  bool one_row_each = true;

  // Every run is one row, runs through all layers and is wanted: decoding and nothing else.
  bool is_repeatable() const {
    return partial_rows == 0 && one_row_each && static_cast<int64_t>(wanted_rows.size()) == whole_rows && whole_rows > 0;
  }
  int64_t RowsAt(int64_t layer) const { return whole_rows + (layer >= first_layer && layer < end_layer ? partial_rows : 0); }
};

void AddRows(const Extend& extend, size_t index, bool is_wanted, int64_t block_size, bool follows_later, Plan& plan) {
  const int64_t length = static_cast<int64_t>(extend.tokens.size());
  plan.one_row_each = plan.one_row_each && length == 1;
  for (int64_t row = 0; row < length; ++row) {
    const int64_t at = extend.cached_tokens + row;
    plan.batch.tokens.push_back(extend.tokens[static_cast<size_t>(row)]);
    plan.batch.slots.push_back({extend.positions[static_cast<size_t>(row)], extend.block_table[static_cast<size_t>(at / block_size)],
                                static_cast<uint32_t>(at % block_size)});
    plan.batch.attention.push_back({extend.block_table.data(), extend.cached_tokens + std::max(row + 1, extend.bidirectional_tokens)});
  }
  if (follows_later) {
    plan.batch.sampled_by.resize(plan.batch.tokens.size(), -1);
    if (extend.sampled_by) plan.batch.sampled_by.back() = static_cast<int32_t>(*extend.sampled_by);
  }
  const int64_t end = static_cast<int64_t>(plan.batch.tokens.size()), count = is_wanted ? WantedRows(extend.want) : 0;
  for (int64_t i = 0; i < count; ++i) {
    plan.wanted_rows.push_back(end - count + i);
    plan.wanted_parts.push_back({0, index, i});
  }
}

Plan MakePlan(const Step& step, int64_t num_layers, int64_t block_size, bool follows_later) {
  Plan plan;
  std::optional<size_t> partial;
  for (size_t e = 0; e < step.extends.size(); ++e) {
    if (step.extends[e].is_whole(num_layers)) {
      AddRows(step.extends[e], e, true, block_size, follows_later, plan);
    } else {
      partial = e;
    }
  }
  plan.whole_rows = static_cast<int64_t>(plan.batch.tokens.size());
  if (partial) {
    const Extend& extend = step.extends[*partial];
    AddRows(extend, *partial, extend.end_layer == num_layers, block_size, follows_later, plan);
    plan.partial_rows = static_cast<int64_t>(extend.tokens.size());
    plan.first_layer = extend.first_layer;
    plan.end_layer = extend.end_layer;
  }
  return plan;
}

// Leaves the final layer norm of the wanted rows in kHidden; the keys and values of all rows are in the cache, of the layers that they ran through.
void Forward(const ModelShape& shape, const Plan& plan, Backend& backend, const std::atomic<bool>& cancelled) {
  constexpr Activation kHidden = Activation::kHidden, kDelta = Activation::kDelta, kWide = Activation::kWide, kNarrow = Activation::kNarrow;
  const float alpha = static_cast<float>(std::sqrt(2.0 * static_cast<double>(shape.num_layers)));

  for (int64_t layer = 0; layer < shape.num_layers; ++layer) {
    const int64_t rows = plan.RowsAt(layer);
    if (rows == 0) continue;
    if (cancelled.load()) throw Error(ErrorCode::kAborted, "the step was aborted");
    backend.UseRows(rows);
    if (layer == 0) {
      backend.Embed(kHidden);
      backend.AllReduce(kHidden);
      backend.InputNorm(kHidden);
    } else if (layer == plan.first_layer) {
      backend.RestoreCarry(plan.whole_rows, plan.partial_rows);
    }

    // kHidden is normalised: the residual is the normalised value times alpha, so each sum is followed by a layer norm in place (model-spec section 12, 1).
    backend.Linear(layer, Projection::kQueryKeyValue, kHidden, kWide);
    backend.RotaryAndWriteKv(layer, kWide, kNarrow);
    if (layer == shape.num_layers - 1) {
      if (plan.wanted_rows.empty()) return;
      backend.KeepRows(plan.wanted_rows);  // nothing reads the others from here on
    }
    backend.Attention(layer, kNarrow);
    backend.Linear(layer, Projection::kDense, kNarrow, kDelta);
    backend.AllReduce(kDelta);
    backend.AddResidualAndNorm(layer, Projection::kDense, alpha, kDelta, kHidden);

    backend.Linear(layer, Projection::kHTo4h, kHidden, kWide);
    backend.GegluLinear(layer, kWide, kDelta);
    backend.AllReduce(kDelta);
    backend.AddResidualAndNorm(layer, Projection::k4hToH, alpha, kDelta, kHidden);
    if (plan.partial_rows > 0 && layer == plan.end_layer - 1 && plan.end_layer < shape.num_layers) {
      backend.SaveCarry(plan.whole_rows, plan.partial_rows);
    }
  }
}

// Results with room for what is wanted. What goes wrong on rank 0 alone must not keep it from the collectives that the others are in.
std::vector<ExtendResult> EmptyResults(const Step& step, const ModelShape& shape) {
  std::vector<ExtendResult> results;
  for (const Extend& extend : step.extends) {
    try {
      results.push_back(extend.end_layer == shape.num_layers ? EmptyResult(extend.want, shape.vocab_size) : WantNothing{});
    } catch (const std::bad_alloc&) {
      results.push_back(ErrorResult{"no memory for " + std::to_string(WantedRows(extend.want)) + " rows of logits"});
    }
  }
  return results;
}

// Fills in result.results on rank 0, or has it done later: then returns what Backend::Collect takes, else -1.
int EvaluateWanted(const Step& step, const Plan& plan, const ModelShape& shape, Backend& backend, StepResult& result) {
  if (backend.is_first_rank()) result.results = EmptyResults(step, shape);
  const int64_t count = static_cast<int64_t>(plan.wanted_rows.size());
  std::chrono::steady_clock::duration evaluating{};
  for (int64_t first = 0; first < count; first += kMaxLogitsRows) {
    const int64_t n = std::min(kMaxLogitsRows, count - first);
    backend.Logits(first, n);
    if (!backend.is_first_rank()) continue;
    const auto begin = std::chrono::steady_clock::now();
    std::vector<LogitsRow> rows(plan.wanted_parts.begin() + first, plan.wanted_parts.begin() + first + n);
    for (int64_t i = 0; i < n; ++i) rows[static_cast<size_t>(i)].row = i;
    const int later = n == count ? backend.EvaluateLater(rows, step.extends) : -1;
    if (later >= 0) return later;
    backend.Evaluate(rows, step.extends, result.results);
    evaluating += std::chrono::steady_clock::now() - begin;
  }
  result.evaluate_micros = std::chrono::duration_cast<std::chrono::microseconds>(evaluating).count();
  return -1;
}

int64_t MicrosSince(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace

StepUnderWay BeginStep(const ModelShape& shape, Step step, int64_t block_size, Backend& backend, const std::atomic<bool>& cancelled, bool follows_later) {
  StepUnderWay under_way;
  under_way.begin = std::chrono::steady_clock::now();
  under_way.result.step_id = step.step_id;
  const Plan plan = MakePlan(step, shape.num_layers, block_size, follows_later);
  backend.Begin(plan.batch);
  backend.CopyKvBlocks(step.block_copies);
  backend.RunForward(plan.is_repeatable(), [&] { Forward(shape, plan, backend, cancelled); });
  under_way.later = EvaluateWanted(step, plan, shape, backend, under_way.result);
  under_way.step = std::move(step);
  if (under_way.later >= 0) return under_way;
  backend.Finish();
  under_way.result.collective_micros = backend.collective_micros();
  under_way.result.compute_micros = MicrosSince(under_way.begin);
  return under_way;
}

StepResult EndStep(StepUnderWay& under_way, Backend& backend) {
  if (under_way.later >= 0) {
    backend.Collect(under_way.later, under_way.result.results);
    under_way.result.compute_micros = MicrosSince(under_way.begin);
  }
  return std::move(under_way.result);
}

}  // namespace tandem
