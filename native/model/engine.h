// One rank of a loaded model: weights, KV cache, communicator, backend, and the steps it runs.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "comm/communicator.h"
#include "core/thread_pool.h"
#include "model/backend.h"
#include "model/cpu_backend.h"
#include "model/engine_options.h"
#include "model/step.h"

namespace tandem {

// Loads the weights. Keeps references to all but the options.
using MakeBackend = std::unique_ptr<Backend> (*)(EngineOptions options, Communicator& communicator, ThreadPool& pool, const std::atomic<bool>& cancelled);

class Engine {
 public:
  // Meets the other ranks, then loads; `cancelled` (any thread may set it, lives as long as the engine) ends both, and running steps.
  Engine(EngineOptions options, const std::atomic<bool>& cancelled, MakeBackend make_backend = MakeCpuBackend);

  // Throws kInvalidArgument for a step that ValidateStep refuses (nothing has happened then, and the engine goes on); kAborted, kTimeout, kInternal.
  StepResult Run(Step step);
  // Ends collectives on all ranks, and every later step. Any thread; the caller sets `cancelled` as well.
  void Abort() { communicator_->Abort(); }
  EngineMemory memory() const { return backend_->memory(); }

 private:
  // Tokens that the last step drew, into the runs that go on from them.
  void TakeSamples(Step& step);

  const ModelShape shape_;
  const std::atomic<bool>& cancelled_;
  StepLimits limits_;
  StepsBefore before_;
  std::vector<uint32_t> samples_;  // of the last step's Extends, on rank 0; 0 where there is none
  ThreadPool pool_;
  std::unique_ptr<Communicator> communicator_;
  std::unique_ptr<Backend> backend_;
};

}  // namespace tandem
