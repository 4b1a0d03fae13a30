// packed_linear.cc: y = x W^T + b of int8 activations and packed INT8 or INT4 weights. PackedLinearRef is the definition; the vector versions have its
// bits.
#include "kernels/packed_linear.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <string>

#include "core/error.h"
#include "core/half.h"

namespace tandem {

namespace {

constexpr int64_t kBlockRows = PackedWeight::kBlockRows;
// Below so many multiplications a thread costs more than it saves.
constexpr int64_t kMinMultiplications = 1 << 17;

// 4 bytes of a row to how a packed vector holds them. INT4: the nibbles of the columns 0..7 come as 10 32 54 76 (the high nibble is the earlier column),
// lowest byte first, and go as 40 51 62 73 (the high nibble is written first); adding 8 or 128 modulo 16 or 256 turns the sign bit over.
template <WeightType type>
uint32_t PackFour(uint32_t v) {
  if constexpr (type == WeightType::kI8) return v ^ 0x80808080u;
  v = ((v >> 4) & 0x0f0f0f0fu) | ((v & 0x0f0f0f0fu) << 4);
  v = (v & 0xff0000ffu) | ((v & 0x00ff0000u) >> 8) | ((v & 0x0000ff00u) << 8);
  v = (v & 0xf00ff00fu) | ((v & 0x0f000f00u) >> 4) | ((v & 0x00f000f0u) << 4);
  return v ^ 0x88888888u;
}

// The vector of `bytes` <= 4 bytes of each of `rows` rows, row_stride apart. Called with constants where most of the work is.
template <WeightType type>
inline void PackVector(const uint8_t* from, int64_t row_stride, int64_t rows, size_t bytes, uint8_t* vector) {
  uint32_t fours[kBlockRows] = {};
  for (int64_t r = 0; r < rows; ++r) std::memcpy(fours + r, from + r * row_stride, bytes);
  for (int64_t r = 0; r < rows; ++r) fours[r] = PackFour<type>(fours[r]);
  std::memcpy(vector, fours, static_cast<size_t>(rows) * 4);
}

template <WeightType type>
void PackRowsOf(const LinearWeight& from, const PackedWeight& packed, int64_t begin, int64_t end, uint8_t* to) {
  constexpr int64_t kColumnsOfFour = type == WeightType::kI8 ? 4 : 8;
  for (int64_t o = begin; o < end; o += kBlockRows) {
    const int64_t rows = std::min(kBlockRows, end - o);
    const uint8_t* row = static_cast<const uint8_t*>(from.data) + o * from.row_stride;
    uint8_t* vector = to + o / kBlockRows * packed.BlockBytes() + packed.ScaleBytes();
    for (auto s = packed.segments.First(); s.begin < from.cols; s.Next()) {
      const uint8_t* columns = row + s.begin * 4 / kColumnsOfFour;
      int64_t left = s.length() * 4 / kColumnsOfFour;  // bytes of each row
      for (; left >= 4; left -= 4, columns += 4, vector += 64) {
        rows == kBlockRows ? PackVector<type>(columns, from.row_stride, kBlockRows, 4, vector) : PackVector<type>(columns, from.row_stride, rows, 4, vector);
      }
      if (left == 0) continue;
      PackVector<type>(columns, from.row_stride, rows, static_cast<size_t>(left), vector);
      vector += 64;
    }
  }
}

}  // namespace

PackedWeight DescribePacked(const LinearWeight& from, const void* data) {
  if (from.type != WeightType::kI8 && from.type != WeightType::kI4) {
    throw Error(ErrorCode::kInvalidArgument, "packed linear: only INT8 and INT4 weights can be packed");
  }
  CheckWeight(from);
  PackedWeight packed;
  packed.type = from.type;
  packed.rows = from.rows;
  packed.groups = from.groups;
  packed.segments = ColumnSegments(from.cols, from.group_size, from.group_offset);
  packed.data = static_cast<const uint8_t*>(data);
  return packed;
}

void PackRows(const LinearWeight& from, int64_t begin, int64_t end, void* to) {
  const PackedWeight packed = DescribePacked(from, to);
  uint8_t* bytes = static_cast<uint8_t*>(to);
  for (int64_t o = begin; o < (end + kBlockRows - 1) / kBlockRows * kBlockRows; ++o) {
    uint16_t* scales = reinterpret_cast<uint16_t*>(bytes + o / kBlockRows * packed.BlockBytes()) + o % kBlockRows;
    for (int64_t g = 0; g < from.groups; ++g) scales[g * kBlockRows] = o < from.rows ? from.scales[o * from.groups + g] : uint16_t{0};
  }
  from.type == WeightType::kI8 ? PackRowsOf<WeightType::kI8>(from, packed, begin, end, bytes)
                               : PackRowsOf<WeightType::kI4>(from, packed, begin, end, bytes);
}

void DequantizeRow(const PackedWeight& weight, int64_t o, float* out) {
  const uint8_t* block = weight.data + o / kBlockRows * weight.BlockBytes();
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(block) + o % kBlockRows;
  const uint8_t* vectors = block + weight.ScaleBytes() + o % kBlockRows * 4;
  for (auto s = weight.segments.First(); s.begin < weight.cols(); s.Next()) {
    const float scale = HalfToFloat(scales[s.group * kBlockRows]);
    if (weight.type == WeightType::kI8) {
      for (int64_t c = 0; c < s.length(); ++c) out[s.begin + c] = static_cast<float>(vectors[c / 4 * 64 + c % 4] - 128) * scale;
      vectors += (s.length() + 3) / 4 * 64;
    } else {
      for (int64_t c = 0; c < s.length(); ++c) {
        out[s.begin + c] = static_cast<float>(((vectors[c / 8 * 64 + c % 4] >> (c % 8 < 4 ? 0 : 4)) & 15) - 8) * scale;
      }
      vectors += (s.length() + 7) / 8 * 64;
    }
  }
}

void PackedLinearRef(const LinearWeight& weight, const float* x, int64_t m, int64_t x_stride, const float* bias, float* y, int64_t y_stride) {
  const ColumnSegments segments(weight.cols, weight.group_size, weight.group_offset);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t o = 0; o < weight.rows; ++o) y[i * y_stride + o] = bias == nullptr ? 0.0f : bias[o];
    for (auto s = segments.First(); s.begin < weight.cols; s.Next()) {
      int8_t q[kSegmentColumns];
      float scale;
      QuantizeSegmentRef(x + i * x_stride + s.begin, s.length(), q, &scale);
      for (int64_t o = 0; o < weight.rows; ++o) {
        int32_t sum = 0;
        for (int64_t c = 0; c < s.length(); ++c) sum += q[c] * QuantizedAt(weight, o, s.begin + c);
        y[i * y_stride + o] += static_cast<float>(sum) * (ScaleAt(weight, o, s.begin) * scale);
      }
    }
  }
}

}  // namespace tandem

#define TANDEM_VECTOR_VNNI
#define TANDEM_VECTOR_FILE "kernels/packed_linear_vector.inc"
#include "kernels/vector/each_isa.inc"

namespace tandem {

void PackedLinear(Isa isa, const PackedWeight& weight, const void* quantized, int64_t m, const float* bias, float* y, int64_t y_stride, ThreadPool& pool) {
  const auto packed_blocks = TANDEM_SELECT(isa, PackedBlocks);
  if (m <= 0) return;
  const auto body = [&](int64_t begin, int64_t end, int) {
    packed_blocks(weight, begin, end, static_cast<const uint8_t*>(quantized), m, bias, y, y_stride);
  };
  const int64_t block_cost = std::max<int64_t>(m * weight.cols() * kBlockRows, 1);
  pool.ParallelFor((weight.rows + kBlockRows - 1) / kBlockRows, std::max<int64_t>(1, kMinMultiplications / block_cost), std::cref(body));
}

}  // namespace tandem
