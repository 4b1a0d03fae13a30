// avx512.h's operations, with products of bytes by VNNI. Include it only where that is enabled (each_isa.inc does so).
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/vector/avx512.h"

namespace tandem::avx512vnni {

using namespace avx512;

using I8Rows = __m512i;
constexpr int32_t kI8Offset = 128;

struct I4Sums {
  __m512i v;  // 32 bits, one of each row
};
constexpr int kI4Dots = 32;  // any number; a segment has 32

TANDEM_INLINE I8Rows PrepareI8(U8x64 bytes) { return bytes; }
TANDEM_INLINE I4Sums DotI4(U8x64 rows, const int8_t* x) { return {_mm512_dpbusd_epi32(_mm512_setzero_si512(), rows, Four(x))}; }
TANDEM_INLINE I4Sums AddDotI4(I4Sums sums, U8x64 rows, const int8_t* x) { return {_mm512_dpbusd_epi32(sums.v, rows, Four(x))}; }
TANDEM_INLINE I32x16 AddI4Sums(I32x16 sums, I4Sums i4_sums) { return _mm512_add_epi32(sums, i4_sums.v); }
TANDEM_INLINE I32x16 DotI8(I32x16 sums, I8Rows rows, const int8_t* x) { return _mm512_dpbusd_epi32(sums, rows, Four(x)); }

}  // namespace tandem::avx512vnni
