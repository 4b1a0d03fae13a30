// Rotary position embedding over the whole head size ("rotate half"), and the write of keys and values into the paged KV cache.
#pragma once

#include <cstdint>
#include <vector>

#include "core/cpu_features.h"
#include "core/thread_pool.h"
#include "kernels/kv_layout.h"

namespace tandem {

enum class RotaryPrecision { kF32, kHalf, kHalfFreq };

// cos and sin of every position's angles: [max_position, head_dim / 2] each.
// kF32: angle = p * base^(-2j/d) in fp32. kHalfFreq: the frequency is rounded to fp16 first. kHalf: frequency, product, cos and sin are all rounded
// to fp16, as GLM-130B was run. Frequencies and cosines are computed in fp32 before rounding (model-spec sections 2 and 11).
struct RotaryTable {
  int64_t max_position = 0;
  int64_t half_dim = 0;
  std::vector<float> cos, sin;
};
RotaryTable MakeRotaryTable(int64_t max_position, int64_t head_dim, double base, RotaryPrecision precision);

// One new token's place: its rotary position id, and where its keys and values go.
struct KvSlot {
  uint32_t position;
  uint32_t block;   // block id
  uint32_t offset;  // token inside the block
};

// qkv: [m, num_heads * 3 * head_dim], per head q, k, v. Rotates q and k of row i by slots[i].position, writes q to q_out [m, num_heads * head_dim] and
// k (after rotary) and v into the cache.
void RotaryAndWriteKv(Isa isa, const float* qkv, int64_t m, const KvSlot* slots, const RotaryTable& table, const KvLayer& kv, float* q_out, ThreadPool& pool);

}  // namespace tandem
