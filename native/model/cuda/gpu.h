// One GPU, its memory and its stream.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>

#include "kernels/cuda/device.h"

namespace tandem::cuda {

// What GPU `index` is; takes none of its memory. Throws kInvalidArgument saying what is wrong: no driver, or one too old for this build's CUDA; no such GPU.
cudaDeviceProp FindGpu(int index);
// Makes it the calling thread's. Throws as FindGpu, and where this build has no kernels for its kind.
void UseGpu(int index);

// Free and whole memory of the thread's GPU, in bytes.
struct GpuMemory {
  int64_t free;
  int64_t total;
};
GpuMemory MemoryOfGpu();

// "12.3 GiB"
std::string GiB(int64_t bytes);

// Memory that a Space gives and takes back. Moves, does not copy.
template <typename Space>
class OwnedMemory {
 public:
  OwnedMemory() = default;
  // Throws kOutOfMemory, which says what the memory was for.
  OwnedMemory(int64_t bytes, const char* purpose) : data_(bytes > 0 ? Space::Allocate(bytes, purpose) : nullptr), bytes_(std::max<int64_t>(bytes, 0)) {}
  ~OwnedMemory() { Space::Free(data_); }
  OwnedMemory(OwnedMemory&& other) noexcept { *this = std::move(other); }
  OwnedMemory& operator=(OwnedMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }

  void* data() const { return data_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  int64_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

// The GPU's own, zeroed.
struct DeviceSpace {
  static void* Allocate(int64_t bytes, const char* purpose);
  static void Free(void* data) { cudaFree(data); }
};
using DeviceBuffer = OwnedMemory<DeviceSpace>;

// The host's, which the GPU copies from and to without a detour.
struct PinnedSpace {
  static void* Allocate(int64_t bytes, const char* purpose);
  static void Free(void* data) { cudaFreeHost(data); }
};
using PinnedBuffer = OwnedMemory<PinnedSpace>;

class OwnedStream {
 public:
  OwnedStream();
  ~OwnedStream();
  OwnedStream(const OwnedStream&) = delete;
  OwnedStream& operator=(const OwnedStream&) = delete;

  Stream get() const { return stream_; }
  void Wait() const { Check(cudaStreamSynchronize(stream_), "waiting for the GPU"); }

 private:
  Stream stream_ = nullptr;
};

class OwnedEvent {
 public:
  OwnedEvent() { Check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "creating an event"); }
  ~OwnedEvent() { cudaEventDestroy(event_); }
  OwnedEvent(const OwnedEvent&) = delete;
  OwnedEvent& operator=(const OwnedEvent&) = delete;

  void Record(Stream stream) { Check(cudaEventRecord(event_, stream), "recording an event"); }
  void Wait() const { Check(cudaEventSynchronize(event_), "waiting for the GPU"); }

 private:
  cudaEvent_t event_ = nullptr;
};

}  // namespace tandem::cuda
