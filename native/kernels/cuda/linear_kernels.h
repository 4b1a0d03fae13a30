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

// Streams the weights once for up to kMaxDecodeRows rows; a warp multiplies row_tiles (1, 2 or 4; fp16: 1 or 2) tiles of 16 output rows at a time.
constexpr int64_t kMaxDecodeRows = 16;
void LaunchDecode(const LinearCall& call, int row_tiles);

// Tiled products for any m; a block makes a tile of (output rows) x (tokens).
enum class GemmTile { k64x32, k64x64, k128x128, k256x128 };
constexpr GemmTile kGemmTiles[] = {GemmTile::k64x32, GemmTile::k64x64, GemmTile::k128x128, GemmTile::k256x128};
void LaunchGemm(const LinearCall& call, GemmTile tile);
int64_t TileOutputRows(GemmTile tile);
int64_t TileTokens(GemmTile tile);
size_t GemmSharedBytes(GemmTile tile, WeightType type);

// What Linear takes, on the current device.
int ChooseDecodeRowTiles(const DeviceWeight& weight, int64_t m);
GemmTile ChooseGemmTile(const DeviceWeight& weight, int64_t m);

}  // namespace tandem::cuda
