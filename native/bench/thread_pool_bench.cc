// Measures what an empty loop costs: the caller tells the others, and waits until all have said that they are done.
// Build and run:  cmake --build native/build --target tandem_thread_pool_bench && native/build/tandem_thread_pool_bench [threads [pools]]
// With several pools, each in a process of its own, threads may outnumber the CPUs.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "core/thread_pool.h"

namespace tandem {
namespace {

void Measure(int threads, int pool_number) {
  constexpr int kLoops = 20000;
  ThreadPool pool(threads);
  // Loops of nothing, and of some microseconds for each thread, with a pause between them as between kernels.
  for (const int work : {0, 2000}) {
    std::vector<double> nanoseconds;
    volatile int sink = 0;
    const auto begin_all = std::chrono::steady_clock::now();
    for (int i = 0; i < kLoops; ++i) {
      const auto begin = std::chrono::steady_clock::now();
      pool.ParallelFor(threads, 1, [&](int64_t, int64_t, int) {
        for (int turn = 0; turn < work; ++turn) asm volatile("" : : "r"(turn));
      });
      nanoseconds.push_back(std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - begin).count());
      for (int turn = 0; turn < 500; ++turn) sink = turn;
    }
    const double mean = std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - begin_all).count() / kLoops;
    std::sort(nanoseconds.begin(), nanoseconds.end());
    std::printf("pool %d, %d threads, %d turns each: median %.0f ns, fastest tenth %.0f ns, slowest hundredth %.0f ns, mean with the pause %.0f ns\n", pool_number,
                threads, work, nanoseconds[kLoops / 2], nanoseconds[kLoops / 10], nanoseconds[kLoops - kLoops / 100], mean);
    (void)sink;
  }
  std::fflush(stdout);
}

int Run(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 2, pools = argc > 2 ? std::atoi(argv[2]) : 1;
  if (threads < 1 || pools < 1) {
    std::fprintf(stderr, "threads and pools: at least 1\n");
    return 2;
  }
  for (int number = 1; number < pools; ++number) {
    if (fork() != 0) continue;
    Measure(threads, number);
    std::_Exit(0);
  }
  Measure(threads, 0);
  while (wait(nullptr) > 0) {
  }
  return 0;
}

}  // namespace
}  // namespace tandem

int main(int argc, char** argv) { return tandem::Run(argc, argv); }
