// Measures the operations beside matrix products and attention at GLM-130B's sizes: microseconds of a launch, and bytes that it must read and write per second.
//
//   nvcc -std=c++17 -O3 -arch=native -Inative native/bench/cuda/small_kernels_bench.cu native/kernels/cuda/{layernorm,rope,geglu,sampling}.cu \
//        native/kernels/{layernorm,rope,geglu,sampling,quantize_rows}.cc native/core/*.cc -o small_kernels_bench && ./small_kernels_bench
//
// Each measurement is a CUDA graph of many launches of the same kernel on the same data, which the L2 cache may hold, as in a step of the model; the median of
// some runs.
#include <algorithm>
#include <cstdio>
#include <exception>
#include <functional>
#include <random>
#include <vector>

#include "kernels/cuda/geglu.h"
#include "kernels/cuda/layernorm.h"
#include "kernels/cuda/rope.h"
#include "kernels/cuda/sampling.h"

namespace tandem::cuda {
namespace {

constexpr int64_t kHidden = 12288, kHeads = 96, kHeadDim = 128, kInner = 32768, kVocab = 150528, kMaxPosition = 2048, kBlockSize = 16;
constexpr int64_t kMaxLogitsRows = 64;

template <typename T>
class Memory {
 public:
  explicit Memory(int64_t count) : count_(count) {
    Check(cudaMalloc(reinterpret_cast<void**>(&values_), static_cast<size_t>(count) * sizeof(T)), "memory");
    Check(cudaMemset(values_, 0, static_cast<size_t>(count) * sizeof(T)), "memory");
  }
  explicit Memory(const std::vector<T>& values) : Memory(static_cast<int64_t>(values.size())) {
    Check(cudaMemcpy(values_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "upload");
  }
  ~Memory() { cudaFree(values_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  T* get() { return values_; }

 private:
  int64_t count_;
  T* values_ = nullptr;
};

// What one of the launches of `body` takes.
double Microseconds(Stream stream, const std::function<void()>& body) {
  constexpr int kRuns = 15, kLaunches = 20;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  Check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  for (int i = 0; i < kLaunches; ++i) body();
  Check(cudaStreamEndCapture(stream, &graph), "capture");
  Check(cudaGraphInstantiate(&executable, graph, 0), "graph");
  cudaEvent_t begin, end;
  Check(cudaEventCreate(&begin), "event");
  Check(cudaEventCreate(&end), "event");
  Check(cudaGraphLaunch(executable, stream), "graph");
  std::vector<float> times;
  for (int run = 0; run < kRuns; ++run) {
    Check(cudaEventRecord(begin, stream), "event");
    Check(cudaGraphLaunch(executable, stream), "graph");
    Check(cudaEventRecord(end, stream), "event");
    Check(cudaEventSynchronize(end), "run");
    float milliseconds = 0.0f;
    Check(cudaEventElapsedTime(&milliseconds, begin, end), "event");
    times.push_back(milliseconds * 1000.0f / kLaunches);
  }
  Check(cudaEventDestroy(begin), "event");
  Check(cudaEventDestroy(end), "event");
  Check(cudaGraphExecDestroy(executable), "graph");
  Check(cudaGraphDestroy(graph), "graph");
  std::nth_element(times.begin(), times.begin() + kRuns / 2, times.end());
  return times[kRuns / 2];
}

void Report(const char* name, int64_t m, double microseconds, int64_t bytes) {
  std::printf("%-36s m %5lld  %9.1f us  %8.1f GB/s\n", name, static_cast<long long>(m), microseconds, static_cast<double>(bytes) / microseconds / 1000.0);
}

std::vector<__half> RandomHalves(int64_t count) {
  std::mt19937 generator(1);
  std::vector<__half> values(static_cast<size_t>(count));
  for (__half& value : values) value = __float2half(static_cast<float>(generator() % 4096) / 1024.0f - 2.0f);
  return values;
}

void MeasureActivations(int64_t m, Stream stream) {
  const int64_t halves = m * 2 * kInner;
  Memory<__half> wide(RandomHalves(halves)), hidden(RandomHalves(m * kHidden)), delta(RandomHalves(m * kHidden)), out(m * kInner);
  Memory<float> weight(std::vector<float>(kHidden, 1.0f)), bias(kHidden);
  Report("layer norm", m, Microseconds(stream, [&] { LayerNorm(hidden.get(), m, kHidden, kHidden, weight.get(), bias.get(), 1e-5f, out.get(), stream); }),
         m * kHidden * 4 + kHidden * 8);
  Report("residual and layer norm", m, Microseconds(stream, [&] {
           ResidualLayerNorm(hidden.get(), 11.8f, delta.get(), bias.get(), m, kHidden, kHidden, weight.get(), bias.get(), 1e-5f, stream);
         }),
         m * kHidden * 6 + kHidden * 12);
  Report("geglu", m, Microseconds(stream, [&] { Geglu(wide.get(), m, kInner, 2 * kInner, out.get(), kInner, stream); }), m * kInner * 6);

  const RotaryTable table = MakeRotaryTable(kMaxPosition, kHeadDim, 10000.0, RotaryPrecision::kHalf);
  Memory<float> cos(table.cos), sin(table.sin);
  std::vector<KvSlot> places;
  for (uint32_t i = 0; i < m; ++i) places.push_back({i % uint32_t{kMaxPosition}, i / uint32_t{kBlockSize}, i % uint32_t{kBlockSize}});
  Memory<KvSlot> slots(places);
  const int64_t blocks = (m + kBlockSize - 1) / kBlockSize, tokens = blocks * kBlockSize * kHeads;
  Memory<__half> k(tokens * kHeadDim), v(tokens * kHeadDim), k_scales(tokens), v_scales(tokens);
  for (const KvType type : {KvType::kF16, KvType::kI8}) {
    const bool is_int8 = type == KvType::kI8;
    const CudaKvLayer kv = {{k.get(), v.get(), type, blocks, kHeads, kBlockSize, kHeadDim}, k_scales.get(), v_scales.get()};
    const int64_t bytes = m * kHidden * (6 + 2 + (is_int8 ? 2 : 4)) + (is_int8 ? m * kHeads * 4 : 0) + m * kHeadDim * 4;
    Report(is_int8 ? "rotary and write of int8 K, V" : "rotary and write of fp16 K, V", m, Microseconds(stream, [&] {
             RotaryAndWriteKv(wide.get(), m, 3 * kHidden, slots.get(), cos.get(), sin.get(), kv, out.get(), kHidden, stream);
           }),
           bytes);
  }
}

void MeasureSampling(int64_t m, Memory<float>& logits, Stream stream) {
  struct Case {
    const char* name;
    SamplingParams params;
    uint32_t top_logprobs;
  };
  const Case cases[] = {{"sampling: greedy", {0.0f}, 0},
                        {"sampling: temperature", {0.8f}, 0},
                        {"sampling: top k 40", {1.0f, 40}, 0},
                        {"sampling: top p 0.7", {1.0f, 0, 0.7f}, 0},
                        {"sampling: top k 200, top p 0.95, bans", {0.9f, 200, 0.95f, {1, 2, 3}}, 0},
                        {"sampling: greedy, 20 log-probabilities", {0.0f}, 20}};
  const auto measure = [&](const char* name, const SamplingBatch& batch) {
    std::vector<unsigned char> packed(static_cast<size_t>(batch.RequestBytes()));
    batch.Pack(packed.data());
    Memory<unsigned char> requests(packed), scratch(SamplingScratchBytes(m, kVocab)), results(batch.ResultBytes());
    const double microseconds = Microseconds(stream, [&] {
      EvaluateRequests(logits.get(), kVocab, kVocab, requests.get(), m, batch.has_noise(), scratch.get(), results.get(), nullptr, stream);
    });
    Report(name, m, microseconds, m * kVocab * 4);
  };
  for (const Case& one : cases) {
    SamplingBatch batch(kVocab);
    for (int64_t i = 0; i < m; ++i) batch.AddSample(i, one.params, {1, 2, static_cast<uint32_t>(i)}, one.top_logprobs);
    measure(one.name, batch);
  }
  SamplingBatch candidates(kVocab), noisy(kVocab), targets(kVocab);
  for (int64_t i = 0; i < m; ++i) {
    const NoiseKey key = {1, 2, static_cast<uint32_t>(i)};
    candidates.AddCandidates(i, 16, {5}, nullptr);
    noisy.AddCandidates(i, 16, {5}, &key);
    targets.AddTarget(i, 7);
  }
  measure("sampling: 16 candidates", candidates);
  measure("sampling: 16 candidates with noise", noisy);
  measure("sampling: targets", targets);
}

void Main() {
  cudaDeviceProp properties;
  Check(cudaGetDeviceProperties(&properties, 0), "device");
  std::printf("%s\n", properties.name);
  Stream stream;
  Check(cudaStreamCreate(&stream), "stream");
  for (const int64_t m : {1, 64, 2048}) MeasureActivations(m, stream);
  std::mt19937 generator(1);
  std::normal_distribution<float> normal(0.0f, 3.0f);
  std::vector<float> values(static_cast<size_t>(kMaxLogitsRows * kVocab));
  for (float& value : values) value = normal(generator);
  Memory<float> logits(values);
  for (const int64_t m : {int64_t{1}, kMaxLogitsRows}) MeasureSampling(m, logits, stream);
  Check(cudaStreamDestroy(stream), "stream");
}

}  // namespace
}  // namespace tandem::cuda

int main() {
  try {
    tandem::cuda::Main();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
