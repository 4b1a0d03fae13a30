#include "model/read_bandwidth.h"

#include <algorithm>
#include <chrono>
#include <string>
#include <vector>

#include "core/cpu_features.h"
#include "core/error.h"
#include "core/thread_pool.h"
#include "model/aligned_buffer.h"

namespace tandem {
namespace {

// Sums of 64-bit words in 32 independent lanes: the compiler makes the widest loads that the target has of it.
#define TANDEM_SUM_BODY                                                     \
  uint64_t lanes[32] = {};                                                  \
  for (int64_t i = 0; i + 32 <= count; i += 32) {                           \
    for (int64_t lane = 0; lane < 32; ++lane) lanes[lane] += words[i + lane]; \
  }                                                                         \
  uint64_t sum = 0;                                                         \
  for (const uint64_t lane : lanes) sum += lane;                            \
  return sum;

uint64_t SumGeneric(const uint64_t* words, int64_t count) { TANDEM_SUM_BODY }
#if defined(__x86_64__)
__attribute__((target("avx2"))) uint64_t SumAvx2(const uint64_t* words, int64_t count) { TANDEM_SUM_BODY }
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))) uint64_t SumAvx512(const uint64_t* words, int64_t count) { TANDEM_SUM_BODY }
#endif
#undef TANDEM_SUM_BODY

uint64_t Sum(Isa isa, const uint64_t* words, int64_t count) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) return SumAvx512(words, count);
  if (isa == Isa::kAvx2) return SumAvx2(words, count);
#endif
  (void)isa;
  return SumGeneric(words, count);
}

}  // namespace

double MeasureReadBandwidth(int64_t bytes, int threads, int repeats, const std::atomic<bool>& cancelled) {
  const auto check = [](const char* name, int64_t value, int64_t least, int64_t most) {
    if (value >= least && value <= most) return;
    throw Error(ErrorCode::kInvalidArgument, std::string(name) + ": " + std::to_string(value) + " is not in " + std::to_string(least) + " .. " + std::to_string(most));
  };
  check("bytes", bytes, 1 << 20, int64_t{1} << 40);
  check("threads", threads, 1, 1024);
  check("repeats", repeats, 1, 1000);

  const int64_t count = bytes / 8;
  const AlignedBuffer buffer(bytes, "the bandwidth measurement");
  uint64_t* words = buffer.as<uint64_t>();
  ThreadPool pool(threads);
  constexpr int64_t kPiece = 1 << 17;  // words: a megabyte
  // Written, by the threads that read: untouched memory is all one page of zeros.
  pool.ParallelFor(count, kPiece, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) words[i] = static_cast<uint64_t>(i);
  });

  const Isa isa = BestIsa();
  double best_seconds = 0;
  std::atomic<uint64_t> total{0};  // keeps the sums from being optimised away
  for (int repeat = 0; repeat < repeats; ++repeat) {
    const auto begin_time = std::chrono::steady_clock::now();
    pool.ParallelFor(count, kPiece, [&](int64_t begin, int64_t end, int) {
      uint64_t sum = 0;
      for (int64_t i = begin; i < end && !cancelled.load(std::memory_order_relaxed); i += kPiece) sum += Sum(isa, words + i, std::min(kPiece, end - i));
      total.fetch_add(sum);
    });
    if (cancelled.load()) throw Error(ErrorCode::kAborted, "the bandwidth measurement was aborted");
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_time).count();
    if (repeat == 0 || seconds < best_seconds) best_seconds = seconds;
  }
  return static_cast<double>(count) * 8 / best_seconds;
}

}  // namespace tandem
