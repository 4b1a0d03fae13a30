#include "model/model_shape.h"

#include <cmath>
#include <string>

#include "core/error.h"
#include "kernels/attention.h"

namespace tandem {

void CheckModelShape(const ModelShape& shape, const Shard& shard) {
  const auto check = [](bool legal, const std::string& what) {
    if (!legal) throw Error(ErrorCode::kInvalidArgument, what);
  };
  // The bound keeps every product of two sizes and a few factors inside 63 bits.
  constexpr int64_t kMost = int64_t{1} << 24;
  const struct {
    const char* name;
    int64_t value;
  } sizes[] = {{"numLayers", shape.num_layers},
               {"hiddenSize", shape.hidden_size},
               {"numAttentionHeads", shape.num_attention_heads},
               {"innerHiddenSize", shape.inner_hidden_size},
               {"vocabSize", shape.vocab_size},
               {"maxSequenceLength", shape.max_sequence_length}};
  for (const auto& size : sizes) {
    check(size.value >= 1 && size.value <= kMost, std::string("model.") + size.name + ": " + std::to_string(size.value) + " is not in 1 .. 2^24");
  }
  check(shape.hidden_size % shape.num_attention_heads == 0, "model.hiddenSize: " + std::to_string(shape.hidden_size) +
                                                                " is not a multiple of numAttentionHeads " + std::to_string(shape.num_attention_heads));
  check(shape.head_dim() % 2 == 0, "model.hiddenSize: heads of " + std::to_string(shape.head_dim()) + ", rotary embedding needs an even size");
  check(shape.head_dim() <= kMaxHeadDim,
        "model.hiddenSize: heads of " + std::to_string(shape.head_dim()) + ", attention takes at most " + std::to_string(kMaxHeadDim));
  check(std::isfinite(shape.layernorm_epsilon) && shape.layernorm_epsilon >= 0, "model.layernormEpsilon: must be a number >= 0");
  check(std::isfinite(shape.rotary_base) && shape.rotary_base > 0, "model.rotaryBase: must be a number > 0");

  check(shard.world_size >= 1, "worldSize: " + std::to_string(shard.world_size) + ", must be at least 1");
  check(shard.rank >= 0 && shard.rank < shard.world_size,
        "rank: " + std::to_string(shard.rank) + " of world size " + std::to_string(shard.world_size));
  for (const auto& size : {sizes[1], sizes[2], sizes[3], sizes[4]}) {
    check(size.value % shard.world_size == 0, "worldSize: " + std::to_string(shard.world_size) + " does not divide the model's " + size.name + " of " +
                                                  std::to_string(size.value));
  }
}

}  // namespace tandem
