#include "model/cuda/gpu.h"

#include <cstdio>

#include "kernels/cuda/probe.h"

namespace tandem::cuda {
namespace {

[[noreturn]] void Refuse(const std::string& what) { throw Error(ErrorCode::kInvalidArgument, "gpu: " + what); }

std::string Version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

}  // namespace

cudaDeviceProp FindGpu(int index) {
  int driver = 0, runtime = 0, count = 0;
  cudaRuntimeGetVersion(&runtime);
  cudaDriverGetVersion(&driver);
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaErrorInsufficientDriver || driver == 0) {
    if (driver == 0) Refuse("no NVIDIA driver is loaded here; install one, or use --device cpu");
    Refuse("the driver supports CUDA " + Version(driver) + ", this build needs " + Version(runtime) + ": install a newer driver, or build with an older toolkit");
  }
  if (status == cudaErrorNoDevice || (status == cudaSuccess && count == 0)) Refuse("there is none (CUDA_VISIBLE_DEVICES hides some); use --device cpu");
  Check(status, "looking for GPUs");
  if (index < 0 || index >= count) Refuse(std::to_string(index) + " is not there, this machine has " + std::to_string(count) + ", counted from 0");
  cudaDeviceProp properties;
  Check(cudaGetDeviceProperties(&properties, index), "asking what the GPU is");
  return properties;
}

void UseGpu(int index) {
  const cudaDeviceProp properties = FindGpu(index);
  Check(cudaSetDevice(index), "choosing the GPU");
  const cudaError_t probe = ProbeKernels();
  if (probe == cudaErrorNoKernelImageForDevice || probe == cudaErrorInvalidDeviceFunction) {
    Refuse(std::string(properties.name) + " has compute capability " + std::to_string(properties.major) + "." + std::to_string(properties.minor) +
           ", for which this build has no kernels; build with TANDEM_CUDA_ARCHITECTURES=" + std::to_string(properties.major * 10 + properties.minor));
  }
  Check(probe, "running a first kernel");
}

GpuMemory MemoryOfGpu() {
  size_t free = 0, total = 0;
  Check(cudaMemGetInfo(&free, &total), "asking for free memory");
  return {static_cast<int64_t>(free), static_cast<int64_t>(total)};
}

std::string GiB(int64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f GiB", static_cast<double>(bytes) / (1 << 30));
  return text;
}

void* DeviceSpace::Allocate(int64_t bytes, const char* purpose) {
  void* data = nullptr;
  const cudaError_t status = cudaMalloc(&data, static_cast<size_t>(bytes));
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // it is told, and not to be found by the next check
    const GpuMemory memory = MemoryOfGpu();
    throw Error(ErrorCode::kOutOfMemory,
                "no " + GiB(bytes) + " of GPU memory for " + purpose + ": " + GiB(memory.free) + " of " + GiB(memory.total) + " are free");
  }
  Check(status, purpose);
  Check(cudaMemset(data, 0, static_cast<size_t>(bytes)), purpose);
  return data;
}

void* PinnedSpace::Allocate(int64_t bytes, const char* purpose) {
  void* data = nullptr;
  Check(cudaMallocHost(&data, static_cast<size_t>(bytes)), purpose);
  return data;
}

OwnedStream::OwnedStream() { Check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream"); }

OwnedStream::~OwnedStream() { cudaStreamDestroy(stream_); }

}  // namespace tandem::cuda
