#include "core/file_hints.h"

#include <fcntl.h>

#include <algorithm>

namespace tandem {

void HintRead(int fd, int64_t offset, int64_t length) {
#if defined(__linux__)
  // Linux takes no more of one call than it would read ahead by itself, which is 128 KiB where nobody changed it.
  constexpr int64_t kStep = 128 * 1024;
  for (int64_t done = 0; done < length; done += kStep) posix_fadvise(fd, offset + done, std::min(kStep, length - done), POSIX_FADV_WILLNEED);
#else
  static_cast<void>(fd), static_cast<void>(offset), static_cast<void>(length);
#endif
}

void HintWritten(int fd, int64_t offset, int64_t length) {
#if defined(__linux__)
  sync_file_range(fd, offset, length, SYNC_FILE_RANGE_WRITE);
#else
  static_cast<void>(fd), static_cast<void>(offset), static_cast<void>(length);
#endif
}

}  // namespace tandem
