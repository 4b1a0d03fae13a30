// One rank's shard of a model's weights: its rows, columns and heads, cut out of the whole tensors of a store (model-spec section 1.2).
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "core/thread_pool.h"
#include "kernels/linear.h"
#include "model/aligned_buffer.h"
#include "model/model_shape.h"
#include "model/tensor_file.h"

namespace tandem {

// A linear layer's share and the memory it lies in. Rows begin on 64-byte boundaries.
struct OwnedLinear {
  LinearWeight weight;
  AlignedBuffer data;
  AlignedBuffer scales;

  int64_t bytes() const { return data.bytes() + scales.bytes(); }
};

struct LayerNormWeights {
  std::vector<float> weight, bias;  // [hidden_size]
};

struct LayerWeights {
  LayerNormWeights input_layernorm, post_attention_layernorm;
  OwnedLinear query_key_value;              // [3 h / R, h]: whole heads, in each q, k, v
  std::vector<float> query_key_value_bias;  // [3 h / R]
  OwnedLinear dense;                        // [h, h / R]
  std::vector<float> dense_bias;            // [h]: added once, after the all-reduce
  OwnedLinear dense_h_to_4h;                // [2 f / R, h]: this rank's block of the linear half, then its block of the GELU half
  std::vector<float> dense_h_to_4h_bias;    // [2 f / R]
  OwnedLinear dense_4h_to_h;                // [h, f / R]
  std::vector<float> dense_4h_to_h_bias;    // [h]: added once, after the all-reduce
};

struct Weights {
  OwnedLinear word_embeddings;  // [V / R, h]: the lookup table and, tied, the output projection
  std::vector<LayerWeights> layers;
  LayerNormWeights final_layernorm;

  int64_t bytes() const;
};

// Reads layers in parallel. Throws kCheckpoint naming the tensor, what was seen and what is expected; kOutOfMemory; kAborted when `cancelled`.
Weights LoadWeights(const ModelShape& shape, const Shard& shard, std::vector<TensorSource> tensors, ThreadPool& pool, const std::atomic<bool>& cancelled);

}  // namespace tandem
