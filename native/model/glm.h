// The forward pass of a GLM (model-spec section 2), over the rows of a step.
#pragma once

#include <atomic>
#include <chrono>

#include "model/backend.h"
#include "model/model_shape.h"
#include "model/step.h"

namespace tandem {

// A step that has begun. It may have ended, too.
struct StepUnderWay {
  Step step;
  StepResult result;
  int later = -1;  // what Backend::Collect takes; -1: it has ended, and `result` is what it gives
  std::chrono::steady_clock::time_point begin;
};

// Runs a valid step (ValidateStep), or gives it to the backend to run, so that another one can be begun meanwhile. Looks at `cancelled` once a layer and throws
// kAborted; throws what the backend throws: the ranks are then out of step. What goes wrong on rank 0 alone after the forward pass (NaN logits) becomes the
// ErrorResult of the Extends that it concerns.
//   follows_later: the step before this one was evaluated later, so its samples are the backend's to put in; else sampled_by is of no meaning
StepUnderWay BeginStep(const ModelShape& shape, Step step, int64_t block_size, Backend& backend, const std::atomic<bool>& cancelled, bool follows_later);

// Waits for its end. From any one thread.
StepResult EndStep(StepUnderWay& step, Backend& backend);

}  // namespace tandem
