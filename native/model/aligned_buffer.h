// Owned memory for weights, KV blocks and activations.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace tandem {

// Zeroed, 64-byte aligned; large ones take memory pages only where they are written. Moves, does not copy.
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  // Throws kOutOfMemory, which says what the memory was for.
  AlignedBuffer(int64_t bytes, const std::string& purpose);
  ~AlignedBuffer();
  AlignedBuffer(AlignedBuffer&& other) noexcept;
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept;

  void* data() const { return data_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  int64_t bytes() const { return bytes_; }

 private:
  void* allocation_ = nullptr;
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace tandem
