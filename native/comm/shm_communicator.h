// Collectives over memory that all ranks have mapped.
//
// Every rank has two slots. Chunk number k of the stream of messages uses slot k % 2: a rank writes its part into its own slot, arrives at a barrier,
// and reads the others' slots once all have arrived. One barrier for a chunk is enough: a rank that writes chunk k + 2 has passed a barrier of chunk
// k + 1, and every rank came to that one after it had read all it wanted of chunk k.
#pragma once

#include <chrono>

#include "comm/communicator.h"
#include "comm/shm_segment.h"

namespace tandem {

class ShmCommunicator final : public Communicator {
 public:
  // header: filled in, mapped until this is destroyed. Does not wait for the other ranks: see Attach.
  ShmCommunicator(ShmHeader* header, int rank, int64_t timeout_ms, std::chrono::microseconds spin = kLeastSpin);
  // Takes over the segment that the header lies in.
  ShmCommunicator(std::unique_ptr<ShmSegment> segment, int rank, int64_t timeout_ms, std::chrono::microseconds spin);
  ~ShmCommunicator() override;  // ends the other ranks' waiting for this one

  // Waits for all ranks.
  void Attach(const std::atomic<bool>& cancelled);

  int rank() const override { return rank_; }
  int world_size() const override { return world_size_; }
  void AllReduceSum(float* data, int64_t count) override;
  void AllGather(const void* in, int64_t bytes, void* out) override;
  void Broadcast(void* data, int64_t bytes, int root) override;
  void Abort() override;

 private:
  enum class Kind : uint32_t { kAttach, kAllReduce, kAllGather, kBroadcast };
  enum class Reason : uint32_t { kAbort, kTimeout, kMismatch, kClosed };

  void ThrowIfAborted(Kind kind) const;
  // The barrier: returns when every rank has come to its barrier of the same number, and is doing the same.
  void MeetAll(const ShmOperation& operation);
  void WaitFor(int peer, uint32_t target, Kind kind);
  bool HasArrived(int peer, uint32_t target) const;
  [[noreturn]] void ThrowTimeout(uint32_t target, Kind kind);
  void End(Reason reason);
  char* Slot(int rank) const { return ShmSlot(header_, rank, parity_); }
  // data[i] = sum over the ranks, in rank order, of element first + i of their slots, but of data[i] for this rank's
  void SumParts(int64_t first, int64_t count, float* data) const;

  static const char* Name(Kind kind);

  std::unique_ptr<ShmSegment> segment_;
  ShmHeader* header_;
  const int rank_;
  const int world_size_;
  const int64_t slot_bytes_;
  const int64_t timeout_ms_;
  const std::chrono::microseconds spin_;
  uint32_t barrier_;      // how many barriers this rank has come to, modulo 2^32
  int parity_ = 0;        // slot of the current chunk
  const std::atomic<bool>* cancelled_ = nullptr;
};

}  // namespace tandem
