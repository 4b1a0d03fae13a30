// The one exception type of the native code; binding/ turns it into a JavaScript error with the same code.
#pragma once

#include <stdexcept>
#include <string>

namespace tandem {

enum class ErrorCode { kInvalidArgument, kCheckpoint, kOutOfMemory, kTimeout, kAborted, kInternal };

class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace tandem
