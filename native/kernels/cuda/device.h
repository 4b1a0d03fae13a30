// What every CUDA source starts from. Under nvcc, and for host code beside the toolkit's headers, it is CUDA itself; with TANDEM_CUDA_ON_CPU the same
// sources are plain C++ that the emulator runs (test/cuda_on_cpu.h).
#pragma once

#ifdef TANDEM_CUDA_ON_CPU
#include "test/cuda_on_cpu.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstddef>
#include <string>

#include "core/error.h"

namespace tandem::cuda {

using Stream = cudaStream_t;

// Throws kInternal (kOutOfMemory for an allocation) naming what was being done.
inline void Check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  const ErrorCode code = status == cudaErrorMemoryAllocation ? ErrorCode::kOutOfMemory : ErrorCode::kInternal;
  throw Error(code, std::string("cuda: ") + what + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")");
}

constexpr int kWarpSize = 32;

#ifdef TANDEM_CUDA_ON_CPU

// In a kernel: `Type* name`, the dynamic shared memory of the block.
#define TANDEM_DYNAMIC_SHARED(Type, name) Type* name = static_cast<Type*>(::tandem::cuda_on_cpu::DynamicShared())

template <typename... Parameters, typename... Arguments>
void Launch(const char*, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream, Arguments... arguments) {
  cuda_on_cpu::Launch([=] { kernel(static_cast<Parameters>(arguments)...); }, grid, block, shared_bytes, stream);
}

#elif defined(__CUDACC__)

#define TANDEM_DYNAMIC_SHARED(Type, name)                              \
  extern __shared__ __align__(128) unsigned char tandem_dynamic_shared[]; \
  Type* name = reinterpret_cast<Type*>(tandem_dynamic_shared)

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...), checked; `name` is for the error.
template <typename... Parameters, typename... Arguments>
void Launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream, Arguments... arguments) {
  constexpr size_t kAlwaysAllowed = 48 * 1024;
  if (shared_bytes > kAlwaysAllowed) {
    Check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)), name);
  }
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  Check(cudaGetLastError(), name);
}

#endif

}  // namespace tandem::cuda
