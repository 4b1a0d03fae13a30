#include "model/aligned_buffer.h"

#include <cstdlib>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "core/error.h"

namespace tandem {

AlignedBuffer::AlignedBuffer(int64_t bytes, const std::string& purpose) : bytes_(bytes) {
  constexpr uintptr_t kAlignment = 64;
  if (bytes <= 0) return;
  // calloc rather than aligned_alloc: it hands out untouched zero pages.
  allocation_ = std::calloc(static_cast<size_t>(bytes) + kAlignment, 1);
  if (allocation_ == nullptr) throw Error(ErrorCode::kOutOfMemory, purpose + ": " + std::to_string(bytes) + " bytes cannot be had");
  const uintptr_t address = (reinterpret_cast<uintptr_t>(allocation_) + kAlignment - 1) / kAlignment * kAlignment;
  data_ = reinterpret_cast<void*>(address);
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage, end = (address + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  // A hint only: a decode step reads every weight once, and with small pages spends part of that time on address translation.
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

AlignedBuffer::~AlignedBuffer() { std::free(allocation_); }

AlignedBuffer::AlignedBuffer(AlignedBuffer&& other) noexcept
    : allocation_(std::exchange(other.allocation_, nullptr)), data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

AlignedBuffer& AlignedBuffer::operator=(AlignedBuffer&& other) noexcept {
  std::swap(allocation_, other.allocation_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

}  // namespace tandem
