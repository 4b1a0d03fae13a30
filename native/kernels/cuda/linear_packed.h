// How a packed weight lies in device memory, and how kernels make tensor-core operands of it.
//
// The weight is the A operand of mma.m16n8k16: 16 output rows by 16 columns; 8 tokens are the n of B. Memory is, for each tile of 16 rows and each chunk of
// 64 columns, kLaneVectors vectors of 16 bytes for each of a warp's 32 lanes, [row tile][chunk][vector][lane]: a warp loads 512 contiguous bytes at once.
// Four mma make up a chunk. Lane 4 g + t owns rows g and g + 8 and the columns 16 t .. 16 t + 15 of the chunk; mma i takes columns 16 t + 4 i + {0, 1} as
// its k = 2 t, 2 t + 1 and 16 t + 4 i + {2, 3} as its k = 2 t + 8, 2 t + 9. The order of k within a chunk thus is not the columns', but it is the same for
// both operands, and a lane's B operands are 32 contiguous bytes of a row of x: no ldmatrix.
//
// Operand register a[j], half e, of mma i: row g + 8 (j % 2), column 16 t + 4 i + 2 (j / 2) + e. It lies
//   FP16: in vector i, word j, half e
//   INT8: in vector i / 2, word 2 (i % 2) + j / 2, byte 2 (j % 2) + e, as q + 128
//   INT4: in word i, nibble j + 4 e, as q + 8
//
// Behind the weights lie the scales, [part or group][row tile][8] words: the fp16 scales of row g and, in the high half, g + 8.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/cuda/instructions.h"
#include "kernels/cuda/linear.h"

namespace tandem::cuda {

constexpr int kTileRows = 16;
constexpr int kChunkColumns = 64;
constexpr int kTileRowPadding = 4;  // row tiles are padded to a multiple of it, so that a warp's tiles are all there

template <WeightType kType>
constexpr int kLaneVectors = kType == WeightType::kI4 ? 1 : kType == WeightType::kI8 ? 2 : 4;
inline int LaneVectors(WeightType type) { return type == WeightType::kI4 ? 1 : type == WeightType::kI8 ? 2 : 4; }

// A DeviceWeight as kernels take it.
struct PackedView {
  const uint4* data;
  const uint32_t* scales;
  int rows;
  int row_tiles;
  int chunks;
  int parts;
  // kPerChunk: the scale of chunk c is in block (c + group_offset_chunks) / group_chunks.
  int group_chunks;
  int group_offset_chunks;
};

PackedView ViewOf(const DeviceWeight& weight);

// Blocks of scales: parts or groups.
int64_t ScaleBlocks(const DeviceWeight& weight);

// Part p of a weight is the chunks [PartBegin(p), PartBegin(p + 1)).
__host__ __device__ __forceinline__ int PartBegin(int chunks, int parts, int part) { return static_cast<int>(static_cast<int64_t>(chunks) * part / parts); }

__device__ __forceinline__ uint32_t Component(const uint4& vector, int i) { return i == 0 ? vector.x : i == 1 ? vector.y : i == 2 ? vector.z : vector.w; }

__device__ __forceinline__ __half2 AsHalf2(uint32_t bits) {
  __half2 value;
  std::memcpy(static_cast<void*>(&value), &bits, sizeof value);
  return value;
}
__device__ __forceinline__ uint32_t AsBits(const __half2& value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
__device__ __forceinline__ uint32_t Subtract(uint32_t pair, uint32_t constant) { return AsBits(__hsub2(AsHalf2(pair), AsHalf2(constant))); }
__device__ __forceinline__ uint32_t MultiplyPair(uint32_t pair, uint32_t factor) { return AsBits(__hmul2(AsHalf2(pair), AsHalf2(factor))); }

// a = the A operand of mma `i` (0..3, known at compile time) of a chunk. Quantised weights are the integers q, which halves hold exactly: a half between 1024
// and 2047 has an ulp of 1, so that integer bits put below the bits of 1024 are 1024 + q', in 16ths for the nibbles that stand 4 bits higher.
template <WeightType kType>
__device__ __forceinline__ void WeightOperand(const uint4 (&packed)[kLaneVectors<kType>], int i, uint32_t (&a)[4]) {
  if constexpr (kType == WeightType::kF16) {
    a[0] = packed[i].x;
    a[1] = packed[i].y;
    a[2] = packed[i].z;
    a[3] = packed[i].w;
  } else if constexpr (kType == WeightType::kI8) {
    constexpr uint32_t k1024 = 0x64646464u, k1152 = 0x64806480u;  // the high byte of 1024 is 0x64
    const uint32_t low = Component(packed[i / 2], i % 2 * 2), high = Component(packed[i / 2], i % 2 * 2 + 1);
    a[0] = Subtract(Prmt(low, k1024, 0x4140), k1152);
    a[1] = Subtract(Prmt(low, k1024, 0x4342), k1152);
    a[2] = Subtract(Prmt(high, k1024, 0x4140), k1152);
    a[3] = Subtract(Prmt(high, k1024, 0x4342), k1152);
  } else {
    constexpr uint32_t k1024 = 0x64006400u, k1032 = 0x64086408u, kSixteenth = 0x2c002c00u, kMinus72 = 0xd480d480u;
    const uint32_t word = Component(packed[0], i), upper = word >> 8;
    a[0] = Subtract(Lop3AndOr(word, 0x000f000fu, k1024), k1032);
    a[1] = AsBits(__hfma2(AsHalf2(Lop3AndOr(word, 0x00f000f0u, k1024)), AsHalf2(kSixteenth), AsHalf2(kMinus72)));
    a[2] = Subtract(Lop3AndOr(upper, 0x000f000fu, k1024), k1032);
    a[3] = AsBits(__hfma2(AsHalf2(Lop3AndOr(upper, 0x00f000f0u, k1024)), AsHalf2(kSixteenth), AsHalf2(kMinus72)));
  }
}

// kPerChunk: a *= the scales of its rows, rounded to fp16.
__device__ __forceinline__ void ScaleOperand(uint32_t scales, uint32_t (&a)[4]) {
  const uint32_t low = Prmt(scales, scales, 0x1010), high = Prmt(scales, scales, 0x3232);
  a[0] = MultiplyPair(a[0], low);
  a[1] = MultiplyPair(a[1], high);
  a[2] = MultiplyPair(a[2], low);
  a[3] = MultiplyPair(a[3], high);
}

// kPerPart: what a part adds to y, from the sum of its products. The functions that end a sum name their roundings: the compiler must not fuse a
// multiplication and an addition in one kernel and not in the other.
__device__ __forceinline__ void ScalePart(uint32_t scales, float (&sums)[4]) {
  const float low = __low2float(AsHalf2(scales)), high = __high2float(AsHalf2(scales));
  sums[0] = __fmul_rn(low, sums[0]);
  sums[1] = __fmul_rn(low, sums[1]);
  sums[2] = __fmul_rn(high, sums[2]);
  sums[3] = __fmul_rn(high, sums[3]);
}

// Where a product goes: y[token, row] for the rows there are.
struct Output {
  void* y;
  int64_t stride;
  const float* bias;
  int rows;
  bool is_half;
};

// Zero where there is none, for rows past the end too.
__device__ __forceinline__ float BiasOf(const Output& output, int row) { return output.bias != nullptr && row < output.rows ? __ldg(output.bias + row) : 0.0f; }

__device__ __forceinline__ void Store(const Output& output, int64_t token, int row, float sum, float bias) {
  if (row >= output.rows) return;
  sum = __fadd_rn(sum, bias);
  const int64_t place = token * output.stride + row;
  if (output.is_half) {
    static_cast<__half*>(output.y)[place] = __float2half_rn(sum);
  } else {
    static_cast<float*>(output.y)[place] = sum;
  }
}

}  // namespace tandem::cuda
