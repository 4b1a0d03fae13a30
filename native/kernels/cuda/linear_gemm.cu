// linear_gemm.cu: y = x W^T + b for many rows of x, on tensor cores, weights dequantised in registers.
//
// A block makes a tile of output rows x tokens: chunk after chunk of 64 columns, packed weights and rows of x come to shared memory by cp.async, some stages
// ahead; a warp makes operands of its weights, each of which then multiplies all of the warp's tokens. Rows of x lie in shared memory as in global memory, 128
// bytes a chunk, except that odd rows have their 16-byte pieces swapped in pairs: the 8 lanes of a phase read 4 pieces of an even row and 4 of an odd one, from
// all 32 banks.
//
// The additions are the decode kernel's: a chain of mma for each part of the columns, then part after part. The sums of the parts before are in registers or,
// where tiles are too large for that, in shared memory.
#include "kernels/cuda/linear_kernels.h"

namespace tandem::cuda {

namespace {

template <int kRows_, int kTokens_, int kWarpRows_, int kWarpTokens_, bool kTotalsInShared_, int kMaxStages_, int kBlocksPerProcessor_>
struct TileShape {
  static constexpr int kRows = kRows_, kTokens = kTokens_, kWarpRows = kWarpRows_, kWarpTokens = kWarpTokens_;
  static constexpr bool kTotalsInShared = kTotalsInShared_;
  static constexpr int kBlocksPerProcessor = kBlocksPerProcessor_;
  static constexpr int kWarpsAlongRows = kRows / kWarpRows;
  static constexpr int kThreads = kWarpsAlongRows * (kTokens / kWarpTokens) * kWarpSize;
  static constexpr size_t kTotalBytes = kTotalsInShared ? size_t{kRows} * kTokens * sizeof(float) : 0;

  __host__ __device__ static constexpr int WeightVectors(int lane_vectors) { return kRows / kTileRows * lane_vectors * kWarpSize; }  // of a stage
  static constexpr int kTokenVectors = kTokens * kChunkColumns / 8;
  __host__ __device__ static constexpr size_t StageBytes(int lane_vectors) { return size_t{16} * (WeightVectors(lane_vectors) + kTokenVectors); }
  // As many as leave the totals their place in the 227 KB of a block (sm_90).
  __host__ __device__ static constexpr int Stages(int lane_vectors) {
    constexpr size_t kBlockBytes = 227 * 1024;
    const auto fit = static_cast<int>((kBlockBytes - kTotalBytes) / StageBytes(lane_vectors));
    return fit < kMaxStages_ ? fit : kMaxStages_;
  }
  __host__ __device__ static constexpr size_t SharedBytes(int lane_vectors) { return kTotalBytes + Stages(lane_vectors) * StageBytes(lane_vectors); }
};

using Tile64x32 = TileShape<64, 32, 32, 16, false, 5, 3>;
using Tile64x64 = TileShape<64, 64, 32, 32, false, 4, 3>;
using Tile128x128 = TileShape<128, 128, 32, 64, false, 3, 1>;
using Tile256x128 = TileShape<256, 128, 64, 64, true, 4, 1>;

template <WeightType kType, WeightScaling kScaling, typename Tile>
__device__ __forceinline__ void MultiplyTile(const PackedView& weight, const __half* __restrict__ x, int m, int64_t x_stride, const Output& output) {
  constexpr int kVectors = kLaneVectors<kType>, kStages = Tile::Stages(kVectors);
  constexpr int kRowTiles = Tile::kWarpRows / kTileRows, kTokenTiles = Tile::kWarpTokens / 8;
  constexpr int kWeightVectors = Tile::WeightVectors(kVectors), kStageVectors = kWeightVectors + Tile::kTokenVectors;
  TANDEM_DYNAMIC_SHARED(uint4, shared);

  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int group = lane / 4, member = lane % 4;
  const int block_tile = static_cast<int>(blockIdx.y) * (Tile::kRows / kTileRows), block_token = static_cast<int>(blockIdx.x) * Tile::kTokens;
  const int warp_tile = warp % Tile::kWarpsAlongRows * kRowTiles, warp_token = warp / Tile::kWarpsAlongRows * Tile::kWarpTokens;  // within the block's

  const int64_t tile_stride = static_cast<int64_t>(weight.chunks) * (kVectors * kWarpSize);
  const auto load_stage = [&](int chunk, int slot) {
    uint4* const to_weights = shared + slot * kStageVectors;
    uint4* const to_tokens = to_weights + kWeightVectors;
    static_assert(kWeightVectors % Tile::kThreads == 0 && Tile::kTokenVectors % Tile::kThreads == 0, "all threads load as much");
#pragma unroll
    for (int i = 0; i < kWeightVectors / Tile::kThreads; ++i) {
      const int place = thread + i * Tile::kThreads;
      const int tile = block_tile + place / (kVectors * kWarpSize), in_tile = place % (kVectors * kWarpSize);
      const bool valid = tile < weight.row_tiles;
      CpAsync16(to_weights + place, weight.data + (valid ? tile : 0) * tile_stride + static_cast<int64_t>(chunk) * (kVectors * kWarpSize) + in_tile, valid);
    }
#pragma unroll
    for (int i = 0; i < Tile::kTokenVectors / Tile::kThreads; ++i) {
      const int place = thread + i * Tile::kThreads;
      const int row = place / 8, piece = place % 8, token = block_token + row;
      const bool valid = token < m;
      CpAsync16(to_tokens + row * 8 + (piece ^ (row & 1)), x + (valid ? token : 0) * x_stride + static_cast<int64_t>(chunk) * kChunkColumns + piece * 8, valid);
    }
  };

  float sums[kRowTiles][kTokenTiles][4];
  float totals[Tile::kTotalsInShared ? 1 : kRowTiles][kTokenTiles][4];
  // [row tile, token tile][thread]: each thread's own
  float4* const shared_totals = reinterpret_cast<float4*>(shared + kStages * kStageVectors) + thread;

#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < weight.chunks) load_stage(stage, stage);
    CpAsyncCommit();
  }
  int slot = 0;
#pragma unroll 1
  for (int part = 0; part < weight.parts; ++part) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[r][n][j] = 0.0f;
      }
    }
    const int end = PartBegin(weight.chunks, weight.parts, part + 1);
#pragma unroll 1
    for (int chunk = PartBegin(weight.chunks, weight.parts, part); chunk < end; ++chunk) {
      CpAsyncWait<kStages - 2>();
      __syncthreads();  // all threads' copies of this chunk are there, and all are done with the chunk before, whose slot is loaded next
      if (chunk + kStages - 1 < weight.chunks) load_stage(chunk + kStages - 1, slot == 0 ? kStages - 1 : slot - 1);
      CpAsyncCommit();

      const uint4* const weights = shared + slot * kStageVectors + warp_tile * (kVectors * kWarpSize) + lane;
      const uint4* const tokens = shared + slot * kStageVectors + kWeightVectors + (warp_token + group) * 8;
      uint32_t scales[kRowTiles];
      if constexpr (kScaling == WeightScaling::kPerChunk) {
        const int block = (chunk + weight.group_offset_chunks) / weight.group_chunks;
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          const int tile = min(block_tile + warp_tile + r, weight.row_tiles - 1);  // those past the end are not stored
          scales[r] = __ldg(weight.scales + (static_cast<int64_t>(block) * weight.row_tiles + tile) * 8 + group);
        }
      }
      uint4 packed[kRowTiles][kVectors];
      if constexpr (kVectors == 1) {
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) packed[r][0] = weights[r * kWarpSize];
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // two mma deep each
        uint4 operands[kTokenTiles];
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) operands[n] = tokens[n * 64 + ((2 * member + half) ^ (group & 1))];
        if constexpr (kVectors > 1) {
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
            for (int v = half * kVectors / 2; v < (half + 1) * kVectors / 2; ++v) packed[r][v] = weights[(r * kVectors + v) * kWarpSize];
          }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) {
            uint32_t a[4];
            WeightOperand<kType>(packed[r], half * 2 + i, a);
            if constexpr (kScaling == WeightScaling::kPerChunk) ScaleOperand(scales[r], a);
#pragma unroll
            for (int n = 0; n < kTokenTiles; ++n) {
              const uint32_t b[2] = {Component(operands[n], i * 2), Component(operands[n], i * 2 + 1)};
              MmaM16N8K16(sums[r][n], a, b);
            }
          }
        }
      }
      slot = slot == kStages - 1 ? 0 : slot + 1;
    }

#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      uint32_t part_scales = 0;
      if constexpr (kScaling == WeightScaling::kPerPart) {
        const int tile = min(block_tile + warp_tile + r, weight.row_tiles - 1);
        part_scales = __ldg(weight.scales + (static_cast<int64_t>(part) * weight.row_tiles + tile) * 8 + group);
      }
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        if constexpr (kScaling == WeightScaling::kPerPart) ScalePart(part_scales, sums[r][n]);
        if constexpr (Tile::kTotalsInShared) {
          float4* const total = shared_totals + (r * kTokenTiles + n) * Tile::kThreads;
          if (part > 0) {
            const float4 before = *total;
            sums[r][n][0] = __fadd_rn(before.x, sums[r][n][0]);
            sums[r][n][1] = __fadd_rn(before.y, sums[r][n][1]);
            sums[r][n][2] = __fadd_rn(before.z, sums[r][n][2]);
            sums[r][n][3] = __fadd_rn(before.w, sums[r][n][3]);
          }
          if (part + 1 < weight.parts) *total = make_float4(sums[r][n][0], sums[r][n][1], sums[r][n][2], sums[r][n][3]);
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j) totals[r][n][j] = part == 0 ? sums[r][n][j] : __fadd_rn(totals[r][n][j], sums[r][n][j]);
        }
      }
    }
  }
  CpAsyncWait<0>();

#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    const int row = (block_tile + warp_tile + r) * kTileRows + group;
    const float biases[2] = {BiasOf(output, row), BiasOf(output, row + 8)};
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int token = block_token + warp_token + n * 8 + 2 * member + j % 2;
        float sum;
        if constexpr (Tile::kTotalsInShared) {
          sum = sums[r][n][j];
        } else {
          sum = totals[r][n][j];
        }
        if (token < m) Store(output, token, row + j / 2 * 8, sum, biases[j / 2]);
      }
    }
  }
}

template <WeightType kType, WeightScaling kScaling, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerProcessor)
    GemmKernel(PackedView weight, const __half* __restrict__ x, int m, int64_t x_stride, Output output) {
  if constexpr (!Tile::kTotalsInShared || kHasLargeShared) MultiplyTile<kType, kScaling, Tile>(weight, x, m, x_stride, output);
}

template <WeightType kType, WeightScaling kScaling, typename Tile>
void LaunchTile(const LinearCall& call) {
  const PackedView view = ViewOf(call.weight);
  const dim3 grid(static_cast<unsigned int>((call.m + Tile::kTokens - 1) / Tile::kTokens), static_cast<unsigned int>((view.rows + Tile::kRows - 1) / Tile::kRows));
  Launch("linear gemm", GemmKernel<kType, kScaling, Tile>, grid, dim3(Tile::kThreads), Tile::SharedBytes(kLaneVectors<kType>), call.stream, view, call.x,
         static_cast<int>(call.m), call.x_stride, call.output);
}

template <typename Tile>
void LaunchTyped(const LinearCall& call) {
  const bool per_part = call.weight.scaling == WeightScaling::kPerPart;
  switch (call.weight.type) {
    case WeightType::kI4:
      return per_part ? LaunchTile<WeightType::kI4, WeightScaling::kPerPart, Tile>(call) : LaunchTile<WeightType::kI4, WeightScaling::kPerChunk, Tile>(call);
    case WeightType::kI8:
      return per_part ? LaunchTile<WeightType::kI8, WeightScaling::kPerPart, Tile>(call) : LaunchTile<WeightType::kI8, WeightScaling::kPerChunk, Tile>(call);
    default: return LaunchTile<WeightType::kF16, WeightScaling::kNone, Tile>(call);
  }
}

// run(TileShape()) for the shape of `tile`.
template <typename Run>
auto WithShape(GemmTile tile, const Run& run) {
  switch (tile) {
    case GemmTile::k64x32: return run(Tile64x32());
    case GemmTile::k64x64: return run(Tile64x64());
    case GemmTile::k128x128: return run(Tile128x128());
    default: return run(Tile256x128());
  }
}

}  // namespace

void LaunchGemm(const LinearCall& call, GemmTile tile) {
  WithShape(tile, [&](auto shape) { LaunchTyped<decltype(shape)>(call); });
}

int64_t TileOutputRows(GemmTile tile) {
  return WithShape(tile, [](auto shape) { return int64_t{decltype(shape)::kRows}; });
}

int64_t TileTokens(GemmTile tile) {
  return WithShape(tile, [](auto shape) { return int64_t{decltype(shape)::kTokens}; });
}

size_t GemmSharedBytes(GemmTile tile, WeightType type) {
  return WithShape(tile, [&](auto shape) { return decltype(shape)::SharedBytes(LaneVectors(type)); });
}

}  // namespace tandem::cuda
