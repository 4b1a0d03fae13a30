// IEEE 754 binary16 ("fp16") to and from fp32. Round to nearest, ties to even; subnormals, infinities and NaN as the F16C instructions do them.
#pragma once

#include <cstdint>
#include <cstring>

namespace tandem {

inline float HalfToFloat(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  uint32_t bits = magnitude << 13;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  value *= 0x1p112f;  // moves the exponent's bias from 15 to 127; exact, also for subnormal halves
  std::memcpy(&bits, &value, sizeof bits);
  if (magnitude >= 0x7c00u) bits = 0x7f800000u | (magnitude << 13);
  if (magnitude > 0x7c00u) bits |= 0x400000u;  // a signalling NaN becomes quiet
  bits |= static_cast<uint32_t>(half & 0x8000u) << 16;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint16_t FloatToHalf(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {                                               // below 2^-14: the result is subnormal
    // Adding 0.5 makes the last mantissa bit worth 2^-24, a subnormal half's unit, so the addition does the rounding.
    float scaled;
    std::memcpy(&scaled, &magnitude, sizeof scaled);
    scaled += 0.5f;
    uint32_t scaled_bits;
    std::memcpy(&scaled_bits, &scaled, sizeof scaled_bits);
    return static_cast<uint16_t>(sign | (scaled_bits - 0x3f000000u));
  }
  const uint32_t odd = (magnitude >> 13) & 1u;
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

}  // namespace tandem
