#include "comm/shm_communicator.h"

#include <algorithm>
#include <chrono>
#include <climits>
#include <cstring>
#include <thread>
#include <utility>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "core/error.h"
#include "core/spin.h"

namespace tandem {
namespace {

// A sleep ends at least this often to look at the abort flag and the deadline: a wake-up can come just before the sleep.
constexpr int64_t kSliceMs = 20;
// A long message goes in chunks that a rank still has at hand from writing its part when it reads the others'.
constexpr int64_t kChunkBytes = 256 * 1024;
// Up to here every rank sums the whole message itself, which needs one barrier; above, each sums its part and they exchange the parts.
constexpr int64_t kDirectBytes = 64 * 1024;
constexpr int64_t kFloatsPerLine = 16;

void SleepWhileEqual(std::atomic<uint32_t>& word, uint32_t value, int64_t milliseconds) {
#if defined(__linux__)
  struct timespec slice = {milliseconds / 1000, milliseconds % 1000 * 1000000};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, value, &slice, nullptr, 0);
#else
  (void)milliseconds;
  if (word.load() == value) std::this_thread::sleep_for(std::chrono::microseconds(100));
#endif
}

void WakeAll(std::atomic<uint32_t>& word) {
#if defined(__linux__)
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
#else
  (void)word;
#endif
}

}  // namespace

ShmCommunicator::ShmCommunicator(ShmHeader* header, int rank, int64_t timeout_ms, std::chrono::microseconds spin)
    : header_(header),
      rank_(rank),
      world_size_(static_cast<int>(header->world_size)),
      slot_bytes_(static_cast<int64_t>(header->slot_bytes)),
      timeout_ms_(timeout_ms),
      spin_(spin),
      barrier_(header->ranks[rank].arrived.load()) {
  if (header_->ranks[rank_].attached.exchange(1) != 0) {
    throw Error(ErrorCode::kInvalidArgument, "attach: rank " + std::to_string(rank_) + " is there already");
  }
}

ShmCommunicator::ShmCommunicator(std::unique_ptr<ShmSegment> segment, int rank, int64_t timeout_ms, std::chrono::microseconds spin)
    : ShmCommunicator(segment->header(), rank, timeout_ms, spin) {
  segment_ = std::move(segment);
}

ShmCommunicator::~ShmCommunicator() { End(Reason::kClosed); }

void ShmCommunicator::Attach(const std::atomic<bool>& cancelled) {
  cancelled_ = &cancelled;
  MeetAll({static_cast<uint32_t>(Kind::kAttach), 0, 0});
  cancelled_ = nullptr;
  if (segment_ != nullptr) segment_->Unlink();
}

void ShmCommunicator::AllReduceSum(float* data, int64_t count) {
  ThrowIfAborted(Kind::kAllReduce);
  const ShmOperation operation = {static_cast<uint32_t>(Kind::kAllReduce), 0, static_cast<uint64_t>(count) * sizeof(float)};
  const int64_t chunk = std::min(slot_bytes_, kChunkBytes) / static_cast<int64_t>(sizeof(float));
  for (int64_t begin = 0; begin < count; begin += chunk) {
    const int64_t n = std::min(chunk, count - begin);
    parity_ ^= 1;
    std::memcpy(Slot(rank_), data + begin, static_cast<size_t>(n) * sizeof(float));
    MeetAll(operation);
    if (world_size_ <= 2 || n * static_cast<int64_t>(sizeof(float)) <= kDirectBytes) {
      SumParts(0, n, data + begin);
      continue;
    }
    // Rank r sums part r and puts the sum where its own input of that part was: nobody else reads that.
    const int64_t part = (n / world_size_ + kFloatsPerLine) / kFloatsPerLine * kFloatsPerLine;
    const auto part_begin = [&](int rank) { return std::min(n, rank * part); };
    const int64_t mine = part_begin(rank_), mine_count = part_begin(rank_ + 1) - mine;
    SumParts(mine, mine_count, data + begin + mine);
    std::memcpy(Slot(rank_) + mine * sizeof(float), data + begin + mine, static_cast<size_t>(mine_count) * sizeof(float));
    MeetAll(operation);
    for (int peer = 0; peer < world_size_; ++peer) {
      if (peer == rank_) continue;
      const int64_t first = part_begin(peer);
      std::memcpy(data + begin + first, Slot(peer) + first * sizeof(float), static_cast<size_t>(part_begin(peer + 1) - first) * sizeof(float));
    }
  }
}

void ShmCommunicator::AllGather(const void* in, int64_t bytes, void* out) {
  ThrowIfAborted(Kind::kAllGather);
  for (int64_t begin = 0; begin < bytes; begin += slot_bytes_) {
    const size_t n = static_cast<size_t>(std::min(slot_bytes_, bytes - begin));
    parity_ ^= 1;
    std::memcpy(Slot(rank_), static_cast<const char*>(in) + begin, n);
    MeetAll({static_cast<uint32_t>(Kind::kAllGather), 0, static_cast<uint64_t>(bytes)});
    for (int peer = 0; peer < world_size_; ++peer) std::memcpy(static_cast<char*>(out) + peer * bytes + begin, Slot(peer), n);
  }
}

void ShmCommunicator::Broadcast(void* data, int64_t bytes, int root) {
  ThrowIfAborted(Kind::kBroadcast);
  if (root < 0 || root >= world_size_) {
    throw Error(ErrorCode::kInvalidArgument, "broadcast: root " + std::to_string(root) + ", the world has " + std::to_string(world_size_) + " ranks");
  }
  for (int64_t begin = 0; begin < bytes; begin += slot_bytes_) {
    const size_t n = static_cast<size_t>(std::min(slot_bytes_, bytes - begin));
    parity_ ^= 1;
    if (rank_ == root) std::memcpy(Slot(root), static_cast<char*>(data) + begin, n);
    MeetAll({static_cast<uint32_t>(Kind::kBroadcast), static_cast<uint32_t>(root), static_cast<uint64_t>(bytes)});
    if (rank_ != root) std::memcpy(static_cast<char*>(data) + begin, Slot(root), n);
  }
}

void ShmCommunicator::Abort() { End(Reason::kAbort); }

void ShmCommunicator::End(Reason reason) {
  uint32_t running = 0;
  header_->aborted.compare_exchange_strong(running, 1 + (static_cast<uint32_t>(reason) << 8) + static_cast<uint32_t>(rank_));
  for (int rank = 0; rank < world_size_; ++rank) WakeAll(header_->ranks[rank].arrived);
}

void ShmCommunicator::ThrowIfAborted(Kind kind) const {
  const uint32_t aborted = header_->aborted.load(std::memory_order_acquire);
  if (aborted == 0) return;
  const uint32_t by = (aborted - 1) & 0xff;
  const char* how[] = {"it was told to abort", "a peer did not arrive there in time", "the ranks ran different collectives", "it has ended"};
  throw Error(ErrorCode::kAborted, std::string(Name(kind)) + ": ended by rank " + std::to_string(by) + ": " + how[((aborted - 1) >> 8) & 3]);
}

void ShmCommunicator::MeetAll(const ShmOperation& operation) {
  const Kind kind = static_cast<Kind>(operation.kind);
  ShmRank& self = header_->ranks[rank_];
  const uint32_t target = ++barrier_;
  self.operation[target & 1] = operation;
  // Sequentially consistent, as is WaitFor: either this sees the sleeper, or the sleeper sees the arrival.
  self.arrived.store(target);
  if (self.sleepers.load() != 0) WakeAll(self.arrived);

  for (int peer = 0; peer < world_size_; ++peer) {
    if (peer == rank_) continue;
    WaitFor(peer, target, kind);
    const ShmOperation& theirs = header_->ranks[peer].operation[target & 1];
    if (theirs.kind == operation.kind && theirs.root == operation.root && theirs.bytes == operation.bytes) continue;
    End(Reason::kMismatch);
    throw Error(ErrorCode::kInternal, std::string(Name(kind)) + " of " + std::to_string(operation.bytes) + " bytes from root " +
                                          std::to_string(operation.root) + " meets " + Name(static_cast<Kind>(theirs.kind & 3)) + " of " +
                                          std::to_string(theirs.bytes) + " bytes from root " + std::to_string(theirs.root) + " of rank " +
                                          std::to_string(peer) + ": the ranks run different steps");
  }
}

bool ShmCommunicator::HasArrived(int peer, uint32_t target) const {
  // The difference of two numbers modulo 2^32: ranks are never more than one barrier apart.
  return static_cast<int32_t>(header_->ranks[peer].arrived.load() - target) >= 0;
}

void ShmCommunicator::WaitFor(int peer, uint32_t target, Kind kind) {
  if (SpinUntil(spin_, [&] { return HasArrived(peer, target); })) return;
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(timeout_ms_);
  ShmRank& other = header_->ranks[peer];
  for (;;) {
    const uint32_t seen = other.arrived.load();
    if (HasArrived(peer, target)) return;
    if (header_->aborted.load() != 0) {
      // A rank that passed this barrier may have ended since: then all have arrived, though this rank may only see it now.
      if (HasArrived(peer, target)) return;
      ThrowIfAborted(kind);
    }
    if (cancelled_ != nullptr && cancelled_->load()) {
      End(Reason::kAbort);
      ThrowIfAborted(kind);
    }
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now()).count();
    if (left <= 0) ThrowTimeout(target, kind);
    other.sleepers.fetch_add(1);
    SleepWhileEqual(other.arrived, seen, std::min<int64_t>(left, kSliceMs));
    other.sleepers.fetch_sub(1);
  }
}

void ShmCommunicator::ThrowTimeout(uint32_t target, Kind kind) {
  std::string missing;
  int count = 0;
  for (int peer = 0; peer < world_size_; ++peer) {
    if (peer == rank_ || HasArrived(peer, target)) continue;
    missing += (count++ == 0 ? "" : ", ") + std::to_string(peer);
  }
  End(Reason::kTimeout);
  throw Error(ErrorCode::kTimeout, std::string(Name(kind)) + ": " + (count == 1 ? "rank " : "ranks ") + missing + " did not arrive within " +
                                       std::to_string(timeout_ms_) + " ms");
}

void ShmCommunicator::SumParts(int64_t first, int64_t count, float* data) const {
  constexpr int64_t kBlock = 2 * kFloatsPerLine;  // in registers over the ranks
  const float* parts[kMaxShmRanks];
  for (int rank = 0; rank < world_size_; ++rank) parts[rank] = rank == rank_ ? data : reinterpret_cast<const float*>(Slot(rank)) + first;
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock) {
    float sums[kBlock];
    for (int64_t j = 0; j < kBlock; ++j) sums[j] = parts[0][i + j];
    for (int rank = 1; rank < world_size_; ++rank) {
      const float* part = parts[rank] + i;
      for (int64_t j = 0; j < kBlock; ++j) sums[j] += part[j];
    }
    for (int64_t j = 0; j < kBlock; ++j) data[i + j] = sums[j];
  }
  for (; i < count; ++i) {
    float sum = parts[0][i];
    for (int rank = 1; rank < world_size_; ++rank) sum += parts[rank][i];
    data[i] = sum;
  }
}

const char* ShmCommunicator::Name(Kind kind) {
  const char* names[] = {"attach", "all-reduce", "all-gather", "broadcast"};
  return names[static_cast<uint32_t>(kind) & 3];
}

std::unique_ptr<Communicator> MakeShmCommunicator(const ShmOptions& options, const std::atomic<bool>& cancelled) {
  const auto check = [](bool legal, const std::string& what) {
    if (!legal) throw Error(ErrorCode::kInvalidArgument, what);
  };
  check(options.world_size >= 1 && options.world_size <= kMaxShmRanks,
        "worldSize: " + std::to_string(options.world_size) + ", shared memory takes 1 to " + std::to_string(kMaxShmRanks));
  check(options.rank >= 0 && options.rank < options.world_size,
        "rank: " + std::to_string(options.rank) + " of world size " + std::to_string(options.world_size));
  check(options.timeout_ms >= 1, "communicator.timeoutMs: " + std::to_string(options.timeout_ms) + ", must be at least 1");
  check(options.slot_bytes >= 64 && options.slot_bytes % 64 == 0 && options.slot_bytes <= (int64_t{1} << 30),
        "slot bytes: " + std::to_string(options.slot_bytes) + ", must be a multiple of 64 up to 2^30");

  std::unique_ptr<ShmSegment> segment;
  if (options.rank == 0) {
    SweepDeadShmSegments();
    segment = ShmSegment::Create(options.name, options.world_size, options.slot_bytes);
  } else {
    segment = ShmSegment::Open(options.name, options.world_size, options.slot_bytes, options.timeout_ms, cancelled);
  }
  auto communicator = std::make_unique<ShmCommunicator>(std::move(segment), options.rank, options.timeout_ms, options.spin);
  communicator->Attach(cancelled);
  return communicator;
}

}  // namespace tandem
