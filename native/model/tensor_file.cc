#include "model/tensor_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "core/error.h"
#include "core/file_hints.h"

namespace tandem {
namespace {

// What the kernel is told to fetch while a block is worked on: as many bytes as the block has, so far behind it. Tensors lie in a file in the order in which
// they are read, so it goes from one to the next.
constexpr int64_t kReadAhead = 8 << 20;
constexpr int64_t kLeastHint = 64 << 10;
// Columns of rows are read with what is between them, unless that is more than so many times as much.
constexpr int64_t kMostSkipped = 4;
constexpr int64_t kPieceBytes = 256 << 10;

[[noreturn]] void Fail(const TensorSource& tensor, const std::string& what) {
  throw Error(ErrorCode::kCheckpoint, "tensor " + tensor.name + ": " + what);
}

}  // namespace

int64_t TensorBytes(const TensorSource& tensor) {
  int64_t bytes = TensorTypeBytes(tensor.type);
  for (const int64_t size : tensor.shape) {
    if (size < 0 || __builtin_mul_overflow(bytes, size, &bytes)) return -1;
  }
  return bytes;
}

const char* TensorTypeName(TensorType type) {
  const char* names[] = {"F32", "F16", "I8", "U8"};
  return names[static_cast<int>(type)];
}

int64_t TensorTypeBytes(TensorType type) {
  const int64_t bytes[] = {4, 2, 1, 1};
  return bytes[static_cast<int>(type)];
}

std::string Describe(TensorType type, const std::vector<int64_t>& shape) {
  std::string text = std::string(TensorTypeName(type)) + " [";
  for (size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + "]";
}

TensorFiles::TensorFiles(std::vector<TensorSource> tensors) {
  try {
    for (TensorSource& tensor : tensors) {
      Open(tensor);
      const std::string name = tensor.name;
      const auto [at, inserted] = tensors_.emplace(name, std::move(tensor));
      if (!inserted) Fail(at->second, "is listed twice");
    }
  } catch (...) {
    for (const auto& file : files_) close(file.second.descriptor);
    throw;
  }
}

TensorFiles::~TensorFiles() {
  for (const auto& file : files_) close(file.second.descriptor);
}

void TensorFiles::Open(const TensorSource& tensor) {
  auto at = files_.find(tensor.file);
  if (at == files_.end()) {
    const int descriptor = open(tensor.file.c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor < 0) Fail(tensor, "file " + tensor.file + " cannot be opened: " + std::strerror(errno));
    struct stat status;
    if (fstat(descriptor, &status) != 0 || !S_ISREG(status.st_mode)) {
      close(descriptor);
      Fail(tensor, tensor.file + " is not a regular file");
    }
    at = files_.emplace(tensor.file, File{descriptor, static_cast<int64_t>(status.st_size)}).first;
  }
  const int64_t bytes = TensorBytes(tensor), file_bytes = at->second.bytes;
  if (bytes < 0) Fail(tensor, "shape " + Describe(tensor.type, tensor.shape) + " is too large");
  if (tensor.offset < 0 || bytes > file_bytes || tensor.offset > file_bytes - bytes) {
    Fail(tensor, Describe(tensor.type, tensor.shape) + " at byte " + std::to_string(tensor.offset) + " does not fit " + tensor.file + ", which has " +
                     std::to_string(file_bytes) + " bytes");
  }
}

const TensorSource* TensorFiles::Find(const std::string& name) const {
  const auto at = tensors_.find(name);
  return at == tensors_.end() ? nullptr : &at->second;
}

void TensorFiles::ReadRows(const TensorSource& tensor, int64_t first_row, int64_t rows, int64_t column_byte, int64_t bytes, void* out,
                           int64_t out_stride) const {
  const int64_t row_bytes = tensor.shape.empty() || tensor.shape[0] == 0 ? 0 : TensorBytes(tensor) / tensor.shape[0];
  const int64_t begin = tensor.offset + first_row * row_bytes, length = rows * row_bytes;
  if (length >= kLeastHint) HintRead(files_.at(tensor.file).descriptor, begin + kReadAhead, length);
  if (bytes == row_bytes && out_stride == bytes) {
    ReadAt(tensor, begin, out, rows * bytes);
    return;
  }
  const auto row_of = [&](int64_t i) { return static_cast<char*>(out) + i * out_stride; };
  if (bytes * kMostSkipped < row_bytes) {
    for (int64_t i = 0; i < rows; ++i) ReadAt(tensor, begin + i * row_bytes + column_byte, row_of(i), bytes);
    return;
  }
  // One call for many rows, what is not wanted of them included.
  const int64_t rows_at_once = std::max<int64_t>(1, std::min(rows, kPieceBytes / std::max<int64_t>(row_bytes, 1)));
  std::vector<char> piece(static_cast<size_t>(rows_at_once * row_bytes));
  for (int64_t first = 0; first < rows; first += rows_at_once) {
    const int64_t count = std::min(rows_at_once, rows - first);
    ReadAt(tensor, begin + first * row_bytes, piece.data(), count * row_bytes);
    for (int64_t i = 0; i < count; ++i) std::memcpy(row_of(first + i), piece.data() + i * row_bytes + column_byte, static_cast<size_t>(bytes));
  }
}

void TensorFiles::ReadAt(const TensorSource& tensor, int64_t offset, void* out, int64_t bytes) const {
  constexpr int64_t kMost = int64_t{1} << 30;  // of one system call
  const int descriptor = files_.at(tensor.file).descriptor;
  for (int64_t done = 0; done < bytes;) {
    const ssize_t n = pread(descriptor, static_cast<char*>(out) + done, static_cast<size_t>(std::min(bytes - done, kMost)), offset + done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) Fail(tensor, "file " + tensor.file + " cannot be read: " + std::strerror(errno));
    if (n == 0) Fail(tensor, "file " + tensor.file + " became shorter while it was read");
    done += n;
  }
}

}  // namespace tandem
