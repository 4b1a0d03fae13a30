#include "model/cpu_backend.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <exception>
#include <optional>
#include <string>

#include "core/error.h"
#include "kernels/embedding.h"
#include "kernels/geglu.h"
#include "kernels/layernorm.h"
#include "kernels/linear.h"
#include "kernels/packed_linear.h"
#include "kernels/quantize_rows.h"
#include "model/evaluate_want.h"

namespace tandem {

namespace {

int64_t MostQuantizedBytes(const Weights& weights, int64_t m) {
  int64_t most = 0;
  const auto count = [&](const OwnedLinear& weight) {
    if (weight.packed) most = std::max(most, QuantizedBytes(weight.packed->segments, m));
  };
  count(weights.word_embeddings);
  for (const LayerWeights& layer : weights.layers) {
    for (const OwnedLinear* weight : {&layer.query_key_value, &layer.dense, &layer.dense_h_to_4h, &layer.dense_4h_to_h}) count(*weight);
  }
  return most;
}

KvType CpuKvType(KvType type) {
  if (type == KvType::kI8) throw Error(ErrorCode::kInvalidArgument, "kv.dtype: an INT8 KV cache is for GPUs; fp16 and fp32 are there on the CPU");
  return type;
}

}  // namespace

CpuBackend::CpuBackend(EngineOptions options, Communicator& communicator, ThreadPool& pool, const std::atomic<bool>& cancelled)
    : shape_(options.model),
      kv_(shape_.num_layers, options.kv_blocks, shape_.num_attention_heads / options.shard.world_size, options.kv_block_size, shape_.head_dim(),
          CpuKvType(options.kv_type)),
      weights_(LoadWeights(shape_, options.shard, std::move(options.tensors), options.weights, pool, cancelled, options.progress.get())),
      communicator_(communicator),
      pool_(pool),
      isa_(options.isa.value_or(BestIsa())),
      local_hidden_(shape_.hidden_size / communicator.world_size()),
      local_inner_(shape_.inner_hidden_size / communicator.world_size()),
      local_vocab_(shape_.vocab_size / communicator.world_size()),
      rotary_(MakeRotaryTable(shape_.max_sequence_length, shape_.head_dim(), shape_.rotary_base, shape_.rotary_precision)) {
  const int64_t row = static_cast<int64_t>(sizeof(float));
  const int64_t columns[] = {shape_.hidden_size, shape_.hidden_size, std::max(3 * local_hidden_, 2 * local_inner_), std::max(local_hidden_, local_inner_)};
  for (int i = 0; i < 4; ++i) activations_[i] = AlignedBuffer(options.max_batch_tokens * columns[i] * row, "activations");
  quantized_ = AlignedBuffer(MostQuantizedBytes(weights_, options.max_batch_tokens), "activations");
  carry_ = AlignedBuffer(options.max_batch_tokens * shape_.hidden_size * row, "activations");
  const int64_t logits_rows = std::min(kMaxLogitsRows, options.max_batch_tokens);
  local_logits_ = AlignedBuffer(logits_rows * local_vocab_ * row, "logits");
  if (communicator.world_size() > 1) gathered_logits_ = AlignedBuffer(logits_rows * shape_.vocab_size * row, "logits");
  if (communicator.world_size() > 1 && is_first_rank()) logits_ = AlignedBuffer(logits_rows * shape_.vocab_size * row, "logits");
}

int64_t CpuBackend::workspace_bytes() const {
  int64_t bytes = quantized_.bytes() + carry_.bytes() + local_logits_.bytes() + gathered_logits_.bytes() + logits_.bytes();
  for (const AlignedBuffer& buffer : activations_) bytes += buffer.bytes();
  return bytes + static_cast<int64_t>((rotary_.cos.size() + rotary_.sin.size()) * sizeof(float));
}

template <typename Collective>
void CpuBackend::Timed(Collective collective) {
  const auto begin = std::chrono::steady_clock::now();
  collective();
  collective_nanos_ += std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - begin).count();
}

void CpuBackend::CopyKvBlocks(const std::vector<uint32_t>& from_to_pairs) {
  for (size_t i = 0; i + 1 < from_to_pairs.size(); i += 2) kv_.CopyBlock(from_to_pairs[i], from_to_pairs[i + 1]);
}

void CpuBackend::Begin(const Batch& batch) {
  batch_ = &batch;
  rows_ = static_cast<int64_t>(batch.tokens.size());
  attention_ = batch.attention;
  collective_nanos_ = 0;
}

void CpuBackend::SaveCarry(int64_t first, int64_t count) {
  const float* rows = At(Activation::kHidden) + first * shape_.hidden_size;
  std::memcpy(carry_.data(), rows, static_cast<size_t>(count * shape_.hidden_size) * sizeof(float));
}

void CpuBackend::RestoreCarry(int64_t first, int64_t count) {
  float* rows = At(Activation::kHidden) + first * shape_.hidden_size;
  std::memcpy(rows, carry_.data(), static_cast<size_t>(count * shape_.hidden_size) * sizeof(float));
}

void CpuBackend::Embed(Activation out) {
  const uint32_t first_token = static_cast<uint32_t>(communicator_.rank() * local_vocab_);
  const OwnedLinear& table = weights_.word_embeddings;
  if (!table.packed) {
    tandem::Embed(table.weight, first_token, batch_->tokens.data(), rows_, At(out), pool_);
  } else {
    tandem::Embed(*table.packed, first_token, batch_->tokens.data(), rows_, At(out), pool_);
  }
}

void CpuBackend::InputNorm(Activation x) {
  const LayerNormWeights& weights = Layer(0).input_layernorm;
  LayerNorm(isa_, At(x), rows_, shape_.hidden_size, weights.weight.data(), weights.bias.data(), shape_.layernorm_epsilon, At(x), pool_);
}

void CpuBackend::Linear(int64_t layer, Projection projection, Activation in, Activation out) {
  const LayerWeights& weights = Layer(layer);
  switch (projection) {
    case Projection::kQueryKeyValue: return Multiply(weights.query_key_value, At(in), rows_, weights.query_key_value_bias.data(), At(out));
    case Projection::kDense: return Multiply(weights.dense, At(in), rows_, nullptr, At(out));
    case Projection::kHTo4h: return Multiply(weights.dense_h_to_4h, At(in), rows_, weights.dense_h_to_4h_bias.data(), At(out));
    case Projection::k4hToH: return Multiply(weights.dense_4h_to_h, At(in), rows_, nullptr, At(out));
  }
}

void CpuBackend::Multiply(const OwnedLinear& weight, const float* x, int64_t m, const float* bias, float* y) {
  if (!weight.packed) {
    tandem::Linear(isa_, weight.weight, x, m, weight.cols(), bias, y, weight.rows(), pool_);
    return;
  }
  QuantizeRows(isa_, weight.packed->segments, x, m, weight.cols(), quantized_.data(), pool_);
  PackedLinear(isa_, *weight.packed, quantized_.data(), m, bias, y, weight.rows(), pool_);
}

void CpuBackend::RotaryAndWriteKv(int64_t layer, Activation qkv, Activation q) {
  tandem::RotaryAndWriteKv(isa_, At(qkv), rows_, batch_->slots.data(), rotary_, kv_.layer(layer), At(q), pool_);
}

void CpuBackend::KeepRows(const std::vector<int64_t>& rows) {
  const auto keep = [&](float* x, int64_t columns) {
    for (size_t i = 0; i < rows.size(); ++i) {
      const int64_t to = static_cast<int64_t>(i), from = rows[i];
      if (to != from) std::memcpy(x + to * columns, x + from * columns, static_cast<size_t>(columns) * sizeof(float));
    }
  };
  keep(At(Activation::kHidden), shape_.hidden_size);
  keep(At(Activation::kNarrow), local_hidden_);
  for (size_t i = 0; i < rows.size(); ++i) attention_[i] = attention_[static_cast<size_t>(rows[i])];
  rows_ = static_cast<int64_t>(rows.size());
}

void CpuBackend::Attention(int64_t layer, Activation q) {
  tandem::Attention(isa_, At(q), attention_.data(), rows_, kv_.layer(layer), At(q), pool_);
}

void CpuBackend::GegluLinear(int64_t layer, Activation u, Activation y) {
  const OwnedLinear& weight = Layer(layer).dense_4h_to_h;
  if (weight.packed) {
    GegluQuantized(isa_, weight.packed->segments, At(u), rows_, quantized_.data(), pool_);
    PackedLinear(isa_, *weight.packed, quantized_.data(), rows_, nullptr, At(y), weight.rows(), pool_);
  } else {
    Geglu(isa_, At(u), rows_, local_inner_, At(Activation::kNarrow), pool_);
    Multiply(weight, At(Activation::kNarrow), rows_, nullptr, At(y));
  }
}

void CpuBackend::AllReduce(Activation x) {
  Timed([&] { communicator_.AllReduceSum(At(x), rows_ * shape_.hidden_size); });
}

void CpuBackend::AddResidualAndNorm(int64_t layer, Projection projection, float alpha, Activation delta, Activation x) {
  const LayerWeights& weights = Layer(layer);
  const bool is_attention = projection == Projection::kDense, is_last = layer == shape_.num_layers - 1;
  const LayerNormWeights& norm = is_attention ? weights.post_attention_layernorm : is_last ? weights_.final_layernorm : Layer(layer + 1).input_layernorm;
  const std::vector<float>& bias = is_attention ? weights.dense_bias : weights.dense_4h_to_h_bias;
  ResidualLayerNorm(isa_, At(x), alpha, At(delta), bias.data(), rows_, shape_.hidden_size, norm.weight.data(), norm.bias.data(), shape_.layernorm_epsilon,
                    pool_);
}

void CpuBackend::Logits(int64_t first, int64_t count) {
  float* local = local_logits_.as<float>();
  Multiply(weights_.word_embeddings, At(Activation::kHidden) + first * shape_.hidden_size, count, nullptr, local);
  if (communicator_.world_size() == 1) return;
  float* gathered = gathered_logits_.as<float>();
  Timed([&] { communicator_.AllGather(local, count * local_vocab_ * static_cast<int64_t>(sizeof(float)), gathered); });
  if (!is_first_rank()) return;
  for (int64_t rank = 0; rank < communicator_.world_size(); ++rank) {
    for (int64_t row = 0; row < count; ++row) {
      std::memcpy(logits_.as<float>() + row * shape_.vocab_size + rank * local_vocab_, gathered + (rank * count + row) * local_vocab_,
                  static_cast<size_t>(local_vocab_) * sizeof(float));
    }
  }
}

void CpuBackend::Evaluate(const std::vector<LogitsRow>& rows, const std::vector<Extend>& extends, std::vector<ExtendResult>& results) {
  const float* logits = communicator_.world_size() == 1 ? local_logits_.as<float>() : logits_.as<float>();
  std::vector<std::optional<std::string>> errors(rows.size());
  pool_.ParallelFor(static_cast<int64_t>(rows.size()), 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const LogitsRow& row = rows[static_cast<size_t>(i)];
      try {
        EvaluateRow(isa_, logits + row.row * shape_.vocab_size, shape_.vocab_size, extends[row.extend].want, row.index, results[row.extend]);
      } catch (const std::exception& error) {
        errors[static_cast<size_t>(i)] = error.what();
      }
    }
  });
  // Not before all rows are through: others of the same Extend write into its result.
  for (size_t i = 0; i < rows.size(); ++i) {
    ExtendResult& result = results[rows[i].extend];
    if (errors[i] && !std::holds_alternative<ErrorResult>(result)) result = ErrorResult{*errors[i]};
  }
}

std::unique_ptr<Backend> MakeCpuBackend(EngineOptions options, Communicator& communicator, ThreadPool& pool, const std::atomic<bool>& cancelled) {
  return std::make_unique<CpuBackend>(std::move(options), communicator, pool, cancelled);
}

}  // namespace tandem
