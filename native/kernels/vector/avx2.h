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
TANDEM_INLINE void Prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace tandem::avx2
