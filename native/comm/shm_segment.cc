#include "comm/shm_segment.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <new>
#include <thread>
#include <utility>

#include "core/error.h"

namespace tandem {
namespace {

constexpr uint64_t kShmMagic = 0x316d6873646e6174;  // "tandshm1"
constexpr uint32_t kShmVersion = 1;
constexpr char kPrefix[] = "tandem.";
// A segment without a filled-in header may be one that is just being created; after this long its creator died in the middle.
constexpr int64_t kUnfinishedSeconds = 60;

int64_t HeaderBytes() { return (static_cast<int64_t>(sizeof(ShmHeader)) + 4095) / 4096 * 4096; }

std::string SegmentPath(const std::string& name) {
  bool legal = !name.empty() && name.size() <= 200;
  for (const char c : name) {
    legal = legal && ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' || c == '_' || c == '-');
  }
  if (!legal) throw Error(ErrorCode::kInvalidArgument, "communicator.name: \"" + name + "\" is not 1 to 200 of A-Z a-z 0-9 . _ -");
  return std::string("/") + kPrefix + name;
}

std::string Reason() { return std::strerror(errno); }

ShmHeader* Map(int fd, int64_t bytes) {
  void* memory = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  return memory == MAP_FAILED ? nullptr : static_cast<ShmHeader*>(memory);
}

}  // namespace

int64_t ShmSegmentBytes(int world_size, int64_t slot_bytes) { return HeaderBytes() + 2 * world_size * slot_bytes; }

char* ShmSlot(ShmHeader* header, int rank, int parity) {
  return reinterpret_cast<char*>(header) + HeaderBytes() + (2 * rank + parity) * static_cast<int64_t>(header->slot_bytes);
}

void FillShmHeader(ShmHeader* header, int world_size, int64_t slot_bytes) {
  header->version = kShmVersion;
  header->world_size = static_cast<uint32_t>(world_size);
  header->slot_bytes = static_cast<uint64_t>(slot_bytes);
  header->total_bytes = static_cast<uint64_t>(ShmSegmentBytes(world_size, slot_bytes));
  header->magic.store(kShmMagic, std::memory_order_release);
}

ShmSegment::ShmSegment(std::string path, int fd, ShmHeader* header, int64_t bytes, bool creator)
    : path_(std::move(path)), fd_(fd), header_(header), bytes_(bytes), linked_(creator) {}

ShmSegment::~ShmSegment() {
  Unlink();
  munmap(static_cast<void*>(header_), static_cast<size_t>(bytes_));
  close(fd_);
}

void ShmSegment::Unlink() {
  if (linked_) shm_unlink(path_.c_str());
  linked_ = false;
}

std::unique_ptr<ShmSegment> ShmSegment::Create(const std::string& name, int world_size, int64_t slot_bytes) {
  const std::string path = SegmentPath(name);
  const int fd = shm_open(path.c_str(), O_CREAT | O_EXCL | O_RDWR, 0600);
  if (fd < 0 && errno == EEXIST) {
    throw Error(ErrorCode::kInvalidArgument, "communicator.name: \"" + name + "\" was used before, every group needs a new name");
  }
  if (fd < 0) throw Error(ErrorCode::kInternal, "shared memory " + path + " cannot be created: " + Reason());

  const int64_t bytes = ShmSegmentBytes(world_size, slot_bytes);
  const auto fail = [&](ErrorCode code, const std::string& what) {
    shm_unlink(path.c_str());
    close(fd);
    throw Error(code, what);
  };
  while (flock(fd, LOCK_EX) != 0) {  // waits at most for a sweeper that is just looking at it
    if (errno != EINTR) fail(ErrorCode::kInternal, "shared memory " + path + " cannot be locked: " + Reason());
  }
#if defined(__linux__)
  // Reserves the memory: without it a full /dev/shm shows as a SIGBUS in the middle of a collective.
  const int allocated = posix_fallocate(fd, 0, bytes);
  if (allocated != 0) {
    fail(ErrorCode::kOutOfMemory, "shared memory for " + std::to_string(world_size) + " ranks needs " + std::to_string(bytes) +
                                      " bytes in /dev/shm: " + std::strerror(allocated));
  }
#else
  if (ftruncate(fd, bytes) != 0) fail(ErrorCode::kOutOfMemory, "shared memory of " + std::to_string(bytes) + " bytes cannot be had: " + Reason());
#endif
  ShmHeader* header = Map(fd, bytes);
  if (header == nullptr) fail(ErrorCode::kOutOfMemory, "shared memory of " + std::to_string(bytes) + " bytes cannot be mapped: " + Reason());
  FillShmHeader(header, world_size, slot_bytes);
  return std::unique_ptr<ShmSegment>(new ShmSegment(path, fd, header, bytes, true));
}

std::unique_ptr<ShmSegment> ShmSegment::Open(const std::string& name, int world_size, int64_t slot_bytes, int64_t timeout_ms,
                                             const std::atomic<bool>& cancelled) {
  const std::string path = SegmentPath(name);
  const int64_t bytes = ShmSegmentBytes(world_size, slot_bytes);
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(timeout_ms);
  const auto wait = [&] {
    if (cancelled.load()) throw Error(ErrorCode::kAborted, "attach: aborted while waiting for rank 0");
    if (std::chrono::steady_clock::now() >= deadline) {
      throw Error(ErrorCode::kTimeout, "attach: rank 0 did not create " + path + " within " + std::to_string(timeout_ms) + " ms");
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  };

  int fd;
  while ((fd = shm_open(path.c_str(), O_RDWR, 0)) < 0) {
    if (errno != ENOENT) throw Error(ErrorCode::kInternal, "shared memory " + path + " cannot be opened: " + Reason());
    wait();
  }
  ShmHeader* header = nullptr;
  try {
    struct stat status;
    for (;;) {
      if (fstat(fd, &status) != 0) throw Error(ErrorCode::kInternal, "shared memory " + path + " cannot be read: " + Reason());
      if (status.st_uid != geteuid()) throw Error(ErrorCode::kInternal, "shared memory " + path + " belongs to another user");
      if (status.st_size != 0) break;
      wait();
    }
    if (status.st_size != bytes) {
      throw Error(ErrorCode::kInternal, "shared memory " + path + " has " + std::to_string(status.st_size) + " bytes, this rank of world size " +
                                            std::to_string(world_size) + " expects " + std::to_string(bytes));
    }
    header = Map(fd, bytes);
    if (header == nullptr) throw Error(ErrorCode::kOutOfMemory, "shared memory " + path + " cannot be mapped: " + Reason());
    while (header->magic.load(std::memory_order_acquire) == 0) wait();
    if (header->magic.load() != kShmMagic || header->version != kShmVersion || header->world_size != static_cast<uint32_t>(world_size) ||
        header->slot_bytes != static_cast<uint64_t>(slot_bytes) || header->total_bytes != static_cast<uint64_t>(bytes)) {
      throw Error(ErrorCode::kInternal, "shared memory " + path + " was made for version " + std::to_string(header->version) + ", world size " +
                                            std::to_string(header->world_size) + ", slots of " + std::to_string(header->slot_bytes) +
                                            " bytes; this rank expects " + std::to_string(kShmVersion) + ", " + std::to_string(world_size) + ", " +
                                            std::to_string(slot_bytes));
    }
  } catch (...) {
    if (header != nullptr) munmap(static_cast<void*>(header), static_cast<size_t>(bytes));
    close(fd);
    throw;
  }
  return std::unique_ptr<ShmSegment>(new ShmSegment(path, fd, header, bytes, false));
}

int SweepDeadShmSegments() {
  int removed = 0;
#if defined(__linux__)
  DIR* folder = opendir("/dev/shm");
  if (folder == nullptr) return 0;
  while (const dirent* entry = readdir(folder)) {
    if (std::strncmp(entry->d_name, kPrefix, sizeof(kPrefix) - 1) != 0) continue;
    const std::string path = std::string("/") + entry->d_name;
    const int fd = shm_open(path.c_str(), O_RDWR, 0);
    if (fd < 0) continue;  // another user's, or just unlinked
    struct stat status;
    if (fstat(fd, &status) == 0 && S_ISREG(status.st_mode) && status.st_uid == geteuid() && flock(fd, LOCK_EX | LOCK_NB) == 0) {
      uint64_t magic = 0;
      const bool finished = pread(fd, &magic, sizeof(magic), 0) == sizeof(magic) && magic == kShmMagic;
      if (finished || time(nullptr) - status.st_mtime > kUnfinishedSeconds) removed += shm_unlink(path.c_str()) == 0;
    }
    close(fd);
  }
  closedir(folder);
#endif
  return removed;
}

}  // namespace tandem
