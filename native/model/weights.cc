#include "model/weights.h"

#include <string>
#include <utility>

namespace tandem {
namespace {

constexpr int64_t kRowAlignment = 64;

// Rows that a thread reads at a time: what it holds beside the weights themselves is so much.
constexpr int64_t kBlockRows = 4 * PackedWeight::kBlockRows;

int64_t Aligned(int64_t bytes) { return (bytes + kRowAlignment - 1) / kRowAlignment * kRowAlignment; }

// A thread reads the rows that are its share of a loop over them, so that on a machine with several memory nodes they lie where they are used.
OwnedLinear RowMajor(const MatrixSource& source, ThreadPool& pool, const std::atomic<bool>& cancelled) {
  OwnedLinear linear;
  LinearWeight& weight = linear.weight;
  weight = source.weight;
  weight.row_stride = Aligned(source.weight.row_stride);
  linear.data = AlignedBuffer(weight.rows * weight.row_stride, source.name);
  linear.scales = AlignedBuffer(weight.rows * weight.groups * 2, source.name);
  weight.data = linear.data.data();
  weight.scales = linear.scales.as<const uint16_t>();
  ForRowBlocks(pool, weight.rows, kBlockRows, cancelled, [&](int64_t begin, int64_t end, int) {
    source.read(begin, end, linear.data.as<char>() + begin * weight.row_stride, weight.row_stride, linear.scales.as<uint16_t>() + begin * weight.groups);
  });
  return linear;
}

OwnedLinear Packed(const MatrixSource& source, ThreadPool& pool, const std::atomic<bool>& cancelled) {
  OwnedLinear linear;
  linear.weight = source.weight;
  const uint16_t no_scale = 0;
  LinearWeight shape = source.weight;
  shape.scales = &no_scale;
  PackedWeight packed = DescribePacked(shape, nullptr);
  linear.data = AlignedBuffer(packed.Bytes(), source.name);
  packed.data = linear.data.as<const uint8_t>();
  linear.packed = packed;
  ForRowBlocks(pool, shape.rows, kBlockRows, cancelled, [&](int64_t begin, int64_t end, int) {
    std::vector<uint8_t> q(static_cast<size_t>((end - begin) * shape.row_stride));
    std::vector<uint16_t> scales(static_cast<size_t>((end - begin) * shape.groups));
    source.read(begin, end, q.data(), shape.row_stride, scales.data());
    LinearWeight block = shape;
    block.rows = end - begin;
    block.data = q.data();
    block.scales = scales.data();
    PackRows(block, 0, block.rows, linear.data.as<uint8_t>() + begin / PackedWeight::kBlockRows * packed.BlockBytes());
  });
  return linear;
}

}  // namespace

int64_t Weights::bytes() const {
  const auto vector_bytes = [](const std::vector<float>& v) { return static_cast<int64_t>(v.size() * sizeof(float)); };
  const auto norm_bytes = [&](const LayerNormWeights& norm) { return vector_bytes(norm.weight) + vector_bytes(norm.bias); };
  int64_t bytes = word_embeddings.bytes() + norm_bytes(final_layernorm);
  for (const LayerWeights& layer : layers) {
    bytes += norm_bytes(layer.input_layernorm) + norm_bytes(layer.post_attention_layernorm) + vector_bytes(layer.query_key_value_bias) +
             vector_bytes(layer.dense_bias) + vector_bytes(layer.dense_h_to_4h_bias) + vector_bytes(layer.dense_4h_to_h_bias) +
             layer.query_key_value.bytes() + layer.dense.bytes() + layer.dense_h_to_4h.bytes() + layer.dense_4h_to_h.bytes();
  }
  return bytes;
}

Weights LoadWeights(const ModelShape& shape, const Shard& shard, std::vector<TensorSource> tensors, const WeightOptions& options, ThreadPool& pool,
                    const std::atomic<bool>& cancelled, LoadProgress* progress) {
  const WeightReader reader(shape, shard, std::move(tensors), progress);
  const auto load = [&](const MatrixSource& source) {
    const bool is_quantised = source.weight.type == WeightType::kI8 || source.weight.type == WeightType::kI4;
    return is_quantised && options.integer_products ? Packed(source, pool, cancelled) : RowMajor(source, pool, cancelled);
  };
  Weights weights;
  weights.word_embeddings = load(reader.Embedding(options.quantize_embedding));
  weights.final_layernorm = reader.FinalNorm();
  for (int64_t i = 0; i < shape.num_layers; ++i) {
    LayerSource source = reader.Layer(i);
    LayerWeights layer;
    layer.input_layernorm = std::move(source.input_layernorm);
    layer.query_key_value = load(source.query_key_value);
    layer.query_key_value_bias = std::move(source.query_key_value_bias);
    layer.dense = load(source.dense);
    layer.dense_bias = std::move(source.dense_bias);
    layer.post_attention_layernorm = std::move(source.post_attention_layernorm);
    layer.dense_h_to_4h = load(source.dense_h_to_4h);
    layer.dense_h_to_4h_bias = std::move(source.dense_h_to_4h_bias);
    layer.dense_4h_to_h = load(source.dense_4h_to_h);
    layer.dense_4h_to_h_bias = std::move(source.dense_4h_to_h_bias);
    weights.layers.push_back(std::move(layer));
  }
  return weights;
}

}  // namespace tandem
