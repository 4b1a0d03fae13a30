#include "model/kv_cache.h"

#include <cstring>
#include <string>

#include "core/error.h"

namespace tandem {

KvCache::KvCache(int64_t num_layers, int64_t num_blocks, int64_t num_heads, int64_t block_size, int64_t head_dim, KvType type)
    : num_layers_(num_layers) {
  const auto check = [](const char* name, int64_t value) {
    if (value < 1 || value > int64_t{1} << 31) {
      throw Error(ErrorCode::kInvalidArgument, std::string(name) + ": " + std::to_string(value) + " is not in 1 .. 2^31");
    }
  };
  check("kv.numBlocks", num_blocks);
  check("kv.blockSize", block_size);
  layer_.type = type;
  layer_.num_blocks = num_blocks;
  layer_.num_heads = num_heads;
  layer_.block_size = block_size;
  layer_.head_dim = head_dim;
  int64_t bytes = type == KvType::kF16 ? 2 : 4;
  bool fits = true;
  for (const int64_t factor : {num_heads, block_size, head_dim}) fits = fits && !__builtin_mul_overflow(bytes, factor, &bytes);
  block_bytes_ = bytes;
  // K and V of a layer begin on 64-byte boundaries, whatever the block size.
  int64_t plane = 0;
  fits = fits && !__builtin_mul_overflow(bytes, num_blocks, &plane) && !__builtin_add_overflow(plane, 63, &plane);
  plane_bytes_ = plane / 64 * 64;
  fits = fits && !__builtin_mul_overflow(plane_bytes_, 2 * num_layers, &bytes);
  if (!fits) throw Error(ErrorCode::kInvalidArgument, "kv.numBlocks: " + std::to_string(num_blocks) + " blocks of this model are no size of a memory");
  memory_ = AlignedBuffer(bytes, "KV cache of " + std::to_string(num_blocks) + " blocks");
}

KvLayer KvCache::layer(int64_t index) const {
  KvLayer layer = layer_;
  char* base = memory_.as<char>() + 2 * index * plane_bytes_;
  layer.k = base;
  layer.v = base + plane_bytes_;
  return layer;
}

void KvCache::CopyBlock(uint32_t from, uint32_t to) {
  for (int64_t plane = 0; plane < 2 * num_layers_; ++plane) {
    char* base = memory_.as<char>() + plane * plane_bytes_;
    std::memcpy(base + to * block_bytes_, base + from * block_bytes_, static_cast<size_t>(block_bytes_));
  }
}

}  // namespace tandem
