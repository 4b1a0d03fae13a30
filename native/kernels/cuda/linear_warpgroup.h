// Products for many rows of x by warpgroups (wgmma), on GPUs of compute capability 9.0 where the program was compiled for sm_90a. The same bits as the kernels
// of linear_kernels.h.
#pragma once

#include "kernels/cuda/linear_kernels.h"

namespace tandem::cuda {

// Output rows of a block's tile; its tokens are kWarpgroupTokens.
enum class WarpgroupTile { k128, k192, k256 };
constexpr WarpgroupTile kWarpgroupTiles[] = {WarpgroupTile::k128, WarpgroupTile::k192, WarpgroupTile::k256};
constexpr int64_t kWarpgroupTokens = 128;
int64_t TileOutputRows(WarpgroupTile tile);

// Whether the current device and the program can: then every tile but k256 for fp16 weights.
bool CanRunWarpgroups(WarpgroupTile tile, WeightType type);

// scratch: WarpgroupScratchBytes() of device memory, 16-byte aligned, for the rows of x in another order.
int64_t WarpgroupScratchBytes(const DeviceWeight& weight, int64_t m);
void LaunchWarpgroups(const LinearCall& call, WarpgroupTile tile, void* scratch);

// Whether Linear takes a tile of these with scratch memory, and which, on the current device.
bool ChooseWarpgroupTile(const DeviceWeight& weight, int64_t m, WarpgroupTile* tile);

}  // namespace tandem::cuda
