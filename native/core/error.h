// The one exception type of the native code; binding/ turns it into a JavaScript error with the same code.
#pragma once

#include <stdexcept>
#include <string>

namespace tandem {

// kEvaluation: the step ran on all ranks and they are still in step, but its results could not be made (a logit is NaN).
enum class ErrorCode { kInvalidArgument, kCheckpoint, kOutOfMemory, kTimeout, kAborted, kEvaluation, kInternal };

class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace tandem
