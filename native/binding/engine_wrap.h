// The JavaScript object of one engine.
#pragma once

#include <napi.h>

#include <memory>

#include "binding/async_call.h"
#include "model/engine.h"

namespace tandem {

class EngineThread;

class EngineWrap : public Napi::ObjectWrap<EngineWrap> {
 public:
  static Napi::Function Define(Napi::Env env);
  // createEngine(options): resolves to an EngineWrap, made by `constructor`. The promise has a function `progress` of how far loading is.
  static Napi::Value Create(const Napi::CallbackInfo& info, const std::shared_ptr<Runtime>& runtime, const Napi::FunctionReference& constructor);

  // Not for JavaScript: takes an External of Loaded.
  explicit EngineWrap(const Napi::CallbackInfo& info);

 private:
  struct Loaded;

  Napi::Value StepMethod(const Napi::CallbackInfo& info);
  Napi::Value Memory(const Napi::CallbackInfo& info);
  Napi::Value AbortMethod(const Napi::CallbackInfo& info);
  Napi::Value DisposeMethod(const Napi::CallbackInfo& info);

  std::shared_ptr<Runtime> runtime_;
  // Calls hold the engine too, so it lives until the last of them has been settled, also if this object is collected or disposed of before.
  std::shared_ptr<EngineThread> engine_;    // null once disposed of
  std::weak_ptr<EngineThread> abortable_;  // also afterwards, while calls are under way
  EngineMemory memory_;
};

}  // namespace tandem
