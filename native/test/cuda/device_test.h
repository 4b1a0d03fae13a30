// What the tests of CUDA kernels share. They are written once, and run under the emulator and, where there is one, on a GPU.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "kernels/cuda/device.h"
#include "test/kernel_test.h"

namespace tandem::test {

inline void Sync(cuda::Stream stream = nullptr) { cuda::Check(cudaStreamSynchronize(stream), "a test's kernels"); }

// Device memory of `count` values; those that no one wrote are NaN (0xFF in every byte).
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(int64_t count) : count_(count) {
    cuda::Check(cudaMalloc(reinterpret_cast<void**>(&values_), Bytes() + kGuardBytes), "a test's memory");
    Poison();
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(static_cast<int64_t>(values.size())) { Upload(values); }
  ~DeviceArray() { cudaFree(values_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* get() { return values_; }
  const T* get() const { return values_; }
  int64_t size() const { return count_; }

  void Poison() { cuda::Check(cudaMemset(values_, 0xff, Bytes() + kGuardBytes), "a test's poison"); }
  void Upload(const std::vector<T>& values) {
    CHECK_EQ(static_cast<int64_t>(values.size()), count_);
    cuda::Check(cudaMemcpy(values_, values.data(), Bytes(), cudaMemcpyHostToDevice), "a test's input");
  }

  // Waits for the device. Fails the test when a kernel wrote behind the array's end.
  std::vector<T> Download() const {
    cuda::Check(cudaDeviceSynchronize(), "a test's kernels");
    std::vector<T> values(static_cast<size_t>(count_));
    cuda::Check(cudaMemcpy(values.data(), values_, Bytes(), cudaMemcpyDeviceToHost), "a test's output");
    unsigned char guard[kGuardBytes];
    cuda::Check(cudaMemcpy(guard, reinterpret_cast<const char*>(values_) + Bytes(), kGuardBytes, cudaMemcpyDeviceToHost), "a test's guard");
    for (const unsigned char byte : guard) {
      if (byte == 0xff) continue;
      Fail(__FILE__, __LINE__, "a kernel wrote behind the end of an array of " + std::to_string(count_));
      break;
    }
    return values;
  }

 private:
  static constexpr size_t kGuardBytes = 256;
  size_t Bytes() const { return static_cast<size_t>(count_) * sizeof(T); }

  int64_t count_;
  T* values_ = nullptr;
};

inline std::vector<__half> ToHalf(const std::vector<float>& values) {
  std::vector<__half> halves;
  halves.reserve(values.size());
  for (const float value : values) halves.push_back(__float2half(value));
  return halves;
}

inline std::vector<float> ToFloat(const std::vector<__half>& halves) {
  std::vector<float> values;
  values.reserve(halves.size());
  for (const __half half : halves) values.push_back(__half2float(half));
  return values;
}

// The values as a kernel sees them, for the scalar reference.
inline std::vector<float> RoundToHalf(const std::vector<float>& values) { return ToFloat(ToHalf(values)); }

// Runs the body with threads and blocks going forward, backward and, twice, in a random order. A GPU has its own order: once.
inline void ForEachThreadOrder(const std::function<void()>& body) {
#ifdef TANDEM_CUDA_ON_CPU
  using cuda_on_cpu::ThreadOrder;
  for (const ThreadOrder order : {ThreadOrder::kForward, ThreadOrder::kBackward}) {
    cuda_on_cpu::SetThreadOrder(order);
    body();
  }
  for (const uint32_t seed : {1u, 2u}) {
    cuda_on_cpu::SetThreadOrder(ThreadOrder::kRandom, seed);
    body();
  }
  cuda_on_cpu::SetThreadOrder(ThreadOrder::kForward);
#else
  body();
#endif
}

}  // namespace tandem::test
