// JavaScript values to native ones and back. What does not fit is an error that names its field, as in "extends[3].blockTable".
#pragma once

#include <napi.h>

#include <cstdint>
#include <exception>
#include <string>
#include <vector>

#include "model/engine.h"
#include "model/step.h"

namespace tandem {

// A value and where it stands. Every method throws kInvalidArgument if the value is not of that kind.
class Field {
 public:
  Field(Napi::Value value, std::string path) : value_(value), path_(std::move(path)) {}

  Field Get(const char* name) const;
  bool IsNull() const { return value_.IsNull(); }
  std::vector<Field> Elements() const;
  int64_t Integer(int64_t least, int64_t most) const;
  double Number() const;
  std::string Text() const;
  std::vector<uint32_t> Uint32s() const;
  // Index into `names`.
  size_t OneOf(const std::vector<std::string>& names) const;
  Napi::Float32Array Float32s() const;
  Napi::Uint8Array Uint8s() const;
  Napi::Uint16Array Uint16s() const;
  [[noreturn]] void Fail(const std::string& expected) const;

 private:
  Napi::Value value_;
  std::string path_;  // empty: the argument itself
};

// A step's result as it goes to JavaScript.
struct EncodedStepResult {
  uint32_t step_id = 0;
  std::vector<uint32_t> body;  // EncodeResults
  int64_t compute_micros = 0, collective_micros = 0, evaluate_micros = 0;
};

EngineOptions EngineOptionsFromJs(Napi::Value options);
Step StepFromJs(Napi::Value step_id, Napi::Value body);
SamplingParams SamplingParamsFromJs(const Field& params);
Isa IsaFromJs(const Field& isa);
Napi::Value StepResultToJs(Napi::Env env, const EncodedStepResult& result);
Napi::Value ProgressToJs(Napi::Env env, const LoadProgress& progress);
Napi::Value MemoryToJs(Napi::Env env, const EngineMemory& memory);

// An Error with `code`: INVALID_ARGUMENT, CHECKPOINT, OUT_OF_MEMORY, TIMEOUT, ABORTED or INTERNAL. A JavaScript exception stays what it is.
Napi::Value ErrorToJs(Napi::Env env, std::exception_ptr error);

}  // namespace tandem
