// generic.h's operations with AVX-512 F, BW, DQ and VL: 16 lanes. Include it only where these are enabled (each_isa.inc does that).
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace tandem::avx512 {

using F32 = __m512;
constexpr int kLanes = 16;
constexpr int kRegisters = 32;

TANDEM_INLINE F32 Set1(float value) { return _mm512_set1_ps(value); }
TANDEM_INLINE F32 Zero() { return _mm512_setzero_ps(); }
TANDEM_INLINE F32 Load(const float* p) { return _mm512_loadu_ps(p); }
TANDEM_INLINE void Store(float* p, F32 value) { _mm512_storeu_ps(p, value); }
TANDEM_INLINE __mmask16 PartialMask(int64_t count) { return static_cast<__mmask16>((1u << count) - 1u); }
TANDEM_INLINE F32 LoadPartial(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(PartialMask(count), p); }
TANDEM_INLINE void StorePartial(float* p, F32 value, int64_t count) { _mm512_mask_storeu_ps(p, PartialMask(count), value); }
TANDEM_INLINE float HalfScalar(uint16_t half) { return _cvtsh_ss(half); }
TANDEM_INLINE F32 LoadHalf(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
TANDEM_INLINE F32 LoadHalfPartial(const uint16_t* p, int64_t count) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(PartialMask(count), p)); }
TANDEM_INLINE __m256i ToHalf(F32 value) { return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
TANDEM_INLINE void StoreHalf(uint16_t* p, F32 value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), ToHalf(value)); }
TANDEM_INLINE void StoreHalfPartial(uint16_t* p, F32 value, int64_t count) { _mm256_mask_storeu_epi16(p, PartialMask(count), ToHalf(value)); }
TANDEM_INLINE F32 LoadI8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

// The 16 values that an int4 weight can have: a weight is then one permute, which looks at the low 4 bits of an index only.
TANDEM_INLINE F32 I4Scale(float scale) {
  return _mm512_mul_ps(_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1), _mm512_set1_ps(scale));
}
// Lane 2j and 2j + 1 get byte j; element 2j is its high nibble.
TANDEM_INLINE F32 LoadI4(const uint8_t* p, F32 scale) {
  int64_t bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  const __m512i spread = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  const __m512i lanes = _mm512_shuffle_epi8(_mm512_set1_epi64(bytes), spread);
  return _mm512_permutexvar_ps(_mm512_srlv_epi32(lanes, _mm512_set1_epi64(4)), scale);
}

TANDEM_INLINE F32 Add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
TANDEM_INLINE F32 Sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
TANDEM_INLINE F32 Mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
TANDEM_INLINE F32 Div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
TANDEM_INLINE F32 Fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
TANDEM_INLINE F32 Less(F32 a, F32 b, F32 then, F32 otherwise) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), otherwise, then); }
TANDEM_INLINE F32 Max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
TANDEM_INLINE F32 Abs(F32 a) { return _mm512_abs_ps(a); }
TANDEM_INLINE F32 ScaleByPow2(F32 a, F32 shifted_n) {
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_slli_epi32(_mm512_castps_si512(shifted_n), 23)));
}

TANDEM_INLINE __m128 FoldTo4(F32 a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
}
TANDEM_INLINE float ReduceAdd(F32 a) {
  const __m128 four = FoldTo4(a);
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
TANDEM_INLINE void ReduceAdd4(const F32* a, float* out) {
  const __m128 a0 = FoldTo4(a[0]), a1 = FoldTo4(a[1]), a2 = FoldTo4(a[2]), a3 = FoldTo4(a[3]);
  const __m128 s01 = _mm_add_ps(_mm_unpacklo_ps(a0, a1), _mm_unpackhi_ps(a0, a1));  // a0[0]+a0[2], a1[0]+a1[2], a0[1]+a0[3], a1[1]+a1[3]
  const __m128 s23 = _mm_add_ps(_mm_unpacklo_ps(a2, a3), _mm_unpackhi_ps(a2, a3));
  _mm_storeu_ps(out, _mm_add_ps(_mm_movelh_ps(s01, s23), _mm_movehl_ps(s23, s01)));
}
TANDEM_INLINE float ReduceMax(F32 a) { return _mm512_reduce_max_ps(a); }
TANDEM_INLINE void StoreI8(int8_t* p, F32 value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(value)));
}
TANDEM_INLINE void Prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

using U8x64 = __m512i;
using I32x16 = __m512i;
using F32x16 = __m512;
struct I8Rows {
  __m512i magnitude;
  __mmask64 negative;
};
constexpr int32_t kI8Offset = 0;
struct I4Sums {
  __m512i v;  // 16 bits, two of each row
};
constexpr int kI4Dots = 8;  // 2 products of at most 15 * 127 each: 16 of them fit into 16 bits

TANDEM_INLINE U8x64 LoadU8x64(const uint8_t* p) { return _mm512_loadu_si512(p); }
TANDEM_INLINE U8x64 LowNibbles(U8x64 bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
TANDEM_INLINE U8x64 HighNibbles(U8x64 bytes) { return LowNibbles(_mm512_srli_epi16(bytes, 4)); }
TANDEM_INLINE I8Rows PrepareI8(U8x64 bytes) {
  const __m512i value = _mm512_xor_si512(bytes, _mm512_set1_epi8(-128));
  return {_mm512_abs_epi8(value), _mm512_movepi8_mask(value)};
}
TANDEM_INLINE I32x16 SetI32x16(int32_t value) { return _mm512_set1_epi32(value); }
TANDEM_INLINE __m512i Four(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, sizeof four);
  return _mm512_set1_epi32(four);
}
TANDEM_INLINE __m512i AddPairs(__m512i sums, __m512i pairs) { return _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1))); }
TANDEM_INLINE I4Sums DotI4(U8x64 rows, const int8_t* x) { return {_mm512_maddubs_epi16(rows, Four(x))}; }
TANDEM_INLINE I4Sums AddDotI4(I4Sums sums, U8x64 rows, const int8_t* x) {
  return {_mm512_add_epi16(sums.v, _mm512_maddubs_epi16(rows, Four(x)))};
}
TANDEM_INLINE I32x16 AddI4Sums(I32x16 sums, I4Sums i4_sums) { return AddPairs(sums, i4_sums.v); }
// |w| * (x with w's sign): the sums of pairs, at most 2 * 128 * 127, do not saturate.
TANDEM_INLINE I32x16 DotI8(I32x16 sums, I8Rows rows, const int8_t* x) {
  const __m512i four = Four(x);
  return AddPairs(sums, _mm512_maddubs_epi16(rows.magnitude, _mm512_mask_sub_epi8(four, rows.negative, _mm512_setzero_si512(), four)));
}
TANDEM_INLINE F32x16 Load16(const float* p) { return Load(p); }
TANDEM_INLINE F32x16 LoadHalf16(const uint16_t* p) { return LoadHalf(p); }
TANDEM_INLINE void Store16(float* p, F32x16 value) { Store(p, value); }
TANDEM_INLINE F32x16 AddScaled(F32x16 y, I32x16 sums, F32x16 w_scale, float x_scale) {
  return Add(y, Mul(_mm512_cvtepi32_ps(sums), Mul(w_scale, Set1(x_scale))));
}

}  // namespace tandem::avx512
