// generic.h's operations with NEON as ARMv8.2 has it, with products of bytes (SDOT): 4 lanes. Include it only where these are enabled (each_isa.inc does that).
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace tandem::neon {

using F32 = float32x4_t;
constexpr int kLanes = 4;
constexpr int kRegisters = 32;

TANDEM_INLINE F32 Set1(float value) { return vdupq_n_f32(value); }
TANDEM_INLINE F32 Zero() { return vdupq_n_f32(0.0f); }
TANDEM_INLINE F32 Load(const float* p) { return vld1q_f32(p); }
TANDEM_INLINE void Store(float* p, F32 value) { vst1q_f32(p, value); }
TANDEM_INLINE F32 LoadPartial(const float* p, int64_t count) {
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return Load(lanes);
}
TANDEM_INLINE void StorePartial(float* p, F32 value, int64_t count) {
  float lanes[kLanes];
  Store(lanes, value);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}
TANDEM_INLINE F32 LoadHalf(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
TANDEM_INLINE float HalfScalar(uint16_t half) { return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(half))), 0); }
TANDEM_INLINE F32 LoadHalfPartial(const uint16_t* p, int64_t count) {
  uint16_t lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return LoadHalf(lanes);
}
TANDEM_INLINE void StoreHalf(uint16_t* p, F32 value) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(value))); }
TANDEM_INLINE void StoreHalfPartial(uint16_t* p, F32 value, int64_t count) {
  uint16_t lanes[kLanes];
  StoreHalf(lanes, value);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}
TANDEM_INLINE F32 LoadI8(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
}

TANDEM_INLINE F32 I4Scale(float scale) { return Set1(scale); }
// Each lane shifts its nibble of the 2 bytes to the top and back, so that it is sign-extended. Element 2j lies above element 2j + 1.
TANDEM_INLINE F32 LoadI4(const uint8_t* p, F32 scale) {
  const int32x4_t to_top = {24, 28, 16, 20};
  const int32x4_t top = vshlq_s32(vdupq_n_s32(p[0] | p[1] << 8), to_top);
  return vmulq_f32(vcvtq_f32_s32(vshrq_n_s32(top, 28)), scale);
}

TANDEM_INLINE F32 Add(F32 a, F32 b) { return vaddq_f32(a, b); }
TANDEM_INLINE F32 Sub(F32 a, F32 b) { return vsubq_f32(a, b); }
TANDEM_INLINE F32 Mul(F32 a, F32 b) { return vmulq_f32(a, b); }
TANDEM_INLINE F32 Div(F32 a, F32 b) { return vdivq_f32(a, b); }
TANDEM_INLINE F32 Fma(F32 a, F32 b, F32 c) { return vfmaq_f32(c, a, b); }
TANDEM_INLINE F32 Less(F32 a, F32 b, F32 then, F32 otherwise) { return vbslq_f32(vcltq_f32(a, b), then, otherwise); }
TANDEM_INLINE F32 Max(F32 a, F32 b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
TANDEM_INLINE F32 Abs(F32 a) { return vabsq_f32(a); }
TANDEM_INLINE F32 ScaleByPow2(F32 a, F32 shifted_n) {
  return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a), vshlq_n_s32(vreinterpretq_s32_f32(shifted_n), 23)));
}

TANDEM_INLINE float ReduceAdd(F32 a) {
  const float32x2_t two = vadd_f32(vget_low_f32(a), vget_high_f32(a));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
TANDEM_INLINE void ReduceAdd4(const F32* a, float* out) {
  for (int i = 0; i < 4; ++i) out[i] = ReduceAdd(a[i]);
}
TANDEM_INLINE float ReduceMax(F32 a) { return vmaxvq_f32(a); }
TANDEM_INLINE void StoreI8(int8_t* p, F32 value) {
  const int16x4_t wide = vmovn_s32(vcvtq_s32_f32(value));
  const int32_t four = vget_lane_s32(vreinterpret_s32_s8(vmovn_s16(vcombine_s16(wide, wide))), 0);
  std::memcpy(p, &four, sizeof four);
}
TANDEM_INLINE void Prefetch(const void* p) { __builtin_prefetch(p); }

struct I32x16 {
  int32x4_t v[4];
};
struct U8x64 {
  uint8x16_t v[4];
};
struct F32x16 {
  F32 v[4];
};
struct I8Rows {
  int8x16_t v[4];
};
constexpr int32_t kI8Offset = 0;
using I4Sums = I32x16;
constexpr int kI4Dots = 32;  // any number; a segment has 32

TANDEM_INLINE U8x64 LoadU8x64(const uint8_t* p) { return {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}}; }
TANDEM_INLINE U8x64 LowNibbles(U8x64 bytes) {
  for (uint8x16_t& v : bytes.v) v = vandq_u8(v, vdupq_n_u8(15));
  return bytes;
}
TANDEM_INLINE U8x64 HighNibbles(U8x64 bytes) {
  for (uint8x16_t& v : bytes.v) v = vshrq_n_u8(v, 4);
  return bytes;
}
TANDEM_INLINE I8Rows PrepareI8(U8x64 bytes) {
  I8Rows rows;
  for (int i = 0; i < 4; ++i) rows.v[i] = vreinterpretq_s8_u8(veorq_u8(bytes.v[i], vdupq_n_u8(128)));
  return rows;
}
TANDEM_INLINE I32x16 SetI32x16(int32_t value) {
  const int32x4_t v = vdupq_n_s32(value);
  return {{v, v, v, v}};
}
TANDEM_INLINE I32x16 DotI8(I32x16 sums, I8Rows rows, const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, sizeof four);
  const int8x16_t all = vreinterpretq_s8_s32(vdupq_n_s32(four));
  for (int i = 0; i < 4; ++i) sums.v[i] = vdotq_s32(sums.v[i], rows.v[i], all);
  return sums;
}
TANDEM_INLINE I4Sums AddDotI4(I4Sums sums, U8x64 rows, const int8_t* x) {
  I8Rows as_signed;  // up to 15: the same number
  for (int i = 0; i < 4; ++i) as_signed.v[i] = vreinterpretq_s8_u8(rows.v[i]);
  return DotI8(sums, as_signed, x);
}
TANDEM_INLINE I4Sums DotI4(U8x64 rows, const int8_t* x) { return AddDotI4(SetI32x16(0), rows, x); }
TANDEM_INLINE I32x16 AddI4Sums(I32x16 sums, I4Sums i4_sums) {
  for (int i = 0; i < 4; ++i) sums.v[i] = vaddq_s32(sums.v[i], i4_sums.v[i]);
  return sums;
}
TANDEM_INLINE F32x16 Load16(const float* p) { return {{Load(p), Load(p + 4), Load(p + 8), Load(p + 12)}}; }
TANDEM_INLINE F32x16 LoadHalf16(const uint16_t* p) { return {{LoadHalf(p), LoadHalf(p + 4), LoadHalf(p + 8), LoadHalf(p + 12)}}; }
TANDEM_INLINE void Store16(float* p, F32x16 value) {
  for (int i = 0; i < 4; ++i) Store(p + 4 * i, value.v[i]);
}
TANDEM_INLINE F32x16 AddScaled(F32x16 y, I32x16 sums, F32x16 w_scale, float x_scale) {
  for (int i = 0; i < 4; ++i) y.v[i] = Add(y.v[i], Mul(vcvtq_f32_s32(sums.v[i]), Mul(w_scale.v[i], Set1(x_scale))));
  return y;
}

}  // namespace tandem::neon
