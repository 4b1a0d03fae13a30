// The backend that computes on the CPU through kernels/.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "comm/communicator.h"
#include "core/cpu_features.h"
#include "core/thread_pool.h"
#include "model/backend.h"
#include "model/engine_options.h"
#include "model/kv_cache.h"
#include "model/model_shape.h"
#include "model/weights.h"

namespace tandem {

class CpuBackend final : public Backend {
 public:
  // Loads the weights. Keeps references to all but the options.
  CpuBackend(EngineOptions options, Communicator& communicator, ThreadPool& pool, const std::atomic<bool>& cancelled);

  bool is_first_rank() const override { return communicator_.rank() == 0; }
  EngineMemory memory() const override { return {weights_.bytes(), kv_.bytes(), workspace_bytes()}; }
  void CopyKvBlocks(const std::vector<uint32_t>& from_to_pairs) override;
  void Begin(const Batch& batch) override;
  void UseRows(int64_t count) override { rows_ = count; }
  void SaveCarry(int64_t first, int64_t count) override;
  void RestoreCarry(int64_t first, int64_t count) override;
  void Embed(Activation out) override;
  void InputNorm(Activation x) override;
  void Linear(int64_t layer, Projection projection, Activation in, Activation out) override;
  void RotaryAndWriteKv(int64_t layer, Activation qkv, Activation q) override;
  void KeepRows(const std::vector<int64_t>& rows) override;
  void Attention(int64_t layer, Activation q) override;
  void GegluLinear(int64_t layer, Activation u, Activation y) override;
  void AllReduce(Activation x) override;
  void AddResidualAndNorm(int64_t layer, Projection projection, float alpha, Activation delta, Activation x) override;
  void Logits(int64_t first, int64_t count) override;
  void Evaluate(const std::vector<LogitsRow>& rows, const std::vector<Extend>& extends, std::vector<ExtendResult>& results) override;
  int64_t collective_micros() const override { return collective_nanos_ / 1000; }

 private:
  int64_t workspace_bytes() const;
  float* At(Activation activation) const { return activations_[static_cast<int>(activation)].as<float>(); }
  const LayerWeights& Layer(int64_t layer) const { return weights_.layers[static_cast<size_t>(layer)]; }
  // y = x W^T + bias; x: [m, weight.cols()] dense, y: [m, weight.rows()] dense
  void Multiply(const OwnedLinear& weight, const float* x, int64_t m, const float* bias, float* y);
  template <typename Collective>
  void Timed(Collective collective);

  const ModelShape shape_;
  KvCache kv_;
  const Weights weights_;
  Communicator& communicator_;
  ThreadPool& pool_;
  const Isa isa_;
  const int64_t local_hidden_, local_inner_, local_vocab_;
  const RotaryTable rotary_;

  AlignedBuffer activations_[4];
  AlignedBuffer quantized_;        // activations on their way into packed weights; only where there are any
  AlignedBuffer carry_;            // [max_batch_tokens, h]
  AlignedBuffer local_logits_;     // [kMaxLogitsRows, V / R]
  AlignedBuffer gathered_logits_;  // [R, kMaxLogitsRows, V / R]; only where R > 1
  AlignedBuffer logits_;           // [kMaxLogitsRows, V] on rank 0; only where R > 1

  const Batch* batch_ = nullptr;
  int64_t rows_ = 0;
  std::vector<AttentionRow> attention_;
  int64_t collective_nanos_ = 0;
};

std::unique_ptr<Backend> MakeCpuBackend(EngineOptions options, Communicator& communicator, ThreadPool& pool, const std::atomic<bool>& cancelled);

}  // namespace tandem
