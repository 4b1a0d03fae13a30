// How one layer's keys and values of one rank lie in memory.
#pragma once

#include <cstdint>

namespace tandem {

enum class KvType { kF16, kF32, kI8 };

// k and v: [num_blocks, num_heads, block_size, head_dim] of fp16 or fp32 (on the CPU), fp16 or INT8 (on GPUs), 64-byte aligned. Owns nothing.
struct KvLayer {
  void* k = nullptr;
  void* v = nullptr;
  KvType type = KvType::kF16;
  int64_t num_blocks = 0;
  int64_t num_heads = 0;  // this rank's
  int64_t block_size = 0;
  int64_t head_dim = 0;
};

}  // namespace tandem
