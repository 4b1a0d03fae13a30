// How one layer's keys and values of one rank lie in device memory: the layout of kernels/kv_layout.h, with INT8 as an option.
#pragma once

#include <cstdint>

#include "kernels/cuda/device.h"
#include "kernels/kv_layout.h"

namespace tandem::cuda {

// Of fp16 or INT8; 16-byte aligned, head_dim is a multiple of 8. Owns nothing.
// INT8: x is q * scale with one fp16 scale per token and head, k_scales and v_scales [num_blocks, num_heads, block_size]; null for fp16.
// A writer takes scale = fp16(max |x| / 127) over the head_dim values (kLeastKvScale at the least) and q = round(x / scale), at most 127.
struct CudaKvLayer : KvLayer {
  __half* k_scales = nullptr;
  __half* v_scales = nullptr;
};

// The least normal half: all-zero values still have a scale to divide by.
constexpr float kLeastKvScale = 6.103515625e-5f;

// Where the values of a token and head begin in k and v, and, divided by head_dim, its place in the scales.
__host__ __device__ inline int64_t KvPlace(const CudaKvLayer& kv, uint32_t block, int64_t head, int64_t offset_in_block) {
  return ((static_cast<int64_t>(block) * kv.num_heads + head) * kv.block_size + offset_in_block) * kv.head_dim;
}

}  // namespace tandem::cuda
