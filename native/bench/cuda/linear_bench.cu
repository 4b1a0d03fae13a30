// linear_bench.cu: GLM-130B's linear layers on one GPU, synthetic weights: decoding against the speed of a copy, prefill against the rate of the tensor cores.
//
//   nvcc -std=c++17 -O3 -arch=native -Inative native/bench/cuda/linear_bench.cu native/kernels/cuda/linear*.cu native/kernels/linear.cc native/core/*.cc \
//        -o linear_bench && ./linear_bench [--quick] [--kernels] [--rows 1,8,...] [--layer NAME] [--type int4|int8|fp16]
//
// --quick    fewer shapes and rows
// --kernels  every kernel that could run, beside the one that Linear takes (marked *)
//
// Each measurement is a CUDA graph of launches that go through as many copies of the weight as the L2 cache cannot hold; the median of some runs.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cuda/instructions.h"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/linear_kernels.h"

namespace tandem::cuda {

namespace {

constexpr int kRuns = 5;

struct Memory {
  explicit Memory(int64_t bytes) { Check(cudaMalloc(&data, static_cast<size_t>(bytes)), "memory of the bench"); }
  ~Memory() { cudaFree(data); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* data = nullptr;
};

// The seconds that what `run` puts on the stream takes, the median of some runs.
double MedianSeconds(Stream stream, const std::function<void()>& run) {
  cudaEvent_t begin, end;
  Check(cudaEventCreate(&begin), "an event");
  Check(cudaEventCreate(&end), "an event");
  std::vector<float> all;
  for (int i = 0; i <= kRuns; ++i) {  // the first one warms up
    Check(cudaEventRecord(begin, stream), "an event");
    run();
    Check(cudaEventRecord(end, stream), "an event");
    Check(cudaEventSynchronize(end), "a measurement");
    float milliseconds = 0.0f;
    Check(cudaEventElapsedTime(&milliseconds, begin, end), "a measurement");
    if (i > 0) all.push_back(milliseconds);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::nth_element(all.begin(), all.begin() + kRuns / 2, all.end());
  return static_cast<double>(all[kRuns / 2]) * 1e-3;
}

// The seconds that one of `count` calls of run(i) takes in a graph of them.
double Seconds(Stream stream, int count, const std::function<void(int)>& run) {
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  Check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capturing");
  for (int i = 0; i < count; ++i) run(i);
  Check(cudaStreamEndCapture(stream, &graph), "capturing");
  Check(cudaGraphInstantiate(&executable, graph, 0), "a graph");
  const double seconds = MedianSeconds(stream, [&] { Check(cudaGraphLaunch(executable, stream), "a graph"); });
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  return seconds / count;
}

// Bytes read and written per second by a copy within the card's memory, the median of some.
double CopyRate(Stream stream) {
  constexpr int64_t kBytes = int64_t{4} << 30;
  const Memory from(kBytes), to(kBytes);
  Check(cudaMemset(from.data, 1, kBytes), "the source of a copy");
  const auto copy = [&] { Check(cudaMemcpyAsync(to.data, from.data, kBytes, cudaMemcpyDeviceToDevice, stream), "a copy"); };
  return 2.0 * kBytes / MedianSeconds(stream, copy);
}

constexpr int kMmaChains = 8, kMmaRounds = 2048;

// mma from registers alone: 8 independent chains per warp.
__global__ void __launch_bounds__(256, 2) MmaRateKernel(float* out) {
  float sums[kMmaChains][4] = {};
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = threadIdx.x * 4 + i;
  for (int i = 0; i < 2; ++i) b[i] = threadIdx.x * 2 + i;
  for (int round = 0; round < kMmaRounds; ++round) {
#pragma unroll
    for (int chain = 0; chain < kMmaChains; ++chain) MmaM16N8K16(sums[chain], a, b);
  }
  float sum = 0.0f;
  for (int chain = 0; chain < kMmaChains; ++chain) sum += sums[chain][0] + sums[chain][1] + sums[chain][2] + sums[chain][3];
  if (sum == 1.0f) out[0] = sum;  // never: for the compiler
}

// Floating-point operations per second.
double MmaRate(Stream stream, int processors) {
  const Memory out(256);
  const int blocks = processors * 2 * 4;
  const double seconds = Seconds(stream, 8, [&](int) {
    Launch("mma rate", MmaRateKernel, dim3(static_cast<unsigned int>(blocks)), dim3(256), 0, stream, static_cast<float*>(out.data));
  });
  return 2.0 * 16 * 8 * 16 * kMmaChains * kMmaRounds * 8 * blocks / seconds;
}

struct Layer {
  const char* name;
  int64_t rows, cols;
  int64_t group_size;  // of the whole matrix's quantisation over 8 ranks; 0: it is not quantised
};

// How a rank of 1 and of 4 sees them.
constexpr Layer kLayers[] = {{"qkv", 36864, 12288, 12288},       {"dense", 12288, 12288, 1536},  {"h_to_4h", 65536, 12288, 12288},
                             {"4h_to_h", 12288, 32768, 4096},    {"logits", 150528, 12288, 0},   {"qkv / 4", 9216, 12288, 12288},
                             {"dense / 4", 12288, 3072, 1536},   {"h_to_4h / 4", 16384, 12288, 12288},
                             {"4h_to_h / 4", 12288, 8192, 4096}, {"logits / 4", 37632, 12288, 0}};

const char* TypeName(WeightType type) { return type == WeightType::kI4 ? "int4" : type == WeightType::kI8 ? "int8" : "fp16"; }

DeviceWeight Describe(const Layer& layer, WeightType type, int64_t group_size) {
  LinearWeight weight;
  weight.type = type;
  weight.rows = layer.rows;
  weight.cols = layer.cols;
  if (type != WeightType::kF16) {
    weight.group_size = group_size;
    weight.groups = layer.cols / group_size;
  }
  return DescribeDeviceWeight(weight);
}

struct Kernel {
  std::string name;
  std::function<void(const LinearCall&)> run;
  bool chosen;
};

std::vector<Kernel> Kernels(const DeviceWeight& weight, int64_t m, bool all, size_t shared_bytes) {
  std::vector<Kernel> kernels;
  const int stream_tiles = ChooseStreamTokenTiles(weight, m);
  if (m <= kMaxDecodeRows) {
    const int chosen = stream_tiles > 0 ? 0 : ChooseDecodeRowTiles(weight, m);
    for (const int row_tiles : {1, 2, 4}) {
      if ((row_tiles == 1 && m > 8) || (row_tiles == 4 && weight.type == WeightType::kF16)) continue;
      if (all || row_tiles == chosen) {
        kernels.push_back({"decode " + std::to_string(row_tiles), [=](const LinearCall& call) { LaunchDecode(call, row_tiles); }, row_tiles == chosen});
      }
    }
  }
  for (const int token_tiles : kStreamTokenTiles) {
    if (!CanStream(weight, token_tiles) || (token_tiles != stream_tiles && (!all || m > 2 * kMaxStreamRows || m > 16 * token_tiles))) continue;
    kernels.push_back({"stream " + std::to_string(token_tiles), [=](const LinearCall& call) { LaunchStream(call, token_tiles); }, token_tiles == stream_tiles});
  }
  if (m < 8) return kernels;
  for (const GemmTile tile : kGemmTiles) {
    const bool chosen = m > kMaxDecodeRows && stream_tiles == 0 && tile == ChooseGemmTile(weight, m);
    if (GemmSharedBytes(tile, weight.type) > shared_bytes || (!all && !chosen) || (m <= 64 && TileTokens(tile) > 64)) continue;
    kernels.push_back({"gemm " + std::to_string(TileOutputRows(tile)) + "x" + std::to_string(TileTokens(tile)),
                       [=](const LinearCall& call) { LaunchGemm(call, tile); }, chosen});
  }
  return kernels;
}

struct Options {
  bool quick = false, all_kernels = false;
  std::vector<int64_t> row_counts;  // empty: some
  std::string layer, type;          // empty: all
};

void Measure(const Options& options) {
  int device = 0;
  Check(cudaGetDevice(&device), "the device");
  cudaDeviceProp properties;
  Check(cudaGetDeviceProperties(&properties, device), "the device");
  Stream stream;
  Check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a stream");
  const double copy_rate = CopyRate(stream), mma_rate = MmaRate(stream, properties.multiProcessorCount);
  std::printf("%s, %d processors\ncopy: %.0f GB/s read and written\nmma.m16n8k16: %.0f TFLOP/s\n\n", properties.name, properties.multiProcessorCount,
              copy_rate * 1e-9, mma_rate * 1e-12);
  std::printf("%-12s %-5s %5s %6s  %-13s %10s %8s %9s %9s %8s\n", "layer", "type", "group", "rows", "kernel", "us", "GB/s", "of copy", "TFLOP/s", "of mma");

  const std::vector<int64_t> row_counts =
      !options.row_counts.empty() ? options.row_counts
      : options.quick ? std::vector<int64_t>{1, 8, 16, 32, 64, 2048} : std::vector<int64_t>{1, 2, 4, 8, 16, 32, 64, 512, 1024, 2048};
  int64_t most_cols = 0, most_rows = 0;
  for (const Layer& layer : kLayers) {
    most_cols = std::max(most_cols, layer.cols);
    most_rows = std::max(most_rows, layer.rows);
  }
  const int64_t most_tokens = *std::max_element(row_counts.begin(), row_counts.end());
  // Rows of x are drawn as a weight's are: finite halves.
  LinearWeight rows_as_weight;
  rows_as_weight.type = WeightType::kF16;
  rows_as_weight.rows = most_tokens;
  rows_as_weight.cols = most_cols;
  DeviceWeight x = DescribeDeviceWeight(rows_as_weight);
  const Memory x_memory(DeviceWeightBytes(x));
  x.data = x_memory.data;
  RandomWeight(x, 1, stream);
  const Memory y(most_tokens * most_rows * 2);

  for (const Layer& layer : kLayers) {
    if (options.quick && std::strchr(layer.name, '/') != nullptr) continue;
    if (!options.layer.empty() && options.layer != layer.name) continue;
    for (const WeightType type : {WeightType::kI4, WeightType::kI8, WeightType::kF16}) {
      if (!options.type.empty() && options.type != TypeName(type)) continue;
      if (layer.group_size == 0 && type != WeightType::kF16) continue;
      for (const int64_t group_size : {layer.group_size, int64_t{128}}) {
        if (group_size == 128 && (type != WeightType::kI4 || options.quick || std::strcmp(layer.name, "qkv") != 0)) continue;
        const DeviceWeight described = Describe(layer, type, group_size);
        const int64_t bytes = DeviceWeightBytes(described), read_bytes = DeviceWeightReadBytes(described);
        const auto copies = static_cast<int>(std::max<int64_t>(2, 4 * int64_t{properties.l2CacheSize} / bytes + 1));
        const Memory memory(bytes * copies);
        std::vector<DeviceWeight> weights(static_cast<size_t>(copies), described);
        for (int i = 0; i < copies; ++i) {
          weights[static_cast<size_t>(i)].data = static_cast<unsigned char*>(memory.data) + i * bytes;
          RandomWeight(weights[static_cast<size_t>(i)], static_cast<uint64_t>(i), stream);
        }
        for (const int64_t m : row_counts) {
          for (const Kernel& kernel : Kernels(described, m, options.all_kernels, properties.sharedMemPerBlockOptin)) {
            const double seconds = Seconds(stream, m >= 128 ? 2 : std::max(8, copies), [&](int i) {
              kernel.run(LinearCall{weights[static_cast<size_t>(i % copies)], static_cast<const __half*>(x.data), m, most_cols,
                                    Output{y.data, layer.rows, nullptr, static_cast<int>(layer.rows), true}, stream});
            });
            const double rate = static_cast<double>(read_bytes) / seconds;
            const double flops = 2.0 * static_cast<double>(m) * static_cast<double>(layer.rows) * static_cast<double>(layer.cols) / seconds;
            std::printf("%-12s %-5s %5lld %6lld %c%-13s %10.1f %8.0f %8.1f%% %9.1f %7.1f%%\n", layer.name, TypeName(type),
                        static_cast<long long>(group_size), static_cast<long long>(m), kernel.chosen ? '*' : ' ', kernel.name.c_str(), seconds * 1e6,
                        rate * 1e-9, 100.0 * rate / copy_rate, flops * 1e-12, 100.0 * flops / mma_rate);
            std::fflush(stdout);
          }
        }
      }
    }
  }
  Check(cudaStreamDestroy(stream), "a stream");
}

}  // namespace

}  // namespace tandem::cuda

int main(int argc, char** argv) {
  tandem::cuda::Options options;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--quick") == 0) {
      options.quick = true;
    } else if (std::strcmp(argv[i], "--kernels") == 0) {
      options.all_kernels = true;
    } else if (std::strcmp(argv[i], "--rows") == 0 && i + 1 < argc) {
      for (const char* at = argv[++i]; at != nullptr; at = std::strchr(at, ',')) options.row_counts.push_back(std::atoll(*at == ',' ? ++at : at));
    } else if (std::strcmp(argv[i], "--layer") == 0 && i + 1 < argc) {
      options.layer = argv[++i];
    } else if (std::strcmp(argv[i], "--type") == 0 && i + 1 < argc) {
      options.type = argv[++i];
    } else {
      std::fprintf(stderr, "usage: linear_bench [--quick] [--kernels] [--rows 1,8,...] [--layer NAME] [--type int4|int8|fp16]\n");
      return 2;
    }
  }
  try {
    tandem::cuda::Measure(options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "linear_bench: %s\n", error.what());
    return 1;
  }
  return 0;
}
