#include "core/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "core/cpu_affinity.h"
#include "core/error.h"
#include "core/spin.h"

namespace tandem {

namespace {

// Kernels of one forward pass follow each other within microseconds, or after an all-reduce: a worker that spins this long is awake for the next one,
// and an idle pool soon costs nothing.
constexpr std::chrono::microseconds kSpin{200};
constexpr int64_t kRangesPerThread = 4;  // so that a thread that the system interrupts delays only a part of its share

}  // namespace

// A loop is cut into ranges, and these are shared out: thread t's are published as its ticket, the loop's number in the upper half, how many of them
// nobody has claimed yet in the lower. Whoever runs out of its own claims others'. A range is claimed by compare-and-swap on both halves, so a worker that
// wakes late can claim nothing of a loop whose description it did not read, and the caller need not wait for workers that sleep. The description changes
// only while the lower half of every ticket is 0 and all who claimed have reported.
struct ThreadPool::Impl {
  struct alignas(64) Share {
    std::atomic<uint64_t> ticket{0};
  };

  Impl(int num_threads, const ThreadPoolOptions& options);
  ~Impl();

  std::vector<int> CpusOf(const ThreadPoolOptions& options, int thread) const;
  void Stop();
  void WorkerLoop(int thread);
  void RunRanges(int thread);
  int64_t ShareBegin(int thread, int64_t ranges) const { return ranges * thread / num_threads; }

  const int num_threads;
  const std::chrono::microseconds spin;

  alignas(64) std::atomic<uint32_t> loop{0};  // number of the last loop published
  std::atomic<bool> stopping{false};
  std::atomic<const std::function<void(int64_t, int64_t, int)>*> body{nullptr};
  std::atomic<int64_t> count{0};
  std::atomic<int64_t> range{0};  // length of each range but the last
  std::atomic<int64_t> total{0};  // ranges
  std::vector<Share> shares;
  alignas(64) std::atomic<int64_t> finished{0};  // ranges

  std::mutex mutex;
  std::condition_variable work;  // workers sleep here
  std::condition_variable done;  // the caller sleeps here
  std::atomic<int> sleeping_workers{0};
  std::atomic<bool> caller_sleeps{false};
  std::exception_ptr start_error;
  int started = 0;
  std::vector<std::thread> workers;
};

ThreadPool::Impl::Impl(int num_threads, const ThreadPoolOptions& options)
    : num_threads(num_threads),
      spin(options.spin.value_or(AllowedCpuCount() >= num_threads ? kSpin : std::chrono::microseconds(0))),
      shares(static_cast<size_t>(num_threads)) {
  PinThisThread(CpusOf(options, 0));
  workers.reserve(static_cast<size_t>(num_threads - 1));
  try {
    for (int thread = 1; thread < num_threads; ++thread) {
      workers.emplace_back([this, thread, cpus = CpusOf(options, thread)] {
        std::exception_ptr error;
        try {
          PinThisThread(cpus);
        } catch (...) {
          error = std::current_exception();
        }
        {
          const std::lock_guard<std::mutex> lock(mutex);
          if (error) start_error = error;
          ++started;
          done.notify_one();
        }
        if (!error) WorkerLoop(thread);
      });
    }
    std::unique_lock<std::mutex> lock(mutex);
    done.wait(lock, [&] { return started == num_threads - 1; });
    if (start_error) std::rethrow_exception(start_error);
  } catch (...) {
    Stop();
    throw;
  }
}

ThreadPool::Impl::~Impl() { Stop(); }

std::vector<int> ThreadPool::Impl::CpusOf(const ThreadPoolOptions& options, int thread) const {
  if (static_cast<int>(options.cpus.size()) < num_threads) return options.cpus;
  return {options.cpus[static_cast<size_t>(thread)]};
}

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
  uint32_t seen = 0;
  const auto has_work = [&] { return loop.load() != seen || stopping.load(); };
  for (;;) {
    if (!SpinUntil(spin, has_work)) {
      std::unique_lock<std::mutex> lock(mutex);
      sleeping_workers.fetch_add(1);
      work.wait(lock, has_work);
      sleeping_workers.fetch_sub(1);
    }
    if (stopping.load()) return;
    seen = loop.load();
    RunRanges(thread);
  }
}

void ThreadPool::Impl::RunRanges(int thread) {
  int64_t claimed = 0, of = 0;
  for (int i = 0; i < num_threads; ++i) {
    const int owner = (thread + i) % num_threads;
    std::atomic<uint64_t>& ticket = shares[static_cast<size_t>(owner)].ticket;
    uint64_t seen = ticket.load();
    while (static_cast<uint32_t>(seen) != 0) {
      const auto* loop_body = body.load();
      const int64_t loop_count = count.load();
      const int64_t loop_range = range.load();
      const int64_t loop_total = total.load();
      if (!ticket.compare_exchange_weak(seen, seen - 1)) continue;
      const int64_t share_end = ShareBegin(owner + 1, loop_total);
      const int64_t begin = (share_end - static_cast<uint32_t>(seen)) * loop_range;
      (*loop_body)(begin, std::min(begin + loop_range, loop_count), thread);
      ++claimed;
      of = loop_total;
      seen = ticket.load();
    }
  }
  if (claimed > 0 && finished.fetch_add(claimed) + claimed == of && caller_sleeps.load()) {
    std::lock_guard<std::mutex> lock(mutex);
    done.notify_one();
  }
}

ThreadPool::ThreadPool(int num_threads, const ThreadPoolOptions& options) : impl_(nullptr) {
  if (num_threads < 1) {
    throw Error(ErrorCode::kInvalidArgument, "a thread pool of " + std::to_string(num_threads) + " threads, at least 1 is needed (the caller)");
  }
  impl_ = new Impl(num_threads, options);
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
  pool.body.store(&body, std::memory_order_relaxed);
  pool.count.store(count, std::memory_order_relaxed);
  pool.range.store(range, std::memory_order_relaxed);
  pool.total.store(ranges, std::memory_order_relaxed);
  pool.finished.store(0, std::memory_order_relaxed);
  const uint32_t number = pool.loop.load(std::memory_order_relaxed) + 1;
  for (int thread = 0; thread < pool.num_threads; ++thread) {
    const int64_t share = pool.ShareBegin(thread + 1, ranges) - pool.ShareBegin(thread, ranges);
    pool.shares[static_cast<size_t>(thread)].ticket.store(static_cast<uint64_t>(number) << 32 | static_cast<uint64_t>(share), std::memory_order_release);
  }
  pool.loop.store(number);  // sequentially consistent, as are the sleepers' steps: either they see it, or they are seen
  if (pool.sleeping_workers.load() > 0) {
    std::lock_guard<std::mutex> lock(pool.mutex);  // a worker between its check and its wait would miss the call
    pool.work.notify_all();
  }

  pool.RunRanges(0);
  const auto is_finished = [&] { return pool.finished.load() == ranges; };
  if (SpinUntil(pool.spin, is_finished)) return;
  std::unique_lock<std::mutex> lock(pool.mutex);
  pool.caller_sleeps.store(true);
  pool.done.wait(lock, is_finished);
  pool.caller_sleeps.store(false);
}

}  // namespace tandem
