// The vector operations that kernels/*_vector.inc are written in, without instruction-set intrinsics: 4 lanes of GCC's and Clang's vector types,
// which every CPU's baseline holds (SSE2, NEON). The other files of this folder define the same names for one instruction set each.
//
// LoadPartial fills the lanes from `count` on with zeros. Max gives b where a or b is NaN. ReduceAdd adds the upper half of the lanes to the lower
// half until one is left, in every file; ReduceAdd4 has the same bits as four ReduceAdd. StoreI8 takes whole numbers from -128 to 127.
//
// For 16 rows of weights at a time (kernels/packed_linear.h has the layout) there are the types U8x64, 16 rows of 4 bytes; I32x16 and F32x16, a number
// for each row; I8Rows, what DotI8 wants to know of a U8x64; I4Sums, for each row sums of products that may be narrower than 32 bits; and
//   DotI4(rows, x)             for each row byte[0..3] . x[0..3], for bytes up to 15, x of int8 > -128
//   AddDotI4(sums, rows, x)    I4Sums + DotI4(rows, x); the sum of at most kI4Dots of them
//   AddI4Sums(sums, i4_sums)   I32x16 + I4Sums
//   DotI8(sums, rows, x)       I32x16 + for each row (byte - 128 + kI8Offset)[0..3] . x[0..3], for any bytes, x of int8 > -128
//   AddScaled(y, sums, w, x)   y + float(sums) * (w * x), each product and the sum rounded
// These have the same bits in every file.
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
TANDEM_INLINE float ReduceMax(F32 a) {
  const float upper = a[0] > a[2] ? a[0] : a[2], lower = a[1] > a[3] ? a[1] : a[3];
  return upper > lower ? upper : lower;
}
TANDEM_INLINE void StoreI8(int8_t* p, F32 value) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(value[i]);
}
TANDEM_INLINE void Prefetch(const void* p) { __builtin_prefetch(p); }

typedef int16_t I16 __attribute__((vector_size(16)));
typedef uint16_t U16 __attribute__((vector_size(16)));
struct U8x64 {
  I16 v[4];
};
struct I32x16 {
  I32 v[4];
};
struct F32x16 {
  F32 v[4];
};
struct I8Rows {
  I16 even[4], odd[4];
};
constexpr int32_t kI8Offset = 0;
struct I4Sums {
  I16 v[4];  // two of each row
};
constexpr int kI4Dots = 8;  // 2 products of at most 15 * 127 each: 16 of them fit into 16 bits

TANDEM_INLINE U8x64 LoadU8x64(const uint8_t* p) {
  U8x64 bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return bytes;
}
TANDEM_INLINE U8x64 LowNibbles(U8x64 bytes) {
  for (I16& v : bytes.v) v &= 0x0f0f;
  return bytes;
}
TANDEM_INLINE U8x64 HighNibbles(U8x64 bytes) {
  for (I16& v : bytes.v) v = (v >> 4) & 0x0f0f;
  return bytes;
}
TANDEM_INLINE I8Rows PrepareI8(U8x64 bytes) {
  I8Rows rows;
  for (int i = 0; i < 4; ++i) {
    rows.even[i] = (bytes.v[i] & 0xff) - 128;
    rows.odd[i] = (I16)((U16)bytes.v[i] >> 8) - 128;
  }
  return rows;
}
TANDEM_INLINE I32x16 SetI32x16(int32_t value) {
  const I32 v = {value, value, value, value};
  return {{v, v, v, v}};
}
// Columns 0 and 2, and 1 and 3, of the 4 from x on, once for each of 4 rows.
TANDEM_INLINE void EvenAndOdd(const int8_t* x, I16* even, I16* odd) {
  int32_t four;
  std::memcpy(&four, x, sizeof four);
  const I16 all = (I16)I32{four, four, four, four};
  *even = (I16)((U16)all << 8) >> 8;
  *odd = all >> 8;
}
TANDEM_INLINE I32 AddPairs(I32 sums, I16 pairs) { return sums + ((I32)((I32)pairs << 16) >> 16) + ((I32)pairs >> 16); }
TANDEM_INLINE I4Sums AddDotI4(I4Sums sums, U8x64 rows, const int8_t* x) {
  I16 even, odd;
  EvenAndOdd(x, &even, &odd);
  for (int i = 0; i < 4; ++i) sums.v[i] += (rows.v[i] & 0xff) * even + (rows.v[i] >> 8) * odd;
  return sums;
}
TANDEM_INLINE I4Sums DotI4(U8x64 rows, const int8_t* x) { return AddDotI4({}, rows, x); }
TANDEM_INLINE I32x16 AddI4Sums(I32x16 sums, I4Sums i4_sums) {
  for (int i = 0; i < 4; ++i) sums.v[i] = AddPairs(sums.v[i], i4_sums.v[i]);
  return sums;
}
TANDEM_INLINE I32x16 DotI8(I32x16 sums, I8Rows rows, const int8_t* x) {
  I16 even, odd;
  EvenAndOdd(x, &even, &odd);
  for (int i = 0; i < 4; ++i) sums.v[i] = AddPairs(sums.v[i], rows.even[i] * even + rows.odd[i] * odd);  // 2 * 128 * 127 fits
  return sums;
}
TANDEM_INLINE F32x16 Load16(const float* p) { return {{Load(p), Load(p + 4), Load(p + 8), Load(p + 12)}}; }
TANDEM_INLINE F32x16 LoadHalf16(const uint16_t* p) { return {{LoadHalf(p), LoadHalf(p + 4), LoadHalf(p + 8), LoadHalf(p + 12)}}; }
TANDEM_INLINE void Store16(float* p, F32x16 value) {
  for (int i = 0; i < 4; ++i) Store(p + 4 * i, value.v[i]);
}
TANDEM_INLINE F32x16 AddScaled(F32x16 y, I32x16 sums, F32x16 w_scale, float x_scale) {
  for (int i = 0; i < 4; ++i) y.v[i] = y.v[i] + __builtin_convertvector(sums.v[i], F32) * (w_scale.v[i] * Set1(x_scale));
  return y;
}

}  // namespace tandem::generic
