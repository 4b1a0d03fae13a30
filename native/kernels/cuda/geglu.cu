// geglu.cu: u1 * gelu(u2) with the exact GELU, not the tanh form (model-spec section 2).
#include "kernels/cuda/geglu.h"

#include "kernels/cuda/half8.h"

namespace tandem::cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float Gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }

// A thread has 8 columns of a row.
__global__ void __launch_bounds__(kThreads) GegluKernel8(const __half* u, int64_t f, int64_t u_stride, __half* y, int64_t y_stride) {
  const int64_t row = blockIdx.x, j = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * 8;
  if (j >= f) return;
  float linear[8], gate[8];
  LoadHalf8(u + row * u_stride + j, linear);
  LoadHalf8(u + row * u_stride + f + j, gate);
#pragma unroll
  for (int i = 0; i < 8; ++i) linear[i] *= Gelu(gate[i]);
  StoreHalf8(linear, y + row * y_stride + j);
}

// A thread has one: the second half of the row need not be aligned.
__global__ void __launch_bounds__(kThreads) GegluKernel1(const __half* u, int64_t f, int64_t u_stride, __half* y, int64_t y_stride) {
  const int64_t row = blockIdx.x, j = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  if (j >= f) return;
  const __half* from = u + row * u_stride + j;
  y[row * y_stride + j] = __float2half(__half2float(from[0]) * Gelu(__half2float(from[f])));
}

}  // namespace

void Geglu(const __half* u, int64_t m, int64_t f, int64_t u_stride, __half* y, int64_t y_stride, Stream stream) {
  if (m == 0 || f == 0) return;
  const bool is_aligned = f % 8 == 0;
  const int64_t units = is_aligned ? f / 8 : f;
  const dim3 grid(static_cast<unsigned>(m), static_cast<unsigned>((units + kThreads - 1) / kThreads));
  Launch("geglu", is_aligned ? GegluKernel8 : GegluKernel1, grid, dim3(kThreads), 0, stream, u, f, u_stride, y, y_stride);
}

}  // namespace tandem::cuda
