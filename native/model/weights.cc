#include "model/weights.h"

#include <algorithm>
#include <cmath>
#include <exception>
#include <mutex>
#include <string>
#include <utility>

#include "core/error.h"
#include "core/half.h"

namespace tandem {
namespace {

constexpr int64_t kRowAlignment = 64;

[[noreturn]] void Fail(const std::string& name, const std::string& what) { throw Error(ErrorCode::kCheckpoint, "tensor " + name + ": " + what); }

// `count` rows from `first`: a share of rows is one such range, or two for the halves of GEGLU.
struct RowRange {
  int64_t first;
  int64_t count;
};

// Which part of a matrix this rank takes: rows of all columns, or columns of all rows.
struct Share {
  std::vector<RowRange> rows;
  int64_t first_column;
  int64_t columns;

  int64_t row_count() const {
    int64_t count = 0;
    for (const RowRange& range : rows) count += range.count;
    return count;
  }
};

// q = round(w / scale), ties to even, where scale is fp16 of max |w| / 127 over the group.
OwnedLinear QuantizeToInt8(const LinearWeight& plain, const std::string& name, ThreadPool& pool) {
  OwnedLinear linear;
  LinearWeight& weight = linear.weight;
  weight.type = WeightType::kI8;
  weight.rows = plain.rows;
  weight.cols = plain.cols;
  weight.row_stride = (plain.cols + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
  weight.group_size = kEmbeddingGroup;
  weight.groups = (plain.cols + kEmbeddingGroup - 1) / kEmbeddingGroup;
  linear.data = AlignedBuffer(weight.rows * weight.row_stride, name);
  linear.scales = AlignedBuffer(weight.rows * weight.groups * 2, name);
  weight.data = linear.data.data();
  weight.scales = linear.scales.as<const uint16_t>();
  pool.ParallelFor(weight.rows, 16, [&](int64_t begin, int64_t end, int) {
    std::vector<float> values(static_cast<size_t>(plain.cols));
    for (int64_t o = begin; o < end; ++o) {
      DequantizeRow(plain, o, values.data());
      int8_t* q = linear.data.as<int8_t>() + o * weight.row_stride;
      for (int64_t group = 0; group < weight.groups; ++group) {
        const auto first = values.begin() + group * kEmbeddingGroup, last = values.begin() + std::min((group + 1) * kEmbeddingGroup, plain.cols);
        float largest = 0.0f;
        for (auto value = first; value != last; ++value) largest = std::max(largest, std::abs(*value));
        const uint16_t half = FloatToHalf(largest / 127.0f);
        linear.scales.as<uint16_t>()[o * weight.groups + group] = half;
        const float scale = HalfToFloat(half);
        for (auto value = first; value != last; ++value, ++q) {
          *q = scale == 0.0f ? 0 : static_cast<int8_t>(std::clamp(std::nearbyint(*value / scale), -127.0f, 127.0f));
        }
      }
    }
  });
  return linear;
}

class Loader {
 public:
  Loader(const ModelShape& shape, const Shard& shard, const TensorFiles& files, const WeightOptions& options)
      : shape_(shape), shard_(shard), files_(files), options_(options) {}

  OwnedLinear Embedding(ThreadPool& pool) const {
    const std::string name = "transformer.word_embeddings.weight";
    OwnedLinear plain = Plain(name, shape_.vocab_size, shape_.hidden_size, RowShare(shape_.vocab_size, shape_.hidden_size));
    if (!options_.quantize_embedding) return plain;
    OwnedLinear quantised = QuantizeToInt8(plain.weight, name, pool);
    return options_.integer_products ? Packed(std::move(quantised), name) : std::move(quantised);
  }

  LayerNormWeights Norm(const std::string& name) const {
    return {Vector(name + ".weight", {{0, shape_.hidden_size}}, shape_.hidden_size), Vector(name + ".bias", {{0, shape_.hidden_size}}, shape_.hidden_size)};
  }

  LayerWeights Layer(int64_t index) const {
    const int64_t h = shape_.hidden_size, f = shape_.inner_hidden_size;
    const std::string prefix = "transformer.layers." + std::to_string(index) + ".";
    const Share qkv = RowShare(3 * h, h), halves = GegluShare();
    LayerWeights layer;
    layer.input_layernorm = Norm(prefix + "input_layernorm");
    layer.query_key_value = Linear(prefix + "attention.query_key_value", 3 * h, h, qkv);
    layer.query_key_value_bias = Vector(prefix + "attention.query_key_value.bias", qkv.rows, 3 * h);
    layer.dense = Linear(prefix + "attention.dense", h, h, ColumnShare(h, h));
    layer.dense_bias = Vector(prefix + "attention.dense.bias", {{0, h}}, h);
    layer.post_attention_layernorm = Norm(prefix + "post_attention_layernorm");
    layer.dense_h_to_4h = Linear(prefix + "mlp.dense_h_to_4h", 2 * f, h, halves);
    layer.dense_h_to_4h_bias = Vector(prefix + "mlp.dense_h_to_4h.bias", halves.rows, 2 * f);
    layer.dense_4h_to_h = Linear(prefix + "mlp.dense_4h_to_h", h, f, ColumnShare(h, f));
    layer.dense_4h_to_h_bias = Vector(prefix + "mlp.dense_4h_to_h.bias", {{0, h}}, h);
    return layer;
  }

 private:
  Share RowShare(int64_t rows, int64_t columns) const {
    const int64_t count = rows / shard_.world_size;
    return {{{shard_.rank * count, count}}, 0, columns};
  }

  Share GegluShare() const {
    const int64_t f = shape_.inner_hidden_size, count = f / shard_.world_size;
    return {{{shard_.rank * count, count}, {f + shard_.rank * count, count}}, 0, shape_.hidden_size};
  }

  Share ColumnShare(int64_t rows, int64_t columns) const {
    const int64_t count = columns / shard_.world_size;
    return {{{0, rows}}, shard_.rank * count, count};
  }

  const TensorSource& Need(const std::string& name) const {
    const TensorSource* tensor = files_.Find(name);
    if (tensor == nullptr) Fail(name, "is missing");
    return *tensor;
  }

  // F16 or F32 of this shape.
  const TensorSource& NeedFloat(const std::string& name, const std::vector<int64_t>& shape) const {
    const TensorSource& tensor = Need(name);
    if (tensor.shape != shape || (tensor.type != TensorType::kF16 && tensor.type != TensorType::kF32)) {
      Fail(name, "is " + Describe(tensor.type, tensor.shape) + ", expected " + Describe(TensorType::kF16, shape) + " or F32");
    }
    return tensor;
  }

  std::vector<float> Vector(const std::string& name, const std::vector<RowRange>& ranges, int64_t size) const {
    const TensorSource& tensor = NeedFloat(name, {size});
    std::vector<float> values;
    for (const RowRange& range : ranges) {
      const size_t begin = values.size(), count = static_cast<size_t>(range.count);
      values.resize(begin + count);
      if (tensor.type == TensorType::kF32) {
        files_.ReadRows(tensor, range.first, range.count, 0, 4, values.data() + begin, 4);
        continue;
      }
      std::vector<uint16_t> halves(count);
      files_.ReadRows(tensor, range.first, range.count, 0, 2, halves.data(), 2);
      for (size_t i = 0; i < count; ++i) values[begin + i] = HalfToFloat(halves[i]);
    }
    return values;
  }

  // NAME.weight, or NAME.qweight and NAME.scales.
  OwnedLinear Linear(const std::string& name, int64_t rows, int64_t columns, const Share& share) const {
    const bool plain = files_.Find(name + ".weight") != nullptr, quantised = files_.Find(name + ".qweight") != nullptr;
    if (plain && quantised) Fail(name, "has both .weight and .qweight");
    if (!plain && !quantised) Fail(name + ".weight", "is missing, and " + name + ".qweight too");
    return plain ? Plain(name + ".weight", rows, columns, share) : Quantised(name, rows, columns, share);
  }

  OwnedLinear Plain(const std::string& name, int64_t rows, int64_t columns, const Share& share) const {
    const TensorSource& tensor = NeedFloat(name, {rows, columns});
    OwnedLinear linear;
    linear.weight.type = tensor.type == TensorType::kF16 ? WeightType::kF16 : WeightType::kF32;
    const int64_t element = TensorTypeBytes(tensor.type);
    ReadMatrix(tensor, share, share.first_column * element, share.columns * element, linear);
    return linear;
  }

  OwnedLinear Quantised(const std::string& name, int64_t rows, int64_t columns, const Share& share) const {
    const TensorSource& tensor = Need(name + ".qweight");
    const bool int4 = tensor.type == TensorType::kU8;
    const std::vector<int64_t> int8_shape = {rows, columns}, int4_shape = {rows, columns / 2};
    if (!(int4 && columns % 2 == 0 && tensor.shape == int4_shape) && !(tensor.type == TensorType::kI8 && tensor.shape == int8_shape)) {
      Fail(tensor.name, "is " + Describe(tensor.type, tensor.shape) + ", expected " + Describe(TensorType::kI8, int8_shape) + " or " +
                            Describe(TensorType::kU8, int4_shape));
    }
    const TensorSource& scales = Need(name + ".scales");
    const int64_t groups = scales.shape.size() == 2 ? scales.shape[1] : 0;
    if (scales.type != TensorType::kF16 || groups < 1 || scales.shape[0] != rows || columns % groups != 0 || (int4 && columns / groups % 2 != 0)) {
      Fail(scales.name, "is " + Describe(scales.type, scales.shape) + ", expected F16 [" + std::to_string(rows) + ", groups] where groups divides " +
                            std::to_string(columns) + (int4 ? " into groups of even size" : ""));
    }
    if (int4 && share.columns % 2 != 0) {
      Fail(tensor.name, "INT4 columns come in pairs: world size " + std::to_string(shard_.world_size) + " would give each rank " +
                            std::to_string(share.columns) + " of them");
    }

    OwnedLinear linear;
    linear.weight.type = int4 ? WeightType::kI4 : WeightType::kI8;
    const int64_t per_byte = int4 ? 2 : 1;
    ReadMatrix(tensor, share, share.first_column / per_byte, share.columns / per_byte, linear);

    const int64_t group_size = columns / groups;
    const int64_t first_group = share.first_column / group_size, last_group = (share.first_column + share.columns - 1) / group_size;
    LinearWeight& weight = linear.weight;
    weight.group_size = group_size;
    weight.group_offset = share.first_column - first_group * group_size;
    weight.groups = last_group - first_group + 1;
    const int64_t row_bytes = weight.groups * 2;
    linear.scales = AlignedBuffer(weight.rows * row_bytes, scales.name);
    weight.scales = linear.scales.as<const uint16_t>();
    char* out = linear.scales.as<char>();
    for (const RowRange& range : share.rows) {
      files_.ReadRows(scales, range.first, range.count, first_group * 2, row_bytes, out, row_bytes);
      out += range.count * row_bytes;
    }
    return options_.integer_products ? Packed(std::move(linear), tensor.name) : std::move(linear);
  }

  static OwnedLinear Packed(OwnedLinear from, const std::string& name) {
    OwnedLinear packed;
    packed.weight = from.weight;
    packed.weight.data = nullptr;
    packed.weight.scales = nullptr;
    packed.data = AlignedBuffer(DescribePacked(from.weight, nullptr).Bytes(), name);
    packed.packed = DescribePacked(from.weight, packed.data.data());
    PackRows(from.weight, 0, from.weight.rows, packed.data.data());
    return packed;
  }

  void ReadMatrix(const TensorSource& tensor, const Share& share, int64_t column_byte, int64_t bytes, OwnedLinear& linear) const {
    LinearWeight& weight = linear.weight;
    weight.rows = share.row_count();
    weight.cols = share.columns;
    weight.row_stride = (bytes + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
    linear.data = AlignedBuffer(weight.rows * weight.row_stride, tensor.name);
    weight.data = linear.data.data();
    char* out = linear.data.as<char>();
    for (const RowRange& range : share.rows) {
      files_.ReadRows(tensor, range.first, range.count, column_byte, bytes, out, weight.row_stride);
      out += range.count * weight.row_stride;
    }
  }

  const ModelShape& shape_;
  const Shard& shard_;
  const TensorFiles& files_;
  const WeightOptions& options_;
};

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
                    const std::atomic<bool>& cancelled) {
  CheckModelShape(shape, shard);
  const TensorFiles files(std::move(tensors));
  const Loader loader(shape, shard, files, options);
  Weights weights;
  weights.word_embeddings = loader.Embedding(pool);
  weights.final_layernorm = loader.Norm("transformer.final_layernorm");
  weights.layers.resize(static_cast<size_t>(shape.num_layers));

  std::mutex mutex;
  std::exception_ptr error;
  std::atomic<bool> failed{false};
  pool.ParallelFor(shape.num_layers, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end && !failed.load(); ++i) {
      try {
        if (cancelled.load()) throw Error(ErrorCode::kAborted, "loading the weights was aborted");
        weights.layers[static_cast<size_t>(i)] = loader.Layer(i);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
  });
  if (error) std::rethrow_exception(error);
  return weights;
}

}  // namespace tandem
