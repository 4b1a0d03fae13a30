// linear_decode.cu: y = x W^T + b for a few rows of x, at the speed at which memory gives the weights. Two kernels:
//
// The decode kernel, for up to 16 rows. A block of 8 warps makes (8 / parts) sets of kRowTiles tiles of output rows: a warp multiplies one part of the columns
// of one set. Weights come by cp.async into a ring of each lane's own in shared memory: no barrier, no registers for what is under way, which is 3 to 7 KB per
// warp and so 64 to 224 KB per processor, two and more times what hides the latency of its share of an H200's memory. Rows of x come from the L1 and L2 caches,
// straight as operands. The parts' sums meet in shared memory.
//
// The streaming kernel, for larger quantised matrices on processors with 227 KB of shared memory and any number of rows: one block for each processor, which
// goes through the matrix in units of kStreamSets sets of kStreamRowTiles tiles of output rows by kTokenTiles tiles of tokens. A warp multiplies a share of the
// columns (1 or 2 parts, one after the other) of one set; the sets share the rows of x. Both come by cp.async, some steps (a chunk of each share) ahead; the
// loads of a unit begin while the one before is still multiplied, so that memory never rests.
#include <algorithm>
#include <limits>
#include <string>

#include "kernels/cuda/linear_kernels.h"

namespace tandem::cuda {

namespace {

constexpr int kWarps = 8;
constexpr int kTokensPerTile = 8;
constexpr int kStreamSets = 3, kStreamRowTiles = 2;
constexpr size_t kStreamSharedBytes = 227 * 1024;

template <WeightType kType, int kTokenTiles, int kRowTiles>
struct DecodeShape {
  static constexpr int kVectors = kLaneVectors<kType>;
  static constexpr int kLoads = kRowTiles * kVectors;                          // of 16 bytes, for a chunk of all row tiles
  // Chunks: those under way and the one that is multiplied. Even, so that the operands of x can be in two buffers.
  static constexpr int kSlots = kLoads == 1 ? 8 : kLoads == 2 ? 6 : kLoads == 4 ? 4 : 2;
  static constexpr bool kOperandsAhead = kTokenTiles == 1 && kRowTiles <= 2;
  static constexpr int kSumStride = kRowTiles * kTileRows + 4;                 // 4: the lanes of a warp write to 32 banks
  // Registers for as many blocks; where kernels of old GPUs would spill them, fewer.
  static constexpr bool kLargest = kTokenTiles == 2 && kRowTiles == 4;
  static constexpr int kBlocksPerProcessor = !kHasLargeShared ? (kLargest ? 1 : 2) : kLargest ? 2 : kTokenTiles == 1 && kRowTiles == 1 ? 4 : 3;
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
  const __half* tokens[kTokenTiles];
#pragma unroll
  for (int n = 0; n < kTokenTiles; ++n) {
    // In place of rows that there are not, the last: a column of B is a column of the product and no other.
    tokens[n] = x + min(n * kTokensPerTile + group, m - 1) * x_stride + static_cast<int64_t>(begin) * kChunkColumns + member * 16;
  }
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

  // The chunk that is `ahead` of the one where `weights` and `tokens` point.
  const auto load_weights = [&](int slot, int ahead) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        CpAsync16(ring + ((slot * kRowTiles + r) * kVectors + v) * kWarpSize, weights + r * tile_stride + (ahead * kVectors + v) * kWarpSize, true);
      }
    }
  };
  uint4 operands[2][kTokenTiles][2];
  const auto load_operands = [&](int buffer, int ahead) {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      const uint4* from = reinterpret_cast<const uint4*>(tokens[n] + ahead * kChunkColumns);
      operands[buffer][n][0] = __ldg(from);
      operands[buffer][n][1] = __ldg(from + 1);
    }
  };
#pragma unroll
  for (int slot = 0; slot < kSlots - 1; ++slot) {
    if (slot < count) load_weights(slot, slot);
    CpAsyncCommit();
  }
  if (Shape::kOperandsAhead && count > 0) load_operands(0, 0);
#pragma unroll 1
  for (int first = 0; first < count; first += kSlots) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const int chunk = first + slot, buffer = Shape::kOperandsAhead ? slot % 2 : 0;
      if (chunk >= count) break;
      if constexpr (Shape::kOperandsAhead) {
        if (chunk + 1 < count) load_operands(1 - buffer, slot + 1);
      } else {
        load_operands(0, slot);
      }
      CpAsyncWait<kSlots - 2>();  // of this chunk, for this lane, which is the only one to read it
      // To where the chunk before was, whose products are under way.
      if (chunk + kSlots - 1 < count) load_weights((slot + kSlots - 1) % kSlots, slot + kSlots - 1);
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
            const uint4& operand = operands[buffer][n][i / 2];
            const uint32_t b[2] = {Component(operand, i % 2 * 2), Component(operand, i % 2 * 2 + 1)};
            MmaM16N8K16(part_sums[r][n], a, b);
          }
        }
      }
    }
    weights += kSlots * kVectors * kWarpSize;
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) tokens[n] += kSlots * kChunkColumns;
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

template <WeightType kType, int kTokenTiles>
struct StreamShape {
  static constexpr int kVectors = kLaneVectors<kType>;
  static constexpr int kRowTiles = kStreamRowTiles;
  // More than 2 token tiles leave registers for half as many warps.
  static constexpr int kShares = kTokenTiles <= 2 ? 8 : 4, kSets = kStreamSets, kStreamWarps = kShares * kSets, kThreads = kStreamWarps * kWarpSize;
  static constexpr int kMostPartsEach = 8 / kShares;
  static constexpr int kTokens = kTokenTiles * kTokensPerTile;
  static constexpr int kSetRows = kRowTiles * kTileRows;
  static constexpr int kWeightVectors = kStreamWarps * kRowTiles * kVectors * kWarpSize;  // of a step
  static constexpr int kShareTokenVectors = kTokens * kChunkColumns / 8;
  static constexpr int kStepVectors = kWeightVectors + kShares * kShareTokenVectors;
  // Sums of a share's first part: those of the first token tiles stay in registers, the others lie in shared memory.
  static constexpr int kRegisterTiles = kTokenTiles < 8 ? kTokenTiles : 3;
  static constexpr int kKeptVectors = kMostPartsEach == 1 ? 0 : kThreads * kRowTiles * (kTokenTiles - kRegisterTiles);
  static constexpr int kSumStride = kSetRows + 4;
  static constexpr size_t kSumBytes = size_t{kMostPartsEach} * kStreamWarps * kTokensPerTile * kSumStride * sizeof(float);
  static constexpr int kMostSlots = static_cast<int>((kStreamSharedBytes - kSumBytes - size_t{16} * kKeptVectors) / (size_t{16} * kStepVectors));
  static constexpr int kSlots = kMostSlots < 5 ? kMostSlots : kMostSlots < 8 ? 4 : 8;
  static constexpr size_t kSharedBytes = kSumBytes + size_t{16} * (kStepVectors * kSlots + kKeptVectors);
};

// What a lane of the streaming kernel loads next, in vectors of 16 bytes from the beginning of the weights and of x.
struct StreamPlace {
  uint32_t weights, tokens;
  int rows_left;  // of the token block, from the lane's first on
};

template <WeightType kType, WeightScaling kScaling, int kTokenTiles>
__device__ __forceinline__ void MultiplyStream(const PackedView& weight, const __half* __restrict__ x, int m, int x_row_vectors, int units, int token_blocks,
                                               const Output& output) {
  using Shape = StreamShape<kType, kTokenTiles>;
  constexpr int kVectors = Shape::kVectors, kSlots = Shape::kSlots, kRowTiles = Shape::kRowTiles, kSets = Shape::kSets;
  constexpr int kRegisterTiles = Shape::kRegisterTiles, kUnitRows = kSets * Shape::kSetRows;
  TANDEM_DYNAMIC_SHARED(uint4, shared);

  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int group = lane / 4, member = lane % 4;
  const int share = warp / kSets, set = warp % kSets;
  const int parts_each = Shape::kMostPartsEach == 1 ? 1 : weight.parts / Shape::kShares, first_part = share * parts_each;
  const int begin = PartBegin(weight.chunks, weight.parts, first_part), count = PartBegin(weight.chunks, weight.parts, first_part + parts_each) - begin;
  const int first_end = parts_each == 1 ? count : PartBegin(weight.chunks, weight.parts, first_part + 1) - begin;
  // Of the longest share, and up to a multiple of the slots, so that all units begin in the first slot.
  const int steps = ((weight.chunks + Shape::kShares - 1) / Shape::kShares + kSlots - 1) / kSlots * kSlots;
  const int unit_stride = static_cast<int>(gridDim.x);
  const auto first_tile_of = [&](int unit, int set) {  // those past the end are multiplied as the last ones, and not stored
    return min((unit / token_blocks * kSets + set) * kRowTiles, weight.row_tiles - kRowTiles);
  };

  // A lane loads its own weights and, with the other warps of its share, every (kSets * 4)-th row of x.
  constexpr int kRowsAtOnce = kSets * kWarpSize / 8;
  static_assert(kRowsAtOnce % 2 == 0, "all rows of a lane are even or all are odd");
  const uint32_t tile_stride = static_cast<uint32_t>(weight.chunks) * (kVectors * kWarpSize);
  uint4* const weight_ring = shared + warp * (kRowTiles * kVectors * kWarpSize) + lane;
  uint4* const token_ring = shared + Shape::kWeightVectors + share * Shape::kShareTokenVectors;
  const int load_row = (set * kWarpSize + lane) / 8;
  uint4* const token_place = token_ring + load_row * 8 + (lane % 8 ^ (load_row & 1));  // odd rows: as in linear_gemm.cu
  const auto place_of = [&](int unit) {
    const int thread = ReadThreadIndex(), in_share = thread % (kSets * kWarpSize), row = in_share / 8, token = unit % token_blocks * Shape::kTokens + row;
    const int at = PartBegin(weight.chunks, weight.parts, thread / (kSets * kWarpSize) * (weight.parts / Shape::kShares));
    StreamPlace place;
    place.weights = static_cast<uint32_t>(first_tile_of(unit, in_share / kWarpSize)) * tile_stride +
                    static_cast<uint32_t>(at * (kVectors * kWarpSize) + thread % kWarpSize);
    place.tokens = static_cast<uint32_t>(token) * static_cast<uint32_t>(x_row_vectors) + static_cast<uint32_t>(at * (kChunkColumns / 8) + thread % 8);
    place.rows_left = min(m - token, Shape::kTokens - row);
    return place;
  };
  const auto* const x_vectors = reinterpret_cast<const uint4*>(x);
  StreamPlace place = place_of(static_cast<int>(blockIdx.x));
  const auto load = [&](int slot, int ahead) {  // the chunk `ahead` of the place
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        CpAsync16(weight_ring + slot * Shape::kStepVectors + (r * kVectors + v) * kWarpSize,
                  weight.data + (place.weights + static_cast<uint32_t>(r) * tile_stride) + (ahead * kVectors + v) * kWarpSize, true);
      }
    }
#pragma unroll
    for (int i = 0; i * kRowsAtOnce < Shape::kTokens; ++i) {
      // Rows that there are not stay what they are: a column of B is a column of the product and no other.
      if (i * kRowsAtOnce < place.rows_left) {
        CpAsync16(token_place + slot * Shape::kStepVectors + i * kRowsAtOnce * 8,
                  x_vectors + (place.tokens + static_cast<uint32_t>(i * kRowsAtOnce * x_row_vectors)) + ahead * (kChunkColumns / 8), true);
      }
    }
  };

#pragma unroll
  for (int slot = 0; slot < kSlots - 1; ++slot) {
    if (slot < count) load(slot, slot);
    CpAsyncCommit();
  }
#pragma unroll 1
  for (int unit = static_cast<int>(blockIdx.x); unit < units; unit += unit_stride) {
    float part_sums[kRowTiles][kTokenTiles][4] = {};
    float kept[kRowTiles][kRegisterTiles][4];
    float4* const shared_kept = reinterpret_cast<float4*>(shared + kSlots * Shape::kStepVectors) + threadIdx.x;  // [row tile, token tile][thread]
    const auto part_scales = [&](int part_of_share, uint32_t(&scales)[kRowTiles]) {
      if constexpr (kScaling == WeightScaling::kPerPart) {
        const int thread = ReadThreadIndex(), part = thread / (kSets * kWarpSize) * (weight.parts / Shape::kShares) + part_of_share;
        const int tile = first_tile_of(unit, thread / kWarpSize % kSets);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          scales[r] = __ldg(weight.scales + (static_cast<int64_t>(part) * weight.row_tiles + tile + r) * 8 + thread % kWarpSize / 4);
        }
      }
    };
    // kPerChunk: where the scales of the chunk are, and how many chunks they still serve.
    uint32_t scales_at = 0;
    int chunks_left = 0;
    if constexpr (kScaling == WeightScaling::kPerChunk) {
      const int from_first_group = begin + weight.group_offset_chunks;
      scales_at = static_cast<uint32_t>((from_first_group / weight.group_chunks * weight.row_tiles + first_tile_of(unit, set)) * 8 + group);
      chunks_left = weight.group_chunks - from_first_group % weight.group_chunks;
    }
#pragma unroll 1
    for (int first_step = 0; first_step < steps; first_step += kSlots) {
      int load_first = first_step, load_end = count;
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const int step = first_step + slot;
        uint32_t chunk_scales[kRowTiles] = {};
        if constexpr (kScaling == WeightScaling::kPerChunk) {
          if (step < count) {
            if (chunks_left == 0) {
              scales_at += static_cast<uint32_t>(weight.row_tiles) * 8;
              chunks_left = weight.group_chunks;
            }
            --chunks_left;
#pragma unroll
            for (int r = 0; r < kRowTiles; ++r) chunk_scales[r] = __ldg(weight.scales + scales_at + r * 8);
          }
        }
        if (Shape::kMostPartsEach == 2 && step == first_end && step < count) {  // the second part begins
          uint32_t scales[kRowTiles] = {};
          part_scales(0, scales);
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
            for (int n = 0; n < kTokenTiles; ++n) {
              if constexpr (kScaling == WeightScaling::kPerPart) ScalePart(scales[r], part_sums[r][n]);
              if (n >= kRegisterTiles) {
                shared_kept[(r * (kTokenTiles - kRegisterTiles) + n - kRegisterTiles) * Shape::kThreads] =
                    make_float4(part_sums[r][n][0], part_sums[r][n][1], part_sums[r][n][2], part_sums[r][n][3]);
              }
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                if (n < kRegisterTiles) kept[r][n % kRegisterTiles][j] = part_sums[r][n][j];
                part_sums[r][n][j] = 0.0f;
              }
            }
          }
        }
        CpAsyncWait<kSlots - 2>();
        __syncthreads();  // all threads' copies of this step are there, and all are done with the step before, whose slot is loaded next
        if (slot == 0) {
          if (first_step + kSlots - 1 < count) load(kSlots - 1, kSlots - 1);
          // The other slots are for the steps after these or the next unit's first.
          load_first = first_step + kSlots;
          if (load_first < steps) {
            place.weights += kSlots * kVectors * kWarpSize;
            place.tokens += kSlots * (kChunkColumns / 8);
          } else {
            load_first = 0;
            load_end = unit + unit_stride < units ? count : 0;
            place = place_of(unit + unit_stride);
          }
        } else {
          if (load_first + slot - 1 < load_end) load(slot - 1, slot - 1);
        }
        CpAsyncCommit();
        if (step < count) {
          const uint4* const from_weights = weight_ring + slot * Shape::kStepVectors;
          const uint4* const from_tokens = token_ring + slot * Shape::kStepVectors + group * 8;
          uint4 packed[kRowTiles][kVectors];
          if constexpr (kVectors == 1) {
#pragma unroll
            for (int r = 0; r < kRowTiles; ++r) packed[r][0] = from_weights[r * kWarpSize];
          }
#pragma unroll
          for (int half = 0; half < 2; ++half) {  // two mma deep each
            uint32_t a[2][kRowTiles][4];
#pragma unroll
            for (int r = 0; r < kRowTiles; ++r) {
              if constexpr (kVectors > 1) {
#pragma unroll
                for (int v = half * kVectors / 2; v < (half + 1) * kVectors / 2; ++v) packed[r][v] = from_weights[(r * kVectors + v) * kWarpSize];
              }
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                WeightOperand<kType>(packed[r], half * 2 + i, a[i][r]);
                if constexpr (kScaling == WeightScaling::kPerChunk) ScaleOperand(chunk_scales[r], a[i][r]);
              }
            }
            constexpr int kAtOnce = kTokenTiles == 2 || kTokenTiles == 8 ? 2 : 1;
#pragma unroll
            for (int first = 0; first < kTokenTiles; first += kAtOnce) {
              uint4 operands[kAtOnce];
#pragma unroll
              for (int n = 0; n < kAtOnce; ++n) operands[n] = from_tokens[(first + n) * 64 + ((2 * member + half) ^ (group & 1))];
#pragma unroll
              for (int i = 0; i < 2; ++i) {
#pragma unroll
                for (int n = 0; n < kAtOnce; ++n) {
                  const uint32_t b[2] = {Component(operands[n], i * 2), Component(operands[n], i * 2 + 1)};
#pragma unroll
                  for (int r = 0; r < kRowTiles; ++r) MmaM16N8K16(part_sums[r][first + n], a[i][r], b);
                }
              }
            }
          }
        }
      }
    }

    uint32_t tile_scales[kRowTiles] = {};
    part_scales(parts_each - 1, tile_scales);
    // [share, set, part of the share][token][row]
    auto* const sums = reinterpret_cast<float(*)[kTokensPerTile][Shape::kSumStride]>(shared + kSlots * Shape::kStepVectors + Shape::kKeptVectors);
    const int thread = ReadThreadIndex(), this_warp = thread / kWarpSize, row_in_tile = thread % kWarpSize / 4, first_column = thread % 4 * 2;
    const int first_token = unit % token_blocks * Shape::kTokens, first_row = unit / token_blocks * kUnitRows;
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      const int tokens_here = min(m - first_token - n * kTokensPerTile, kTokensPerTile);
      if (tokens_here <= 0) break;
      if (n > 0) __syncthreads();  // the tile before has been read
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        if constexpr (kScaling == WeightScaling::kPerPart) ScalePart(tile_scales[r], part_sums[r][n]);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sums[Shape::kMostPartsEach * this_warp + parts_each - 1][first_column + j % 2][r * kTileRows + row_in_tile + j / 2 * 8] = part_sums[r][n][j];
        }
        if (Shape::kMostPartsEach == 2 && parts_each == 2) {
          float first_sums[4];
          if (n < kRegisterTiles) {
#pragma unroll
            for (int j = 0; j < 4; ++j) first_sums[j] = kept[r][n % kRegisterTiles][j];
          } else {
            const float4 there = shared_kept[(r * (kTokenTiles - kRegisterTiles) + n - kRegisterTiles) * Shape::kThreads];
            first_sums[0] = there.x;
            first_sums[1] = there.y;
            first_sums[2] = there.z;
            first_sums[3] = there.w;
          }
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[2 * this_warp][first_column + j % 2][r * kTileRows + row_in_tile + j / 2 * 8] = first_sums[j];
        }
      }
      __syncthreads();
      for (int place = thread; place < tokens_here * kUnitRows; place += Shape::kThreads) {
        const int token = place / kUnitRows, unit_row = place % kUnitRows;
        const int from_set = unit_row / Shape::kSetRows, row_in_set = unit_row % Shape::kSetRows;
        float sum = 0.0f;
#pragma unroll
        for (int q = 0; q < Shape::kShares; ++q) {
          const float(&of_share)[kTokensPerTile][Shape::kSumStride] = sums[Shape::kMostPartsEach * (q * kSets + from_set)];
          sum = q == 0 ? of_share[token][row_in_set] : __fadd_rn(sum, of_share[token][row_in_set]);
          if (Shape::kMostPartsEach == 2 && parts_each == 2) {
            sum = __fadd_rn(sum, sums[Shape::kMostPartsEach * (q * kSets + from_set) + 1][token][row_in_set]);
          }
        }
        Store(output, first_token + n * kTokensPerTile + token, first_row + unit_row, sum, BiasOf(output, first_row + unit_row));
      }
    }
  }
  CpAsyncWait<0>();
}

template <WeightType kType, WeightScaling kScaling, int kTokenTiles>
__global__ void __launch_bounds__(StreamShape<kType, kTokenTiles>::kThreads, 1)
    StreamKernel(PackedView weight, const __half* __restrict__ x, int m, int x_row_vectors, int units, int token_blocks, Output output) {
  if constexpr (kHasLargeShared) MultiplyStream<kType, kScaling, kTokenTiles>(weight, x, m, x_row_vectors, units, token_blocks, output);
}

template <WeightType kType, WeightScaling kScaling, int kTokenTiles>
void LaunchStreamShape(const LinearCall& call) {
  using Shape = StreamShape<kType, kTokenTiles>;
  const PackedView view = ViewOf(call.weight);
  const int64_t token_blocks = (call.m + Shape::kTokens - 1) / Shape::kTokens, units = StreamUnits(call.weight, call.m, kTokenTiles);
  // The kernel counts units in 31 bits and vectors of x in 32.
  if (units > std::numeric_limits<int>::max() / 2 || call.m > std::numeric_limits<uint32_t>::max() / (call.x_stride / 8) - Shape::kTokens) {
    throw Error(ErrorCode::kInvalidArgument, "linear: " + std::to_string(call.m) + " rows are too many for the streaming kernel");
  }
  Launch("linear stream", StreamKernel<kType, kScaling, kTokenTiles>, dim3(static_cast<unsigned int>(std::min(units, LimitsOfDevice().processors))),
         dim3(Shape::kThreads), Shape::kSharedBytes, call.stream, view, call.x, static_cast<int>(call.m), static_cast<int>(call.x_stride / 8),
         static_cast<int>(units), static_cast<int>(token_blocks), call.output);
}

template <WeightType kType, WeightScaling kScaling>
void LaunchStreamTyped(const LinearCall& call, int token_tiles) {
  switch (token_tiles) {
    case 1: return LaunchStreamShape<kType, kScaling, 1>(call);
    case 2: return LaunchStreamShape<kType, kScaling, 2>(call);
    default: break;
  }
  if constexpr (kScaling != WeightScaling::kPerChunk) {
    if (token_tiles == 4) return LaunchStreamShape<kType, kScaling, 4>(call);
    if (token_tiles == 8) return LaunchStreamShape<kType, kScaling, 8>(call);
  }
  throw Error(ErrorCode::kInternal, "linear: no streaming kernel has these token tiles");
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

bool CanStream(const DeviceWeight& weight, int token_tiles) {
  const bool has_kernel = token_tiles <= 2 ? weight.parts == 8 : weight.parts >= 4 && weight.scaling != WeightScaling::kPerChunk;
  return has_kernel && weight.type != WeightType::kF16 && LimitsOfDevice().shared_bytes >= kStreamSharedBytes;
}

int64_t StreamUnits(const DeviceWeight& weight, int64_t m, int token_tiles) {
  const int64_t unit_rows = int64_t{kStreamSets} * kStreamRowTiles * kTileRows, unit_tokens = int64_t{token_tiles} * kTokensPerTile;
  return (weight.rows + unit_rows - 1) / unit_rows * ((m + unit_tokens - 1) / unit_tokens);
}

void LaunchStream(const LinearCall& call, int token_tiles) {
  if (!CanStream(call.weight, token_tiles)) throw Error(ErrorCode::kInternal, "linear: no streaming kernel for this weight on this device");
  const bool per_part = call.weight.scaling == WeightScaling::kPerPart;
  if (call.weight.type == WeightType::kI4) {
    return per_part ? LaunchStreamTyped<WeightType::kI4, WeightScaling::kPerPart>(call, token_tiles)
                    : LaunchStreamTyped<WeightType::kI4, WeightScaling::kPerChunk>(call, token_tiles);
  }
  return per_part ? LaunchStreamTyped<WeightType::kI8, WeightScaling::kPerPart>(call, token_tiles)
                  : LaunchStreamTyped<WeightType::kI8, WeightScaling::kPerChunk>(call, token_tiles);
}

}  // namespace tandem::cuda
