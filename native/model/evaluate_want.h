// From rows of logits to what an Extend wants of them.
#pragma once

#include <cstdint>

#include "model/step.h"

namespace tandem {

// A result with room for every wanted row, to be filled by EvaluateRow.
ExtendResult EmptyResult(const Want& want, int64_t vocab);

// Fills in what wanted row `index` (0 is the first of the run's last WantedRows rows) contributes. Calls for different rows may run at once. An
// ErrorResult stays one.
//   logits: [vocab]
// Throws kInternal if a logit is NaN.
void EvaluateRow(Isa isa, const float* logits, int64_t vocab, const Want& want, int64_t index, ExtendResult& result);

}  // namespace tandem
