#include "model/glm.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <exception>

#include "core/error.h"
#include "model/evaluate_want.h"

namespace tandem {
namespace {

Batch MakeBatch(const Step& step, int64_t block_size) {
  Batch batch;
  for (const Extend& extend : step.extends) {
    for (size_t i = 0; i < extend.tokens.size(); ++i) {
      const int64_t row = static_cast<int64_t>(i), index = extend.cached_tokens + row;
      batch.tokens.push_back(extend.tokens[i]);
      batch.slots.push_back({extend.positions[i], extend.block_table[static_cast<size_t>(index / block_size)], static_cast<uint32_t>(index % block_size)});
      batch.attention.push_back({extend.block_table.data(), extend.cached_tokens + std::max(row + 1, extend.bidirectional_tokens)});
    }
  }
  return batch;
}

// Rows that need logits, and where each belongs.
struct Wanted {
  std::vector<int64_t> rows;     // of the batch, ascending
  std::vector<LogitsRow> parts;  // rows[i] is wanted row parts[i].index of extends[parts[i].extend]; parts[i].row is not set yet
};

Wanted FindWanted(const Step& step) {
  Wanted wanted;
  int64_t end = 0;
  for (size_t e = 0; e < step.extends.size(); ++e) {
    end += static_cast<int64_t>(step.extends[e].tokens.size());
    const int64_t count = WantedRows(step.extends[e].want);
    for (int64_t i = 0; i < count; ++i) {
      wanted.rows.push_back(end - count + i);
      wanted.parts.push_back({0, e, i});
    }
  }
  return wanted;
}

// Leaves the final layer norm of the wanted rows in kHidden; the keys and values of all rows are in the cache.
void Forward(const ModelShape& shape, const std::vector<int64_t>& wanted_rows, Backend& backend, const std::atomic<bool>& cancelled) {
  constexpr Activation kHidden = Activation::kHidden, kDelta = Activation::kDelta, kWide = Activation::kWide, kNarrow = Activation::kNarrow;
  const float alpha = static_cast<float>(std::sqrt(2.0 * static_cast<double>(shape.num_layers)));

  backend.Embed(kHidden);
  backend.AllReduce(kHidden);
  for (int64_t layer = 0; layer < shape.num_layers; ++layer) {
    if (cancelled.load()) throw Error(ErrorCode::kAborted, "the step was aborted");

    // The residual is the normalised value times alpha, so the layer norm is in place (model-spec section 12, 1).
    backend.LayerNorm(layer, Norm::kInput, kHidden);
    backend.Linear(layer, Projection::kQueryKeyValue, kHidden, kWide);
    backend.RotaryAndWriteKv(layer, kWide, kNarrow);
    if (layer == shape.num_layers - 1) {
      if (wanted_rows.empty()) return;
      backend.KeepRows(wanted_rows);  // nothing reads the others from here on
    }
    backend.Attention(layer, kNarrow);
    backend.Linear(layer, Projection::kDense, kNarrow, kDelta);
    backend.AllReduce(kDelta);
    backend.AddResidual(layer, Projection::kDense, alpha, kDelta, kHidden);

    backend.LayerNorm(layer, Norm::kPostAttention, kHidden);
    backend.Linear(layer, Projection::kHTo4h, kHidden, kWide);
    backend.Geglu(kWide, kNarrow);
    backend.Linear(layer, Projection::k4hToH, kNarrow, kDelta);
    backend.AllReduce(kDelta);
    backend.AddResidual(layer, Projection::k4hToH, alpha, kDelta, kHidden);
  }
  backend.LayerNorm(0, Norm::kFinal, kHidden);
}

// Fills in result.results or result.error on rank 0. What goes wrong there alone must not keep it from the collectives that the others are in.
void EvaluateWanted(const Step& step, const Wanted& wanted, int64_t vocab, Backend& backend, StepResult& result) {
  const auto attempt = [&](auto evaluate) {
    if (!backend.is_first_rank() || result.error) return;
    try {
      evaluate();
    } catch (const std::exception& error) {
      result.error = std::make_exception_ptr(Error(ErrorCode::kEvaluation, error.what()));
    }
  };
  attempt([&] {
    for (const Extend& extend : step.extends) result.results.push_back(EmptyResult(extend.want, vocab));
  });
  const int64_t count = static_cast<int64_t>(wanted.rows.size());
  for (int64_t first = 0; first < count; first += kMaxLogitsRows) {
    const int64_t n = std::min(kMaxLogitsRows, count - first);
    backend.Logits(first, n);
    attempt([&] {
      std::vector<LogitsRow> rows(wanted.parts.begin() + first, wanted.parts.begin() + first + n);
      for (int64_t i = 0; i < n; ++i) rows[static_cast<size_t>(i)].row = i;
      backend.Evaluate(rows, step.extends, result.results);
    });
  }
}

}  // namespace

StepResult RunStep(const ModelShape& shape, const Step& step, int64_t block_size, Backend& backend, const std::atomic<bool>& cancelled) {
  const auto begin = std::chrono::steady_clock::now();
  StepResult result;
  result.step_id = step.step_id;
  backend.CopyKvBlocks(step.block_copies);
  const Batch batch = MakeBatch(step, block_size);
  const Wanted wanted = FindWanted(step);
  backend.Begin(batch);
  if (!batch.tokens.empty()) Forward(shape, wanted.rows, backend, cancelled);
  EvaluateWanted(step, wanted, shape.vocab_size, backend, result);
  result.collective_micros = backend.collective_micros();
  result.compute_micros = std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() - begin).count();
  return result;
}

}  // namespace tandem
