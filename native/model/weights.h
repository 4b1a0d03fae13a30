// One rank's shard of a model's weights: its rows, columns and heads, cut out of the whole tensors of a store (model-spec section 1.2).
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <vector>

#include "core/thread_pool.h"
#include "kernels/linear.h"
#include "kernels/packed_linear.h"
#include "model/aligned_buffer.h"
#include "model/model_shape.h"
#include "model/tensor_file.h"

namespace tandem {

// A linear layer's share and the memory it lies in: row-major, rows on 64-byte boundaries; or packed for integer products.
struct OwnedLinear {
  LinearWeight weight;  // where `packed` is given: without data
  std::optional<PackedWeight> packed;
  AlignedBuffer data;
  AlignedBuffer scales;

  int64_t rows() const { return weight.rows; }
  int64_t cols() const { return weight.cols; }
  int64_t bytes() const { return data.bytes() + scales.bytes(); }
};

struct WeightOptions {
  // INT8 and INT4 weights are packed: activations are quantised on their way into them (packed_linear.h).
  bool integer_products = false;
  // The word embeddings are kept in INT8, with a scale for every kEmbeddingGroup columns of a row, instead of as the store has them.
  bool quantize_embedding = false;
};
constexpr int64_t kEmbeddingGroup = 128;

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

// How far loading is, for another thread to look at.
struct LoadProgress {
  std::atomic<int64_t> done_bytes{0};   // of the matrices in the store
  std::atomic<int64_t> total_bytes{0};  // 0: not known yet
};

// On all threads of the pool; beside the weights each needs memory for some rows. Throws kCheckpoint naming the tensor, what was seen and what is
// expected; kOutOfMemory; kAborted when `cancelled`. progress: may be null
Weights LoadWeights(const ModelShape& shape, const Shard& shard, std::vector<TensorSource> tensors, const WeightOptions& options, ThreadPool& pool,
                    const std::atomic<bool>& cancelled, LoadProgress* progress = nullptr);

}  // namespace tandem
