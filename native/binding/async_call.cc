#include "binding/async_call.h"

#include <algorithm>

namespace tandem {

std::shared_ptr<Runtime> Runtime::Create(Napi::Env env) {
  auto runtime = std::make_shared<Runtime>();
  runtime->return_ = ReturnFunction::New(env, "tandem", 0, 1, runtime.get());
  runtime->return_.Unref(env);
  // Hooks run last in, first out: the threads are gone before Node takes the thread-safe function away under them.
  napi_add_env_cleanup_hook(env, EnvironmentEnds, new std::shared_ptr<Runtime>(runtime));
  return runtime;
}

void Runtime::Watch(const std::shared_ptr<Stoppable>& owner) {
  watched_.erase(std::remove_if(watched_.begin(), watched_.end(), [](const auto& watched) { return watched.expired(); }), watched_.end());
  watched_.push_back(owner);
}

void Runtime::Begin(Napi::Env env) {
  if (pending_++ == 0) return_.Ref(env);
}

void Runtime::Return(SettlingTask* task) { return_.BlockingCall(task); }

void Runtime::CallJs(Napi::Env env, Napi::Function, Runtime* runtime, SettlingTask* task) {
  const std::unique_ptr<SettlingTask> owned(task);
  if (static_cast<napi_env>(env) == nullptr) return;  // the environment has ended: there is nobody to tell
  try {
    task->Settle(env);
  } catch (const Napi::Error&) {  // JavaScript is being terminated
  }
  if (--runtime->pending_ == 0) runtime->return_.Unref(env);
}

void Runtime::EnvironmentEnds(void* data) {
  const std::unique_ptr<std::shared_ptr<Runtime>> runtime(static_cast<std::shared_ptr<Runtime>*>(data));
  for (const std::weak_ptr<Stoppable>& watched : (*runtime)->watched_) {
    if (const std::shared_ptr<Stoppable> owner = watched.lock()) owner->Stop();
  }
}

}  // namespace tandem
