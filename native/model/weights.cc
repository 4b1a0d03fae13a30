#include "model/weights.h"

#include <algorithm>
#include <cmath>
#include <exception>
#include <functional>
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

// Rows that a thread reads at a time: what it holds beside the weights themselves is so much.
constexpr int64_t kBlockRows = 4 * PackedWeight::kBlockRows;

// One row's q = round(w / scale), ties to even, where scale is fp16 of max |w| / 127 over a group of kEmbeddingGroup columns.
void QuantizeRowToInt8(const float* w, int64_t cols, int8_t* q, uint16_t* scales) {
  for (int64_t begin = 0; begin < cols; begin += kEmbeddingGroup) {
    const int64_t end = std::min(begin + kEmbeddingGroup, cols);
    float largest = 0.0f;
    for (int64_t i = begin; i < end; ++i) largest = std::max(largest, std::abs(w[i]));
    *scales = FloatToHalf(largest / 127.0f);
    const float scale = HalfToFloat(*scales++);
    for (int64_t i = begin; i < end; ++i) q[i] = scale == 0.0f ? 0 : static_cast<int8_t>(std::clamp(std::nearbyint(w[i] / scale), -127.0f, 127.0f));
  }
}

// Matrices one after the other, each by all threads: a thread reads the rows that are its share of a loop over them, so that on a machine with several
// memory nodes they lie where they are used.
class Loader {
 public:
  Loader(const ModelShape& shape, const Shard& shard, const TensorFiles& files, const WeightOptions& options, ThreadPool& pool,
         const std::atomic<bool>& cancelled, LoadProgress* progress)
      : shape_(shape), shard_(shard), files_(files), options_(options), pool_(pool), cancelled_(cancelled), progress_(progress) {
    if (progress != nullptr) progress->total_bytes.store(MatrixBytes());
  }

  OwnedLinear Embedding() const {
    const std::string name = "transformer.word_embeddings.weight";
    const Share share = RowShare(shape_.vocab_size, shape_.hidden_size);
    if (!options_.quantize_embedding) return Plain(name, shape_.vocab_size, shape_.hidden_size, share);
    const TensorSource& tensor = NeedFloat(name, {shape_.vocab_size, shape_.hidden_size});
    const int64_t cols = shape_.hidden_size, row_bytes = cols * TensorTypeBytes(tensor.type);
    LinearWeight weight;
    weight.type = WeightType::kI8;
    weight.rows = share.row_count();
    weight.cols = cols;
    weight.group_size = kEmbeddingGroup;
    weight.groups = (cols + kEmbeddingGroup - 1) / kEmbeddingGroup;
    return Quantised(weight, name, [&](int64_t begin, int64_t end, uint8_t* q, int64_t stride, uint16_t* scales) {
      std::vector<char> rows(static_cast<size_t>((end - begin) * row_bytes));
      std::vector<float> values(static_cast<size_t>(cols));
      ReadShare(tensor, share, begin, end, 0, row_bytes, rows.data(), row_bytes);
      Count((end - begin) * row_bytes);
      LinearWeight plain;
      plain.type = tensor.type == TensorType::kF16 ? WeightType::kF16 : WeightType::kF32;
      plain.rows = end - begin;
      plain.cols = cols;
      plain.data = rows.data();
      plain.row_stride = row_bytes;
      for (int64_t o = 0; o < end - begin; ++o) {
        DequantizeRow(plain, o, values.data());
        QuantizeRowToInt8(values.data(), cols, reinterpret_cast<int8_t*>(q + o * stride), scales + o * weight.groups);
      }
    });
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
    const int64_t element = TensorTypeBytes(tensor.type), bytes = share.columns * element;
    OwnedLinear linear;
    LinearWeight& weight = linear.weight;
    weight.type = tensor.type == TensorType::kF16 ? WeightType::kF16 : WeightType::kF32;
    weight.rows = share.row_count();
    weight.cols = share.columns;
    weight.row_stride = Aligned(bytes);
    linear.data = AlignedBuffer(weight.rows * weight.row_stride, name);
    weight.data = linear.data.data();
    ForBlocks(weight.rows, [&](int64_t begin, int64_t end) {
      char* out = linear.data.as<char>() + begin * weight.row_stride;
      ReadShare(tensor, share, begin, end, share.first_column * element, bytes, out, weight.row_stride);
      Count((end - begin) * bytes);
    });
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

    const int64_t per_byte = int4 ? 2 : 1, group_size = columns / groups;
    const int64_t first_group = share.first_column / group_size, last_group = (share.first_column + share.columns - 1) / group_size;
    LinearWeight weight;
    weight.type = int4 ? WeightType::kI4 : WeightType::kI8;
    weight.rows = share.row_count();
    weight.cols = share.columns;
    weight.group_size = group_size;
    weight.group_offset = share.first_column - first_group * group_size;
    weight.groups = last_group - first_group + 1;
    return Quantised(weight, tensor.name, [&](int64_t begin, int64_t end, uint8_t* q, int64_t stride, uint16_t* out_scales) {
      ReadShare(tensor, share, begin, end, share.first_column / per_byte, share.columns / per_byte, q, stride);
      Count((end - begin) * share.columns / per_byte);
      ReadShare(scales, share, begin, end, first_group * 2, weight.groups * 2, out_scales, weight.groups * 2);
    });
  }

  // Writes rows [begin, end) of a matrix: q, `stride` bytes from row to row, and scales, [end - begin, groups].
  using FillRows = std::function<void(int64_t begin, int64_t end, uint8_t* q, int64_t stride, uint16_t* scales)>;

  // `weight`: what the matrix is, without data. Packed: block by block from a small buffer.
  OwnedLinear Quantised(const LinearWeight& weight, const std::string& name, const FillRows& fill) const {
    const int64_t row_bytes = weight.cols / (weight.type == WeightType::kI4 ? 2 : 1), groups = weight.groups;
    OwnedLinear linear;
    linear.weight = weight;
    if (!options_.integer_products) {
      linear.weight.row_stride = Aligned(row_bytes);
      linear.data = AlignedBuffer(weight.rows * linear.weight.row_stride, name);
      linear.scales = AlignedBuffer(weight.rows * groups * 2, name);
      linear.weight.data = linear.data.data();
      linear.weight.scales = linear.scales.as<const uint16_t>();
      ForBlocks(weight.rows, [&](int64_t begin, int64_t end) {
        uint8_t* q = linear.data.as<uint8_t>() + begin * linear.weight.row_stride;
        fill(begin, end, q, linear.weight.row_stride, linear.scales.as<uint16_t>() + begin * groups);
      });
      return linear;
    }
    const uint16_t no_scale = 0;
    LinearWeight shape = weight;
    shape.scales = &no_scale;
    PackedWeight packed = DescribePacked(shape, nullptr);
    linear.data = AlignedBuffer(packed.Bytes(), name);
    packed.data = linear.data.as<const uint8_t>();
    linear.packed = packed;
    ForBlocks(weight.rows, [&](int64_t begin, int64_t end) {
      std::vector<uint8_t> q(static_cast<size_t>((end - begin) * row_bytes));
      std::vector<uint16_t> scales(static_cast<size_t>((end - begin) * groups));
      fill(begin, end, q.data(), row_bytes, scales.data());
      LinearWeight block = weight;
      block.rows = end - begin;
      block.data = q.data();
      block.row_stride = row_bytes;
      block.scales = scales.data();
      PackRows(block, 0, block.rows, linear.data.as<uint8_t>() + begin / PackedWeight::kBlockRows * packed.BlockBytes());
    });
    return linear;
  }

  static int64_t Aligned(int64_t bytes) { return (bytes + kRowAlignment - 1) / kRowAlignment * kRowAlignment; }

  // Calls body for kBlockRows rows at a time, on all threads; throws the first error that one of them has.
  void ForBlocks(int64_t rows, const std::function<void(int64_t begin, int64_t end)>& body) const {
    std::mutex mutex;
    std::exception_ptr error;
    std::atomic<bool> failed{false};
    pool_.ParallelFor(rows, kBlockRows, [&](int64_t first, int64_t last, int) {
      for (int64_t begin = first; begin < last && !failed.load(); begin += kBlockRows) {
        try {
          if (cancelled_.load()) throw Error(ErrorCode::kAborted, "loading the weights was aborted");
          body(begin, std::min(begin + kBlockRows, last));
        } catch (...) {
          const std::lock_guard<std::mutex> lock(mutex);
          if (!failed.exchange(true)) error = std::current_exception();
        }
      }
    });
    if (error) std::rethrow_exception(error);
  }

  // Rows [begin, end) of a share, of each `bytes` bytes from `column_byte` on.
  void ReadShare(const TensorSource& tensor, const Share& share, int64_t begin, int64_t end, int64_t column_byte, int64_t bytes, void* out,
                 int64_t stride) const {
    char* to = static_cast<char*>(out);
    int64_t range_begin = 0;  // of the share's rows
    for (const RowRange& range : share.rows) {
      const int64_t first = std::max(begin, range_begin), last = std::min(end, range_begin + range.count);
      if (first < last) files_.ReadRows(tensor, range.first + first - range_begin, last - first, column_byte, bytes, to + (first - begin) * stride, stride);
      range_begin += range.count;
    }
  }

  // This rank's share of all weights and qweights: what Count counts up to.
  int64_t MatrixBytes() const {
    const auto is_scales = [](const std::string& name) { return name.size() > 7 && name.compare(name.size() - 7, 7, ".scales") == 0; };
    int64_t bytes = 0;
    for (const auto& [name, tensor] : files_.tensors()) {
      if (tensor.shape.size() == 2 && !is_scales(name)) bytes += TensorBytes(tensor) / shard_.world_size;
    }
    return bytes;
  }

  void Count(int64_t bytes) const {
    if (progress_ != nullptr) progress_->done_bytes.fetch_add(bytes, std::memory_order_relaxed);
  }

  const ModelShape& shape_;
  const Shard& shard_;
  const TensorFiles& files_;
  const WeightOptions& options_;
  ThreadPool& pool_;
  const std::atomic<bool>& cancelled_;
  LoadProgress* const progress_;
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
                    const std::atomic<bool>& cancelled, LoadProgress* progress) {
  CheckModelShape(shape, shard);
  const TensorFiles files(std::move(tensors));
  const Loader loader(shape, shard, files, options, pool, cancelled, progress);
  Weights weights;
  weights.word_embeddings = loader.Embedding();
  weights.final_layernorm = loader.Norm("transformer.final_layernorm");
  for (int64_t i = 0; i < shape.num_layers; ++i) weights.layers.push_back(loader.Layer(i));
  return weights;
}

}  // namespace tandem
