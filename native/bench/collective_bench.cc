// Measures an all-reduce between processes in shared memory: the median over many, and how far it is from a bare exchange (each process writes its
// numbers, says so, waits for the others, and adds theirs up).
// Build and run:  cmake --build native/build --target tandem_collective_bench && native/build/tandem_collective_bench [processes]
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "comm/communicator.h"

namespace tandem {
namespace {

constexpr int kMaxProcesses = 8;
constexpr int kRounds = 3000;
constexpr int64_t kCounts[] = {4096, 12288, 65536, 512 * 4096};

double Microseconds(const std::function<void()>& body) {
  const auto begin = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count();
}

double Quantile(std::vector<double> values, double part) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(part * static_cast<double>(values.size() - 1))];
}

// No deadline, no abort, no sleep, messages of one size.
struct BareExchange {
  struct alignas(128) Flag {
    std::atomic<uint32_t> arrived;
  };
  struct Memory {
    Flag flags[kMaxProcesses];
    alignas(128) float slots[2][kMaxProcesses][512 * 4096];
  };

  void AllReduceSum(float* data, int64_t count) {
    ++round;
    std::memcpy(memory->slots[round & 1][rank], data, static_cast<size_t>(count) * sizeof(float));
    memory->flags[rank].arrived.store(round, std::memory_order_release);
    for (int peer = 0; peer < processes; ++peer) {
      while (static_cast<int32_t>(memory->flags[peer].arrived.load(std::memory_order_acquire) - round) < 0) {
      }
      if (peer == rank) continue;
      const float* __restrict theirs = memory->slots[round & 1][peer];
      float* __restrict sum = data;
      for (int64_t i = 0; i < count; ++i) sum[i] += theirs[i];
    }
  }

  Memory* memory;
  int rank, processes;
  uint32_t round = 0;
};

void RunRank(BareExchange bare, const std::string& name) {
  const std::atomic<bool> cancelled{false};
  ShmOptions options;
  options.name = name;
  options.rank = bare.rank;
  options.world_size = bare.processes;
  options.spin = std::chrono::microseconds(500);  // as the engine has it where there are enough CPUs
  const auto communicator = MakeShmCommunicator(options, cancelled);
  for (const int64_t count : kCounts) {
    std::vector<float> data(static_cast<size_t>(count));
    const int rounds = count > 100000 ? kRounds / 30 : kRounds;
    std::vector<double> ours, bare_ones;  // in turn, so that both see the same disturbances
    for (int round = 0; round < rounds; ++round) {
      ours.push_back(Microseconds([&] { communicator->AllReduceSum(data.data(), count); }));
      bare_ones.push_back(Microseconds([&] { bare.AllReduceSum(data.data(), count); }));
    }
    if (bare.rank == 0) {
      std::printf("%d processes, %7d floats: median %.1f us, bare exchange %.1f us; fastest tenth %.1f us, bare exchange %.1f us\n", bare.processes,
                  static_cast<int>(count), Quantile(ours, 0.5), Quantile(bare_ones, 0.5), Quantile(ours, 0.1), Quantile(bare_ones, 0.1));
      std::fflush(stdout);
    }
  }
}

int Run(int argc, char** argv) {
  const int processes = argc > 1 ? std::atoi(argv[1]) : 2;
  if (processes < 1 || processes > kMaxProcesses) {
    std::fprintf(stderr, "processes: 1 to %d\n", kMaxProcesses);
    return 2;
  }
  void* memory = mmap(nullptr, sizeof(BareExchange::Memory), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("mmap");
    return 1;
  }
  const std::string name = "tandem-bench-" + std::to_string(getpid());
  for (int rank = 1; rank < processes; ++rank) {
    if (fork() != 0) continue;
    RunRank({static_cast<BareExchange::Memory*>(memory), rank, processes}, name);
    std::_Exit(0);
  }
  RunRank({static_cast<BareExchange::Memory*>(memory), 0, processes}, name);
  while (wait(nullptr) > 0) {
  }
  return 0;
}

}  // namespace
}  // namespace tandem

int main(int argc, char** argv) { return tandem::Run(argc, argv); }
