// What an engine is made from.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/cpu_features.h"
#include "kernels/kv_layout.h"
#include "model/model_shape.h"
#include "model/tensor_file.h"
#include "model/weights.h"

namespace tandem {

enum class Device { kCpu, kCuda };

struct EngineOptions {
  ModelShape model;
  std::vector<TensorSource> tensors;
  Shard shard;
  WeightOptions weights;
  int threads = 1;
  std::vector<int> cpus;   // where they run (ThreadPoolOptions); all ranks of a machine have as many threads
  std::optional<Isa> isa;  // none: the best this CPU has
  Device device = Device::kCpu;
  int gpu = 0;  // kCuda: its number, as CUDA counts
  int64_t kv_blocks = 0;
  int64_t kv_block_size = 16;
  KvType kv_type = KvType::kF16;  // kF32 on the CPU alone, kI8 on GPUs alone
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

}  // namespace tandem
