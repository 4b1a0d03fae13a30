// One rank's shard of a model's weights in this machine's memory, as the CPU's kernels take them.
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
#include "model/weight_reader.h"

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

using LayerWeights = LayerOf<OwnedLinear>;

struct Weights {
  OwnedLinear word_embeddings;  // [V / R, h]: the lookup table and, tied, the output projection
  std::vector<LayerWeights> layers;
  LayerNormWeights final_layernorm;

  int64_t bytes() const;
};

// On all threads of the pool; beside the weights each needs memory for some rows. Throws kCheckpoint naming the tensor, what was seen and what is
// expected; kOutOfMemory; kAborted when `cancelled`. progress: may be null
Weights LoadWeights(const ModelShape& shape, const Shard& shard, std::vector<TensorSource> tensors, const WeightOptions& options, ThreadPool& pool,
                    const std::atomic<bool>& cancelled, LoadProgress* progress = nullptr);

}  // namespace tandem
