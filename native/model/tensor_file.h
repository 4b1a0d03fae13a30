// Tensors of a model store: where they lie, and checked reads of rows and columns out of them.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

namespace tandem {

enum class TensorType { kF32, kF16, kI8, kU8 };

const char* TensorTypeName(TensorType type);
int64_t TensorTypeBytes(TensorType type);

// A whole, unsplit tensor: little-endian, dense, row-major.
struct TensorSource {
  std::string name;
  std::string file;
  int64_t offset = 0;  // of its first byte in `file`
  TensorType type = TensorType::kF32;
  std::vector<int64_t> shape;
};

// "F16 [3, 4]"
std::string Describe(TensorType type, const std::vector<int64_t>& shape);

// Bytes of the whole tensor, or -1 if they do not fit 63 bits.
int64_t TensorBytes(const TensorSource& tensor);

// The tensors of a store by name, their files open. Reads are safe from several threads. Errors are kCheckpoint and name the tensor.
//
// Read, not mapped: a file that gets shorter under a mapping kills the process; a short read is an error like any other.
class TensorFiles {
 public:
  // Opens every file and checks that every tensor lies inside its own.
  explicit TensorFiles(std::vector<TensorSource> tensors);
  ~TensorFiles();
  TensorFiles(const TensorFiles&) = delete;
  TensorFiles& operator=(const TensorFiles&) = delete;

  const TensorSource* Find(const std::string& name) const;
  const std::unordered_map<std::string, TensorSource>& tensors() const { return tensors_; }

  // Copies bytes [column_byte, column_byte + bytes) of rows [first_row, first_row + rows) to `out`, row i to out + i * out_stride. A row is everything
  // but the first dimension. The range lies inside the tensor: the caller has checked its shape.
  void ReadRows(const TensorSource& tensor, int64_t first_row, int64_t rows, int64_t column_byte, int64_t bytes, void* out, int64_t out_stride) const;

 private:
  void Open(const TensorSource& tensor);
  void ReadAt(const TensorSource& tensor, int64_t offset, void* out, int64_t bytes) const;

  struct File {
    int descriptor;
    int64_t bytes;
  };
  std::map<std::string, File> files_;
  std::unordered_map<std::string, TensorSource> tensors_;
};

}  // namespace tandem
