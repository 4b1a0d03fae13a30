// Measures attention on a GPU over one layer of GLM-130B (96 heads of 128): decoding as bytes of K and V read each second, beside a copy's bytes read and
// written, and prefill of one bidirectional run as arithmetic of its two products. First it holds both ways against each other, bit for bit.
//   nvcc -std=c++17 -O3 -arch=native -Inative native/bench/cuda/attention_bench.cu native/kernels/cuda/attention.cu -o attention_bench && ./attention_bench
#include <algorithm>
#include <cstdio>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/cuda/attention.h"

namespace tandem::cuda {
namespace {

constexpr int64_t kNumHeads = 96, kHeadDim = 128, kBlockSize = 16, kWidth = kNumHeads * kHeadDim;

// Halves in -1 .. 1, bytes of any value, or scales of 1/128 to 1/64.
enum class Filling { kHalves, kBytes, kScales };
__global__ void FillKernel(void* values, int64_t count, Filling filling) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x) {
    uint32_t x = static_cast<uint32_t>(i) * 2654435761u;
    x = (x ^ x >> 15) * 2246822519u;
    x ^= x >> 13;
    if (filling == Filling::kBytes) static_cast<int8_t*>(values)[i] = static_cast<int8_t>(x % 255) - 127;
    if (filling == Filling::kHalves) static_cast<__half*>(values)[i] = __float2half(static_cast<float>(x % 4096) / 2048.0f - 1.0f);
    if (filling == Filling::kScales) static_cast<__half*>(values)[i] = __float2half(static_cast<float>(x % 128 + 128) / 16384.0f);
  }
}

template <typename T>
T* Allocate(int64_t count) {
  void* memory = nullptr;
  Check(cudaMalloc(&memory, static_cast<size_t>(count) * sizeof(T)), "the bench's memory");
  return static_cast<T*>(memory);
}

template <typename T>
T* Filled(int64_t count, Filling filling) {
  T* values = Allocate<T>(count);
  Launch("fill", FillKernel, dim3(4096), dim3(256), 0, nullptr, static_cast<void*>(values), count, filling);
  return values;
}

template <typename T>
T* Upload(const std::vector<T>& values) {
  T* memory = Allocate<T>(static_cast<int64_t>(values.size()));
  Check(cudaMemcpy(memory, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "the bench's input");
  return memory;
}

// Median of 11 of the mean of `repeats` in a row.
double Seconds(int repeats, const std::function<void()>& body) {
  cudaEvent_t begin, end;
  Check(cudaEventCreate(&begin), "event");
  Check(cudaEventCreate(&end), "event");
  body();
  std::vector<double> seconds;
  for (int i = 0; i < 11; ++i) {
    Check(cudaEventRecord(begin, nullptr), "event");
    for (int r = 0; r < repeats; ++r) body();
    Check(cudaEventRecord(end, nullptr), "event");
    Check(cudaEventSynchronize(end), "the bench's kernels");
    float milliseconds = 0;
    Check(cudaEventElapsedTime(&milliseconds, begin, end), "event");
    seconds.push_back(milliseconds / 1000.0 / repeats);
  }
  std::sort(seconds.begin(), seconds.end());
  Check(cudaEventDestroy(begin), "event");
  Check(cudaEventDestroy(end), "event");
  return seconds[5];
}

CudaKvLayer RandomLayer(KvType type, int64_t num_blocks) {
  CudaKvLayer kv;
  kv.type = type;
  kv.num_blocks = num_blocks;
  kv.num_heads = kNumHeads;
  kv.block_size = kBlockSize;
  kv.head_dim = kHeadDim;
  const int64_t rows = num_blocks * kNumHeads * kBlockSize;
  for (void** plane : {&kv.k, &kv.v}) {
    if (type == KvType::kF16) {
      *plane = Filled<__half>(rows * kHeadDim, Filling::kHalves);
    } else {
      *plane = Filled<int8_t>(rows * kHeadDim, Filling::kBytes);
    }
  }
  if (type == KvType::kI8) {
    for (__half** scales : {&kv.k_scales, &kv.v_scales}) *scales = Filled<__half>(rows, Filling::kScales);
  }
  return kv;
}

void Free(const CudaKvLayer& kv) {
  for (void* memory : {kv.k, kv.v, static_cast<void*>(kv.k_scales), static_cast<void*>(kv.v_scales)}) Check(cudaFree(memory), "free");
}

// Rows whose sequences' blocks lie anywhere in the cache, and where they are on the device.
struct Rows {
  Rows(const std::vector<std::vector<uint32_t>>& visible_of_sequences, int64_t num_blocks) {
    std::vector<uint32_t> tables(static_cast<size_t>(num_blocks));
    std::iota(tables.begin(), tables.end(), 0u);
    std::shuffle(tables.begin(), tables.end(), std::mt19937(1));
    uint32_t next_block = 0;
    for (const std::vector<uint32_t>& sequence : visible_of_sequences) {
      for (const uint32_t visible : sequence) rows.push_back({next_block, visible});
      const uint32_t most = *std::max_element(sequence.begin(), sequence.end());
      longest = std::max<int64_t>(longest, most);
      next_block += (most + kBlockSize - 1) / kBlockSize;
    }
    for (uint32_t i = 0; i < rows.size(); ++i) single.push_back({i, 1, i});
    std::vector<CudaAttentionTile> split;
    BuildAttentionTiles(rows, kHeadDim, &split, &whole);
    batch.rows = device_rows = Upload(rows);
    batch.tables = device_tables = Upload(tables);
    single_tiles = Upload(single);
    whole_tiles = whole.empty() ? nullptr : Upload(whole);
    const auto m = static_cast<int64_t>(rows.size());
    max_parts = (longest + kAttentionPart - 1) / kAttentionPart;
    scratch = Allocate<char>(AttentionScratchBytes(m, max_parts, kNumHeads, kHeadDim));
    batch.q = q = Filled<__half>(m * kWidth, Filling::kHalves);
    batch.out = Allocate<__half>(m * kWidth);
    batch.q_stride = batch.out_stride = kWidth;
  }
  ~Rows() {
    for (void* memory : {static_cast<void*>(device_rows), static_cast<void*>(device_tables), static_cast<void*>(single_tiles), static_cast<void*>(whole_tiles),
                         static_cast<void*>(scratch), static_cast<void*>(q), static_cast<void*>(batch.out)}) {
      cudaFree(memory);
    }
  }
  Rows(const Rows&) = delete;
  Rows& operator=(const Rows&) = delete;

  // Each row for itself, as in decoding; in tiles, as in prefill.
  void Split() const {
    const auto m = static_cast<int64_t>(rows.size());
    AttentionSplit(batch, single_tiles, m, m, max_parts, scratch, nullptr);
  }
  void Whole() const { AttentionWhole(batch, whole_tiles, static_cast<int64_t>(whole.size()), nullptr); }

  std::vector<CudaAttentionRow> rows;
  std::vector<CudaAttentionTile> single, whole;
  CudaAttentionBatch batch;
  int64_t longest = 0, max_parts = 0;
  CudaAttentionRow* device_rows = nullptr;
  uint32_t* device_tables = nullptr;
  CudaAttentionTile* single_tiles = nullptr;
  CudaAttentionTile* whole_tiles = nullptr;
  char* scratch = nullptr;
  __half* q = nullptr;
};

bool SameBitsBothWays(KvType type) {
  const int64_t num_blocks = 80;
  std::vector<uint32_t> visible(300, 700);
  for (uint32_t i = 0; i < 200; ++i) visible.push_back(1 + i * 5);
  Rows rows({visible}, num_blocks);
  rows.batch.kv = RandomLayer(type, num_blocks);
  const size_t bytes = rows.rows.size() * kWidth * sizeof(__half);
  std::vector<uint16_t> split(bytes / 2), whole(bytes / 2);
  Check(cudaMemset(rows.batch.out, 0xff, bytes), "poison");
  rows.Split();
  Check(cudaMemcpy(split.data(), rows.batch.out, bytes, cudaMemcpyDeviceToHost), "split");
  Check(cudaMemset(rows.batch.out, 0xff, bytes), "poison");
  rows.Whole();
  Check(cudaMemcpy(whole.data(), rows.batch.out, bytes, cudaMemcpyDeviceToHost), "whole");
  Free(rows.batch.kv);
  return split == whole && std::none_of(split.begin(), split.end(), [](uint16_t bits) { return (bits & 0x7fff) > 0x7c00; });
}

void MeasureCopy() {
  const int64_t bytes = int64_t{2} << 30;
  char* from = Filled<char>(bytes, Filling::kBytes);
  char* to = Allocate<char>(bytes);
  const double seconds = Seconds(3, [&] { Check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, nullptr), "copy"); });
  std::printf("copy: %.0f GB/s\n", 2.0 * static_cast<double>(bytes) / seconds * 1e-9);
  Check(cudaFree(from), "free");
  Check(cudaFree(to), "free");
}

void MeasureDecode(KvType type, int64_t batch_size, uint32_t context) {
  // At the least so many sequences in turn that K and V do not stay in the L2 cache from one call to the next.
  const int64_t sequences = std::max<int64_t>(batch_size, 8), num_blocks = sequences * context / kBlockSize;
  const CudaKvLayer kv = RandomLayer(type, num_blocks);
  std::vector<std::unique_ptr<Rows>> turns;
  for (int64_t first = 0; first < sequences; first += batch_size) {
    turns.push_back(std::make_unique<Rows>(std::vector<std::vector<uint32_t>>(static_cast<size_t>(batch_size), {context}), num_blocks));
    turns.back()->batch.kv = kv;
    turns.back()->batch.tables += first * context / kBlockSize;
  }
  size_t turn = 0;
  const double seconds = Seconds(static_cast<int>(std::max<int64_t>(2, 64 / batch_size)), [&] { turns[turn++ % turns.size()]->Split(); });
  const double bytes = 2.0 * static_cast<double>(batch_size * context * kNumHeads) * (type == KvType::kF16 ? kHeadDim * 2 : kHeadDim + 2);
  std::printf("decode %s, batch %2d, context %u: %7.1f us, %.0f GB/s of K and V\n", type == KvType::kF16 ? "fp16" : "int8", static_cast<int>(batch_size),
              context, seconds * 1e6, bytes / seconds * 1e-9);
  Free(kv);
}

void MeasurePrefill(KvType type, uint32_t length) {
  const int64_t num_blocks = length / kBlockSize;
  Rows rows({std::vector<uint32_t>(length, length)}, num_blocks);
  rows.batch.kv = RandomLayer(type, num_blocks);
  const double seconds = Seconds(4, [&] { rows.Whole(); });
  const double operations = 4.0 * length * length * static_cast<double>(kWidth);
  std::printf("prefill %s, %4u tokens: %8.1f us, %.0f TFLOP/s\n", type == KvType::kF16 ? "fp16" : "int8", length, seconds * 1e6,
              operations / seconds * 1e-12);
  Free(rows.batch.kv);
}

int Main() {
  cudaDeviceProp device;
  Check(cudaGetDeviceProperties(&device, 0), "device");
  std::printf("%s, %d multiprocessors\n", device.name, device.multiProcessorCount);
  for (const KvType type : {KvType::kF16, KvType::kI8}) {
    if (!SameBitsBothWays(type)) return std::printf("the two ways differ\n"), 1;
  }
  std::printf("decode and prefill: the same bits\n");
  MeasureCopy();
  for (const KvType type : {KvType::kF16, KvType::kI8}) {
    for (const int64_t batch_size : {1, 8, 32, 64}) MeasureDecode(type, batch_size, 2048);
    MeasureDecode(type, 1, 256);
    for (const uint32_t length : {512u, 1024u, 2048u}) MeasurePrefill(type, length);
  }
  return 0;
}

}  // namespace
}  // namespace tandem::cuda

int main() {
  try {
    return tandem::cuda::Main();
  } catch (const tandem::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
