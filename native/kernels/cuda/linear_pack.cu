// linear_pack.cu: what fills packed weights, and the rows that token ids choose from them. A thread makes a 16-byte vector of the packed order, which its lane of
// a warp will load (linear_packed.h).
#include <algorithm>
#include <cmath>
#include <string>

#include "kernels/cuda/linear_packed.h"

namespace tandem::cuda {

namespace {

constexpr unsigned int kThreads = 256;
constexpr uint32_t kI4Zeros = 0x88888888u, kI8Zeros = 0x80808080u;

// Rows of a LinearWeight in device memory, `first_row` of the matrix in front.
struct StagedRows {
  const unsigned char* data;
  int64_t row_stride;
  const __half* scales;
  int64_t groups, group_size, group_offset;
  int64_t first_row, end_row;
  int64_t cols;
};

__device__ __forceinline__ int QuantizedAt(WeightType source, const StagedRows& from, int64_t row, int64_t column) {
  const unsigned char* const values = from.data + (row - from.first_row) * from.row_stride;
  if (source == WeightType::kI8) return static_cast<signed char>(values[column]);
  const int nibble = column % 2 == 0 ? values[column / 2] >> 4 : values[column / 2] & 15;
  return (nibble ^ 8) - 8;
}

__device__ __forceinline__ __half StagedScale(const StagedRows& from, int64_t row, int64_t group) {
  return row < from.end_row ? from.scales[(row - from.first_row) * from.groups + group] : __ushort_as_half(0);
}

// W as an unsigned integer, q + 128 or q + 8, or the bits of a half; zero past the matrix.
__device__ uint32_t StagedValue(WeightType source, WeightType packed, const StagedRows& from, int64_t row, int64_t column) {
  const bool exists = row < from.end_row && column < from.cols;
  if (packed == WeightType::kI4) return exists ? static_cast<uint32_t>(QuantizedAt(source, from, row, column) + 8) : kI4Zeros & 15u;
  if (packed == WeightType::kI8) return exists ? static_cast<uint32_t>(QuantizedAt(source, from, row, column) + 128) : kI8Zeros & 255u;
  if (!exists) return 0;
  const unsigned char* const values = from.data + (row - from.first_row) * from.row_stride;
  switch (source) {
    case WeightType::kF16: return reinterpret_cast<const unsigned short*>(values)[column];
    case WeightType::kF32: return __half_as_ushort(__float2half_rn(reinterpret_cast<const float*>(values)[column]));
    default: {
      const float scale = __half2float(StagedScale(from, row, (column + from.group_offset) / from.group_size));
      return __half_as_ushort(__float2half_rn(static_cast<float>(QuantizedAt(source, from, row, column)) * scale));
    }
  }
}

// The row and column, within a tile of 16 rows and a chunk of 64 columns, of half `half` of operand register a[j] of mma `i` of a lane.
__device__ __forceinline__ int OperandRow(int lane, int j) { return lane / 4 + 8 * (j % 2); }
__device__ __forceinline__ int OperandColumn(int lane, int i, int j, int half) { return lane % 4 * 16 + 4 * i + j / 2 * 2 + half; }

__device__ __forceinline__ int64_t GlobalThread() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }

__global__ void PackKernel(WeightType source, WeightType packed, StagedRows from, int chunks, int lane_vectors, int64_t first_vector, int64_t vectors,
                           uint4* to) {
  const int64_t index = GlobalThread();
  if (index >= vectors) return;
  const int lane = static_cast<int>(index % kWarpSize);
  const int vector = static_cast<int>(index / kWarpSize % lane_vectors);
  const int64_t chunk = index / (kWarpSize * lane_vectors) % chunks;
  const int64_t tile = index / (static_cast<int64_t>(kWarpSize) * lane_vectors * chunks);
  const int64_t row = from.first_row + tile * kTileRows, column = chunk * kChunkColumns;
  const auto value = [&](int i, int j, int half) {
    return StagedValue(source, packed, from, row + OperandRow(lane, j), column + OperandColumn(lane, i, j, half));
  };
  uint32_t words[4] = {};
  for (int word = 0; word < 4; ++word) {
    if (packed == WeightType::kI4) {
      for (int nibble = 0; nibble < 8; ++nibble) words[word] |= value(word, nibble % 4, nibble / 4) << (4 * nibble);
    } else if (packed == WeightType::kI8) {
      for (int byte = 0; byte < 4; ++byte) words[word] |= value(vector * 2 + word / 2, word % 2 * 2 + byte / 2, byte % 2) << (8 * byte);
    } else {
      words[word] = value(vector, word, 0) | value(vector, word, 1) << 16;
    }
  }
  to[first_vector + index] = make_uint4(words[0], words[1], words[2], words[3]);
}

// The scales of row tiles [first_tile, first_tile + tiles). first_groups: kPerPart, the group of each part.
struct PartGroups {
  int of[8];
};
__global__ void PackScalesKernel(bool per_part, PartGroups part_groups, StagedRows from, int blocks, int row_tiles, int first_tile, int tiles, uint32_t* to) {
  const int64_t index = GlobalThread();
  if (index >= static_cast<int64_t>(blocks) * tiles * 8) return;
  const int in_tile = static_cast<int>(index % 8), tile = first_tile + static_cast<int>(index / 8 % tiles), block = static_cast<int>(index / 8 / tiles);
  const int group = per_part ? part_groups.of[block] : block;
  const int64_t row = static_cast<int64_t>(tile) * kTileRows + in_tile;
  const uint32_t low = __half_as_ushort(StagedScale(from, row, group)), high = __half_as_ushort(StagedScale(from, row + 8, group));
  to[(static_cast<int64_t>(block) * row_tiles + tile) * 8 + in_tile] = low | high << 16;
}

// splitmix64's finaliser of a counter: https://prng.di.unimi.it/splitmix64.c. For filling, not for statistics.
__device__ __forceinline__ uint64_t Mix(uint64_t value) {
  value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9ull;
  value = (value ^ value >> 27) * 0x94d049bb133111ebull;
  return value ^ value >> 31;
}

__device__ __forceinline__ uint4 RandomWords(uint64_t seed, int64_t index, uint64_t stream) {
  constexpr uint64_t kGoldenRatio = 0x9e3779b97f4a7c15ull;
  const uint64_t start = Mix(seed + stream * kGoldenRatio), counter = static_cast<uint64_t>(index) * 2;
  const uint64_t first = Mix(start + (counter + 1) * kGoldenRatio), second = Mix(start + (counter + 2) * kGoldenRatio);
  return make_uint4(static_cast<uint32_t>(first), static_cast<uint32_t>(first >> 32), static_cast<uint32_t>(second), static_cast<uint32_t>(second >> 32));
}

// Random words; of halves, between -amplitude and amplitude.
__global__ void RandomKernel(WeightType packed, uint64_t seed, float amplitude, int64_t vectors, uint4* to) {
  const int64_t index = GlobalThread();
  if (index >= vectors) return;
  uint4 random = RandomWords(seed, index, 0);
  if (packed == WeightType::kF16) {
    uint32_t words[4] = {random.x, random.y, random.z, random.w};
    for (uint32_t& word : words) {
      const auto value = [&](int shift) { return amplitude * (static_cast<float>((word >> shift) & 0xffffu) / 32768.0f - 1.0f); };
      word = AsBits(__floats2half2_rn(value(0), value(16)));
    }
    random = make_uint4(words[0], words[1], words[2], words[3]);
  }
  to[index] = random;
}

__global__ void RandomScalesKernel(uint64_t seed, float scale, int64_t words, uint32_t* to) {
  const int64_t index = GlobalThread();
  if (index >= words) return;
  const uint4 random = RandomWords(seed, index, 1);
  const auto value = [&](uint32_t bits) { return scale * (0.75f + 0.5f * static_cast<float>(bits >> 16) / 65536.0f); };
  to[index] = AsBits(__floats2half2_rn(value(random.x), value(random.y)));
}

// Thread: 16 columns of one row.
template <WeightType kType, WeightScaling kScaling>
__global__ void EmbedKernel(PackedView table, int cols, uint32_t first_token, const uint32_t* __restrict__ tokens, int64_t m, __half* y, int64_t y_stride) {
  constexpr int kVectors = kLaneVectors<kType>;
  const int64_t index = GlobalThread();
  const int pieces = table.chunks * 4;
  if (index >= m * pieces) return;
  const int64_t i = index / pieces;
  const int piece = static_cast<int>(index % pieces), chunk = piece / 4, member = piece % 4;
  const int64_t row = static_cast<int64_t>(tokens[i]) - first_token;
  const bool here = row >= 0 && row < table.rows;

  uint32_t pairs[8] = {};  // of columns, ascending
  if (here) {
    const int tile = static_cast<int>(row / kTileRows), group = static_cast<int>(row % 8), upper = static_cast<int>(row / 8 % 2);
    uint4 packed[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      packed[v] = table.data[((static_cast<int64_t>(tile) * table.chunks + chunk) * kVectors + v) * kWarpSize + group * 4 + member];
    }
    uint32_t scales = 0;
    if constexpr (kScaling != WeightScaling::kNone) {
      int block = (chunk + table.group_offset_chunks) / table.group_chunks;
      if constexpr (kScaling == WeightScaling::kPerPart) {
        for (block = 0; chunk >= PartBegin(table.chunks, table.parts, block + 1);) ++block;
      }
      scales = table.scales[(static_cast<int64_t>(block) * table.row_tiles + tile) * 8 + group];
    }
#pragma unroll
    for (int mma = 0; mma < 4; ++mma) {
      uint32_t a[4];
      WeightOperand<kType>(packed, mma, a);
      if constexpr (kScaling != WeightScaling::kNone) ScaleOperand(scales, a);
      pairs[2 * mma] = upper == 0 ? a[0] : a[1];
      pairs[2 * mma + 1] = upper == 0 ? a[2] : a[3];
    }
  }
  __half* const to = y + i * y_stride;
  if (piece * 16 + 16 <= cols) {
    uint4* const vectors = reinterpret_cast<uint4*>(to + piece * 16);
    vectors[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    vectors[1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
    return;
  }
#pragma unroll
  for (int pair = 0; pair < 8; ++pair) {
    const int column = piece * 16 + pair * 2;
    const __half2 values = AsHalf2(pairs[pair]);
    if (column < cols) to[column] = __low2half(values);
    if (column + 1 < cols) to[column + 1] = __high2half(values);
  }
}

dim3 BlocksFor(int64_t threads) { return dim3(static_cast<unsigned int>((threads + kThreads - 1) / kThreads)); }

}  // namespace

void PackRows(const DeviceWeight& weight, int64_t first_row, int64_t rows, const void* staged, int64_t row_stride, const uint16_t* staged_scales,
              Stream stream) {
  const bool is_end = first_row + rows == weight.rows;
  if (first_row < 0 || rows < 1 || first_row + rows > weight.rows || first_row % kTileRows != 0 || (rows % kTileRows != 0 && !is_end)) {
    throw Error(ErrorCode::kInvalidArgument, "linear: rows " + std::to_string(first_row) + " to " + std::to_string(first_row + rows) +
                                                 " are not whole tiles of a weight of " + std::to_string(weight.rows) + " rows");
  }
  const PackedView view = ViewOf(weight);
  const StagedRows from{static_cast<const unsigned char*>(staged), row_stride, reinterpret_cast<const __half*>(staged_scales), weight.groups,
                        std::max<int64_t>(weight.group_size, 1), weight.group_offset, first_row, first_row + rows, weight.cols};
  const auto first_tile = static_cast<int>(first_row / kTileRows);
  const int tiles = is_end ? view.row_tiles - first_tile : static_cast<int>(rows / kTileRows);
  const int lane_vectors = LaneVectors(weight.type);
  const int64_t tile_vectors = static_cast<int64_t>(view.chunks) * lane_vectors * kWarpSize;
  Launch("packing a weight", PackKernel, BlocksFor(tiles * tile_vectors), dim3(kThreads), 0, stream, weight.source, weight.type, from, view.chunks,
         lane_vectors, first_tile * tile_vectors, tiles * tile_vectors, const_cast<uint4*>(view.data));

  const auto blocks = static_cast<int>(ScaleBlocks(weight));
  if (blocks == 0) return;
  const bool per_part = weight.scaling == WeightScaling::kPerPart;
  PartGroups part_groups = {};
  for (int part = 0; per_part && part < view.parts; ++part) {
    const int64_t column = static_cast<int64_t>(PartBegin(view.chunks, view.parts, part)) * kChunkColumns;
    part_groups.of[part] = static_cast<int>((column + weight.group_offset) / weight.group_size);
  }
  Launch("packing a weight's scales", PackScalesKernel, BlocksFor(int64_t{blocks} * tiles * 8), dim3(kThreads), 0, stream, per_part, part_groups, from, blocks,
         view.row_tiles, first_tile, tiles, const_cast<uint32_t*>(view.scales));
}

void RandomWeight(const DeviceWeight& weight, uint64_t seed, Stream stream) {
  const PackedView view = ViewOf(weight);
  const float deviation = 1.0f / std::sqrt(static_cast<float>(weight.cols));
  // Root mean squares: of -amplitude .. amplitude amplitude / sqrt(3), of -8 .. 7 4.6, of -128 .. 127 74.
  const float amplitude = std::min(1.7f * deviation, 1.0f);
  const float scale = weight.type == WeightType::kI4 ? deviation / 4.6f : deviation / 74.0f;
  const int64_t vectors = static_cast<int64_t>(view.row_tiles) * view.chunks * LaneVectors(weight.type) * kWarpSize;
  Launch("a random weight", RandomKernel, BlocksFor(vectors), dim3(kThreads), 0, stream, weight.type, seed, amplitude, vectors,
         const_cast<uint4*>(view.data));
  const int64_t scale_words = ScaleBlocks(weight) * view.row_tiles * 8;
  if (scale_words == 0) return;
  Launch("a random weight's scales", RandomScalesKernel, BlocksFor(scale_words), dim3(kThreads), 0, stream, seed, scale, scale_words,
         const_cast<uint32_t*>(view.scales));
}

namespace {

template <WeightType kType, WeightScaling kScaling>
void LaunchEmbed(const DeviceWeight& table, uint32_t first_token, const uint32_t* tokens, int64_t m, __half* y, int64_t y_stride, Stream stream) {
  const PackedView view = ViewOf(table);
  Launch("embed", EmbedKernel<kType, kScaling>, BlocksFor(m * view.chunks * 4), dim3(kThreads), 0, stream, view, static_cast<int>(table.cols), first_token,
         tokens, m, y, y_stride);
}

}  // namespace

void Embed(const DeviceWeight& table, uint32_t first_token, const uint32_t* tokens, int64_t m, __half* y, int64_t y_stride, Stream stream) {
  if (m <= 0) return;
  const bool per_part = table.scaling == WeightScaling::kPerPart;
  const auto launch = table.type == WeightType::kI4   ? per_part ? LaunchEmbed<WeightType::kI4, WeightScaling::kPerPart>
                                                                  : LaunchEmbed<WeightType::kI4, WeightScaling::kPerChunk>
                      : table.type == WeightType::kI8 ? per_part ? LaunchEmbed<WeightType::kI8, WeightScaling::kPerPart>
                                                                  : LaunchEmbed<WeightType::kI8, WeightScaling::kPerChunk>
                                                      : LaunchEmbed<WeightType::kF16, WeightScaling::kNone>;
  launch(table, first_token, tokens, m, y, y_stride, stream);
}

}  // namespace tandem::cuda
