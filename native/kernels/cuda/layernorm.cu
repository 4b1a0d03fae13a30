// layernorm.cu: one block for a row, which it holds in registers between the passes (mean, variance, result).
#include "kernels/cuda/layernorm.h"

#include "kernels/cuda/half8.h"
#include "kernels/cuda/instructions.h"

namespace tandem::cuda {
namespace {

constexpr int kMaxThreads = 1024;

struct NormRow {
  const __half* x;
  const __half* delta;      // with kResidual
  const float* delta_bias;  // with kResidual
  float alpha;
  int n;
};

__device__ __forceinline__ void LoadFloat8(const float* from, int count, float (&values)[8]) {
  if (count >= 8) {
    const float4 low = reinterpret_cast<const float4*>(from)[0], high = reinterpret_cast<const float4*>(from)[1];
    values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
    values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = i < count ? from[i] : 0.0f;
  }
}

// What the norm is taken of: columns [8 * group, 8 * group + 8) of the row.
template <bool kResidual>
__device__ __forceinline__ void LoadSums(const NormRow& row, int group, float (&values)[8]) {
  LoadHalf8(row.x + 8 * group, values);
  if (!kResidual) return;
  float delta[8], bias[8];
  LoadHalf8(row.delta + 8 * group, delta);
  LoadFloat8(row.delta_bias + 8 * group, row.n - 8 * group, bias);
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = row.alpha * values[i] + delta[i] + bias[i];
}

// The same order of summation whatever runs beside it. partial: one float for each warp, not used by an earlier sum of the launch.
__device__ __forceinline__ float BlockSum(float value, float* partial) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
  value = WarpSum(value);
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  return WarpSum(lane < warps ? partial[lane] : 0.0f);
}

// Thread t has the groups of 8 columns t, t + threads, ...: kHeld of them, in registers; with kHeld 0 any number, read anew in each pass.
template <int kHeld, bool kResidual>
__global__ void __launch_bounds__(kMaxThreads) NormKernel(const __half* x, float alpha, const __half* delta, const float* delta_bias, int n, int64_t stride,
                                                           const float* weight, const float* bias, float eps, __half* y) {
  __shared__ float sums[kMaxThreads / kWarpSize], squares[kMaxThreads / kWarpSize];
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * stride;
  const NormRow row = {x + begin, kResidual ? delta + begin : nullptr, delta_bias, alpha, n};
  const int groups = (n + 7) / 8, threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int turns = kHeld > 0 ? kHeld : (groups + threads - 1) / threads;

  float held[kHeld > 0 ? kHeld : 1][8];
  const auto load = [&](int turn, int group) -> float(&)[8] {
    float(&values)[8] = held[kHeld > 0 ? turn : 0];
    if (kHeld == 0) LoadSums<kResidual>(row, group, values);
    return values;
  };

  if (kHeld > 0) {
#pragma unroll
    for (int turn = 0; turn < kHeld; ++turn) {
      const int group = thread + turn * threads;
      if (group >= groups) continue;
      LoadSums<kResidual>(row, group, held[turn]);
      // Needed only after two sums over the block, and by then here.
      PrefetchL2(weight + 8 * group);
      PrefetchL2(bias + 8 * group);
    }
  }

  float sum = 0.0f;
#pragma unroll
  for (int turn = 0; turn < turns; ++turn) {
    const int group = thread + turn * threads;
    if (group >= groups) continue;
    const float(&values)[8] = load(turn, group);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += 8 * group + i < n ? values[i] : 0.0f;
  }
  const float mean = BlockSum(sum, sums) / static_cast<float>(n);

  float square = 0.0f;
#pragma unroll
  for (int turn = 0; turn < turns; ++turn) {
    const int group = thread + turn * threads;
    if (group >= groups) continue;
    const float(&values)[8] = load(turn, group);
#pragma unroll
    for (int i = 0; i < 8; ++i) square += 8 * group + i < n ? (values[i] - mean) * (values[i] - mean) : 0.0f;
  }
  const float inverse = 1.0f / sqrtf(BlockSum(square, squares) / static_cast<float>(n) + eps);

#pragma unroll
  for (int turn = 0; turn < turns; ++turn) {
    const int group = thread + turn * threads;
    if (group >= groups) continue;
    float(&values)[8] = load(turn, group);
    float scale[8], offset[8];
    LoadFloat8(weight + 8 * group, n - 8 * group, scale);
    LoadFloat8(bias + 8 * group, n - 8 * group, offset);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = (values[i] - mean) * inverse * scale[i] + offset[i];
    __half* to = y + begin + 8 * group;
    if (8 * group + 8 <= n) {
      StoreHalf8(values, to);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (8 * group + i < n) to[i] = __float2half(values[i]);
      }
    }
  }
}

// How many groups a thread holds, and how many threads share a row, follow from n alone.
template <bool kResidual>
void LaunchNorm(const char* name, const __half* x, float alpha, const __half* delta, const float* delta_bias, int64_t m, int64_t n, int64_t stride,
                const float* weight, const float* bias, float eps, __half* y, Stream stream) {
  if (m == 0 || n == 0) return;
  if (n > (int64_t{1} << 30)) throw Error(ErrorCode::kInvalidArgument, std::string(name) + ": " + std::to_string(n) + " columns are more than 2^30");
  const int64_t groups = (n + 7) / 8, held = groups <= kMaxThreads ? 1 : groups <= 2 * kMaxThreads ? 2 : 0;
  const int64_t needed = held == 0 ? kMaxThreads : (groups + held - 1) / held;
  const dim3 grid(static_cast<unsigned>(m)), block(static_cast<unsigned>((needed + kWarpSize - 1) / kWarpSize * kWarpSize));
  const auto kernel = held == 1 ? NormKernel<1, kResidual> : held == 2 ? NormKernel<2, kResidual> : NormKernel<0, kResidual>;
  Launch(name, kernel, grid, block, 0, stream, x, alpha, delta, delta_bias, static_cast<int>(n), stride, weight, bias, eps, y);
}

}  // namespace

void LayerNorm(const __half* x, int64_t m, int64_t n, int64_t stride, const float* weight, const float* bias, float eps, __half* y, Stream stream) {
  LaunchNorm<false>("layer norm", x, 0.0f, nullptr, nullptr, m, n, stride, weight, bias, eps, y, stream);
}

void ResidualLayerNorm(__half* x, float alpha, const __half* delta, const float* delta_bias, int64_t m, int64_t n, int64_t stride, const float* weight,
                       const float* bias, float eps, Stream stream) {
  LaunchNorm<true>("residual layer norm", x, alpha, delta, delta_bias, m, n, stride, weight, bias, eps, x, stream);
}

}  // namespace tandem::cuda
