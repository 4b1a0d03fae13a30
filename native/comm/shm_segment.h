// The memory that the ranks of a ShmCommunicator share: its layout, and its life as a POSIX shared-memory object.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

namespace tandem {

constexpr int kMaxShmRanks = 64;

// What a rank says it is doing, for the other ranks to compare: a mismatch is a defect and would otherwise be wrong sums or a hang.
struct ShmOperation {
  uint32_t kind;
  uint32_t root;
  uint64_t bytes;
};

// One rank's words, on cache lines of their own.
struct alignas(128) ShmRank {
  std::atomic<uint32_t> attached;  // 1 from the moment the rank has mapped the segment
  std::atomic<uint32_t> arrived;   // number of barriers this rank has come to, modulo 2^32; futex word
  std::atomic<uint32_t> sleepers;  // who may be in a futex wait on `arrived`; a killed sleeper stays counted, which only costs a system call
  ShmOperation operation[2];       // of the barrier with that parity; written before `arrived`
};

struct ShmHeader {
  std::atomic<uint64_t> magic;  // kShmMagic once everything below is filled in
  uint32_t version;
  uint32_t world_size;
  uint64_t slot_bytes;
  uint64_t total_bytes;
  alignas(128) std::atomic<uint32_t> aborted;  // 0, or 1 + (reason << 8) + rank of who ended it; never goes back to 0
  ShmRank ranks[kMaxShmRanks];
};

static_assert(std::atomic<uint32_t>::is_always_lock_free && std::atomic<uint64_t>::is_always_lock_free, "atomics in shared memory need no lock");

// Bytes of header and of two slots for each rank.
int64_t ShmSegmentBytes(int world_size, int64_t slot_bytes);
// Slot `parity` (0 or 1) of a rank.
char* ShmSlot(ShmHeader* header, int rank, int parity);
// Makes zeroed memory of ShmSegmentBytes a segment.
void FillShmHeader(ShmHeader* header, int world_size, int64_t slot_bytes);

class ShmSegment {
 public:
  // Rank 0 creates, the others open: both give up after `timeout_ms`, or when `cancelled`. Every field of the header is checked against what this rank
  // expects and against the object's real size.
  static std::unique_ptr<ShmSegment> Create(const std::string& name, int world_size, int64_t slot_bytes);
  static std::unique_ptr<ShmSegment> Open(const std::string& name, int world_size, int64_t slot_bytes, int64_t timeout_ms,
                                          const std::atomic<bool>& cancelled);
  ~ShmSegment();  // a creator that has not unlinked yet does so
  ShmSegment(const ShmSegment&) = delete;
  ShmSegment& operator=(const ShmSegment&) = delete;

  ShmHeader* header() const { return header_; }
  // Takes the name out of the file system; the memory lives on with its mappings.
  void Unlink();

 private:
  ShmSegment(std::string path, int fd, ShmHeader* header, int64_t bytes, bool creator);

  std::string path_;
  int fd_;  // the creator's holds a lock for as long as the name exists: that is how others know that it lives
  ShmHeader* header_;
  int64_t bytes_;
  bool linked_;
};

// Removes segments whose creator was killed before it could unlink them (a lock that nobody holds any more). Linux; elsewhere does nothing.
// Returns how many.
int SweepDeadShmSegments();

}  // namespace tandem
