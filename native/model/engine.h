// One rank of a loaded model: weights, KV cache, communicator, backend, and the steps it runs.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "comm/communicator.h"
#include "core/cpu_features.h"
#include "core/thread_pool.h"
#include "model/cpu_backend.h"
#include "model/kv_cache.h"
#include "model/model_shape.h"
#include "model/step.h"
#include "model/tensor_file.h"
#include "model/weights.h"

namespace tandem {

struct EngineOptions {
  ModelShape model;
  std::vector<TensorSource> tensors;
  Shard shard;
  WeightOptions weights;
  int threads = 1;
  std::vector<int> cpus;   // where they run (ThreadPoolOptions); all ranks of a machine have as many threads
  std::optional<Isa> isa;  // none: the best this CPU has
  int64_t kv_blocks = 0;
  int64_t kv_block_size = 16;
  KvType kv_type = KvType::kF16;
  int64_t max_batch_tokens = 0;
  struct CommunicatorOptions {
    std::string name;
    int64_t timeout_ms = 0;
  };
  std::optional<CommunicatorOptions> communicator;  // needed where world_size > 1
  std::shared_ptr<LoadProgress> progress;           // null: nobody looks
};

struct EngineMemory {
  int64_t weight_bytes = 0;
  int64_t kv_bytes = 0;
  int64_t workspace_bytes = 0;
};

class Engine {
 public:
  // Meets the other ranks, then loads; `cancelled` (any thread may set it, lives as long as the engine) ends both, and running steps.
  Engine(EngineOptions options, const std::atomic<bool>& cancelled);

  // Throws kInvalidArgument for a step that ValidateStep refuses (nothing has happened then, and the engine goes on); kAborted, kTimeout, kInternal.
  StepResult Run(const Step& step);
  // Ends collectives on all ranks, and every later step. Any thread; the caller sets `cancelled` as well.
  void Abort() { communicator_->Abort(); }
  EngineMemory memory() const;

 private:
  const ModelShape shape_;
  const std::atomic<bool>& cancelled_;
  StepLimits limits_;
  std::optional<PartialRun> under_way_;
  ThreadPool pool_;
  KvCache kv_;
  std::unique_ptr<Communicator> communicator_;
  Weights weights_;
  CpuBackend backend_;
};

}  // namespace tandem
