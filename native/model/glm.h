// The forward pass of a GLM (model-spec section 2), over the rows of a step.
#pragma once

#include <atomic>

#include "model/backend.h"
#include "model/model_shape.h"
#include "model/step.h"

namespace tandem {

// Runs a valid step (ValidateStep). Looks at `cancelled` once a layer and throws kAborted; throws what the backend throws: the ranks are then
// out of step. What goes wrong on rank 0 alone after the forward pass (NaN logits) becomes the ErrorResult of the Extends that it concerns.
StepResult RunStep(const ModelShape& shape, const Step& step, int64_t block_size, Backend& backend, const std::atomic<bool>& cancelled);

}  // namespace tandem
