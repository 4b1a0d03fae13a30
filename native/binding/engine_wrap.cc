#include "binding/engine_wrap.h"

#include <atomic>
#include <mutex>
#include <optional>
#include <utility>

#include "core/error.h"
#include "model/cuda/cuda_backend.h"
#include "model/step_codec.h"

namespace tandem {

// An engine on its own thread. Load, Begin and Unload are for that thread. The last reference to it is dropped on the JavaScript thread, where calls are
// settled and objects collected: it waits for the thread, which has nothing to do then.
class EngineThread final : public Stoppable {
 public:
  EngineMemory Load(EngineOptions options) {
    const MakeBackend make_backend = options.device == Device::kCuda ? MakeCudaBackend : MakeCpuBackend;
    auto engine = std::make_unique<Engine>(std::move(options), cancelled_, make_backend);
    const std::lock_guard<std::mutex> lock(mutex_);
    engine_ = std::move(engine);
    if (cancelled_.load()) engine_->Abort();
    return engine_->memory();
  }

  // Nothing: it has begun, and End is for the other thread.
  std::optional<EncodedStepResult> Begin(Step step, std::unique_ptr<Engine::UnderWay>& under_way) {
    under_way = engine_->Begin(std::move(step));
    if (!under_way->has_ended()) return std::nullopt;
    return End(std::move(under_way));
  }

  EncodedStepResult End(std::unique_ptr<Engine::UnderWay> under_way) {
    const StepResult result = under_way->engine().End(*under_way);
    return {result.step_id, EncodeResults(result.results), result.compute_micros, result.collective_micros, result.evaluate_micros};
  }

  void Unload() {
    std::unique_ptr<Engine> engine;
    const std::lock_guard<std::mutex> lock(mutex_);
    engine = std::move(engine_);
  }

  void Abort() {
    cancelled_.store(true);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (engine_ != nullptr) engine_->Abort();
  }

  void Stop() override {
    Abort();
    thread_.Stop();
    ends_.Stop();
  }

  TaskThread& thread() { return thread_; }
  TaskThread& ends() { return ends_; }

 private:
  std::atomic<bool> cancelled_{false};
  std::mutex mutex_;  // Abort comes from another thread than the one that loads and unloads
  std::unique_ptr<Engine> engine_;
  // Last: gone before what they work on. Steps that the first one has begun, and that go on while it begins others, end on the second one.
  TaskThread ends_;
  TaskThread thread_;
};

struct EngineWrap::Loaded {
  std::shared_ptr<Runtime> runtime;
  std::shared_ptr<EngineThread> engine;
  EngineMemory memory;
};

namespace {

Napi::Value Rejected(Napi::Env env, std::exception_ptr error) {
  const Napi::Promise::Deferred deferred = Napi::Promise::Deferred::New(env);
  deferred.Reject(ErrorToJs(env, error));
  return deferred.Promise();
}

}  // namespace

Napi::Function EngineWrap::Define(Napi::Env env) {
  return DefineClass(env, "NativeEngine",
                     {InstanceMethod<&EngineWrap::StepMethod>("step"), InstanceAccessor<&EngineWrap::Memory>("memory"),
                      InstanceMethod<&EngineWrap::AbortMethod>("abort"), InstanceMethod<&EngineWrap::DisposeMethod>("dispose")});
}

Napi::Value EngineWrap::Create(const Napi::CallbackInfo& info, const std::shared_ptr<Runtime>& runtime, const Napi::FunctionReference& constructor) {
  try {
    auto options = std::make_shared<EngineOptions>(EngineOptionsFromJs(info[0]));
    const auto progress = std::make_shared<LoadProgress>();
    options->progress = progress;
    auto engine = std::make_shared<EngineThread>();
    runtime->Watch(engine);
    const auto load = [engine, options] { return engine->Load(std::move(*options)); };
    const auto wrap = [engine, runtime, &constructor](Napi::Env env, EngineMemory& memory) -> Napi::Value {
      Loaded loaded{runtime, engine, memory};
      return constructor.New({Napi::External<Loaded>::New(env, &loaded)});
    };
    Napi::Object promise = AsyncCall<EngineMemory>::Start(info.Env(), runtime, engine->thread(), load, wrap).As<Napi::Object>();
    promise.Set("progress", Napi::Function::New(info.Env(), [progress](const Napi::CallbackInfo& call) { return ProgressToJs(call.Env(), *progress); }));
    return promise;
  } catch (...) {
    return Rejected(info.Env(), std::current_exception());
  }
}

EngineWrap::EngineWrap(const Napi::CallbackInfo& info) : Napi::ObjectWrap<EngineWrap>(info) {
  if (!info[0].IsExternal()) throw Napi::TypeError::New(info.Env(), "an engine is made by createEngine");
  const Loaded& loaded = *info[0].As<Napi::External<Loaded>>().Data();
  runtime_ = loaded.runtime;
  engine_ = loaded.engine;
  abortable_ = engine_;
  memory_ = loaded.memory;
}

Napi::Value EngineWrap::StepMethod(const Napi::CallbackInfo& info) {
  try {
    if (engine_ == nullptr) throw Error(ErrorCode::kAborted, "the engine was disposed of");
    struct Call {
      std::shared_ptr<EngineThread> engine;
      Step step;
      std::unique_ptr<Engine::UnderWay> under_way;  // gone before its engine, which waits for that
    };
    auto call = std::make_shared<Call>(Call{engine_, StepFromJs(info[0], info[1]), nullptr});
    const auto run = [call]() -> std::optional<EncodedStepResult> {
      if (call->under_way != nullptr) return call->engine->End(std::move(call->under_way));
      return call->engine->Begin(std::move(call->step), call->under_way);
    };
    const auto convert = [](Napi::Env env, EncodedStepResult& result) { return StepResultToJs(env, result); };
    return AsyncCall<EncodedStepResult>::Start(info.Env(), runtime_, engine_->thread(), run, convert, &engine_->ends());
  } catch (...) {
    return Rejected(info.Env(), std::current_exception());
  }
}

Napi::Value EngineWrap::Memory(const Napi::CallbackInfo& info) { return MemoryToJs(info.Env(), memory_); }

Napi::Value EngineWrap::AbortMethod(const Napi::CallbackInfo& info) {
  if (const std::shared_ptr<EngineThread> engine = abortable_.lock()) engine->Abort();
  return info.Env().Undefined();
}

Napi::Value EngineWrap::DisposeMethod(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (engine_ == nullptr) {
    const Napi::Promise::Deferred deferred = Napi::Promise::Deferred::New(env);
    deferred.Resolve(env.Undefined());
    return deferred.Promise();
  }
  const std::shared_ptr<EngineThread> engine = std::move(engine_);
  const auto unload = [engine] {
    engine->Unload();
    return true;
  };
  return AsyncCall<bool>::Start(env, runtime_, engine->thread(), unload, [](Napi::Env env, bool&) { return env.Undefined(); });
}

}  // namespace tandem
