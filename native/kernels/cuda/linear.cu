// linear.cu: what a weight becomes on the device, and which kernel multiplies it.
#include "kernels/cuda/linear.h"

#include <algorithm>
#include <limits>
#include <mutex>
#include <string>

#include "kernels/cuda/linear_kernels.h"
#include "kernels/cuda/linear_warpgroup.h"

namespace tandem::cuda {

namespace {

constexpr int64_t kAlignment = 256;

int64_t RoundUp(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
int64_t Chunks(const DeviceWeight& weight) { return (weight.cols + kChunkColumns - 1) / kChunkColumns; }
int64_t RowTiles(const DeviceWeight& weight) { return RoundUp((weight.rows + kTileRows - 1) / kTileRows, kTileRowPadding); }
int64_t DataBytes(const DeviceWeight& weight) { return RowTiles(weight) * Chunks(weight) * LaneVectors(weight.type) * kWarpSize * 16; }

// The more parts, the more warps share a row at decoding, and the more often a GEMM has to put its sums aside.
int64_t PreferredParts(int64_t chunks) { return chunks >= 128 ? 8 : chunks >= 8 ? 4 : chunks >= 2 ? 2 : 1; }

bool PartsLieWithinGroups(const DeviceWeight& weight, int64_t parts) {
  const int chunks = static_cast<int>(Chunks(weight));
  for (int part = 0; part < parts; ++part) {
    const int64_t begin = int64_t{kChunkColumns} * PartBegin(chunks, static_cast<int>(parts), part);
    const int64_t end = std::min<int64_t>(int64_t{kChunkColumns} * PartBegin(chunks, static_cast<int>(parts), part + 1), weight.cols);
    if ((begin + weight.group_offset) / weight.group_size != (end - 1 + weight.group_offset) / weight.group_size) return false;
  }
  return true;
}

void Run(const DeviceWeight& weight, const __half* x, int64_t m, int64_t x_stride, const float* bias, void* y, bool is_half, int64_t y_stride,
         Stream stream, void* scratch) {
  if (m <= 0) return;
  if (m > std::numeric_limits<int>::max()) throw Error(ErrorCode::kInvalidArgument, "linear: " + std::to_string(m) + " rows are too many");
  const LinearCall call{weight, x, m, x_stride, Output{y, y_stride, bias, static_cast<int>(weight.rows), is_half}, stream};
  const int stream_tiles = ChooseStreamTokenTiles(weight, m);
  WarpgroupTile tile;
  if (stream_tiles > 0) {
    LaunchStream(call, stream_tiles);
  } else if (m <= kMaxDecodeRows) {
    LaunchDecode(call, ChooseDecodeRowTiles(weight, m));
  } else if (scratch != nullptr && ChooseWarpgroupTile(weight, m, &tile)) {
    LaunchWarpgroups(call, tile, scratch);
  } else {
    LaunchGemm(call, ChooseGemmTile(weight, m));
  }
}

}  // namespace

// Asking the driver takes a while: once for each device.
DeviceLimits LimitsOfDevice() {
  static std::mutex mutex;
  static std::vector<DeviceLimits> known;
  int device = 0;
  Check(cudaGetDevice(&device), "which device is current");
  const std::lock_guard<std::mutex> lock(mutex);
  const auto index = static_cast<size_t>(device);
  if (known.size() <= index) known.resize(index + 1, {0, 0});
  if (known[index].processors == 0) {
    cudaDeviceProp properties;
    Check(cudaGetDeviceProperties(&properties, device), "properties of the device");
    known[index] = {properties.multiProcessorCount, properties.sharedMemPerBlockOptin};
  }
  return known[index];
}

DeviceWeight DescribeDeviceWeight(const LinearWeight& weight) {
  constexpr int64_t kMost = std::numeric_limits<int>::max() / 2;
  if (weight.rows < 1 || weight.cols < 1 || weight.rows > kMost || weight.cols > kMost) {
    throw Error(ErrorCode::kInvalidArgument, "linear: no weight on a GPU has " + std::to_string(weight.rows) + " rows and " +
                                                 std::to_string(weight.cols) + " columns");
  }
  DeviceWeight described;
  described.source = weight.type;
  described.rows = weight.rows;
  described.cols = weight.cols;
  const int64_t chunks = Chunks(described);
  described.parts = PreferredParts(chunks);
  if (weight.type != WeightType::kI8 && weight.type != WeightType::kI4) return described;

  LinearWeight shape = weight;
  static const uint16_t kSomeScale = 0;
  shape.scales = &kSomeScale;  // the scales may come later
  CheckWeight(shape);
  described.groups = weight.groups;
  described.group_size = weight.group_size;
  described.group_offset = weight.group_offset;
  for (const int64_t parts : {described.parts, int64_t{8}}) {
    if (parts > chunks || !PartsLieWithinGroups(described, parts)) continue;
    described.type = weight.type;
    described.scaling = WeightScaling::kPerPart;
    described.parts = parts;
    return described;
  }
  if (weight.group_size % kChunkColumns == 0 && weight.group_offset % kChunkColumns == 0) {
    described.type = weight.type;
    described.scaling = WeightScaling::kPerChunk;
  }
  return described;
}

int64_t ScaleBlocks(const DeviceWeight& weight) {
  return weight.scaling == WeightScaling::kPerPart ? weight.parts : weight.scaling == WeightScaling::kPerChunk ? weight.groups : 0;
}

int64_t DeviceWeightBytes(const DeviceWeight& weight) {
  return RoundUp(DataBytes(weight) + ScaleBlocks(weight) * RowTiles(weight) * kTileRows * 2, kAlignment);
}

int64_t DeviceWeightReadBytes(const DeviceWeight& weight) {
  const int64_t row_tiles = (weight.rows + kTileRows - 1) / kTileRows;
  return row_tiles * (Chunks(weight) * LaneVectors(weight.type) * kWarpSize * 16 + ScaleBlocks(weight) * kTileRows * 2);
}

PackedView ViewOf(const DeviceWeight& weight) {
  PackedView view;
  view.data = static_cast<const uint4*>(weight.data);
  view.scales = reinterpret_cast<const uint32_t*>(static_cast<const unsigned char*>(weight.data) + DataBytes(weight));
  view.rows = static_cast<int>(weight.rows);
  view.row_tiles = static_cast<int>(RowTiles(weight));
  view.chunks = static_cast<int>(Chunks(weight));
  view.parts = static_cast<int>(weight.parts);
  view.group_chunks = std::max(1, static_cast<int>(weight.group_size / kChunkColumns));
  view.group_offset_chunks = static_cast<int>(weight.group_offset / kChunkColumns);
  return view;
}

// From measurements on an H200. A block with more tiles loads the rows of x less often; with fewer tiles more blocks share the work.
int ChooseDecodeRowTiles(const DeviceWeight& weight, int64_t m) {
  const int64_t blocks_of_one = RowTiles(weight) / (8 / weight.parts), processors = LimitsOfDevice().processors;
  if (m > 8) return weight.type != WeightType::kF16 && blocks_of_one >= 28 * processors ? 4 : 2;
  return blocks_of_one >= 2 * processors ? 2 : 1;
}

// INT4 is bound by instructions as much as by memory, and the streaming kernel takes the fewest, if its units keep all processors busy.
int ChooseStreamTokenTiles(const DeviceWeight& weight, int64_t m) {
  if (m > kMaxStreamRows || (m <= 8 && weight.type != WeightType::kI4)) return 0;
  const int token_tiles = m <= 8 ? 1 : m <= 16 ? 2 : m <= 32 ? 4 : 8;
  if (!CanStream(weight, token_tiles)) return 0;
  if (m > kMaxDecodeRows) return token_tiles;
  const int64_t processors = LimitsOfDevice().processors, units = StreamUnits(weight, m, token_tiles);
  const int64_t rounds = (units + processors - 1) / processors;
  return units * 10 >= rounds * processors * 9 ? token_tiles : 0;
}

namespace {

// A simple model, in any unit: blocks run in waves over the processors, a block takes as long as its tile is large; `efficiency` says how well it uses tensor
// cores, smaller tiles being worse at reusing what they load.
double TileTime(const DeviceWeight& weight, int64_t m, int64_t tile_rows, int64_t tile_tokens, double efficiency) {
  const int64_t processors = LimitsOfDevice().processors;
  const int64_t blocks = ((weight.rows + tile_rows - 1) / tile_rows) * ((m + tile_tokens - 1) / tile_tokens);
  return static_cast<double>((blocks + processors - 1) / processors * tile_rows * tile_tokens) / efficiency;
}

double GemmTime(const DeviceWeight& weight, int64_t m, GemmTile tile) {
  const double efficiency = tile == GemmTile::k256x128 ? 1.0 : tile == GemmTile::k128x128 ? 0.85 : tile == GemmTile::k64x64 ? 0.6 : 0.5;
  return TileTime(weight, m, TileOutputRows(tile), TileTokens(tile), efficiency);
}

}  // namespace

GemmTile ChooseGemmTile(const DeviceWeight& weight, int64_t m) {
  const size_t shared_bytes = LimitsOfDevice().shared_bytes;
  GemmTile best = GemmTile::k64x32;
  for (const GemmTile tile : kGemmTiles) {
    if (GemmSharedBytes(tile, weight.type) <= shared_bytes && GemmTime(weight, m, tile) < GemmTime(weight, m, best)) best = tile;
  }
  return best;
}

bool ChooseWarpgroupTile(const DeviceWeight& weight, int64_t m, WarpgroupTile* chosen) {
  constexpr int64_t kFewRows = 64;  // most of a tile would be empty
  if (m <= kFewRows) return false;
  double best_time = GemmTime(weight, m, ChooseGemmTile(weight, m));
  bool found = false;
  for (const WarpgroupTile tile : kWarpgroupTiles) {
    if (!CanRunWarpgroups(tile, weight.type)) continue;
    const double efficiency = tile == WarpgroupTile::k256 ? 1.95 : tile == WarpgroupTile::k192 ? 1.6 : 1.25;
    const double time = TileTime(weight, m, TileOutputRows(tile), kWarpgroupTokens, efficiency);
    if (time < best_time) {
      best_time = time;
      *chosen = tile;
      found = true;
    }
  }
  return found;
}

int64_t LinearScratchBytes(const DeviceWeight& weight, int64_t max_m) { return WarpgroupScratchBytes(weight, max_m); }

void Linear(const DeviceWeight& weight, const __half* x, int64_t m, int64_t x_stride, const float* bias, __half* y, int64_t y_stride, Stream stream,
            void* scratch) {
  Run(weight, x, m, x_stride, bias, y, true, y_stride, stream, scratch);
}

void Linear(const DeviceWeight& weight, const __half* x, int64_t m, int64_t x_stride, const float* bias, float* y, int64_t y_stride, Stream stream,
            void* scratch) {
  Run(weight, x, m, x_stride, bias, y, false, y_stride, stream, scratch);
}

}  // namespace tandem::cuda
