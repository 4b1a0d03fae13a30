#include "kernels/cuda/rows.h"

namespace tandem::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) GatherRowsKernel(const __half* src, const uint32_t* rows, int64_t columns, int64_t stride, __half* dst) {
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * 8;
  if (column >= columns) return;
  const __half* from = src + rows[blockIdx.x] * stride + column;
  __half* to = dst + blockIdx.x * stride + column;
  if (column + 8 <= columns) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
  } else {
    for (int64_t i = 0; i < columns - column; ++i) to[i] = from[i];
  }
}

__global__ void __launch_bounds__(kThreads) TakeSamplesKernel(const uint32_t* sampled, const int32_t* from, int64_t count, uint32_t vocab, uint32_t* tokens) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count || from[i] < 0) return;
  const uint32_t token = sampled[from[i]];
  tokens[i] = token < vocab ? token : 0;
}

}  // namespace

void TakeSamples(const uint32_t* sampled, const int32_t* from, int64_t count, int64_t vocab, uint32_t* tokens, Stream stream) {
  if (count == 0) return;
  const dim3 grid(static_cast<unsigned>((count + kThreads - 1) / kThreads));
  Launch("take samples", TakeSamplesKernel, grid, dim3(kThreads), 0, stream, sampled, from, count, static_cast<uint32_t>(vocab), tokens);
}

void GatherRows(const __half* src, const uint32_t* rows, int64_t count, int64_t columns, int64_t stride, __half* dst, Stream stream) {
  if (count == 0 || columns == 0) return;
  const int64_t units = (columns + 7) / 8;
  const dim3 grid(static_cast<unsigned>(count), static_cast<unsigned>((units + kThreads - 1) / kThreads));
  Launch("gather rows", GatherRowsKernel, grid, dim3(kThreads), 0, stream, src, rows, columns, stride, dst);
}

}  // namespace tandem::cuda
