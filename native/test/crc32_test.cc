#include "kernels/crc32.h"

#include "test/kernel_test.h"

namespace tandem::test {

TEST(crc32_of_the_check_value) {
  const auto* digits = reinterpret_cast<const uint8_t*>("123456789");
  CHECK_EQ(Crc32(digits, 9, 0), 0xcbf43926u);  // the catalogue's value for CRC-32/ISO-HDLC
  CHECK_EQ(Crc32Ref(digits, 9, 0), 0xcbf43926u);
}

TEST(crc32_is_its_definition_for_any_length_alignment_and_cut) {
  std::mt19937 generator(7);
  std::vector<uint8_t> bytes(3000);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(generator());
  for (const int64_t length : RaggedSizes()) {
    const size_t count = static_cast<size_t>(length);
    for (const size_t offset : {0u, 1u, 7u, 16u}) {
      const uint8_t* at = bytes.data() + offset;
      const uint32_t expected = Crc32Ref(at, count, 0x12345678u);
      CHECK_EQ(Crc32(at, count, 0x12345678u), expected);
      CHECK_EQ(Crc32(at + count / 3, count - count / 3, Crc32(at, count / 3, 0x12345678u)), expected);
    }
  }
}

}  // namespace tandem::test
