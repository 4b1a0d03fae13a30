// A fixed set of threads that run one loop at a time, for kernels.
#pragma once

#include <cstdint>
#include <functional>

namespace tandem {

class ThreadPool {
 public:
  // num_threads >= 1 counts the calling thread: a pool of 1 starts no thread.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const;

  // Calls body(begin, end, thread) so that the ranges cover [0, count) once; returns when all have returned. Range borders are multiples of
  // `grain`. Which thread gets which range may vary: a body's result must not depend on it. Only one caller at a time. body must not throw.
  void ParallelFor(int64_t count, int64_t grain, const std::function<void(int64_t begin, int64_t end, int thread)>& body);

 private:
  struct Impl;
  Impl* impl_;
};

}  // namespace tandem
