// Linear layers y = x W^T + b on the GPU: fp16 activations, fp16, INT8 or INT4 weights in the order in which tensor cores take them, fp32 sums.
//
// One order of additions for each weight, whatever m and the kernel that runs: the columns (in chunks of 64) are cut into `parts`; a part is one chain of
// mma.m16n8k16 in the order of the columns; the parts are added one after the other, then the bias. So a row of y has the same bits alone and among many.
// An mma's own rounding is the hardware's.
//
// Where scales go in:
//   kPerPart   every part lies within one scale group: integers are multiplied, and the fp32 sum of a part by its scale. GLM-130B's own groups (a rank's
//              share of the columns) and whole-row groups.
//   kPerChunk  groups end at multiples of 64 columns, but within parts (groups of 128): a weight becomes half(q * scale), as GLM-130B's own code has it.
//   kNone      all else (groups that end within a chunk) is packed as half(q * scale), and fp16 as it is.
#pragma once

#include <cstdint>

#include "kernels/cuda/device.h"
#include "kernels/linear.h"

namespace tandem::cuda {

enum class WeightScaling { kNone, kPerPart, kPerChunk };

// One rank's share of a linear layer's weight on the device, [rows, cols]; owns nothing.
struct DeviceWeight {
  WeightType source = WeightType::kF16;  // of the rows that PackRows gets
  WeightType type = WeightType::kF16;    // packed: kF16, kI8 or kI4
  WeightScaling scaling = WeightScaling::kNone;
  int64_t rows = 0;
  int64_t cols = 0;
  // The source's (LinearWeight).
  int64_t groups = 0;
  int64_t group_size = 0;
  int64_t group_offset = 0;
  int64_t parts = 1;     // 1, 2, 4 or 8
  void* data = nullptr;  // device memory, DeviceWeightBytes(), 256-byte aligned
};

// What becomes of `weight` on the device, without data: its memory is the caller's to provide. Looks at types and shapes only.
// Throws kInvalidArgument for a shape without rows or columns and for groups that CheckWeight refuses.
DeviceWeight DescribeDeviceWeight(const LinearWeight& weight);

int64_t DeviceWeightBytes(const DeviceWeight& weight);
// The part of them that a product reads: without what pads small matrices.
int64_t DeviceWeightReadBytes(const DeviceWeight& weight);

// Packs rows [first_row, first_row + rows).
//   first_row: a multiple of 16; rows: also, unless they are the matrix's last
//   staged: device memory, row-major in the source's type (LinearWeight's layouts), row_stride bytes from row to row, aligned for its elements
//   staged_scales: device memory, fp16 [rows, groups] of these rows; null for unquantised sources
void PackRows(const DeviceWeight& weight, int64_t first_row, int64_t rows, const void* staged, int64_t row_stride, const uint16_t* staged_scales, Stream stream);

// Fills a weight with finite values from the seed, of a magnitude of about 1 / sqrt(cols) so that activations stay what they are.
void RandomWeight(const DeviceWeight& weight, uint64_t seed, Stream stream);

// y[i, o] = bias[o] + sum_c x[i, c] W[o, c]
//   x: [m, cols] fp16, rows x_stride elements apart, a multiple of 64; columns up to the next multiple of 64 hold zeros; 16-byte aligned
//   bias: [rows] fp32 or null; y: [m, rows] fp16 or fp32, rows y_stride elements apart, must not overlap x
//   scratch: LinearScratchBytes() of device memory, 256-byte aligned; null: the same bits, many rows at half the speed on GPUs with wgmma
void Linear(const DeviceWeight& weight, const __half* x, int64_t m, int64_t x_stride, const float* bias, __half* y, int64_t y_stride, Stream stream,
            void* scratch = nullptr);
void Linear(const DeviceWeight& weight, const __half* x, int64_t m, int64_t x_stride, const float* bias, float* y, int64_t y_stride, Stream stream,
            void* scratch = nullptr);

// Enough for up to max_m rows of x, on any device; it grows with max_m and the weight's columns alone.
int64_t LinearScratchBytes(const DeviceWeight& weight, int64_t max_m);

// y[i, :] = half(W[tokens[i] - first_token, :]) where first_token <= tokens[i] < first_token + table.rows, else zeros
//   tokens: [m] on the device; y: [m, table.cols] fp16, rows y_stride elements apart, a multiple of 8; 16-byte aligned
void Embed(const DeviceWeight& table, uint32_t first_token, const uint32_t* tokens, int64_t m, __half* y, int64_t y_stride, Stream stream);

}  // namespace tandem::cuda
