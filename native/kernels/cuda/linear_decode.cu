// linear_decode.cu: y = x W^T + b for up to 16 rows of x, at the speed at which memory gives the weights.
//
// A block of 8 warps makes (8 / parts) sets of kRowTiles tiles of output rows: a warp multiplies one part of the columns of one set. Weights come by cp.async
// into a ring of each lane's own in shared memory: no barrier, no registers for what is under way, which is 4 KB per warp and so 64 to 128 KB per processor,
// two to four times what hides the latency of its share of an H200's memory. Rows of x come from the L1 and L2 caches, straight as operands. The parts' sums
// meet in shared memory.
#include "kernels/cuda/linear_kernels.h"

namespace tandem::cuda {

namespace {

constexpr int kWarps = 8;
constexpr int kTokensPerTile = 8;

template <WeightType kType, int kTokenTiles, int kRowTiles>
struct DecodeShape {
  static constexpr int kVectors = kLaneVectors<kType>;
  static constexpr int kLoads = kRowTiles * kVectors;                          // of 16 bytes, for a chunk of all row tiles
  static constexpr int kSlots = (kLoads < 8 ? 8 / kLoads : 1) + 1;             // chunks: those under way and the one that is multiplied
  static constexpr int kSumStride = kRowTiles * kTileRows + 4;                 // 4: the lanes of a warp write to 32 banks
  static constexpr int kBlocksPerProcessor = kTokenTiles == 2 ? (kRowTiles == 4 ? 2 : 3) : kRowTiles == 4 ? 3 : 4;
  static constexpr size_t kRingBytes = size_t{kWarps} * kSlots * kLoads * kWarpSize * 16;
  static constexpr size_t kSumBytes = size_t{kWarps} * kTokensPerTile * kSumStride * sizeof(float);
  static constexpr size_t kSharedBytes = kRingBytes > kSumBytes ? kRingBytes : kSumBytes;
};

template <WeightType kType, WeightScaling kScaling, int kTokenTiles, int kRowTiles>
__global__ void __launch_bounds__(kWarps * kWarpSize, DecodeShape<kType, kTokenTiles, kRowTiles>::kBlocksPerProcessor)
    DecodeKernel(PackedView weight, const __half* __restrict__ x, int m, int64_t x_stride, Output output) {
  using Shape = DecodeShape<kType, kTokenTiles, kRowTiles>;
  constexpr int kVectors = Shape::kVectors, kSlots = Shape::kSlots;
  TANDEM_DYNAMIC_SHARED(uint4, shared);

  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int group = lane / 4, member = lane % 4;
  const int sets = kWarps / weight.parts, set = warp / weight.parts, part = warp % weight.parts;
  const int first_tile = (static_cast<int>(blockIdx.x) * sets + set) * kRowTiles;
  const bool has_tiles = first_tile < weight.row_tiles;
  const int begin = PartBegin(weight.chunks, weight.parts, part);
  const int count = has_tiles ? PartBegin(weight.chunks, weight.parts, part + 1) - begin : 0;

  const int64_t tile_stride = static_cast<int64_t>(weight.chunks) * (kVectors * kWarpSize);
  const uint4* weights = weight.data + first_tile * tile_stride + static_cast<int64_t>(begin) * (kVectors * kWarpSize) + lane;  // to be loaded next
  const __half* tokens = x + group * x_stride + static_cast<int64_t>(begin) * kChunkColumns + member * 16;
  uint4* const ring = shared + warp * (kSlots * Shape::kLoads * kWarpSize) + lane;

  float part_sums[kRowTiles][kTokenTiles][4] = {};
  // kPerChunk: the scales of the chunk that is multiplied, and how many chunks they still serve.
  const uint32_t* scales = weight.scales;
  int chunks_left = 0;
  if constexpr (kScaling == WeightScaling::kPerChunk) {
    const int from_first_group = begin + weight.group_offset_chunks;
    scales += (static_cast<int64_t>(from_first_group / weight.group_chunks) * weight.row_tiles + first_tile) * 8 + group;
    chunks_left = weight.group_chunks - from_first_group % weight.group_chunks;
  }

  const auto load_weights = [&](int slot) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        CpAsync16(ring + ((slot * kRowTiles + r) * kVectors + v) * kWarpSize, weights + r * tile_stride + v * kWarpSize, true);
      }
    }
    weights += kVectors * kWarpSize;
  };
#pragma unroll
  for (int slot = 0; slot < kSlots - 1; ++slot) {
    if (slot < count) load_weights(slot);
    CpAsyncCommit();
  }
  int slot = 0;
#pragma unroll 1
  for (int chunk = 0; chunk < count; ++chunk) {
    // These mostly come from L1, while weights become operands.
    uint4 operands[kTokenTiles][2];
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      const bool valid = n * kTokensPerTile + group < m;
      const uint4* from = reinterpret_cast<const uint4*>(tokens + n * kTokensPerTile * x_stride);
      operands[n][0] = valid ? __ldg(from) : make_uint4(0, 0, 0, 0);
      operands[n][1] = valid ? __ldg(from + 1) : make_uint4(0, 0, 0, 0);
    }
    tokens += kChunkColumns;
    CpAsyncWait<kSlots - 2>();  // of this chunk, for this lane, which is the only one to read it
    if (chunk + kSlots - 1 < count) load_weights(slot == 0 ? kSlots - 1 : slot - 1);  // where the chunk before was, whose products are under way
    CpAsyncCommit();
    if constexpr (kScaling == WeightScaling::kPerChunk) {
      if (chunks_left == 0) {
        scales += static_cast<int64_t>(weight.row_tiles) * 8;
        chunks_left = weight.group_chunks;
      }
      --chunks_left;
    }
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      uint4 packed[kVectors];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) packed[v] = ring[((slot * kRowTiles + r) * kVectors + v) * kWarpSize];
      uint32_t tile_scales = 0;
      if constexpr (kScaling == WeightScaling::kPerChunk) tile_scales = __ldg(scales + r * 8);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t a[4];
        WeightOperand<kType>(packed, i, a);
        if constexpr (kScaling == WeightScaling::kPerChunk) ScaleOperand(tile_scales, a);
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
          const uint32_t b[2] = {Component(operands[n][i / 2], i % 2 * 2), Component(operands[n][i / 2], i % 2 * 2 + 1)};
          MmaM16N8K16(part_sums[r][n], a, b);
        }
      }
    }
    slot = slot == kSlots - 1 ? 0 : slot + 1;
  }
  CpAsyncWait<0>();

  if constexpr (kScaling == WeightScaling::kPerPart) {
    if (has_tiles) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const uint32_t tile_scales = __ldg(weight.scales + (static_cast<int64_t>(part) * weight.row_tiles + first_tile + r) * 8 + group);
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) ScalePart(tile_scales, part_sums[r][n]);
      }
    }
  }
  auto* const sums = reinterpret_cast<float(*)[kTokensPerTile][Shape::kSumStride]>(shared);  // [warp][token][row], in place of the rings
#pragma unroll
  for (int n = 0; n < kTokenTiles; ++n) {
    if (n * kTokensPerTile >= m) break;
    __syncthreads();  // the rings, or the tile before, have been read
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[warp][2 * member + j % 2][r * kTileRows + group + j / 2 * 8] = part_sums[r][n][j];
    }
    __syncthreads();
    const int tokens_here = min(m - n * kTokensPerTile, kTokensPerTile);
    const int rows_here = sets * (kRowTiles * kTileRows);
    for (int place = static_cast<int>(threadIdx.x); place < tokens_here * rows_here; place += kWarps * kWarpSize) {
      const int token = place / rows_here, row = place % rows_here;
      const int from_set = row / (kRowTiles * kTileRows), row_in_set = row % (kRowTiles * kTileRows);
      float sum = sums[from_set * weight.parts][token][row_in_set];
      for (int p = 1; p < weight.parts; ++p) sum = __fadd_rn(sum, sums[from_set * weight.parts + p][token][row_in_set]);
      const int output_row = static_cast<int>(blockIdx.x) * rows_here + row;
      Store(output, n * kTokensPerTile + token, output_row, sum, BiasOf(output, output_row));
    }
  }
}

template <WeightType kType, WeightScaling kScaling, int kTokenTiles, int kRowTiles>
void LaunchShape(const LinearCall& call) {
  const PackedView view = ViewOf(call.weight);
  const int tiles_per_block = kWarps / view.parts * kRowTiles;
  const auto blocks = static_cast<unsigned int>((view.row_tiles + tiles_per_block - 1) / tiles_per_block);
  Launch("linear decode", DecodeKernel<kType, kScaling, kTokenTiles, kRowTiles>, dim3(blocks), dim3(kWarps * kWarpSize),
         DecodeShape<kType, kTokenTiles, kRowTiles>::kSharedBytes, call.stream, view, call.x, static_cast<int>(call.m), call.x_stride, call.output);
}

template <WeightType kType, WeightScaling kScaling>
void LaunchTyped(const LinearCall& call, int row_tiles) {
  const bool one_token_tile = call.m <= kTokensPerTile;
  if constexpr (kType != WeightType::kF16) {
    if (row_tiles == 4) return one_token_tile ? LaunchShape<kType, kScaling, 1, 4>(call) : LaunchShape<kType, kScaling, 2, 4>(call);
  }
  if (row_tiles == 2) return one_token_tile ? LaunchShape<kType, kScaling, 1, 2>(call) : LaunchShape<kType, kScaling, 2, 2>(call);
  if (row_tiles == 1 && one_token_tile) return LaunchShape<kType, kScaling, 1, 1>(call);
  throw Error(ErrorCode::kInternal, "linear: no decode kernel has these row tiles");
}

}  // namespace

void LaunchDecode(const LinearCall& call, int row_tiles) {
  const bool per_part = call.weight.scaling == WeightScaling::kPerPart;
  switch (call.weight.type) {
    case WeightType::kI4:
      return per_part ? LaunchTyped<WeightType::kI4, WeightScaling::kPerPart>(call, row_tiles)
                      : LaunchTyped<WeightType::kI4, WeightScaling::kPerChunk>(call, row_tiles);
    case WeightType::kI8:
      return per_part ? LaunchTyped<WeightType::kI8, WeightScaling::kPerPart>(call, row_tiles)
                      : LaunchTyped<WeightType::kI8, WeightScaling::kPerChunk>(call, row_tiles);
    default: return LaunchTyped<WeightType::kF16, WeightScaling::kNone>(call, row_tiles);
  }
}

}  // namespace tandem::cuda
