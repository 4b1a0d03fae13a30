// One rank of a loaded model: weights, KV cache, communicator, backend, and the steps it runs.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "comm/communicator.h"
#include "core/thread_pool.h"
#include "model/backend.h"
#include "model/cpu_backend.h"
#include "model/engine_options.h"
#include "model/glm.h"
#include "model/step.h"

namespace tandem {

// Loads the weights. Keeps references to all but the options.
using MakeBackend = std::unique_ptr<Backend> (*)(EngineOptions options, Communicator& communicator, ThreadPool& pool, const std::atomic<bool>& cancelled);

class Engine {
 public:
  // Meets the other ranks, then loads; `cancelled` (any thread may set it, lives as long as the engine) ends both, and running steps.
  Engine(EngineOptions options, const std::atomic<bool>& cancelled, MakeBackend make_backend = MakeCpuBackend);
  // Waits until no step is under way.
  ~Engine();

  // A step that has begun, and takes part of the engine until it has ended or is given up.
  class UnderWay;

  // Throws kInvalidArgument for a step that ValidateStep refuses (nothing has happened then, and the engine goes on); kAborted, kTimeout, kInternal.
  // At most two have begun and not ended: waits until that is so.
  std::unique_ptr<UnderWay> Begin(Step step);
  // Waits for its result, in the order in which they began. Throws as Begin does. From one thread, which need not be Begin's.
  StepResult End(UnderWay& step);
  StepResult Run(Step step) { return End(*Begin(std::move(step))); }
  // Ends collectives on all ranks, and every later step. Any thread; the caller sets `cancelled` as well.
  void Abort() { communicator_->Abort(); }
  EngineMemory memory() const { return backend_->memory(); }

 private:
  // Tokens that the last step drew, into the runs that go on from them, if that step has ended.
  void TakeSamples(Step& step);
  // While `error` is handled: throws what it means to the engine's user.
  [[noreturn]] void FailStep(const std::exception& error);

  const ModelShape shape_;
  const std::atomic<bool>& cancelled_;
  StepLimits limits_;
  StepsBefore before_;
  std::vector<uint32_t> samples_;  // of the last step's Extends, on rank 0; 0 where there is none
  bool is_last_later_ = false;     // the last step was evaluated later: its samples are the backend's
  std::chrono::steady_clock::time_point last_end_{};  // End's
  ThreadPool pool_;
  std::unique_ptr<Communicator> communicator_;
  std::unique_ptr<Backend> backend_;
  std::mutex mutex_;
  std::condition_variable changed_;
  int under_way_ = 0;
};

class Engine::UnderWay {
 public:
  ~UnderWay();
  bool has_ended() const { return step_.later < 0; }
  Engine& engine() const { return engine_; }

 private:
  friend class Engine;
  explicit UnderWay(Engine& engine);
  Engine& engine_;
  StepUnderWay step_;
};

}  // namespace tandem
