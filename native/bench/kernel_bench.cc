// Measures the packed linear kernels against this machine's limits: memory read bandwidth for one token, products of bytes in registers for many.
// Build and run:  cmake --build native/build --target tandem_kernel_bench && native/build/tandem_kernel_bench
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <vector>

#include "kernels/packed_linear.h"
#include "model/aligned_buffer.h"
#include "model/product_peak.h"
#include "model/read_bandwidth.h"

namespace tandem {
namespace {

constexpr int64_t kRows = 4096, kCols = 10944, kGroup = 128;
constexpr int64_t kTotalBytes = int64_t{1} << 30;  // far above the last cache
constexpr int64_t kTokens = 512;

double Seconds(const std::function<void()>& body) {
  const auto begin = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

double BestSeconds(int repeats, const std::function<void()>& body) {
  double best = Seconds(body);
  for (int i = 1; i < repeats; ++i) best = std::min(best, Seconds(body));
  return best;
}

struct Matrices {
  explicit Matrices(WeightType type) {
    shape.type = type;
    shape.rows = kRows;
    shape.cols = kCols;
    shape.group_size = kGroup;
    shape.groups = (kCols + kGroup - 1) / kGroup;
    bytes = DescribePacked(shape_with_scales(), nullptr).Bytes();
    count = kTotalBytes / bytes + 1;
    memory = AlignedBuffer(count * bytes, "the weights");
    for (int64_t i = 0; i < memory.bytes() / 4; ++i) memory.as<uint32_t>()[i] = static_cast<uint32_t>(i) * 2654435761u & 0xbbffbbff;  // no scale is NaN
  }
  LinearWeight shape_with_scales() {
    static const uint16_t scale = 0;
    LinearWeight with = shape;
    with.scales = &scale;
    return with;
  }
  PackedWeight operator[](int64_t i) { return DescribePacked(shape_with_scales(), memory.as<uint8_t>() + i * bytes); }

  LinearWeight shape;
  int64_t bytes = 0, count = 0;
  AlignedBuffer memory;
};

void Measure(Isa isa, WeightType type, Matrices& matrices, int threads, double bandwidth) {
  ThreadPool pool(threads);
  const ColumnSegments segments = matrices[0].segments;
  const AlignedBuffer x(kTokens * kCols * 4, "x"), y(kTokens * kRows * 4, "y"), quantized(QuantizedBytes(segments, kTokens), "quantised x");
  for (int64_t i = 0; i < kTokens * kCols; ++i) x.as<float>()[i] = static_cast<float>(i % 1001 - 500);
  const double quantize_seconds = BestSeconds(3, [&] { QuantizeRows(isa, segments, x.as<float>(), kTokens, kCols, quantized.data(), pool); });
  const char* bits = type == WeightType::kI8 ? "int8" : "int4";
  const double products = static_cast<double>(kRows) * kCols;

  std::printf("%-10s %s %d thread(s): ", IsaName(isa), bits, threads);
  double one = 0;
  for (const int64_t m : {1, 2, 3, 4, 6, 8, 12, 16, 24, 32}) {
    QuantizeRows(isa, segments, x.as<float>(), m, kCols, quantized.data(), pool);
    const int64_t count = m == 1 || isa >= Isa::kAvx512 ? matrices.count : matrices.count / 4;
    const double seconds = BestSeconds(m == 1 ? 3 : 1, [&] {
      for (int64_t i = 0; i < count; ++i) PackedLinear(isa, matrices[i], quantized.data(), m, nullptr, y.as<float>(), kRows, pool);
    }) / static_cast<double>(count);
    if (m == 1) {
      one = seconds;
      std::printf("m 1: %.2f GB/s = %.0f %% of the bandwidth; times of that:", static_cast<double>(matrices.bytes) / seconds / 1e9,
                  static_cast<double>(matrices.bytes) / seconds / bandwidth * 100);
    } else {
      std::printf(" m %d: %.2f", static_cast<int>(m), seconds / one);
    }
    std::fflush(stdout);
  }
  QuantizeRows(isa, segments, x.as<float>(), kTokens, kCols, quantized.data(), pool);
  const double many = BestSeconds(isa >= Isa::kAvx512 ? 3 : 1, [&] { PackedLinear(isa, matrices[0], quantized.data(), kTokens, nullptr, y.as<float>(), kRows, pool); });
  std::printf("; m %d: %.0f GMAC/s, and quantising %.2f %% of that time\n", static_cast<int>(kTokens), products * kTokens / many / 1e9, quantize_seconds / many * 100);
}

int Run(int argc, char** argv) {
  const std::atomic<bool> cancelled{false};
  double bandwidth[3] = {};
  for (const int threads : {1, 2}) {
    bandwidth[threads] = MeasureReadBandwidth(kTotalBytes, threads, 5, cancelled);
    std::printf("%d thread(s): memory is read at %.2f GB/s; GMAC/s in registers:", threads, bandwidth[threads] / 1e9);
    for (const Isa isa : kAllIsas) {
      if (IsaSupported(isa)) std::printf(" %s %.0f", IsaName(isa), MeasureProductPeak(isa, threads, cancelled) / 1e9);
    }
    std::printf("\n");
  }
  for (const WeightType type : {WeightType::kI4, WeightType::kI8}) {
    Matrices matrices(type);
    for (const Isa isa : {Isa::kAvx512Vnni, Isa::kAvx512, Isa::kAvx2, Isa::kNeon, Isa::kGeneric}) {
      if (!IsaSupported(isa) || (argc > 1 && std::strcmp(argv[1], IsaName(isa)) != 0)) continue;
      for (const int threads : {1, 2}) Measure(isa, type, matrices, threads, bandwidth[threads]);
    }
  }
  return 0;
}

}  // namespace
}  // namespace tandem

int main(int argc, char** argv) { return tandem::Run(argc, argv); }
