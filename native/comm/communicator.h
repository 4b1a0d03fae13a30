// Collectives between the ranks of one model replica. Every rank makes the same calls in the same order with the same sizes.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

namespace tandem {

// One rank's end. Calls come from one thread, Abort() from any. Errors: kTimeout names the ranks that did not arrive, kAborted says who ended it,
// kInternal that the ranks run different collectives; after one of them every later call fails at once with kAborted.
class Communicator {
 public:
  virtual ~Communicator() = default;

  virtual int rank() const = 0;
  virtual int world_size() const = 0;

  // data[i] = sum over the ranks of their data[i], in place, added one after another from rank 0 up: the same bits on all ranks, whatever `count` is
  // and wherever in the message an element stands.
  virtual void AllReduceSum(float* data, int64_t count) = 0;
  // out: [world_size, bytes], block r is what rank r gave as `in`; no overlap
  virtual void AllGather(const void* in, int64_t bytes, void* out) = 0;
  virtual void Broadcast(void* data, int64_t bytes, int root) = 0;

  // Ends every rank's waiting and all later calls. Any thread, any number of times.
  virtual void Abort() = 0;
};

// World size 1: nothing to exchange.
std::unique_ptr<Communicator> MakeLocalCommunicator();

// About what going to sleep and being woken takes.
constexpr std::chrono::microseconds kLeastSpin{10};

struct ShmOptions {
  std::string name;  // [A-Za-z0-9._-]+, at most 200, the same on all ranks, never used twice
  int rank = 0;
  int world_size = 1;
  int64_t timeout_ms = 30000;     // of one wait: for all ranks to attach, for all ranks to arrive at a collective
  // How long a rank looks for the others before it sleeps. Ranks come to a collective as far apart as their parts of a layer take differently long, some
  // hundred microseconds; but where threads outnumber CPUs, the one that looks may hold up the one that it waits for.
  std::chrono::microseconds spin = kLeastSpin;
  int64_t slot_bytes = 1 << 20;   // a longer message goes in chunks of this size; a multiple of 64, the same on all ranks
};

// Shared memory between processes of one machine. Returns when all ranks have attached; nothing is left in the file system from then on.
// `cancelled` (any thread may set it) ends that wait. Throws kInvalidArgument, kOutOfMemory, kTimeout, kAborted, kInternal.
std::unique_ptr<Communicator> MakeShmCommunicator(const ShmOptions& options, const std::atomic<bool>& cancelled);

}  // namespace tandem
