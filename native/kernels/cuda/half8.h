// Eight halves at a time, the 16 bytes that a thread reads and writes at once, and sums over a warp.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/cuda/device.h"

namespace tandem::cuda {

// from, to: 16-byte aligned
__device__ __forceinline__ void LoadHalf8(const __half* from, float (&values)[8]) {
  const uint4 packed = *reinterpret_cast<const uint4*>(from);
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    __half2 pair;
    memcpy(&pair, &words[i], sizeof pair);
    const float2 both = __half22float2(pair);
    values[2 * i] = both.x;
    values[2 * i + 1] = both.y;
  }
}

__device__ __forceinline__ void StoreHalf8(const float (&values)[8], __half* to) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __half2 pair = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
    memcpy(&words[i], &pair, sizeof pair);
  }
  *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ float WarpSum(float value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

}  // namespace tandem::cuda
