// The KV memory of one rank: fixed-size blocks of tokens, each with the keys and values of all layers and of this rank's heads.
#pragma once

#include <cstdint>

#include "kernels/kv_layout.h"
#include "model/aligned_buffer.h"

namespace tandem {

class KvCache {
 public:
  // Throws kOutOfMemory; kInvalidArgument if a size is not positive or the whole does not fit 63 bits.
  KvCache(int64_t num_layers, int64_t num_blocks, int64_t num_heads, int64_t block_size, int64_t head_dim, KvType type);

  const KvLayer& shape() const { return layer_; }  // without memory
  KvLayer layer(int64_t index) const;
  // All layers' keys and values of one block. from != to, both < num_blocks.
  void CopyBlock(uint32_t from, uint32_t to);
  int64_t bytes() const { return memory_.bytes(); }

 private:
  int64_t num_layers_;
  KvLayer layer_;
  int64_t block_bytes_;   // of K or V of one layer
  int64_t plane_bytes_;   // K or V of all blocks of one layer, rounded up to 64 bytes
  AlignedBuffer memory_;  // [num_layers, 2 (k, v)] planes
};

}  // namespace tandem
