// generic.h's operations with AVX2, FMA and F16C: 8 lanes. Include it only where these are enabled (each_isa.inc does that).
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace tandem::avx2 {

using F32 = __m256;
constexpr int kLanes = 8;
constexpr int kRegisters = 16;

TANDEM_INLINE F32 Set1(float value) { return _mm256_set1_ps(value); }
TANDEM_INLINE F32 Zero() { return _mm256_setzero_ps(); }
TANDEM_INLINE F32 Load(const float* p) { return _mm256_loadu_ps(p); }
TANDEM_INLINE void Store(float* p, F32 value) { _mm256_storeu_ps(p, value); }
TANDEM_INLINE __m256i PartialMask(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
TANDEM_INLINE F32 LoadPartial(const float* p, int64_t count) { return _mm256_maskload_ps(p, PartialMask(count)); }
TANDEM_INLINE void StorePartial(float* p, F32 value, int64_t count) { _mm256_maskstore_ps(p, PartialMask(count), value); }
TANDEM_INLINE float HalfScalar(uint16_t half) { return _cvtsh_ss(half); }
TANDEM_INLINE F32 LoadHalf(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
TANDEM_INLINE F32 LoadHalfPartial(const uint16_t* p, int64_t count) {
  uint16_t lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return LoadHalf(lanes);
}
TANDEM_INLINE void StoreHalf(uint16_t* p, F32 value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
TANDEM_INLINE void StoreHalfPartial(uint16_t* p, F32 value, int64_t count) {
  uint16_t lanes[kLanes];
  StoreHalf(lanes, value);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}
TANDEM_INLINE F32 LoadI8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

TANDEM_INLINE F32 I4Scale(float scale) { return Set1(scale); }
// Each lane shifts its nibble of the 4 bytes to the top and back, so that it is sign-extended. Element 2j lies above element 2j + 1.
TANDEM_INLINE F32 LoadI4(const uint8_t* p, F32 scale) {
  int32_t bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  const __m256i top = _mm256_sllv_epi32(_mm256_set1_epi32(bytes), _mm256_setr_epi32(24, 28, 16, 20, 8, 12, 0, 4));
  return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_srai_epi32(top, 28)), scale);
}

TANDEM_INLINE F32 Add(F32 a, F32 b) { return _mm256_add_ps(a, b); }
TANDEM_INLINE F32 Sub(F32 a, F32 b) { return _mm256_sub_ps(a, b); }
TANDEM_INLINE F32 Mul(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
TANDEM_INLINE F32 Div(F32 a, F32 b) { return _mm256_div_ps(a, b); }
TANDEM_INLINE F32 Fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
TANDEM_INLINE F32 Less(F32 a, F32 b, F32 then, F32 otherwise) { return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
TANDEM_INLINE F32 Max(F32 a, F32 b) { return _mm256_max_ps(a, b); }
TANDEM_INLINE F32 Abs(F32 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
TANDEM_INLINE F32 ScaleByPow2(F32 a, F32 shifted_n) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_castps_si256(shifted_n), 23)));
}

TANDEM_INLINE __m128 FoldTo4(F32 a) { return _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)); }
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
TANDEM_INLINE float ReduceMax(F32 a) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
TANDEM_INLINE void StoreI8(int8_t* p, F32 value) {
  const __m256i wide = _mm256_cvtps_epi32(value);
  const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(half, half));
}
TANDEM_INLINE void Prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// Two vectors: members rather than an array, which GCC keeps in memory where asm is about.
struct I32x16 {
  __m256i a, b;
};
using U8x64 = I32x16;
struct F32x16 {
  __m256 a, b;
};
struct I8Rows {
  U8x64 magnitude, value;
};
constexpr int32_t kI8Offset = 0;
using I4Sums = I32x16;      // 16 bits, two of each row
constexpr int kI4Dots = 8;  // 2 products of at most 15 * 127 each: 16 of them fit into 16 bits

TANDEM_INLINE U8x64 LoadU8x64(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
TANDEM_INLINE U8x64 LowNibbles(U8x64 bytes) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(bytes.a, mask), _mm256_and_si256(bytes.b, mask)};
}
TANDEM_INLINE U8x64 HighNibbles(U8x64 bytes) { return LowNibbles({_mm256_srli_epi16(bytes.a, 4), _mm256_srli_epi16(bytes.b, 4)}); }
TANDEM_INLINE I8Rows PrepareI8(U8x64 bytes) {
  const __m256i top = _mm256_set1_epi8(-128);
  const __m256i a = _mm256_xor_si256(bytes.a, top), b = _mm256_xor_si256(bytes.b, top);
  return {{_mm256_abs_epi8(a), _mm256_abs_epi8(b)}, {a, b}};
}
TANDEM_INLINE I32x16 SetI32x16(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
TANDEM_INLINE __m256i Four(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, sizeof four);
  return _mm256_set1_epi32(four);
}
// sums + _mm256_maddubs_epi16(rows, x). Of the intrinsics GCC makes many products before their sums, until 16 registers do not hold them.
TANDEM_INLINE __m256i AddProducts(__m256i sums, __m256i rows, __m256i x) {
  __m256i product;
  asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sums), "=&x"(product) : "x"(rows), "x"(x));
  return sums;
}
TANDEM_INLINE I4Sums DotI4(U8x64 rows, const int8_t* x) {
  const __m256i four = Four(x);
  return {_mm256_maddubs_epi16(rows.a, four), _mm256_maddubs_epi16(rows.b, four)};
}
TANDEM_INLINE I4Sums AddDotI4(I4Sums sums, U8x64 rows, const int8_t* x) {
  const __m256i four = Four(x);
  return {AddProducts(sums.a, rows.a, four), AddProducts(sums.b, rows.b, four)};
}
TANDEM_INLINE __m256i AddPairs(__m256i sums, __m256i pairs) { return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))); }
TANDEM_INLINE I32x16 AddI4Sums(I32x16 sums, I4Sums i4_sums) { return {AddPairs(sums.a, i4_sums.a), AddPairs(sums.b, i4_sums.b)}; }
// |w| * (x with w's sign): the sums of pairs, at most 2 * 128 * 127, do not saturate.
TANDEM_INLINE I32x16 DotI8(I32x16 sums, I8Rows rows, const int8_t* x) {
  const __m256i four = Four(x);
  return {AddPairs(sums.a, _mm256_maddubs_epi16(rows.magnitude.a, _mm256_sign_epi8(four, rows.value.a))),
          AddPairs(sums.b, _mm256_maddubs_epi16(rows.magnitude.b, _mm256_sign_epi8(four, rows.value.b)))};
}
TANDEM_INLINE F32x16 Load16(const float* p) { return {Load(p), Load(p + 8)}; }
TANDEM_INLINE F32x16 LoadHalf16(const uint16_t* p) { return {LoadHalf(p), LoadHalf(p + 8)}; }
TANDEM_INLINE void Store16(float* p, F32x16 value) {
  Store(p, value.a);
  Store(p + 8, value.b);
}
TANDEM_INLINE F32 AddScaled8(F32 y, __m256i sums, F32 w_scale, F32 x_scale) { return Add(y, Mul(_mm256_cvtepi32_ps(sums), Mul(w_scale, x_scale))); }
TANDEM_INLINE F32x16 AddScaled(F32x16 y, I32x16 sums, F32x16 w_scale, float x_scale) {
  const F32 scale = Set1(x_scale);
  return {AddScaled8(y.a, sums.a, w_scale.a, scale), AddScaled8(y.b, sums.b, w_scale.b, scale)};
}

}  // namespace tandem::avx2
