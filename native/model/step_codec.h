// The bodies of Step and StepResult messages (common/step-codec.ts, which says how they are laid out).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "model/step.h"

namespace tandem {

// Throws kInternal where the bytes are no step body; what the values mean is for ValidateStep. `bytes` need not be aligned.
Step DecodeStep(uint32_t step_id, const uint8_t* bytes, size_t size);

std::vector<uint32_t> EncodeResults(const std::vector<ExtendResult>& results);

}  // namespace tandem
