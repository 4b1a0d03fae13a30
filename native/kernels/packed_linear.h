// Linear layers y = x W^T + b whose INT8 or INT4 weights meet activations quantised to int8 (quantize_rows.h), so that the sums are integers.
#pragma once

#include <cstdint>

#include "core/cpu_features.h"
#include "core/thread_pool.h"
#include "kernels/linear.h"
#include "kernels/quantize_rows.h"

namespace tandem {

// A quantised LinearWeight in the order in which vectors read it; owns nothing.
//
// Rows lie in blocks of 16, the last one filled up with rows of scale 0; a block is contiguous. It holds the fp16 scales, [groups, 16], filled up to a
// multiple of 64 bytes, then segment by segment (ColumnSegments) vectors of 64 bytes of 16 rows, 4 bytes each, q stored without sign:
//   INT8: q + 128 of 4 columns;  INT4: q + 8 of 8 columns, k .. k+3 in the low nibbles and k+4 .. k+7 in the high ones
// The columns that fill up a segment to a multiple of 4 (8) meet zeros in x.
struct PackedWeight {
  WeightType type = WeightType::kI4;  // kI8 or kI4
  int64_t rows = 0;
  int64_t groups = 0;
  ColumnSegments segments;
  const uint8_t* data = nullptr;  // 64-byte aligned

  int64_t cols() const { return segments.cols; }
  int64_t ScaleBytes() const { return (groups * 2 * kBlockRows + 63) / 64 * 64; }
  int64_t BlockBytes() const { return ScaleBytes() + (type == WeightType::kI8 ? segments.cols_in_fours : segments.cols_in_eights / 2) * kBlockRows; }
  int64_t Bytes() const { return (rows + kBlockRows - 1) / kBlockRows * BlockBytes(); }

  static constexpr int64_t kBlockRows = 16;
};

// What PackRows makes of `from`, at `data` (which may be null, to learn Bytes()). Throws kInvalidArgument for a type or groups that cannot be packed.
PackedWeight DescribePacked(const LinearWeight& from, const void* data);

// Packs rows [begin, end) of `from`; `to` is where row 0 is packed, of PackedWeight::Bytes() bytes, 64-byte aligned. begin is a multiple of 16, end also
// or the last row's. Reads no other rows of `from`, writes no other bytes of `to`: ranges can be packed at the same time.
void PackRows(const LinearWeight& from, int64_t begin, int64_t end, void* to);

// y[i, o] = bias[o] + sum over segments of (sum over their columns of qx[i, c] * qw[o, c]) * (scale of w * scale of x)
//   quantized: of QuantizeRows with the same segments and m; y: [m, rows], rows y_stride floats apart; bias: [rows] or null
// The inner sums are exact; the outer ones are rounded to fp32 after each product and sum, in the order of the columns, beginning with the bias. So
// y[i, :] has the same bits whatever m, the other rows, the number of threads and the instruction set are. A NaN or an infinity in row i of x makes all
// of y[i, :] NaN.
void PackedLinear(Isa isa, const PackedWeight& weight, const void* quantized, int64_t m, const float* bias, float* y, int64_t y_stride, ThreadPool& pool);

// The definition, from the unpacked weight and fp32 activations x: [m, cols], rows x_stride floats apart. The same bits as PackedLinear.
void PackedLinearRef(const LinearWeight& weight, const float* x, int64_t m, int64_t x_stride, const float* bias, float* y, int64_t y_stride);

// out[c] = W[o, c], [cols]: the bits that LinearWeight defines
void DequantizeRow(const PackedWeight& weight, int64_t o, float* out);

}  // namespace tandem
