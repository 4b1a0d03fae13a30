// One rank's share of the tensors of a store: its rows, columns and heads (model-spec section 1.2), matrix by matrix, for a backend to put where it computes.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/thread_pool.h"
#include "kernels/linear.h"
#include "model/model_shape.h"
#include "model/tensor_file.h"

namespace tandem {

constexpr int64_t kEmbeddingGroup = 128;

// How far loading is, for another thread to look at.
struct LoadProgress {
  std::atomic<int64_t> done_bytes{0};   // of the matrices in the store
  std::atomic<int64_t> total_bytes{0};  // 0: not known yet
};

struct LayerNormWeights {
  std::vector<float> weight, bias;  // [hidden_size]
};

template <typename Matrix>
struct LayerOf {
  LayerNormWeights input_layernorm, post_attention_layernorm;
  Matrix query_key_value;                   // [3 h / R, h]: whole heads, in each q, k, v
  std::vector<float> query_key_value_bias;  // [3 h / R]
  Matrix dense;                             // [h, h / R]
  std::vector<float> dense_bias;            // [h]: added once, after the all-reduce
  Matrix dense_h_to_4h;                     // [2 f / R, h]: this rank's block of the linear half, then its block of the GELU half
  std::vector<float> dense_h_to_4h_bias;    // [2 f / R]
  Matrix dense_4h_to_h;                     // [h, f / R]
  std::vector<float> dense_4h_to_h_bias;    // [h]: added once, after the all-reduce
};

// A matrix that is still in the store.
struct MatrixSource {
  std::string name;
  LinearWeight weight;  // what it is; without data and scales, row_stride: the bytes of a row
  // Reads rows [begin, end): data, `stride` bytes from row to row, and scales, [end - begin, groups], where the type has them. Any thread.
  std::function<void(int64_t begin, int64_t end, void* data, int64_t stride, uint16_t* scales)> read;
};

using LayerSource = LayerOf<MatrixSource>;

// Sources live no longer than their reader. Errors are kCheckpoint and name the tensor, what was seen and what is expected.
class WeightReader {
 public:
  // progress: may be null
  WeightReader(const ModelShape& shape, const Shard& shard, std::vector<TensorSource> tensors, LoadProgress* progress);

  // quantize: INT8 with a scale for every kEmbeddingGroup columns of a row, instead of as the store has it
  MatrixSource Embedding(bool quantize) const;
  LayerSource Layer(int64_t index) const;
  LayerNormWeights FinalNorm() const { return Norm("transformer.final_layernorm"); }

 private:
  struct RowRange;
  struct Share;
  Share RowShare(int64_t rows, int64_t columns) const;
  Share GegluShare() const;
  Share ColumnShare(int64_t rows, int64_t columns) const;
  const TensorSource& Need(const std::string& name) const;
  const TensorSource& NeedFloat(const std::string& name, const std::vector<int64_t>& shape) const;
  LayerNormWeights Norm(const std::string& name) const;
  std::vector<float> Vector(const std::string& name, const std::vector<RowRange>& ranges, int64_t size) const;
  MatrixSource Linear(const std::string& name, int64_t rows, int64_t columns, const Share& share) const;
  MatrixSource Plain(const std::string& name, int64_t rows, int64_t columns, const Share& share) const;
  MatrixSource Quantised(const std::string& name, int64_t rows, int64_t columns, const Share& share) const;
  void ReadShare(const TensorSource& tensor, const Share& share, int64_t begin, int64_t end, int64_t column_byte, int64_t bytes, void* out,
                 int64_t stride) const;
  int64_t MatrixBytes() const;
  void Count(int64_t bytes) const;

  const ModelShape& shape_;
  const Shard& shard_;
  const TensorFiles files_;
  LoadProgress* const progress_;
};

// Calls body(begin, end, thread) for `block` rows at a time, on all threads; throws the first error that one of them has, kAborted once `cancelled`.
void ForRowBlocks(ThreadPool& pool, int64_t rows, int64_t block, const std::atomic<bool>& cancelled,
                  const std::function<void(int64_t begin, int64_t end, int thread)>& body);

}  // namespace tandem
