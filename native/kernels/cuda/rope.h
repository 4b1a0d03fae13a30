// Rotary position embedding and the write of keys and values into the paged cache (kernels/rope.h on the device), and copies of whole KV blocks.
#pragma once

#include <cstdint>

#include "kernels/cuda/device.h"
#include "kernels/cuda/kv_layout.h"
#include "kernels/rope.h"

namespace tandem::cuda {

// Rotates q and k of row i by slots[i].position, writes q to q_out and k (after rotary) and v into the cache.
//   qkv: [m, num_heads * 3 * head_dim] fp16, per head q, k, v, rows qkv_stride elements apart; q_out: [m, num_heads * head_dim] fp16, rows q_stride
//   elements apart, no overlap; strides even, 4-byte aligned
//   slots: [m], device memory; positions below max_position
//   cos, sin: [max_position, head_dim / 2] fp32, device memory (MakeRotaryTable)
// A slot whose block is not in the cache writes no key and no value: rows that only fill up a batch have kNoBlock there.
constexpr uint32_t kNoBlock = 0xffffffffu;
void RotaryAndWriteKv(const __half* qkv, int64_t m, int64_t qkv_stride, const KvSlot* slots, const float* cos, const float* sin, const CudaKvLayer& kv,
                      __half* q_out, int64_t q_stride, Stream stream);

// Copies blocks pairs[0].x to pairs[0].y, pairs[1].x to pairs[1].y, ..., in this order (a later pair may read what an earlier one wrote), in each plane.
//   planes: memory at base + i * plane_stride_bytes for i < planes; block b of a plane is its bytes [b * block_bytes, (b + 1) * block_bytes)
//   pairs: [count], device memory
void CopyKvBlocks(void* base, int64_t plane_stride_bytes, int64_t planes, int64_t block_bytes, const uint2* pairs, int64_t count, Stream stream);

}  // namespace tandem::cuda
