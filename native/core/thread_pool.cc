#include "core/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "core/error.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tandem {

namespace {

// Kernels of one forward pass follow each other within microseconds: a worker that spins this long (some tens of microseconds) is awake for the
// next one, and an idle pool soon costs nothing.
constexpr int kSpins = 2000;
constexpr int64_t kRangesPerThread = 4;  // so that a thread that the system interrupts delays only a part of its share

void Pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

// A loop is published as a ticket: its number in the upper half, the ranges that nobody has claimed yet in the lower. A range is claimed by
// compare-and-swap on both, so a worker that wakes late can claim nothing of a loop whose description it did not read, and the caller need not
// wait for workers that sleep. The description changes only while the ticket's lower half is 0.
struct ThreadPool::Impl {
  explicit Impl(int num_threads);
  ~Impl();

  void Stop();
  void WorkerLoop(int thread);
  void RunRanges(int thread);

  const int num_threads;
  const int spins;

  std::atomic<uint64_t> ticket{0};
  std::atomic<const std::function<void(int64_t, int64_t, int)>*> body{nullptr};
  std::atomic<int64_t> count{0};
  std::atomic<int64_t> range{0};  // length of each range but the last
  std::atomic<int64_t> finished{0};
  std::atomic<int64_t> total{0};

  std::mutex mutex;
  std::condition_variable work;  // workers sleep here
  std::condition_variable done;  // the caller sleeps here
  std::atomic<int> sleeping_workers{0};
  std::atomic<bool> caller_sleeps{false};
  std::atomic<bool> stopping{false};
  std::vector<std::thread> workers;
};

ThreadPool::Impl::Impl(int num_threads)
    : num_threads(num_threads), spins(static_cast<int>(std::thread::hardware_concurrency()) >= num_threads ? kSpins : 0) {
  workers.reserve(static_cast<size_t>(num_threads - 1));
  try {
    for (int thread = 1; thread < num_threads; ++thread) workers.emplace_back([this, thread] { WorkerLoop(thread); });
  } catch (...) {
    Stop();
    throw;
  }
}

ThreadPool::Impl::~Impl() { Stop(); }

void ThreadPool::Impl::Stop() {
  {
    std::lock_guard<std::mutex> lock(mutex);
    stopping.store(true);
  }
  work.notify_all();
  for (std::thread& worker : workers) worker.join();
  workers.clear();
}

void ThreadPool::Impl::WorkerLoop(int thread) {
  const auto has_work = [this] { return static_cast<uint32_t>(ticket.load()) != 0 || stopping.load(); };
  for (;;) {
    for (int spin = 0; spin < spins && !has_work(); ++spin) Pause();
    if (!has_work()) {
      std::unique_lock<std::mutex> lock(mutex);
      sleeping_workers.fetch_add(1);
      work.wait(lock, has_work);
      sleeping_workers.fetch_sub(1);
    }
    if (stopping.load()) return;
    RunRanges(thread);
  }
}

void ThreadPool::Impl::RunRanges(int thread) {
  uint64_t seen = ticket.load();
  while (static_cast<uint32_t>(seen) != 0) {
    const auto* loop_body = body.load();
    const int64_t loop_count = count.load();
    const int64_t loop_range = range.load();
    const int64_t loop_total = total.load();
    if (!ticket.compare_exchange_weak(seen, seen - 1)) continue;
    const int64_t begin = (loop_total - static_cast<uint32_t>(seen)) * loop_range;
    (*loop_body)(begin, std::min(begin + loop_range, loop_count), thread);
    if (finished.fetch_add(1) + 1 == loop_total && caller_sleeps.load()) {
      std::lock_guard<std::mutex> lock(mutex);
      done.notify_one();
    }
    seen = ticket.load();
  }
}

ThreadPool::ThreadPool(int num_threads) : impl_(nullptr) {
  if (num_threads < 1) {
    throw Error(ErrorCode::kInvalidArgument, "a thread pool of " + std::to_string(num_threads) + " threads, at least 1 is needed (the caller)");
  }
  impl_ = new Impl(num_threads);
}

ThreadPool::~ThreadPool() { delete impl_; }

int ThreadPool::num_threads() const { return impl_->num_threads; }

void ThreadPool::ParallelFor(int64_t count, int64_t grain, const std::function<void(int64_t begin, int64_t end, int thread)>& body) {
  if (count <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t grains = (count - 1) / grain + 1;
  if (impl_->num_threads == 1 || grains == 1) {
    body(0, count, 0);
    return;
  }
  const int64_t ranges_wanted = std::min(grains, impl_->num_threads * kRangesPerThread);
  const int64_t range = (grains + ranges_wanted - 1) / ranges_wanted * grain;
  const int64_t ranges = (count - 1) / range + 1;

  Impl& pool = *impl_;
  pool.body.store(&body);
  pool.count.store(count);
  pool.range.store(range);
  pool.total.store(ranges);
  pool.finished.store(0);
  const uint64_t number = (pool.ticket.load() >> 32) + 1;
  pool.ticket.store(number << 32 | static_cast<uint64_t>(ranges));
  if (pool.sleeping_workers.load() > 0) {
    std::lock_guard<std::mutex> lock(pool.mutex);  // a worker between its check and its wait would miss the call
    pool.work.notify_all();
  }

  pool.RunRanges(0);
  for (int spin = 0; spin < pool.spins && pool.finished.load() != ranges; ++spin) Pause();
  if (pool.finished.load() != ranges) {
    std::unique_lock<std::mutex> lock(pool.mutex);
    pool.caller_sleeps.store(true);
    pool.done.wait(lock, [&] { return pool.finished.load() == ranges; });
    pool.caller_sleeps.store(false);
  }
}

}  // namespace tandem
