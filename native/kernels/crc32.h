// CRC-32 as zip archives have it: reflected, polynomial 0x04c11db7, all ones before and after.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tandem {

// Of the bytes that `previous` is of, followed by these; 0 is of none.
uint32_t Crc32(const uint8_t* bytes, size_t count, uint32_t previous);

// The definition, bit by bit.
uint32_t Crc32Ref(const uint8_t* bytes, size_t count, uint32_t previous);

}  // namespace tandem
