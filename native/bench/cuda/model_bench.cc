// A whole model on one GPU with random weights that are made there: decoding at several batch sizes and prefill, beside a copy's bandwidth.
//   tandem_gpu_model_bench [int4|int8|fp16] [layers] [matrix rate in TFLOP/s, where one was measured]
// GLM-130B's shape; fewer layers where the card is smaller: rates are then also given for all 70.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "model/cuda/cuda_backend.h"
#include "model/cuda/gpu.h"
#include "model/glm.h"

namespace tandem {
namespace {

constexpr int64_t kBlockSize = 16;
constexpr int64_t kAllLayers = 70;
// 64 sequences of GLM-130B take 3.7 MB for every token of each: with INT4 weights beside them no longer ones fit a card of 141 GB.
constexpr int64_t kContext = 200;
constexpr int64_t kSteps = 24;
constexpr int64_t kBlocksPerSequence = (kContext + kSteps + kBlockSize - 1) / kBlockSize;
const std::atomic<bool> kNotCancelled{false};

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

template <typename Body>
double Milliseconds(const Body& body) {
  const auto begin = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
}

// Bytes read and written per second by a copy within the card's memory.
double CopyBandwidth() {
  constexpr int64_t kBytes = int64_t{4} << 30;
  const cuda::DeviceBuffer from(kBytes, "a copy"), to(kBytes, "a copy");
  std::vector<double> times;
  for (int i = 0; i < 8; ++i) {
    times.push_back(Milliseconds([&] {
      cuda::Check(cudaMemcpyAsync(to.data(), from.data(), kBytes, cudaMemcpyDeviceToDevice, nullptr), "a copy");
      cuda::Check(cudaDeviceSynchronize(), "a copy");
    }));
  }
  return 2.0 * kBytes / Median(times) * 1e3;
}

Extend ExtendOf(int64_t sequence, int64_t cached, int64_t tokens, int64_t num_layers, int64_t blocks_per_sequence, bool is_context) {
  Extend extend;
  for (int64_t i = 0; i < tokens; ++i) {
    extend.tokens.push_back(static_cast<uint32_t>((sequence * 7919 + (cached + i) * 104729) % 150000));
    extend.positions.push_back(static_cast<uint32_t>(cached + i));
  }
  for (int64_t i = 0; i * kBlockSize < cached + tokens; ++i) extend.block_table.push_back(static_cast<uint32_t>(sequence * blocks_per_sequence + i));
  extend.cached_tokens = cached;
  extend.bidirectional_tokens = is_context ? tokens - 1 : 0;
  extend.end_layer = num_layers;
  WantSample want;
  want.params.temperature = 0.0f;
  extend.want = want;
  return extend;
}

StepResult RunStep(const ModelShape& shape, Step step, Backend& backend) {
  StepUnderWay under_way = BeginStep(shape, std::move(step), kBlockSize, backend, kNotCancelled, false);
  return EndStep(under_way, backend);
}

// Milliseconds a step where each is begun before the one that it goes on from has ended: what a server that runs ahead gives.
double QueuedMilliseconds(const ModelShape& shape, int64_t rows, Backend& backend) {
  const auto step_at = [&](int64_t i) {
    Step step;
    step.step_id = static_cast<uint32_t>(i);
    for (int64_t sequence = 0; sequence < rows; ++sequence) {
      step.extends.push_back(ExtendOf(sequence, kContext + i, 1, shape.num_layers, kBlocksPerSequence, false));
      if (i > 0) step.extends.back().sampled_by = static_cast<uint32_t>(sequence);
    }
    return step;
  };
  std::vector<double> times;
  StepUnderWay before = BeginStep(shape, step_at(0), kBlockSize, backend, kNotCancelled, false);
  auto last_end = std::chrono::steady_clock::now();
  for (int64_t i = 1; i < kSteps; ++i) {
    StepUnderWay next = BeginStep(shape, step_at(i), kBlockSize, backend, kNotCancelled, before.later >= 0);
    EndStep(before, backend);
    before = std::move(next);
    const auto end = std::chrono::steady_clock::now();
    if (i > 4) times.push_back(std::chrono::duration<double, std::milli>(end - last_end).count());
    last_end = end;
  }
  EndStep(before, backend);
  return Median(times);
}

int Run(int argc, char** argv) {
  const std::string weights = argc > 1 ? argv[1] : "int4";
  const WeightType type = weights == "fp16" ? WeightType::kF16 : weights == "int8" ? WeightType::kI8 : WeightType::kI4;
  ModelShape shape;
  shape.num_layers = argc > 2 ? std::atoll(argv[2]) : kAllLayers;
  shape.hidden_size = 12288;
  shape.num_attention_heads = 96;
  shape.inner_hidden_size = 32768;
  shape.vocab_size = 150528;
  shape.max_sequence_length = 2048;
  const double matrix_rate = argc > 3 ? std::atof(argv[3]) * 1e12 : 0.0;

  cuda::UseGpu(0);
  const double bandwidth = CopyBandwidth();
  const int64_t free_before = cuda::MemoryOfGpu().free;
  EngineOptions options;
  options.model = shape;
  options.shard = {0, 1};
  options.kv_blocks = std::max<int64_t>(64 * kBlocksPerSequence, 2048 / kBlockSize);
  options.kv_block_size = kBlockSize;
  options.max_batch_tokens = 2304;
  const auto communicator = MakeLocalCommunicator();
  const std::unique_ptr<Backend> backend = MakeSyntheticCudaBackend(options, type, *communicator);
  const EngineMemory memory = backend->memory();
  const double kv_token_bytes = static_cast<double>(memory.kv_bytes) / static_cast<double>(options.kv_blocks * kBlockSize);
  std::printf("%s weights, %lld layers: %s of weights, %s of workspace; copy %.0f GB/s\n", weights.c_str(), static_cast<long long>(shape.num_layers),
              cuda::GiB(memory.weight_bytes).c_str(), cuda::GiB(memory.workspace_bytes).c_str(), bandwidth / 1e9);
  std::printf("KV cache beside them: %.0f tokens (%.0f bytes each)\n",
              static_cast<double>(free_before - memory.weight_bytes - memory.workspace_bytes) / kv_token_bytes, kv_token_bytes);

  const double all = static_cast<double>(kAllLayers) / static_cast<double>(shape.num_layers);
  uint32_t step_id = 0;
  std::printf("\ndecoding behind %lld tokens\n rows   ms/step   tokens/s   weights+KV GB/s   of copy   all layers: tokens/s   queued: ms/step\n", static_cast<long long>(kContext));
  for (const int64_t rows : {1, 2, 4, 8, 16, 32, 64}) {
    std::vector<double> times;
    for (int64_t i = 0; i < kSteps; ++i) {
      Step step;
      step.step_id = ++step_id;
      for (int64_t sequence = 0; sequence < rows; ++sequence) {
        step.extends.push_back(ExtendOf(sequence, kContext + i, 1, shape.num_layers, kBlocksPerSequence, false));
      }
      const double ms = Milliseconds([&] {
        const StepResult result = RunStep(shape, step, *backend);
        if (std::holds_alternative<ErrorResult>(result.results[0])) throw std::runtime_error(std::get<ErrorResult>(result.results[0]).message);
      });
      if (i >= 4) times.push_back(ms);  // the first run as they are, then they are recorded
    }
    const double ms = Median(times);
    const double bytes = static_cast<double>(memory.weight_bytes) + static_cast<double>(rows) * (kContext + kSteps / 2) * kv_token_bytes;
    std::printf("%5lld %9.3f %10.1f %17.0f %8.1f%% %20.1f %17.3f\n", static_cast<long long>(rows), ms, static_cast<double>(rows) / ms * 1e3, bytes / ms / 1e6,
                bytes / ms * 1e3 / bandwidth * 100.0, static_cast<double>(rows) / ms * 1e3 / all, QueuedMilliseconds(shape, rows, *backend));
  }

  const double h = static_cast<double>(shape.hidden_size), f = static_cast<double>(shape.inner_hidden_size), layers = static_cast<double>(shape.num_layers);
  std::printf("\nprefill\ntokens         ms   tokens/s   TFLOP/s%s   all layers: tokens/s\n", matrix_rate > 0 ? "   of matrix rate" : "");
  for (const int64_t tokens : {512, 1024, 2048}) {
    std::vector<double> times;
    for (int i = 0; i < 5; ++i) {
      Step step;
      step.step_id = ++step_id;
      step.extends.push_back(ExtendOf(0, 0, tokens, shape.num_layers, 0, true));
      const double ms = Milliseconds([&] { RunStep(shape, step, *backend); });
      if (i > 0) times.push_back(ms);
    }
    const double ms = Median(times), n = static_cast<double>(tokens);
    const double flop = layers * (2.0 * n * (4.0 * h * h + 3.0 * h * f) + 4.0 * n * n * h);
    std::printf("%6lld %10.1f %10.0f %9.0f", static_cast<long long>(tokens), ms, n / ms * 1e3, flop / ms / 1e9);
    if (matrix_rate > 0) std::printf(" %15.1f%%", flop / ms * 1e3 / matrix_rate * 100.0);
    std::printf(" %22.0f\n", n / ms * 1e3 / all);
  }
  return 0;
}

}  // namespace
}  // namespace tandem

int main(int argc, char** argv) {
  try {
    return tandem::Run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
