// Collectives between processes and between threads: right bits, and no way to wait for ever.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <dirent.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "comm/communicator.h"
#include "comm/shm_communicator.h"
#include "comm/shm_segment.h"
#include "core/error.h"
#include "test/test.h"

namespace tandem {
namespace {

const std::atomic<bool> kNotCancelled{false};
constexpr int64_t kSlotBytes = 96 * 1024;  // small, so that messages go in several chunks and sums are shared out

std::string NewName() {
  static int count = 0;
  return "comm-test-" + std::to_string(getpid()) + "-" + std::to_string(++count);
}

ShmOptions Options(const std::string& name, int rank, int world_size, int64_t timeout_ms = 20000) {
  ShmOptions options;
  options.name = name;
  options.rank = rank;
  options.world_size = world_size;
  options.timeout_ms = timeout_ms;
  options.slot_bytes = kSlotBytes;
  return options;
}

bool ExistsInShm(const std::string& name) { return access(("/dev/shm/tandem." + name).c_str(), F_OK) == 0; }

std::string MessageOf(const std::function<void()>& action, ErrorCode code) {
  try {
    action();
  } catch (const Error& error) {
    return error.code() == code ? error.what() : std::string("wrong code: ") + error.what();
  }
  return "no error";
}

bool Contains(const std::string& text, const std::string& part) {
  if (text.find(part) != std::string::npos) return true;
  std::printf("  \"%s\" does not contain \"%s\"\n", text.c_str(), part.c_str());
  return false;
}

// Whose results every rank can work out: rank r's input of operation k is made from (k, r).
std::vector<float> Input(uint32_t operation, int rank, int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  uint32_t state = operation * 2654435761u + static_cast<uint32_t>(rank) * 40503u + 12345u;
  for (float& value : values) {
    state = state * 1664525u + 1013904223u;
    value = static_cast<float>(static_cast<int32_t>(state)) * (state & 1 ? 0x1p-31f : 0x1p-20f);  // magnitudes that make rounding depend on the order
  }
  return values;
}

// Random operations of random sizes, each compared bit by bit. Returns the number of the first wrong one, or -1.
int RunOperations(Communicator& communicator, int operations, uint32_t seed) {
  std::mt19937 random(seed);  // the same on all ranks
  const int world_size = communicator.world_size();
  for (int k = 0; k < operations; ++k) {
    const uint32_t id = seed + static_cast<uint32_t>(k);
    const int64_t limit = random() % 50 == 0 ? 120000 : random() % 5 == 0 ? 30000 : 300;
    const int64_t count = static_cast<int64_t>(random()) % (limit + 1);
    const uint32_t kind = random() % 10;
    const int root = static_cast<int>(random() % static_cast<uint32_t>(world_size));
    std::vector<float> mine = Input(id, communicator.rank(), count), expected;
    if (kind < 7) {
      expected = Input(id, 0, count);
      for (int rank = 1; rank < world_size; ++rank) {
        const std::vector<float> term = Input(id, rank, count);
        for (size_t i = 0; i < expected.size(); ++i) expected[i] += term[i];
      }
      communicator.AllReduceSum(mine.data(), count);
    } else if (kind < 9) {
      for (int rank = 0; rank < world_size; ++rank) {
        const std::vector<float> part = Input(id, rank, count);
        expected.insert(expected.end(), part.begin(), part.end());
      }
      std::vector<float> out(expected.size());
      communicator.AllGather(mine.data(), count * 4, out.data());
      mine = out;
    } else {
      expected = Input(id, root, count);
      communicator.Broadcast(mine.data(), count * 4, root);
    }
    if (!expected.empty() && std::memcmp(mine.data(), expected.data(), expected.size() * 4) != 0) return k;
  }
  return -1;
}

// Runs body(rank) in a process of its own for each rank from 1 up, and for rank 0 here. The exit status of a child is what its body returns, or 100
// after an exception, or minus the signal that killed it.
std::vector<int> InProcesses(int world_size, const std::function<int(int rank)>& body) {
  std::fflush(stdout);
  std::vector<pid_t> children;
  for (int rank = 1; rank < world_size; ++rank) {
    const pid_t child = fork();
    if (child == 0) {
      int status = 100;
      try {
        status = body(rank);
      } catch (const std::exception& error) {
        std::fprintf(stderr, "rank %d: %s\n", rank, error.what());
      }
      _exit(status);
    }
    children.push_back(child);
  }
  std::vector<int> statuses = {100};
  try {
    statuses[0] = body(0);
  } catch (const std::exception& error) {
    std::printf("  rank 0: %s\n", error.what());
  }
  for (const pid_t child : children) {
    int status = 0;
    waitpid(child, &status, 0);
    statuses.push_back(WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status));
  }
  return statuses;
}

// Ranks as threads over plain memory, which a thread sanitizer understands.
class ThreadGroup {
 public:
  explicit ThreadGroup(int world_size, int64_t timeout_ms = 20000, uint32_t first_barrier = 0) {
    const size_t bytes = static_cast<size_t>(ShmSegmentBytes(world_size, kSlotBytes));
    memory_ = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    std::memset(memory_, 0, bytes);
    ShmHeader* header = static_cast<ShmHeader*>(memory_);
    FillShmHeader(header, world_size, kSlotBytes);
    for (int rank = 0; rank < world_size; ++rank) {
      header->ranks[rank].arrived.store(first_barrier);
      ranks.push_back(std::make_unique<ShmCommunicator>(header, rank, timeout_ms));
    }
  }
  ~ThreadGroup() {
    ranks.clear();
    std::free(memory_);
  }

  void Run(const std::function<void(ShmCommunicator&)>& body) {
    std::vector<std::thread> threads;
    for (auto& rank : ranks) threads.emplace_back([&body, &rank] { body(*rank); });
    for (std::thread& thread : threads) thread.join();
  }

  std::vector<std::unique_ptr<ShmCommunicator>> ranks;

 private:
  void* memory_;
};

double SecondsSince(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace

TEST(comm_random_operations_between_processes) {
  for (int world_size = 1; world_size <= 4; ++world_size) {
    const std::string name = NewName();
    const std::vector<int> statuses = InProcesses(world_size, [&](int rank) {
      const auto communicator = MakeShmCommunicator(Options(name, rank, world_size), kNotCancelled);
      if (rank == 0) CHECK(!ExistsInShm(name));  // unlinked as soon as all are there
      return RunOperations(*communicator, 2000, static_cast<uint32_t>(world_size)) + 1 == 0 ? 0 : 1;
    });
    for (const int status : statuses) CHECK_EQ(status, 0);
  }
}

TEST(comm_random_operations_between_threads) {
  for (int world_size = 1; world_size <= 4; ++world_size) {
    // The number of barriers wraps around in the middle.
    ThreadGroup group(world_size, 20000, 0xffffff00u);
    std::atomic<int> wrong{0};
    group.Run([&](ShmCommunicator& communicator) { wrong += RunOperations(communicator, 500, 77) != -1; });
    CHECK_EQ(wrong.load(), 0);
  }
}

TEST(comm_local_is_the_identity) {
  const auto communicator = MakeLocalCommunicator();
  CHECK_EQ(RunOperations(*communicator, 100, 5), -1);
  communicator->Abort();
  float value = 1;
  CHECK_THROWS(communicator->AllReduceSum(&value, 1), ErrorCode::kAborted);
}

// The same value in a short and in a long message, at different places, sums to the same bits.
TEST(comm_sum_of_an_element_does_not_depend_on_the_message) {
  ThreadGroup group(4);
  std::atomic<int> wrong{0};
  group.Run([&](ShmCommunicator& communicator) {
    const std::vector<float> values = Input(9, communicator.rank(), 64);
    std::vector<float> alone = values, many(100000, 1.0f);
    for (size_t at = 0; at + 64 <= many.size(); at += 777) std::copy(values.begin(), values.end(), many.begin() + static_cast<int64_t>(at));
    communicator.AllReduceSum(alone.data(), 64);
    communicator.AllReduceSum(many.data(), static_cast<int64_t>(many.size()));
    for (size_t at = 0; at + 64 <= many.size(); at += 777) wrong += std::memcmp(many.data() + at, alone.data(), 64 * 4) != 0;
  });
  CHECK_EQ(wrong.load(), 0);
}

TEST(comm_killed_peer_is_named_at_the_deadline) {
  const std::string name = NewName();
  const std::vector<int> statuses = InProcesses(3, [&](int rank) {
    const auto communicator = MakeShmCommunicator(Options(name, rank, 3, 1000), kNotCancelled);
    if (RunOperations(*communicator, 10, 3) != -1) return 1;
    if (rank == 2) raise(SIGKILL);
    std::vector<float> values(100, 1.0f);
    const auto begin = std::chrono::steady_clock::now();
    const auto reduce = [&] { communicator->AllReduceSum(values.data(), 100); };
    // Whichever of the two gets to its deadline first names the lost rank; the other one may hear of it from that one.
    std::string message;
    try {
      reduce();
      return 2;
    } catch (const Error& error) {
      message = error.what();
      if (error.code() != ErrorCode::kTimeout && error.code() != ErrorCode::kAborted) return 3;
    }
    if (message != "all-reduce: rank 2 did not arrive within 1000 ms" && message.find("a peer did not arrive there in time") == std::string::npos) return 4;
    if (SecondsSince(begin) < 0.9 || SecondsSince(begin) > 10) return 5;
    const auto again = std::chrono::steady_clock::now();
    if (MessageOf(reduce, ErrorCode::kAborted).find("all-reduce: ended by rank ") != 0) return 6;
    return SecondsSince(again) < 0.5 ? 0 : 7;
  });
  CHECK_EQ(statuses[0], 0);
  CHECK_EQ(statuses[1], 0);
  CHECK_EQ(statuses[2], -SIGKILL);
  CHECK(!ExistsInShm(name));
}

TEST(comm_silent_peers_are_named) {
  ThreadGroup group(4, 150);
  std::vector<float> values(10, 1.0f);
  const std::string message = MessageOf([&] { group.ranks[1]->AllReduceSum(values.data(), 10); }, ErrorCode::kTimeout);
  CHECK_EQ(message, std::string("all-reduce: ranks 0, 2, 3 did not arrive within 150 ms"));
  // The others learn of it at once.
  const auto begin = std::chrono::steady_clock::now();
  CHECK(Contains(MessageOf([&] { group.ranks[3]->Broadcast(values.data(), 4, 0); }, ErrorCode::kAborted),
                 "broadcast: ended by rank 1: a peer did not arrive there in time"));
  CHECK(SecondsSince(begin) < 0.1);
}

TEST(comm_abort_from_another_thread_wakes_every_rank) {
  ThreadGroup group(3, 60000);
  std::atomic<int> aborted{0};
  const auto begin = std::chrono::steady_clock::now();
  std::thread aborter([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    group.ranks[0]->Abort();
    group.ranks[0]->Abort();
  });
  group.Run([&](ShmCommunicator& communicator) {
    if (communicator.rank() == 2) return;  // never comes
    float value = 1;
    aborted += Contains(MessageOf([&] { communicator.AllReduceSum(&value, 1); }, ErrorCode::kAborted), "all-reduce: ended by rank 0: it was told to abort");
  });
  aborter.join();
  CHECK_EQ(aborted.load(), 2);
  CHECK(SecondsSince(begin) < 10);
}

TEST(comm_different_collectives_are_found) {
  ThreadGroup group(2);
  std::atomic<int> failed{0};
  group.Run([&](ShmCommunicator& communicator) {
    std::vector<float> values(8, 1.0f);
    try {
      communicator.AllReduceSum(values.data(), communicator.rank() == 0 ? 8 : 4);
    } catch (const Error& error) {
      failed += error.code() == ErrorCode::kInternal || error.code() == ErrorCode::kAborted;
    }
  });
  CHECK_EQ(failed.load(), 2);
}

// A rank that ends right after a collective must not spoil it for the ranks that have not looked yet.
TEST(comm_rank_that_ends_after_the_last_collective) {
  for (int repeat = 0; repeat < 200; ++repeat) {
    ThreadGroup group(3);
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (auto& rank : group.ranks) {
      threads.emplace_back([&] {
        float value = 1;
        try {
          rank->AllReduceSum(&value, 1);
        } catch (const Error&) {
          value = 0;
        }
        wrong += value != 3;
        rank.reset();
      });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK_EQ(wrong.load(), 0);
  }
  ThreadGroup group(2, 60000);
  group.ranks[1].reset();
  float value = 1;
  CHECK(Contains(MessageOf([&] { group.ranks[0]->AllReduceSum(&value, 1); }, ErrorCode::kAborted), "ended by rank 1: it has ended"));
}

TEST(comm_attaching_gives_up) {
  const std::string name = NewName();
  CHECK_EQ(MessageOf([&] { MakeShmCommunicator(Options(name, 0, 3, 100), kNotCancelled); }, ErrorCode::kTimeout),
           std::string("attach: ranks 1, 2 did not arrive within 100 ms"));
  CHECK(!ExistsInShm(name));
  CHECK(Contains(MessageOf([&] { MakeShmCommunicator(Options(name, 1, 3, 50), kNotCancelled); }, ErrorCode::kTimeout), "rank 0 did not create"));

  std::atomic<bool> cancelled{false};
  std::thread canceller([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    cancelled.store(true);
  });
  const auto begin = std::chrono::steady_clock::now();
  CHECK_THROWS(MakeShmCommunicator(Options(NewName(), 0, 2, 60000), cancelled), ErrorCode::kAborted);
  CHECK_THROWS(MakeShmCommunicator(Options(NewName(), 1, 2, 60000), cancelled), ErrorCode::kAborted);
  CHECK(SecondsSince(begin) < 10);
  canceller.join();
}

TEST(comm_segment_is_checked) {
  const std::string name = NewName();
  const auto segment = ShmSegment::Create(name, 2, kSlotBytes);
  CHECK(ExistsInShm(name));
  CHECK_THROWS(ShmSegment::Create(name, 2, kSlotBytes), ErrorCode::kInvalidArgument);
  CHECK(Contains(MessageOf([&] { ShmSegment::Open(name, 3, kSlotBytes, 100, kNotCancelled); }, ErrorCode::kInternal), "expects"));
  {
    const auto same = ShmSegment::Open(name, 2, kSlotBytes, 100, kNotCancelled);
    const ShmCommunicator first(same->header(), 1, 100);
    CHECK_THROWS(ShmCommunicator(segment->header(), 1, 100), ErrorCode::kInvalidArgument);
  }
  segment->header()->version = 9;
  CHECK(Contains(MessageOf([&] { ShmSegment::Open(name, 2, kSlotBytes, 100, kNotCancelled); }, ErrorCode::kInternal), "made for version 9"));
  segment->Unlink();
  CHECK(!ExistsInShm(name));

  for (const char* bad : {"", "a/b", "../a", "a b", "\xc3\xa4"}) CHECK_THROWS(ShmSegment::Create(bad, 2, kSlotBytes), ErrorCode::kInvalidArgument);
  CHECK_THROWS(MakeShmCommunicator(Options(NewName(), 2, 2), kNotCancelled), ErrorCode::kInvalidArgument);
  CHECK_THROWS(MakeShmCommunicator(Options(NewName(), 0, 65), kNotCancelled), ErrorCode::kInvalidArgument);
}

TEST(comm_leftovers_of_killed_creators_are_swept) {
#if !defined(__linux__)
  test::Skip("only Linux lists shared-memory objects");
#else
  const std::string dead = NewName(), alive = NewName();
  InProcesses(2, [&](int rank) {
    if (rank == 0) return 0;
    const auto segment = ShmSegment::Create(dead, 2, kSlotBytes);
    return raise(SIGKILL);
  });
  CHECK(ExistsInShm(dead));
  const auto segment = ShmSegment::Create(alive, 2, kSlotBytes);
  CHECK(SweepDeadShmSegments() >= 1);
  CHECK(!ExistsInShm(dead));
  CHECK(ExistsInShm(alive));
#endif
}

}  // namespace tandem
