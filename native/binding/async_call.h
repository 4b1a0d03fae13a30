// Promises whose work runs on a native thread: one template for all of them, and what they share in one JavaScript environment.
#pragma once

#include <napi.h>

#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "binding/convert.h"
#include "binding/task_thread.h"

namespace tandem {

// Native work that has to end before its environment does.
class Stoppable {
 public:
  virtual ~Stoppable() = default;
  virtual void Stop() = 0;  // returns soon; nothing of it runs afterwards
};

// A task that ends on the JavaScript thread.
class SettlingTask : public Task {
 public:
  virtual void Settle(Napi::Env env) = 0;
};

// One JavaScript environment's way back from native threads. Keeps the process alive while calls are pending and only then. All methods but Return are
// for the JavaScript thread.
class Runtime {
 public:
  static std::shared_ptr<Runtime> Create(Napi::Env env);

  // `owner` is stopped when the environment ends.
  void Watch(const std::shared_ptr<Stoppable>& owner);
  void Begin(Napi::Env env);
  // From any thread that a watched owner stops: Settle runs on the JavaScript thread, in the order of these calls.
  void Return(SettlingTask* task);

 private:
  static void CallJs(Napi::Env env, Napi::Function, Runtime* runtime, SettlingTask* task);
  static void EnvironmentEnds(void* runtime);
  using ReturnFunction = Napi::TypedThreadSafeFunction<Runtime, SettlingTask, CallJs>;

  ReturnFunction return_;
  int pending_ = 0;
  std::vector<std::weak_ptr<Stoppable>> watched_;
};

template <typename Result>
class AsyncCall final : public SettlingTask {
 public:
  // On the native thread. Nothing yet: it is called once more, on the thread for what takes longer.
  using Work = std::function<std::optional<Result>()>;
  using Convert = std::function<Napi::Value(Napi::Env, Result&)>;  // on the JavaScript thread

  // Posts the call to `thread`, which a watched owner stops, as it then does `longer`. `work` keeps alive what it uses.
  static Napi::Value Start(Napi::Env env, const std::shared_ptr<Runtime>& runtime, TaskThread& thread, Work work, Convert convert,
                           TaskThread* longer = nullptr) {
    auto call = std::unique_ptr<AsyncCall>(new AsyncCall(env, runtime, std::move(work), std::move(convert), longer));
    const Napi::Promise promise = call->deferred_.Promise();
    runtime->Begin(env);
    thread.Post(std::move(call));
    return promise;
  }

 private:
  AsyncCall(Napi::Env env, std::shared_ptr<Runtime> runtime, Work work, Convert convert, TaskThread* longer)
      : deferred_(Napi::Promise::Deferred::New(env)),
        runtime_(std::move(runtime)),
        work_(std::move(work)),
        convert_(std::move(convert)),
        longer_(longer) {}

  void Run() override {
    try {
      result_ = work_();
    } catch (...) {
      error_ = std::current_exception();
    }
    if (!result_ && !error_) return longer_->Post(std::unique_ptr<Task>(this));
    runtime_->Return(this);
  }

  void Settle(Napi::Env env) override {
    try {
      if (error_) std::rethrow_exception(error_);
      deferred_.Resolve(convert_(env, *result_));
    } catch (...) {
      deferred_.Reject(ErrorToJs(env, std::current_exception()));
    }
  }

  Napi::Promise::Deferred deferred_;
  std::shared_ptr<Runtime> runtime_;
  Work work_;
  Convert convert_;
  TaskThread* longer_;
  std::optional<Result> result_;
  std::exception_ptr error_;
};

}  // namespace tandem
