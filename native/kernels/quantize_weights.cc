// quantize_weights.cc: weights on their way into a store. QuantizeWeightsRef is the definition; the vector versions have its bits.
#include "kernels/quantize_weights.h"

#include <cmath>

#include "core/half.h"

namespace tandem {

namespace {

constexpr uint16_t kMagnitude = 0x7fff;
constexpr uint16_t kInfinity = 0x7c00;
constexpr uint16_t kSmallestNormal = 0x0400;
constexpr int64_t kChunk = 1024;  // even

int8_t QuotientAsInt(uint16_t weight, float scale) {
  const float quotient = HalfToFloat(FloatToHalf(HalfToFloat(weight) / scale));
  return static_cast<int8_t>(static_cast<int>(std::nearbyint(quotient)));
}

uint16_t ScaleOf(uint16_t largest, int bits) { return FloatToHalf(HalfToFloat(largest) / static_cast<float>((1 << (bits - 1)) - 1)); }

uint8_t PackNibbles(int8_t even, int8_t odd) { return static_cast<uint8_t>((static_cast<uint8_t>(even) << 4) | (odd & 15)); }

}  // namespace

int64_t QuantizeWeightsRef(const uint16_t* w, int64_t rows, int64_t cols, int64_t groups, int bits, uint8_t* q, uint16_t* scales) {
  const int64_t group_size = cols / groups;
  for (int64_t group = 0; group < rows * groups; ++group) {
    const uint16_t* x = w + group * group_size;
    uint16_t largest = 0;
    for (int64_t c = 0; c < group_size; ++c) {
      // Without its sign a half orders as its bits do, infinity and NaN last.
      const uint16_t magnitude = x[c] & kMagnitude;
      largest = magnitude > largest ? magnitude : largest;
    }
    if (largest >= kInfinity) return group / groups;
    scales[group] = ScaleOf(largest, bits);
    const float scale = HalfToFloat(scales[group]);
    const auto at = [&](int64_t c) { return scale == 0.0f ? int8_t{0} : QuotientAsInt(x[c], scale); };
    for (int64_t c = 0; c < group_size; ++c) {
      if (bits == 8) q[group * group_size + c] = static_cast<uint8_t>(at(c));
      else if (c % 2 == 0) q[(group * group_size + c) / 2] = PackNibbles(at(c), at(c + 1));
    }
  }
  return -1;
}

}  // namespace tandem

#define TANDEM_VECTOR_FILE "kernels/quantize_weights_vector.inc"
#include "kernels/vector/each_isa.inc"

namespace tandem {

int64_t QuantizeWeights(Isa isa, const uint16_t* w, int64_t rows, int64_t cols, int64_t groups, int bits, uint8_t* q, uint16_t* scales) {
  const auto largest_magnitude = TANDEM_SELECT(isa, LargestMagnitude);
  const auto quantize = bits == 8 ? TANDEM_SELECT(isa, QuantizeToI8) : TANDEM_SELECT(isa, QuantizeToI4);
  const int64_t group_size = cols / groups;
  for (int64_t group = 0; group < rows * groups; ++group) {
    const uint16_t* x = w + group * group_size;
    uint8_t* to = q + group * group_size * bits / 8;
    const uint16_t largest = largest_magnitude(x, group_size);
    if (largest >= kInfinity) return group / groups;
    scales[group] = ScaleOf(largest, bits);
    // A scale with all its bits leaves |q| at 127 or 7 at most; one that has lost some is rare, and may need to wrap.
    if (scales[group] >= kSmallestNormal) quantize(x, group_size, HalfToFloat(scales[group]), to);
    else QuantizeWeightsRef(x, 1, group_size, 1, bits, to, scales + group);
  }
  return -1;
}

}  // namespace tandem
