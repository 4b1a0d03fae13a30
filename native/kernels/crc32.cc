// crc32.cc: a table of 8 bytes at a time, and carry-less multiplication where the CPU has it (Gopal et al., "Fast CRC Computation for Generic Polynomials
// Using PCLMULQDQ Instruction", Intel 2009).
#include "kernels/crc32.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tandem {

namespace {

constexpr uint32_t kPolynomial = 0xedb88320u;  // reflected

using Tables = std::array<std::array<uint32_t, 256>, 8>;

// tables[k][b]: what byte b does to the checksum when k more bytes follow it.
constexpr Tables MakeTables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? kPolynomial : 0);
    tables[0][byte] = crc;
  }
  for (size_t k = 1; k < 8; ++k) {
    for (size_t byte = 0; byte < 256; ++byte) tables[k][byte] = (tables[k - 1][byte] >> 8) ^ tables[0][tables[k - 1][byte] & 255];
  }
  return tables;
}

constexpr Tables kTables = MakeTables();

// `crc` is inverted here and below.
uint32_t UpdateByTable(const uint8_t* bytes, size_t count, uint32_t crc) {
  for (; count >= 8; bytes += 8, count -= 8) {
    crc ^= bytes[0] | static_cast<uint32_t>(bytes[1]) << 8 | static_cast<uint32_t>(bytes[2]) << 16 | static_cast<uint32_t>(bytes[3]) << 24;
    crc = kTables[7][crc & 255] ^ kTables[6][(crc >> 8) & 255] ^ kTables[5][(crc >> 16) & 255] ^ kTables[4][crc >> 24] ^ kTables[3][bytes[4]] ^
          kTables[2][bytes[5]] ^ kTables[1][bytes[6]] ^ kTables[0][bytes[7]];
  }
  for (; count > 0; ++bytes, --count) crc = (crc >> 8) ^ kTables[0][(crc ^ *bytes) & 255];
  return crc;
}

#if defined(__x86_64__)
#define TANDEM_CLMUL __attribute__((target("pclmul,sse4.1")))

// x times the constants' halves, on to the next 16 bytes of its lane.
TANDEM_CLMUL inline __m128i Fold(__m128i x, __m128i constants, __m128i next) {
  return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(x, constants, 0x00), _mm_clmulepi64_si128(x, constants, 0x11)), next);
}

TANDEM_CLMUL inline __m128i Load16(const uint8_t* bytes) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)); }

// count: 64 at least, a multiple of 16. The constants are x^n mod the polynomial for the distances over which is folded, in the paper's notation k1 ...
TANDEM_CLMUL uint32_t UpdateByClmul(const uint8_t* bytes, size_t count, uint32_t crc) {
  const __m128i k1k2 = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4);
  const __m128i k3k4 = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
  const __m128i k5 = _mm_set_epi64x(0, 0x0163cd6124);
  const __m128i barrett = _mm_set_epi64x(0x01f7011641, 0x01db710641);
  const __m128i low32 = _mm_setr_epi32(~0, 0, ~0, 0);

  __m128i x0 = _mm_xor_si128(Load16(bytes), _mm_cvtsi32_si128(static_cast<int>(crc)));
  __m128i x1 = Load16(bytes + 16), x2 = Load16(bytes + 32), x3 = Load16(bytes + 48);
  for (bytes += 64, count -= 64; count >= 64; bytes += 64, count -= 64) {
    x0 = Fold(x0, k1k2, Load16(bytes));
    x1 = Fold(x1, k1k2, Load16(bytes + 16));
    x2 = Fold(x2, k1k2, Load16(bytes + 32));
    x3 = Fold(x3, k1k2, Load16(bytes + 48));
  }
  __m128i x = Fold(Fold(Fold(x0, k3k4, x1), k3k4, x2), k3k4, x3);
  for (; count >= 16; bytes += 16, count -= 16) x = Fold(x, k3k4, Load16(bytes));

  // 128 bits to 64, to 32 by Barrett reduction.
  x = _mm_xor_si128(_mm_srli_si128(x, 8), _mm_clmulepi64_si128(x, k3k4, 0x10));
  x = _mm_xor_si128(_mm_srli_si128(x, 4), _mm_clmulepi64_si128(_mm_and_si128(x, low32), k5, 0x00));
  __m128i quotient = _mm_clmulepi64_si128(_mm_and_si128(x, low32), barrett, 0x10);
  quotient = _mm_clmulepi64_si128(_mm_and_si128(quotient, low32), barrett, 0x00);
  return static_cast<uint32_t>(_mm_extract_epi32(_mm_xor_si128(x, quotient), 1));
}

bool HasClmul() {
  static const bool has = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
  return has;
}
#endif

}  // namespace

uint32_t Crc32(const uint8_t* bytes, size_t count, uint32_t previous) {
  uint32_t crc = ~previous;
#if defined(__x86_64__)
  if (count >= 64 && HasClmul()) {
    const size_t whole = count / 16 * 16;
    crc = UpdateByClmul(bytes, whole, crc);
    bytes += whole;
    count -= whole;
  }
#endif
  return ~UpdateByTable(bytes, count, crc);
}

uint32_t Crc32Ref(const uint8_t* bytes, size_t count, uint32_t previous) {
  uint32_t crc = ~previous;
  for (size_t i = 0; i < count; ++i) {
    crc ^= bytes[i];
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? kPolynomial : 0);
  }
  return ~crc;
}

}  // namespace tandem
