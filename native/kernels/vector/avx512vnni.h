// avx512.h's operations, with products of bytes by VNNI. Include it only where that is enabled (each_isa.inc does so).
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/vector/avx512.h"

namespace tandem::avx512vnni {

using namespace avx512;

using I8Rows = __m512i;
constexpr int32_t kI8Offset = 128;

TANDEM_INLINE I8Rows PrepareI8(U8x64 bytes) { return bytes; }
TANDEM_INLINE I32x16 DotI4(I32x16 sums, U8x64 low, U8x64 high, const int8_t* x) {
  return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sums, low, Four(x)), high, Four(x + 4));
}
TANDEM_INLINE I32x16 DotI8(I32x16 sums, I8Rows rows, const int8_t* x) { return _mm512_dpbusd_epi32(sums, rows, Four(x)); }

}  // namespace tandem::avx512vnni
