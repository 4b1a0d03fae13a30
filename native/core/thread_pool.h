// A fixed set of threads that run one loop at a time, for kernels.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

namespace tandem {

struct ThreadPoolOptions {
  // Thread i runs on cpus[i] alone, where there is one for each; otherwise all run on all of them. Empty: wherever the system puts them.
  std::vector<int> cpus;
  // How long a thread looks for work before it sleeps. None: some time if there are as many CPUs as threads, else hardly any.
  std::optional<std::chrono::microseconds> spin;
};

class ThreadPool {
 public:
  // num_threads >= 1 counts the calling thread, thread 0: a pool of 1 starts no thread. The caller is pinned, too.
  explicit ThreadPool(int num_threads, const ThreadPoolOptions& options = {});
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const;

  // Calls body(begin, end, thread) so that the ranges cover [0, count) once; returns when all have returned. Range borders are multiples of
  // `grain`. Each thread has a share of its own, the same one whenever `count` and `grain` are (share t of T begins at about t / T), and then takes what
  // is left of others': a body's result must not depend on who does what. Only one caller at a time. body must not throw.
  void ParallelFor(int64_t count, int64_t grain, const std::function<void(int64_t begin, int64_t end, int thread)>& body);

 private:
  struct Impl;
  Impl* impl_;
};

}  // namespace tandem
