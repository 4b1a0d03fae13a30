// The backend that computes on a GPU through kernels/cuda.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "comm/communicator.h"
#include "core/thread_pool.h"
#include "model/backend.h"
#include "model/engine_options.h"

namespace tandem {

// Whether this build has a CUDA backend.
bool HasCuda();

struct GpuDescription {
  std::string name;
  int64_t total_bytes;
};
// Takes none of its memory. Throws kInvalidArgument where this build has no CUDA, or there is no such GPU.
GpuDescription DescribeGpu(int gpu);

// Loads the weights on to the GPU. Throws kInvalidArgument where this build has no CUDA, there is no such GPU, or it cannot run this build's kernels;
// kOutOfMemory with the plan that did not fit; as LoadWeights.
std::unique_ptr<Backend> MakeCudaBackend(EngineOptions options, Communicator& communicator, ThreadPool& pool, const std::atomic<bool>& cancelled);

// The same with random weights of this type that are made on the GPU, vector-wise scales for eight ranks: for benches at sizes that no disk has to hold.
std::unique_ptr<Backend> MakeSyntheticCudaBackend(const EngineOptions& options, WeightType type, Communicator& communicator);

}  // namespace tandem
