#include "model/cuda/cuda_weights.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>

namespace tandem::cuda {
namespace {

// Rows of a packed matrix come in so many.
constexpr int64_t kPackedRows = 16;
// What a thread has in flight between the file and the GPU.
constexpr int64_t kStagingBytes = 8 << 20;

int64_t Padded(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// Vectors gathered on the host, copied as one.
class VectorBlock {
 public:
  // Returns the place of `values` in the block.
  int64_t Add(const std::vector<float>& values) {
    const int64_t place = static_cast<int64_t>(floats_.size());
    floats_.insert(floats_.end(), values.begin(), values.end());
    floats_.resize((floats_.size() + 63) / 64 * 64);  // 256-byte boundaries
    return place;
  }
  DeviceBuffer Copy(const char* purpose) const {
    DeviceBuffer buffer(static_cast<int64_t>(floats_.size() * sizeof(float)), purpose);
    Check(cudaMemcpy(buffer.data(), floats_.data(), floats_.size() * sizeof(float), cudaMemcpyHostToDevice), purpose);
    return buffer;
  }

 private:
  std::vector<float> floats_;
};

class Loader {
 public:
  Loader(int gpu, ThreadPool& pool, const std::atomic<bool>& cancelled, Stream stream) : gpu_(gpu), pool_(pool), cancelled_(cancelled), stream_(stream) {
    for (int i = 0; i < pool.num_threads(); ++i) lanes_.push_back(std::make_unique<Lane>());
  }

  DeviceMatrix Load(const MatrixSource& source) {
    const LinearWeight& shape = source.weight;
    DeviceMatrix matrix;
    matrix.weight = DescribeDeviceWeight(shape);
    matrix.memory = DeviceBuffer(DeviceWeightBytes(matrix.weight), source.name.c_str());
    matrix.weight.data = matrix.memory.data();
    const int64_t row_bytes = (shape.row_stride + 15) / 16 * 16, scale_bytes = shape.groups * 2;
    const int64_t block = std::max<int64_t>(1, kStagingBytes / (row_bytes + scale_bytes) / kPackedRows) * kPackedRows;
    ForRowBlocks(pool_, shape.rows, block, cancelled_, [&](int64_t begin, int64_t end, int thread) {
      Lane& lane = *lanes_[static_cast<size_t>(thread)];
      const int64_t rows = end - begin, scales_at = rows * row_bytes, bytes = scales_at + rows * scale_bytes;
      Check(cudaSetDevice(gpu_), "choosing the GPU");
      lane.MakeRoom(bytes);
      source.read(begin, end, lane.pinned.as<char>(), row_bytes, reinterpret_cast<uint16_t*>(lane.pinned.as<char>() + scales_at));
      const std::lock_guard<std::mutex> lock(mutex_);
      char* staged = lane.staged.as<char>();
      Check(cudaMemcpyAsync(staged, lane.pinned.data(), static_cast<size_t>(bytes), cudaMemcpyHostToDevice, stream_), "copying weights");
      PackRows(matrix.weight, begin, rows, staged, row_bytes, reinterpret_cast<const uint16_t*>(staged + scales_at), stream_);
      lane.done.Record(stream_);
    });
    return matrix;
  }

 private:
  struct Lane {
    PinnedBuffer pinned;
    DeviceBuffer staged;
    OwnedEvent done;  // the GPU has read `pinned` and `staged`

    void MakeRoom(int64_t bytes) {
      done.Wait();
      if (bytes <= pinned.bytes()) return;
      pinned = PinnedBuffer(bytes, "copying weights");
      staged = DeviceBuffer(bytes, "copying weights");
    }
  };

  const int gpu_;
  ThreadPool& pool_;
  const std::atomic<bool>& cancelled_;
  const Stream stream_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Lane>> lanes_;
};

DeviceMatrix RandomMatrix(WeightType type, int64_t rows, int64_t cols, int64_t groups, uint64_t seed, Stream stream) {
  LinearWeight shape;
  shape.type = type;
  shape.rows = rows;
  shape.cols = cols;
  if (type == WeightType::kI8 || type == WeightType::kI4) {
    shape.groups = groups;
    shape.group_size = cols / groups;
  }
  DeviceMatrix matrix;
  matrix.weight = DescribeDeviceWeight(shape);
  matrix.memory = DeviceBuffer(DeviceWeightBytes(matrix.weight), "random weights");
  matrix.weight.data = matrix.memory.data();
  RandomWeight(matrix.weight, seed, stream);
  return matrix;
}

int64_t MatrixBytes(const MatrixSource& source) { return DeviceWeightBytes(DescribeDeviceWeight(source.weight)); }

}  // namespace

int64_t DeviceWeights::bytes() const {
  int64_t bytes = word_embeddings.memory.bytes() + final_vectors.bytes();
  for (const DeviceLayer& layer : layers) {
    bytes += layer.vectors.bytes();
    for (const DeviceMatrix* matrix : {&layer.query_key_value, &layer.dense, &layer.dense_h_to_4h, &layer.dense_4h_to_h}) bytes += matrix->memory.bytes();
  }
  return bytes;
}

int64_t DeviceWeightsBytes(const WeightReader& reader, const ModelShape& shape, bool quantize_embedding) {
  int64_t bytes = Padded(MatrixBytes(reader.Embedding(quantize_embedding)));
  for (int64_t i = 0; i < shape.num_layers; ++i) {
    const LayerSource layer = reader.Layer(i);
    for (const MatrixSource* matrix : {&layer.query_key_value, &layer.dense, &layer.dense_h_to_4h, &layer.dense_4h_to_h}) bytes += Padded(MatrixBytes(*matrix));
    bytes += (9 * shape.hidden_size + 2 * shape.inner_hidden_size) * 4 + 8 * Padded(1);  // norms and biases, each at a boundary
  }
  return bytes;
}

DeviceWeights LoadDeviceWeights(const WeightReader& reader, const ModelShape& shape, bool quantize_embedding, int gpu, ThreadPool& pool,
                                const std::atomic<bool>& cancelled, Stream stream) {
  Loader loader(gpu, pool, cancelled, stream);
  DeviceWeights weights;
  weights.word_embeddings = loader.Load(reader.Embedding(quantize_embedding));
  VectorBlock final;
  const LayerNormWeights norm = reader.FinalNorm();
  const int64_t final_weight = final.Add(norm.weight), final_bias = final.Add(norm.bias);
  weights.final_vectors = final.Copy("the final layer norm");
  weights.final_layernorm = {weights.final_vectors.as<float>() + final_weight, weights.final_vectors.as<float>() + final_bias};
  for (int64_t i = 0; i < shape.num_layers; ++i) {
    const LayerSource source = reader.Layer(i);
    DeviceLayer layer;
    VectorBlock block;
    const std::vector<float>* vectors[] = {&source.input_layernorm.weight, &source.input_layernorm.bias, &source.post_attention_layernorm.weight,
                                           &source.post_attention_layernorm.bias, &source.query_key_value_bias, &source.dense_bias,
                                           &source.dense_h_to_4h_bias, &source.dense_4h_to_h_bias};
    const float** places[] = {&layer.input_layernorm.weight, &layer.input_layernorm.bias, &layer.post_attention_layernorm.weight,
                              &layer.post_attention_layernorm.bias, &layer.query_key_value_bias, &layer.dense_bias,
                              &layer.dense_h_to_4h_bias, &layer.dense_4h_to_h_bias};
    std::vector<int64_t> offsets;
    for (const std::vector<float>* vector : vectors) offsets.push_back(block.Add(*vector));
    layer.vectors = block.Copy("biases and norms");
    for (size_t v = 0; v < offsets.size(); ++v) *places[v] = layer.vectors.as<float>() + offsets[v];
    layer.query_key_value = loader.Load(source.query_key_value);
    layer.dense = loader.Load(source.dense);
    layer.dense_h_to_4h = loader.Load(source.dense_h_to_4h);
    layer.dense_4h_to_h = loader.Load(source.dense_4h_to_h);
    weights.layers.push_back(std::move(layer));
  }
  Check(cudaStreamSynchronize(stream), "packing weights");
  return weights;
}

DeviceWeights RandomDeviceWeights(const ModelShape& shape, const Shard& shard, WeightType type, Stream stream) {
  constexpr int64_t kScaleRanks = 8;
  const int64_t h = shape.hidden_size, f = shape.inner_hidden_size, ranks = shard.world_size, groups = std::max<int64_t>(1, kScaleRanks / ranks);
  const std::vector<float> ones(static_cast<size_t>(h), 1.0f), zeros(static_cast<size_t>(std::max(3 * h, 2 * f)), 0.0f);
  uint64_t seed = 1;
  DeviceWeights weights;
  weights.word_embeddings = RandomMatrix(WeightType::kF16, shape.vocab_size / ranks, h, 0, seed++, stream);
  for (int64_t i = 0; i <= shape.num_layers; ++i) {
    VectorBlock block;
    const int64_t one = block.Add(ones), zero = block.Add(zeros);
    DeviceLayer layer;
    layer.vectors = block.Copy("biases and norms");
    const float* all_zero = layer.vectors.as<float>() + zero;
    const DeviceNorm norm = {layer.vectors.as<float>() + one, all_zero};
    if (i == shape.num_layers) {
      weights.final_layernorm = norm;
      weights.final_vectors = std::move(layer.vectors);
      break;
    }
    layer.input_layernorm = layer.post_attention_layernorm = norm;
    layer.query_key_value_bias = layer.dense_bias = layer.dense_h_to_4h_bias = layer.dense_4h_to_h_bias = all_zero;
    layer.query_key_value = RandomMatrix(type, 3 * h / ranks, h, 1, seed++, stream);
    layer.dense = RandomMatrix(type, h, h / ranks, groups, seed++, stream);
    layer.dense_h_to_4h = RandomMatrix(type, 2 * f / ranks, h, 1, seed++, stream);
    layer.dense_4h_to_h = RandomMatrix(type, h, f / ranks, groups, seed++, stream);
    weights.layers.push_back(std::move(layer));
  }
  Check(cudaStreamSynchronize(stream), "making random weights");
  return weights;
}

}  // namespace tandem::cuda
