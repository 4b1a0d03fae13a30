// Measures attention over the fp16 cache: prefill against fused multiply-adds in registers, decoding against memory read bandwidth.
// Build and run:  cmake --build native/build --target tandem_attention_bench && native/build/tandem_attention_bench [avx512|avx2|generic]
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "core/half.h"
#include "kernels/attention.h"
#include "model/aligned_buffer.h"
#include "model/read_bandwidth.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tandem {
namespace {

constexpr int64_t kHeadDim = 128, kBlockSize = 16;

double MedianSeconds(int repeats, const std::function<void()>& body) {
  std::vector<double> seconds;
  for (int i = 0; i < repeats; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    body();
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  std::sort(seconds.begin(), seconds.end());
  return seconds[seconds.size() / 2];
}

#if defined(__x86_64__)
// 12 sums in flight, so that none waits for the last.
#define TANDEM_FMA_LOOP(constraint)                                                                                                               \
  for (int64_t turn = 0; turn < turns; ++turn) {                                                                                                  \
    asm volatile(                                                                                                                                 \
        "vfmadd231ps %12, %12, %0\n vfmadd231ps %12, %12, %1\n vfmadd231ps %12, %12, %2\n vfmadd231ps %12, %12, %3\n"                             \
        "vfmadd231ps %12, %12, %4\n vfmadd231ps %12, %12, %5\n vfmadd231ps %12, %12, %6\n vfmadd231ps %12, %12, %7\n"                             \
        "vfmadd231ps %12, %12, %8\n vfmadd231ps %12, %12, %9\n vfmadd231ps %12, %12, %10\n vfmadd231ps %12, %12, %11\n"                           \
        : constraint(a), constraint(b), constraint(c), constraint(d), constraint(e), constraint(f), constraint(g), constraint(h), constraint(i),  \
          constraint(j), constraint(k), constraint(l)                                                                                             \
        : "v"(x));                                                                                                                                \
  }
__attribute__((target("avx2,fma"))) void FmaLoopAvx2(int64_t turns) {
  const __m256 x = _mm256_setzero_ps();
  __m256 a = x, b = x, c = x, d = x, e = x, f = x, g = x, h = x, i = x, j = x, k = x, l = x;
  TANDEM_FMA_LOOP("+x")
}
__attribute__((target("avx512f"))) void FmaLoopAvx512(int64_t turns) {
  const __m512 x = _mm512_setzero_ps();
  __m512 a = x, b = x, c = x, d = x, e = x, f = x, g = x, h = x, i = x, j = x, k = x, l = x;
  TANDEM_FMA_LOOP("+v")
}
#endif

double FmaPeak(Isa isa, int threads) {  // multiply-adds per second, 0 where it is not measured
#if defined(__x86_64__)
  if (isa == Isa::kGeneric) return 0;
  constexpr int64_t kTurns = 4'000'000;
  ThreadPool pool(threads);
  const double seconds = MedianSeconds(5, [&] { pool.ParallelFor(threads, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) isa == Isa::kAvx2 ? FmaLoopAvx2(kTurns) : FmaLoopAvx512(kTurns);
  }); });
  return static_cast<double>(kTurns) * 12 * (isa == Isa::kAvx2 ? 8 : 16) * threads / seconds;
#else
  (void)isa, (void)threads;
  return 0;
#endif
}

struct Cache {
  Cache(int64_t num_blocks, int64_t num_heads) : k(Bytes(num_blocks, num_heads), "k"), v(Bytes(num_blocks, num_heads), "v") {
    std::mt19937 random(1);
    for (int64_t i = 0; i < k.bytes() / 2; ++i) {
      k.as<uint16_t>()[i] = static_cast<uint16_t>(0x3000 | (random() & 0x8fff));
      v.as<uint16_t>()[i] = static_cast<uint16_t>(0x3000 | (random() & 0x8fff));
    }
    layer = {k.data(), v.data(), KvType::kF16, num_blocks, num_heads, kBlockSize, kHeadDim};
    for (int64_t i = 0; i < num_blocks; ++i) table.push_back(static_cast<uint32_t>(i));
    std::shuffle(table.begin(), table.end(), random);
  }
  static int64_t Bytes(int64_t num_blocks, int64_t num_heads) { return num_blocks * num_heads * kBlockSize * kHeadDim * 2; }

  AlignedBuffer k, v;
  KvLayer layer;
  std::vector<uint32_t> table;
};

void Prefill(Isa isa, int64_t tokens, int64_t num_heads, bool bidirectional, int threads) {
  ThreadPool pool(threads);
  Cache cache(tokens / kBlockSize, num_heads);
  const int64_t width = num_heads * kHeadDim;
  std::vector<float> q(static_cast<size_t>(tokens * width)), out(q.size());
  for (size_t i = 0; i < q.size(); ++i) q[i] = static_cast<float>(i % 1001) / 500 - 1;
  std::vector<AttentionRow> rows;
  double products = 0;
  for (int64_t i = 0; i < tokens; ++i) {
    rows.push_back({cache.table.data(), bidirectional ? tokens : i + 1});
    products += static_cast<double>(2 * rows.back().visible * width);
  }
  const double seconds = MedianSeconds(5, [&] { Attention(isa, q.data(), rows.data(), tokens, cache.layer, out.data(), pool); });
  const double peak = FmaPeak(isa, threads);
  std::printf("%-10s %d thread(s), %d %s rows, %d heads: %.1f GMAC/s", IsaName(isa), threads, static_cast<int>(tokens),
              bidirectional ? "bidirectional" : "causal", static_cast<int>(num_heads), products / seconds / 1e9);
  if (peak > 0) std::printf(" = %.0f %% of %.1f", products / seconds / peak * 100, peak / 1e9);
  std::printf("\n");
}

// One row that sees `visible` tokens, of another sequence in every call, so that the cache holds none of it.
void Decode(Isa isa, int64_t visible, int64_t num_heads, int threads, double bandwidth) {
  ThreadPool pool(threads);
  const int64_t blocks = (visible + kBlockSize - 1) / kBlockSize;
  const int64_t sequences = (int64_t{512} << 20) / (2 * Cache::Bytes(blocks, num_heads)) + 1;
  Cache cache(blocks * sequences, num_heads);
  std::vector<float> q(static_cast<size_t>(num_heads * kHeadDim), 0.5f), out(q.size());
  const double seconds = MedianSeconds(5, [&] {
    for (int64_t i = 0; i < sequences; ++i) {
      const AttentionRow row = {cache.table.data() + i * blocks, visible};
      Attention(isa, q.data(), &row, 1, cache.layer, out.data(), pool);
    }
  }) / static_cast<double>(sequences);
  const double bytes = static_cast<double>(2 * visible * num_heads * kHeadDim * 2);
  std::printf("%-10s %d thread(s), one row of %d tokens, %d heads: %.1f us, %.2f GB/s = %.0f %% of the bandwidth\n", IsaName(isa), threads,
              static_cast<int>(visible), static_cast<int>(num_heads), seconds * 1e6, bytes / seconds / 1e9, bytes / seconds / bandwidth * 100);
}

int Run(int argc, char** argv) {
  const std::atomic<bool> cancelled{false};
  for (const int threads : {1, 2}) {
    const double bandwidth = MeasureReadBandwidth(int64_t{1} << 29, threads, 5, cancelled);
    std::printf("%d thread(s): memory is read at %.2f GB/s\n", threads, bandwidth / 1e9);
    for (const Isa isa : {Isa::kAvx512, Isa::kAvx2, Isa::kGeneric}) {
      if (!IsaSupported(isa) || (argc > 1 && std::strcmp(argv[1], IsaName(isa)) != 0)) continue;
      Prefill(isa, 512, 32, true, threads);
      Prefill(isa, 2048, 8, false, threads);
      for (const int64_t num_heads : {1, 4, 32}) Decode(isa, 2000, num_heads, threads, bandwidth);
    }
  }
  return 0;
}

}  // namespace
}  // namespace tandem

int main(int argc, char** argv) { return tandem::Run(argc, argv); }
