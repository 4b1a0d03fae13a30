// What the kernel should do with a file's bytes soon. Hints only: they wait for nothing, and nothing goes wrong where they have no effect.
#pragma once

#include <cstdint>

namespace tandem {

// Bytes [offset, offset + length) will be read: they are fetched into the page cache meanwhile.
void HintRead(int fd, int64_t offset, int64_t length);

// Bytes [offset, offset + length) were written and will stay: they go to the disk now, and not when much has piled up.
void HintWritten(int fd, int64_t offset, int64_t length);

}  // namespace tandem
