// The kernels behind Linear, one by one. All give the same bits; which is fastest depends on m.
#pragma once

#include <vector>

#include "kernels/cuda/linear_packed.h"

namespace tandem::cuda {

struct LinearCall {
  DeviceWeight weight;
  const __half* x;
  int64_t m;
  int64_t x_stride;
  Output output;
  Stream stream;
};

struct DeviceLimits {
  int64_t processors;
  size_t shared_bytes;  // of a block at most
};

// Of the current device.
DeviceLimits LimitsOfDevice();

// Streams the weights once for up to kMaxDecodeRows rows; a warp multiplies row_tiles (1, 2 or 4; fp16: 1 or 2) tiles of 16 output rows at a time.
constexpr int64_t kMaxDecodeRows = 16;
void LaunchDecode(const LinearCall& call, int row_tiles);

// The same at any m, on devices with 227 KB of shared memory, for most quantised weights of 8 parts and, with more than 2 tiles, of 4: a block
// multiplies token_tiles (1, 2, 4 or 8) times 8 rows of x at a time.
constexpr int kStreamTokenTiles[] = {1, 2, 4, 8};
bool CanStream(const DeviceWeight& weight, int token_tiles);
void LaunchStream(const LinearCall& call, int token_tiles);
// What is multiplied by one block at a time; there is a block for each processor.
int64_t StreamUnits(const DeviceWeight& weight, int64_t m, int token_tiles);

// Tiled products for any m; a block makes a tile of (output rows) x (tokens).
enum class GemmTile { k64x32, k64x64, k128x128, k256x128 };
constexpr GemmTile kGemmTiles[] = {GemmTile::k64x32, GemmTile::k64x64, GemmTile::k128x128, GemmTile::k256x128};
void LaunchGemm(const LinearCall& call, GemmTile tile);
int64_t TileOutputRows(GemmTile tile);
int64_t TileTokens(GemmTile tile);
size_t GemmSharedBytes(GemmTile tile, WeightType type);

// What Linear takes, on the current device.
// For up to kMaxStreamRows rows; 0: not the streaming kernel.
constexpr int64_t kMaxStreamRows = 64;
int ChooseStreamTokenTiles(const DeviceWeight& weight, int64_t m);
int ChooseDecodeRowTiles(const DeviceWeight& weight, int64_t m);
GemmTile ChooseGemmTile(const DeviceWeight& weight, int64_t m);

}  // namespace tandem::cuda
