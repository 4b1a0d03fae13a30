// The sizes of one GLM model, named as its configuration names them, and one rank's share of them.
#pragma once

#include <cstdint>

#include "kernels/rope.h"

namespace tandem {

struct ModelShape {
  int64_t num_layers = 0;
  int64_t hidden_size = 0;
  int64_t num_attention_heads = 0;
  int64_t inner_hidden_size = 0;
  int64_t vocab_size = 0;
  int64_t max_sequence_length = 0;
  float layernorm_epsilon = 1e-5f;
  double rotary_base = 10000.0;
  RotaryPrecision rotary_precision = RotaryPrecision::kF32;

  int64_t head_dim() const { return hidden_size / num_attention_heads; }
};

struct Shard {
  int rank = 0;
  int world_size = 1;
};

// Throws kInvalidArgument naming the field: sizes that are not positive or absurd, an odd head size, a world size that does not divide heads, inner size,
// hidden size and vocabulary.
void CheckModelShape(const ModelShape& shape, const Shard& shard);

}  // namespace tandem
