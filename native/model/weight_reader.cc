#include "model/weight_reader.h"

#include <algorithm>
#include <cmath>
#include <exception>
#include <mutex>
#include <utility>

#include "core/error.h"
#include "core/half.h"

namespace tandem {
namespace {

[[noreturn]] void Fail(const std::string& name, const std::string& what) { throw Error(ErrorCode::kCheckpoint, "tensor " + name + ": " + what); }

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

}  // namespace

// `count` rows from `first`: a share of rows is one such range, or two for the halves of GEGLU.
struct WeightReader::RowRange {
  int64_t first;
  int64_t count;
};

// Which part of a matrix this rank takes: rows of all columns, or columns of all rows.
struct WeightReader::Share {
  std::vector<RowRange> rows;
  int64_t first_column;
  int64_t columns;

  int64_t row_count() const {
    int64_t count = 0;
    for (const RowRange& range : rows) count += range.count;
    return count;
  }
};

WeightReader::WeightReader(const ModelShape& shape, const Shard& shard, std::vector<TensorSource> tensors, LoadProgress* progress)
    : shape_(shape), shard_(shard), files_(std::move(tensors)), progress_(progress) {
  CheckModelShape(shape, shard);
  if (progress != nullptr) progress->total_bytes.store(MatrixBytes());
}

MatrixSource WeightReader::Embedding(bool quantize) const {
  const std::string name = "transformer.word_embeddings.weight";
  const Share share = RowShare(shape_.vocab_size, shape_.hidden_size);
  MatrixSource plain = Plain(name, shape_.vocab_size, shape_.hidden_size, share);
  if (!quantize) return plain;
  const int64_t cols = shape_.hidden_size, groups = (cols + kEmbeddingGroup - 1) / kEmbeddingGroup;
  MatrixSource source;
  source.name = name;
  source.weight.type = WeightType::kI8;
  source.weight.rows = share.row_count();
  source.weight.cols = source.weight.row_stride = cols;
  source.weight.group_size = kEmbeddingGroup;
  source.weight.groups = groups;
  source.read = [plain = std::move(plain), cols, groups](int64_t begin, int64_t end, void* q, int64_t stride, uint16_t* scales) {
    std::vector<char> rows(static_cast<size_t>((end - begin) * plain.weight.row_stride));
    std::vector<float> values(static_cast<size_t>(cols));
    plain.read(begin, end, rows.data(), plain.weight.row_stride, nullptr);
    LinearWeight block = plain.weight;
    block.rows = end - begin;
    block.data = rows.data();
    for (int64_t o = 0; o < end - begin; ++o) {
      DequantizeRow(block, o, values.data());
      QuantizeRowToInt8(values.data(), cols, static_cast<int8_t*>(q) + o * stride, scales + o * groups);
    }
  };
  return source;
}

LayerSource WeightReader::Layer(int64_t index) const {
  const int64_t h = shape_.hidden_size, f = shape_.inner_hidden_size;
  const std::string prefix = "transformer.layers." + std::to_string(index) + ".";
  const Share qkv = RowShare(3 * h, h), halves = GegluShare();
  LayerSource layer;
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

LayerNormWeights WeightReader::Norm(const std::string& name) const {
  return {Vector(name + ".weight", {{0, shape_.hidden_size}}, shape_.hidden_size), Vector(name + ".bias", {{0, shape_.hidden_size}}, shape_.hidden_size)};
}

WeightReader::Share WeightReader::RowShare(int64_t rows, int64_t columns) const {
  const int64_t count = rows / shard_.world_size;
  return {{{shard_.rank * count, count}}, 0, columns};
}

WeightReader::Share WeightReader::GegluShare() const {
  const int64_t f = shape_.inner_hidden_size, count = f / shard_.world_size;
  return {{{shard_.rank * count, count}, {f + shard_.rank * count, count}}, 0, shape_.hidden_size};
}

WeightReader::Share WeightReader::ColumnShare(int64_t rows, int64_t columns) const {
  const int64_t count = columns / shard_.world_size;
  return {{{0, rows}}, shard_.rank * count, count};
}

const TensorSource& WeightReader::Need(const std::string& name) const {
  const TensorSource* tensor = files_.Find(name);
  if (tensor == nullptr) Fail(name, "is missing");
  return *tensor;
}

// F16 or F32 of this shape.
const TensorSource& WeightReader::NeedFloat(const std::string& name, const std::vector<int64_t>& shape) const {
  const TensorSource& tensor = Need(name);
  if (tensor.shape != shape || (tensor.type != TensorType::kF16 && tensor.type != TensorType::kF32)) {
    Fail(name, "is " + Describe(tensor.type, tensor.shape) + ", expected " + Describe(TensorType::kF16, shape) + " or F32");
  }
  return tensor;
}

std::vector<float> WeightReader::Vector(const std::string& name, const std::vector<RowRange>& ranges, int64_t size) const {
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
MatrixSource WeightReader::Linear(const std::string& name, int64_t rows, int64_t columns, const Share& share) const {
  const bool plain = files_.Find(name + ".weight") != nullptr, quantised = files_.Find(name + ".qweight") != nullptr;
  if (plain && quantised) Fail(name, "has both .weight and .qweight");
  if (!plain && !quantised) Fail(name + ".weight", "is missing, and " + name + ".qweight too");
  return plain ? Plain(name + ".weight", rows, columns, share) : Quantised(name, rows, columns, share);
}

MatrixSource WeightReader::Plain(const std::string& name, int64_t rows, int64_t columns, const Share& share) const {
  const TensorSource& tensor = NeedFloat(name, {rows, columns});
  const int64_t element = TensorTypeBytes(tensor.type), bytes = share.columns * element;
  MatrixSource source;
  source.name = name;
  source.weight.type = tensor.type == TensorType::kF16 ? WeightType::kF16 : WeightType::kF32;
  source.weight.rows = share.row_count();
  source.weight.cols = share.columns;
  source.weight.row_stride = bytes;
  source.read = [this, &tensor, share, element, bytes](int64_t begin, int64_t end, void* data, int64_t stride, uint16_t*) {
    ReadShare(tensor, share, begin, end, share.first_column * element, bytes, data, stride);
    Count((end - begin) * bytes);
  };
  return source;
}

MatrixSource WeightReader::Quantised(const std::string& name, int64_t rows, int64_t columns, const Share& share) const {
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
  MatrixSource source;
  source.name = tensor.name;
  LinearWeight& weight = source.weight;
  weight.type = int4 ? WeightType::kI4 : WeightType::kI8;
  weight.rows = share.row_count();
  weight.cols = share.columns;
  weight.row_stride = share.columns / per_byte;
  weight.group_size = group_size;
  weight.group_offset = share.first_column - first_group * group_size;
  weight.groups = last_group - first_group + 1;
  source.read = [this, &tensor, &scales, share, first_group, per_byte, group_count = weight.groups](int64_t begin, int64_t end, void* q, int64_t stride,
                                                                                                    uint16_t* out_scales) {
    ReadShare(tensor, share, begin, end, share.first_column / per_byte, share.columns / per_byte, q, stride);
    Count((end - begin) * share.columns / per_byte);
    ReadShare(scales, share, begin, end, first_group * 2, group_count * 2, out_scales, group_count * 2);
  };
  return source;
}

// Rows [begin, end) of a share, of each `bytes` bytes from `column_byte` on.
void WeightReader::ReadShare(const TensorSource& tensor, const Share& share, int64_t begin, int64_t end, int64_t column_byte, int64_t bytes, void* out,
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
int64_t WeightReader::MatrixBytes() const {
  const auto is_scales = [](const std::string& name) { return name.size() > 7 && name.compare(name.size() - 7, 7, ".scales") == 0; };
  int64_t bytes = 0;
  for (const auto& [name, tensor] : files_.tensors()) {
    if (tensor.shape.size() == 2 && !is_scales(name)) bytes += TensorBytes(tensor) / shard_.world_size;
  }
  return bytes;
}

void WeightReader::Count(int64_t bytes) const {
  if (progress_ != nullptr) progress_->done_bytes.fetch_add(bytes, std::memory_order_relaxed);
}

void ForRowBlocks(ThreadPool& pool, int64_t rows, int64_t block, const std::atomic<bool>& cancelled,
                  const std::function<void(int64_t begin, int64_t end, int thread)>& body) {
  std::mutex mutex;
  std::exception_ptr error;
  std::atomic<bool> failed{false};
  pool.ParallelFor(rows, block, [&](int64_t first, int64_t last, int thread) {
    for (int64_t begin = first; begin < last && !failed.load(); begin += block) {
      try {
        if (cancelled.load()) throw Error(ErrorCode::kAborted, "loading the weights was aborted");
        body(begin, std::min(begin + block, last), thread);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace tandem
