// One rank's shard of a model's weights in the memory of its GPU.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "core/thread_pool.h"
#include "kernels/cuda/linear.h"
#include "model/cuda/gpu.h"
#include "model/engine_options.h"
#include "model/weight_reader.h"

namespace tandem::cuda {

struct DeviceMatrix {
  DeviceWeight weight;
  DeviceBuffer memory;
};

// fp32 vectors, one behind the other in `memory`.
struct DeviceNorm {
  const float* weight = nullptr;
  const float* bias = nullptr;
};

struct DeviceLayer {
  DeviceNorm input_layernorm, post_attention_layernorm;
  DeviceMatrix query_key_value, dense, dense_h_to_4h, dense_4h_to_h;
  const float* query_key_value_bias = nullptr;
  const float* dense_bias = nullptr;
  const float* dense_h_to_4h_bias = nullptr;
  const float* dense_4h_to_h_bias = nullptr;
  DeviceBuffer vectors;
};

struct DeviceWeights {
  DeviceMatrix word_embeddings;
  std::vector<DeviceLayer> layers;
  DeviceNorm final_layernorm;
  DeviceBuffer final_vectors;

  int64_t bytes() const;
};

// What LoadDeviceWeights will take of the GPU's memory.
int64_t DeviceWeightsBytes(const WeightReader& reader, const ModelShape& shape, bool quantize_embedding);

// Reads on all threads of the pool, a few megabytes at a time, while the GPU packs what came before. Throws as LoadWeights does.
DeviceWeights LoadDeviceWeights(const WeightReader& reader, const ModelShape& shape, bool quantize_embedding, int gpu, ThreadPool& pool,
                                const std::atomic<bool>& cancelled, Stream stream);

// Random matrices, biases and norms of one and zero. Vector-wise scales for eight ranks, as GLM-130B is distributed.
DeviceWeights RandomDeviceWeights(const ModelShape& shape, const Shard& shard, WeightType type, Stream stream);

}  // namespace tandem::cuda
