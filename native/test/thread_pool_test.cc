#include "core/thread_pool.h"

#include <atomic>
#include <chrono>
#include <thread>

#include "core/cpu_affinity.h"
#include "core/error.h"
#include "test/kernel_test.h"

namespace tandem::test {

TEST(thread_pool_covers_every_index_once) {
  for (const int threads : {1, 2, 3, 5}) {
    ThreadPool pool(threads);
    CHECK_EQ(pool.num_threads(), threads);
    for (const int64_t count : {0, 1, 2, 7, 16, 17, 100, 1000}) {
      for (const int64_t grain : {1, 3, 16, 2000}) {
        std::vector<std::atomic<int>> visits(static_cast<size_t>(count));
        std::atomic<int> bad_ranges{0};
        pool.ParallelFor(count, grain, [&](int64_t begin, int64_t end, int thread) {
          const bool good = begin >= 0 && begin < end && end <= count && begin % grain == 0 && (end % grain == 0 || end == count) && thread >= 0 &&
                            thread < threads;
          if (!good) ++bad_ranges;
          for (int64_t i = begin; i < end; ++i) ++visits[static_cast<size_t>(i)];
        });
        CHECK_EQ(bad_ranges.load(), 0);
        for (const auto& visit : visits) CHECK_EQ(visit.load(), 1);
      }
    }
  }
}

// Plain, unsynchronised memory: what one loop writes, the caller and the next loop must see. ThreadSanitizer watches too.
TEST(thread_pool_loops_follow_each_other) {
  ThreadPool pool(3);
  std::vector<int64_t> values(64, 0);
  for (int round = 0; round < 2000; ++round) {
    pool.ParallelFor(64, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) values[static_cast<size_t>(63 - i)] += i;
    });
    for (int64_t i = 0; i < 64; ++i) values[static_cast<size_t>(i)] -= 63 - i;
  }
  for (const int64_t value : values) CHECK_EQ(value, 0);
}

TEST(thread_pool_wakes_workers_that_sleep) {
  ThreadPool pool(3);
  for (int round = 0; round < 20; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    std::atomic<int64_t> sum{0};
    pool.ParallelFor(100, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) sum += i;
    });
    CHECK_EQ(sum.load(), 4950);
  }
}

TEST(thread_pool_runs_bodies_at_the_same_time) {
  ThreadPool pool(2);
  std::atomic<int> arrived{0};
  std::atomic<bool> met{false};
  pool.ParallelFor(2, 1, [&](int64_t, int64_t, int) {
    ++arrived;
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(10);
    while (!met.load() && std::chrono::steady_clock::now() < deadline) {
      if (arrived.load() == 2) met = true;
      std::this_thread::yield();
    }
  });
  CHECK(met.load());
}

// So that a thread reads the memory that it read the last time. Both wait in their first range for the other to have begun, too.
TEST(thread_pool_threads_begin_with_their_own_share) {
  ThreadPool pool(2);
  for (int round = 0; round < 100; ++round) {
    std::atomic<int> begun{0};
    std::atomic<int64_t> first[2] = {{-1}, {-1}};
    pool.ParallelFor(80, 10, [&](int64_t begin, int64_t, int thread) {
      if (first[thread].load() >= 0) return;
      first[thread] = begin;
      ++begun;
      const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(10);
      while (begun.load() < 2 && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
    });
    CHECK_EQ(first[0].load(), 0);
    CHECK_EQ(first[1].load(), 40);
  }
}

TEST(thread_pool_threads_run_where_they_are_told_to) {
  const std::vector<int> allowed = AllowedCpus();
  if (allowed.size() < 2) return Skip("this process may use one CPU only");
  std::thread([&] {
    ThreadPoolOptions options;
    options.cpus = {allowed[1], allowed[0]};
    ThreadPool own(2, options), shared(3, options);
    const auto cpus_of_each = [](ThreadPool& pool) {
      std::vector<std::vector<int>> cpus(static_cast<size_t>(pool.num_threads()));
      std::atomic<int> begun{0};
      pool.ParallelFor(pool.num_threads(), 1, [&](int64_t, int64_t, int thread) {
        cpus[static_cast<size_t>(thread)] = AllowedCpus();
        ++begun;
        while (begun.load() < pool.num_threads()) std::this_thread::yield();  // so that nobody takes the others' range
      });
      return cpus;
    };
    const std::vector<int> both = {allowed[0], allowed[1]};
    CHECK(cpus_of_each(shared) == (std::vector<std::vector<int>>{both, both, both}));
    PinThisThread({allowed[1]});  // the caller, as the second pool left it elsewhere
    CHECK(cpus_of_each(own) == (std::vector<std::vector<int>>{{allowed[1]}, {allowed[0]}}));
    options.cpus = {1023, 1022};
    CHECK_THROWS(ThreadPool(2, options), ErrorCode::kInvalidArgument);
  }).join();
}

TEST(cpu_lists_are_written_as_ranges) {
  CHECK_EQ(FormatCpuList({}), std::string());
  CHECK_EQ(FormatCpuList({3}), std::string("3"));
  CHECK_EQ(FormatCpuList({0, 1, 2, 3, 8, 10, 11}), std::string("0-3,8,10-11"));
}

TEST(thread_pool_refuses_to_have_no_thread) {
  CHECK_THROWS(ThreadPool(0), ErrorCode::kInvalidArgument);
  CHECK_THROWS(ThreadPool(-1), ErrorCode::kInvalidArgument);
}

}  // namespace tandem::test
