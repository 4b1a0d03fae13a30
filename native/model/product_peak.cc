#include "model/product_peak.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>

#include "core/error.h"
#include "core/thread_pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tandem {
namespace {

// Loops of instructions that no compiler can leave out. Each returns something of its sums.

constexpr int64_t kGenericProducts = 64;  // of a turn

int64_t TurnsGeneric(int64_t turns) {
  int16_t x[kGenericProducts], w[kGenericProducts];
  int32_t sums[kGenericProducts / 2] = {};
  for (int64_t i = 0; i < kGenericProducts; ++i) x[i] = w[i] = static_cast<int16_t>(i % 16);
  for (int64_t turn = 0; turn < turns; ++turn) {
    asm volatile("" : : "r"(x), "r"(w) : "memory");  // they might be others in this turn
    for (int64_t i = 0; i < kGenericProducts / 2; ++i) sums[i] += x[2 * i] * w[2 * i] + x[2 * i + 1] * w[2 * i + 1];
  }
  int64_t sum = 0;
  for (const int32_t part : sums) sum += part;
  return sum;
}

#if defined(__x86_64__)
constexpr int64_t kVnniProducts = 12 * 64;  // of a turn
constexpr int64_t kPairDots = 8;            // before 16 bits overflow
constexpr int64_t kPairProducts = 6 * kPairDots;  // of a turn, times the bytes of a vector

// 12 (6) sums in flight hide the latency and fit into the registers.
__attribute__((target("avx512f,avx512vnni"))) int64_t TurnsVnni(int64_t turns) {
  const __m512i x = _mm512_set1_epi8(1);
  __m512i a = x, b = x, c = x, d = x, e = x, f = x, g = x, h = x, i = x, j = x, k = x, l = x;
  for (int64_t turn = 0; turn < turns; ++turn) {
#define TANDEM_DOT(sum) "vpdpbusd %12, %12, %" #sum "\n\t"
    asm volatile(TANDEM_DOT(0) TANDEM_DOT(1) TANDEM_DOT(2) TANDEM_DOT(3) TANDEM_DOT(4) TANDEM_DOT(5) TANDEM_DOT(6) TANDEM_DOT(7) TANDEM_DOT(8)
                     TANDEM_DOT(9) TANDEM_DOT(10) TANDEM_DOT(11)
                 : "+v"(a), "+v"(b), "+v"(c), "+v"(d), "+v"(e), "+v"(f), "+v"(g), "+v"(h), "+v"(i), "+v"(j), "+v"(k), "+v"(l)
                 : "v"(x));
#undef TANDEM_DOT
  }
  return (a + b + c + d + e + f + g + h + i + j + k + l)[0];
}

#define TANDEM_DOT(sum) "vpmaddubsw %7, %7, %6\n\tvpaddw %6, %" #sum ", %" #sum "\n\t"
#define TANDEM_WIDEN(sum) "vpmaddwd %8, %" #sum ", %6\n\tvpaddd %6, %7, %7\n\t"
#define TANDEM_SUMS "+v"(a), "+v"(b), "+v"(c), "+v"(d), "+v"(e), "+v"(f), "=&v"(product)
#define TANDEM_PAIRS_BODY(Vector, x)                                                                                                               \
  Vector a = x, b = x, c = x, d = x, e = x, f = x, wide = x, product;                                                                              \
  for (int64_t turn = 0; turn < turns; ++turn) {                                                                                                   \
    for (int64_t dot = 0; dot < kPairDots; ++dot) {                                                                                                \
      asm volatile(TANDEM_DOT(0) TANDEM_DOT(1) TANDEM_DOT(2) TANDEM_DOT(3) TANDEM_DOT(4) TANDEM_DOT(5) : TANDEM_SUMS : "v"(x));                    \
    }                                                                                                                                              \
    asm volatile(TANDEM_WIDEN(0) TANDEM_WIDEN(1) TANDEM_WIDEN(2) TANDEM_WIDEN(3) TANDEM_WIDEN(4) TANDEM_WIDEN(5) : TANDEM_SUMS, "+v"(wide) : "v"(x)); \
  }                                                                                                                                                \
  return wide[0];

__attribute__((target("avx512f,avx512bw"))) int64_t TurnsAvx512(int64_t turns) {
  const __m512i one = _mm512_set1_epi8(1);
  TANDEM_PAIRS_BODY(__m512i, one)
}
__attribute__((target("avx2"))) int64_t TurnsAvx2(int64_t turns) {
  const __m256i one = _mm256_set1_epi8(1);
  TANDEM_PAIRS_BODY(__m256i, one)
}
#undef TANDEM_DOT
#undef TANDEM_WIDEN
#undef TANDEM_SUMS
#undef TANDEM_PAIRS_BODY
#endif

struct Loop {
  int64_t (*turns)(int64_t);
  int64_t products;  // of a turn
};

Loop LoopOf(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512Vnni) return {TurnsVnni, kVnniProducts};
  if (isa == Isa::kAvx512) return {TurnsAvx512, kPairProducts * 64};
  if (isa == Isa::kAvx2) return {TurnsAvx2, kPairProducts * 32};
#endif
  (void)isa;
  return {TurnsGeneric, kGenericProducts};
}

}  // namespace

double MeasureProductPeak(Isa isa, int threads, const std::atomic<bool>& cancelled) {
  if (!IsaSupported(isa)) throw Error(ErrorCode::kInvalidArgument, std::string("isa: this CPU has no ") + IsaName(isa));
  if (threads < 1 || threads > 1024) throw Error(ErrorCode::kInvalidArgument, "threads: " + std::to_string(threads) + " is not in 1 .. 1024");
  constexpr int64_t kTurns = 10'000'000;  // a tenth of a second or two
  constexpr int kRuns = 3;
  const Loop loop = LoopOf(isa);
  ThreadPool pool(threads);
  std::atomic<int64_t> kept{0};
  double best_seconds = 0;
  for (int run = 0; run < kRuns; ++run) {
    if (cancelled.load()) throw Error(ErrorCode::kAborted, "the measurement of products was aborted");
    const auto begin_time = std::chrono::steady_clock::now();
    pool.ParallelFor(threads, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) kept += loop.turns(kTurns);
    });
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_time).count();
    if (run == 0 || seconds < best_seconds) best_seconds = seconds;
  }
  return static_cast<double>(kTurns * loop.products) * threads / best_seconds;
}

}  // namespace tandem
