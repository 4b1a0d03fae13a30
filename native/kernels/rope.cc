// rope.cc: rotary embedding over the whole head ("rotate half", model-spec section 2) and the write into the paged KV cache.
#include "kernels/rope.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>

#include "core/half.h"

#define TANDEM_VECTOR_FILE "kernels/rope_vector.inc"
#include "kernels/vector/each_isa.inc"

namespace tandem {

static float RoundToHalf(float value) { return HalfToFloat(FloatToHalf(value)); }

// Every value is the fp32 number nearest to the exact function of its fp32 arguments, which is what PyTorch's kernels approximate.
RotaryTable MakeRotaryTable(int64_t max_position, int64_t head_dim, double base, RotaryPrecision precision) {
  if (head_dim < 2 || head_dim % 2 != 0 || max_position < 1) {
    throw Error(ErrorCode::kInvalidArgument, "rotary: head size " + std::to_string(head_dim) + " and " + std::to_string(max_position) +
                                                 " positions; the head size must be even and both positive");
  }
  RotaryTable table;
  table.max_position = max_position;
  table.half_dim = head_dim / 2;
  table.cos.resize(static_cast<size_t>(max_position * table.half_dim));
  table.sin.resize(table.cos.size());
  for (int64_t j = 0; j < table.half_dim; ++j) {
    const float exponent = static_cast<float>(2 * j) / static_cast<float>(head_dim);
    float frequency = 1.0f / static_cast<float>(std::pow(base, static_cast<double>(exponent)));
    if (precision != RotaryPrecision::kF32) frequency = RoundToHalf(frequency);
    for (int64_t p = 0; p < max_position; ++p) {
      float angle = static_cast<float>(p) * frequency;
      if (precision == RotaryPrecision::kHalf) angle = RoundToHalf(RoundToHalf(static_cast<float>(p)) * frequency);
      float cos = static_cast<float>(std::cos(static_cast<double>(angle)));
      float sin = static_cast<float>(std::sin(static_cast<double>(angle)));
      if (precision == RotaryPrecision::kHalf) {
        cos = RoundToHalf(cos);
        sin = RoundToHalf(sin);
      }
      table.cos[static_cast<size_t>(p * table.half_dim + j)] = cos;
      table.sin[static_cast<size_t>(p * table.half_dim + j)] = sin;
    }
  }
  return table;
}

void RotaryAndWriteKv(Isa isa, const float* qkv, int64_t m, const KvSlot* slots, const RotaryTable& table, const KvLayer& kv, float* q_out,
                      ThreadPool& pool) {
  if (table.half_dim * 2 != kv.head_dim) {
    throw Error(ErrorCode::kInvalidArgument, "rotary: a table for head size " + std::to_string(table.half_dim * 2) + ", the KV cache has " +
                                                 std::to_string(kv.head_dim));
  }
  for (int64_t i = 0; i < m; ++i) {
    if (slots[i].position >= table.max_position || slots[i].block >= kv.num_blocks || slots[i].offset >= kv.block_size) {
      throw Error(ErrorCode::kInvalidArgument,
                  "rotary: row " + std::to_string(i) + " has position " + std::to_string(slots[i].position) + ", block " +
                      std::to_string(slots[i].block) + ", offset " + std::to_string(slots[i].offset) + "; there are " +
                      std::to_string(table.max_position) + " positions and " + std::to_string(kv.num_blocks) + " blocks of " +
                      std::to_string(kv.block_size));
    }
  }
  const auto rotary_head = TANDEM_SELECT(isa, RotaryHead);
  const int64_t element_bytes = kv.type == KvType::kF16 ? 2 : 4;
  const auto body = [&](int64_t begin, int64_t end, int) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t i = unit / kv.num_heads, head = unit % kv.num_heads;
      const KvSlot& slot = slots[i];
      const int64_t place = ((slot.block * kv.num_heads + head) * kv.block_size + slot.offset) * kv.head_dim * element_bytes;
      rotary_head(qkv + unit * 3 * kv.head_dim, table.cos.data() + slot.position * table.half_dim, table.sin.data() + slot.position * table.half_dim,
                  kv.head_dim, q_out + unit * kv.head_dim, kv.type, static_cast<char*>(kv.k) + place, static_cast<char*>(kv.v) + place);
    }
  };
  pool.ParallelFor(m * kv.num_heads, std::max<int64_t>(1, 4096 / kv.head_dim), std::cref(body));
}

}  // namespace tandem
