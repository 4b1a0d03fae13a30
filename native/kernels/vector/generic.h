// The vector operations that kernels/*_vector.inc are written in, without instruction-set intrinsics: 4 lanes of GCC's and Clang's vector types,
// which every CPU's baseline holds (SSE2, NEON). The other files of this folder define the same names for one instruction set each.
//
// LoadPartial fills the lanes from `count` on with zeros. Max gives b where a or b is NaN. ReduceAdd adds the upper half of the lanes to the lower
// half until one is left, in every file; ReduceAdd4 has the same bits as four ReduceAdd.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/half.h"

namespace tandem::generic {

#define TANDEM_INLINE inline __attribute__((always_inline))

typedef float F32 __attribute__((vector_size(16)));
typedef int32_t I32 __attribute__((vector_size(16)));
using Mask = I32;
constexpr int kLanes = 4;
#if defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

TANDEM_INLINE F32 Set1(float value) { return F32{value, value, value, value}; }
TANDEM_INLINE F32 Zero() { return Set1(0.0f); }
TANDEM_INLINE F32 Load(const float* p) {
  F32 value;
  std::memcpy(&value, p, sizeof value);
  return value;
}
TANDEM_INLINE void Store(float* p, F32 value) { std::memcpy(p, &value, sizeof value); }
TANDEM_INLINE F32 LoadPartial(const float* p, int64_t count) {
  F32 value = Zero();
  for (int64_t i = 0; i < count; ++i) value[i] = p[i];
  return value;
}
TANDEM_INLINE void StorePartial(float* p, F32 value, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = value[i];
}
TANDEM_INLINE float HalfScalar(uint16_t half) { return HalfToFloat(half); }
TANDEM_INLINE F32 LoadHalf(const uint16_t* p) {  // HalfToFloat, lane by lane
  const I32 halves = {p[0], p[1], p[2], p[3]};
  const I32 magnitude = halves & 0x7fff;
  const I32 finite = (I32)((F32)(magnitude << 13) * Set1(0x1p112f));
  const I32 special = (magnitude << 13) | 0x7f800000 | ((magnitude > 0x7c00) & 0x400000);
  return (F32)((magnitude >= 0x7c00 ? special : finite) | ((halves & 0x8000) << 16));
}
TANDEM_INLINE F32 LoadHalfPartial(const uint16_t* p, int64_t count) {
  F32 value = Zero();
  for (int64_t i = 0; i < count; ++i) value[i] = HalfToFloat(p[i]);
  return value;
}
TANDEM_INLINE void StoreHalf(uint16_t* p, F32 value) {
  for (int i = 0; i < kLanes; ++i) p[i] = FloatToHalf(value[i]);
}
TANDEM_INLINE void StoreHalfPartial(uint16_t* p, F32 value, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = FloatToHalf(value[i]);
}
TANDEM_INLINE F32 LoadI8(const int8_t* p) {
  return F32{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])};
}

// What LoadI4 needs to know of a scale; and the kLanes int4 weights from p on, scaled.
TANDEM_INLINE F32 I4Scale(float scale) { return Set1(scale); }
TANDEM_INLINE F32 LoadI4(const uint8_t* p, F32 scale) {
  const auto high = [](uint8_t byte) { return static_cast<float>(static_cast<int8_t>(byte) >> 4); };
  const auto low = [](uint8_t byte) { return static_cast<float>(static_cast<int8_t>(static_cast<uint8_t>(byte << 4)) >> 4); };
  return F32{high(p[0]), low(p[0]), high(p[1]), low(p[1])} * scale;
}

TANDEM_INLINE F32 Add(F32 a, F32 b) { return a + b; }
TANDEM_INLINE F32 Sub(F32 a, F32 b) { return a - b; }
TANDEM_INLINE F32 Mul(F32 a, F32 b) { return a * b; }
TANDEM_INLINE F32 Div(F32 a, F32 b) { return a / b; }
// a * b + c; here with two roundings.
TANDEM_INLINE F32 Fma(F32 a, F32 b, F32 c) { return a * b + c; }
TANDEM_INLINE F32 Less(F32 a, F32 b, F32 then, F32 otherwise) { return a < b ? then : otherwise; }
TANDEM_INLINE F32 Max(F32 a, F32 b) { return a > b ? a : b; }
TANDEM_INLINE F32 Abs(F32 a) { return (F32)((I32)a & 0x7fffffff); }
// a * 2^n, where n is what (n + 1.5 * 2^23) has in its low mantissa bits; the result must be normal.
TANDEM_INLINE F32 ScaleByPow2(F32 a, F32 shifted_n) { return (F32)((I32)a + ((I32)shifted_n << 23)); }

TANDEM_INLINE float ReduceAdd(F32 a) { return (a[0] + a[2]) + (a[1] + a[3]); }
TANDEM_INLINE void ReduceAdd4(const F32* a, float* out) {
  for (int i = 0; i < 4; ++i) out[i] = ReduceAdd(a[i]);
}
TANDEM_INLINE void Prefetch(const void* p) { __builtin_prefetch(p); }

}  // namespace tandem::generic
