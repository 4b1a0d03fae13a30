// linear_warpgroup.cu: y = x W^T + b for many rows of x by wgmma, weights dequantised in registers.
//
// wgmma takes its A operand, here the weights, from registers laid out as those of mma.m16n8k16, so that weights are packed and dequantised as for all other
// kernels, and B, here the rows of x, from shared memory: 16 contiguous bytes for each half of k, in the order of k. The packed order of k is not that of the
// columns (linear_packed.h), so the rows of x are first copied to scratch memory in it, tile by tile as they will lie in shared memory: stages are plain copies.
//
// A block makes a tile of kRows output rows x 128 tokens; a warpgroup has 64 or 128 of the rows. Chunk after chunk of 64 columns comes to shared memory by
// cp.async, some stages ahead. While an mma of 16 columns runs, the weights of the next one are dequantised; the one barrier of a chunk is in its middle, where
// all warpgroups have an mma in flight.
//
// The additions are those of the other kernels: a chain for each part of the columns, then part after part. The sums of the parts before are in registers as
// far as there are any, else in shared memory.
#include "kernels/cuda/linear_warpgroup.h"

#include <mutex>

namespace tandem::cuda {

namespace {

constexpr int kTokens = static_cast<int>(kWarpgroupTokens);
constexpr int kTokenVectors = kTokens * kChunkColumns / 8;  // of a chunk: 16 KB
constexpr int kSwizzleBytes = 1024;

// kRowSets: sets of 64 rows that a warpgroup has. kRegisterTiles: token tiles whose totals are in registers.
template <int kRows_, int kRowSets_, int kRegisterTiles_>
struct Shape {
  static constexpr int kRows = kRows_, kRowSets = kRowSets_, kRegisterTiles = kRegisterTiles_;
  static constexpr int kThreads = kRows / kTileRows / kRowSets * kWarpSize;
  static constexpr size_t kTotalBytes = size_t{kRows} * (kTokens - 8 * kRegisterTiles) * sizeof(float);

  static constexpr int kMaxStages = 6;
  __host__ __device__ static constexpr int StageVectors(int lane_vectors) { return kTokenVectors + kThreads * kRowSets * lane_vectors; }
  // As many as leave the totals their place in the 227 KB of a block.
  __host__ __device__ static constexpr int Stages(int lane_vectors) {
    const auto fit = static_cast<int>((227 * 1024 - kSwizzleBytes - kTotalBytes) / (size_t{16} * StageVectors(lane_vectors)));
    return fit < kMaxStages ? fit : kMaxStages;
  }
  __host__ __device__ static constexpr size_t SharedBytes(int lane_vectors) {
    return kSwizzleBytes + size_t{16} * Stages(lane_vectors) * StageVectors(lane_vectors) + kTotalBytes;
  }
};

using Shape128 = Shape<128, 1, 16>;
using Shape192 = Shape<192, 1, 16>;
using Shape256 = Shape<256, 2, 4>;

// Row `token` of x as the kernel below copies it, [block of tokens][chunk][token][piece]: piece i holds the word that each lane of four needs for half an mma,
// words i, i + 8, i + 16 and i + 24 of the chunk, and lies where the swizzle of WarpgroupMma wants it. Zeros from row m on.
constexpr int kArrangeThreads = 256;
__global__ void __launch_bounds__(kArrangeThreads) ArrangeKernel(const __half* __restrict__ x, int m, int64_t x_stride, int chunks, uint4* __restrict__ arranged) {
  const int token = static_cast<int>(blockIdx.x), place = static_cast<int>(blockIdx.y * kArrangeThreads + threadIdx.x);
  const int chunk = place / 8, piece = place % 8;
  if (chunk >= chunks) return;
  uint4 words = make_uint4(0, 0, 0, 0);
  if (token < m) {
    const auto* const from = reinterpret_cast<const unsigned int*>(x + token * x_stride + static_cast<int64_t>(chunk) * kChunkColumns) + piece;
    words = make_uint4(__ldg(from), __ldg(from + 8), __ldg(from + 16), __ldg(from + 24));
  }
  arranged[(static_cast<int64_t>(token / kTokens) * chunks + chunk) * kTokenVectors + token % kTokens * 8 + (piece ^ token % 8)] = words;
}

template <WeightType kType, WeightScaling kScaling, typename S>
__device__ __forceinline__ void MultiplyTile(const PackedView& weight, const uint4* __restrict__ arranged, int m, const Output& output) {
  constexpr int kVectors = kLaneVectors<kType>, kRowSets = S::kRowSets, kTokenTiles = kTokens / 8, kWarpgroupWarps = 4;
  constexpr int kStages = S::Stages(kVectors), kStageVectors = S::StageVectors(kVectors);
  static_assert(kStages >= 3, "one is read, one may still be, one is loaded");
  TANDEM_DYNAMIC_SHARED(uint4, unaligned);
  uint4* const shared = unaligned + (-reinterpret_cast<uintptr_t>(unaligned) & (kSwizzleBytes - 1)) / sizeof(uint4);

  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int group = lane / 4, member = lane % 4;
  const int block_token = static_cast<int>(blockIdx.x) * kTokens;
  // The warp's row tile of the first set; of the next one: kWarpgroupWarps on. Those past the end are the last one's, and not stored.
  const int first_tile =
      static_cast<int>(blockIdx.y) * (S::kRows / kTileRows) + warp / kWarpgroupWarps * (kWarpgroupWarps * kRowSets) + warp % kWarpgroupWarps;
  const auto tile_of = [&](int r) { return min(first_tile + r * kWarpgroupWarps, weight.row_tiles - 1); };

  const uint4* weight_source = weight.data + static_cast<int64_t>(tile_of(0)) * weight.chunks * (kVectors * kWarpSize) + lane;
  const int64_t set_step = static_cast<int64_t>(tile_of(kRowSets - 1) - tile_of(0)) * weight.chunks * (kVectors * kWarpSize);
  const uint4* token_source = arranged + static_cast<int64_t>(blockIdx.x) * weight.chunks * kTokenVectors + thread;
  // A thread copies the weights that it reads.
  const int weight_place = kTokenVectors + thread;
  const auto load_weights = [&](uint4* slot) {
#pragma unroll
    for (int r = 0; r < kRowSets; ++r) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        CpAsync16(slot + weight_place + (r * kVectors + v) * S::kThreads, weight_source + r * set_step + v * kWarpSize, true);
      }
    }
    weight_source += kVectors * kWarpSize;
  };
  constexpr int kTokenCopies = (kTokenVectors + S::kThreads - 1) / S::kThreads;
  const auto load_tokens = [&](uint4* slot, int begin, int end) {
#pragma unroll
    for (int i = begin; i < end; ++i) {
      if ((i + 1) * S::kThreads <= kTokenVectors || thread < kTokenVectors % S::kThreads) {
        CpAsync16(slot + thread + i * S::kThreads, token_source + i * S::kThreads, true);
      }
    }
    if (end == kTokenCopies) token_source += kTokenVectors;
  };

  uint4 packed[kRowSets][kVectors];
  uint32_t a[2][kRowSets][4], scales[kRowSets];
  // The weights that mma i of a chunk is the first to take.
  const auto load_packed = [&](const uint4* slot, int i) {
    if (i * kVectors % 4 != 0) return;
#pragma unroll
    for (int r = 0; r < kRowSets; ++r) packed[r][i * kVectors / 4] = slot[weight_place + (r * kVectors + i * kVectors / 4) * S::kThreads];
  };
  const auto load_scales = [&](int block) {
#pragma unroll
    for (int r = 0; r < kRowSets; ++r) scales[r] = __ldg(weight.scales + (static_cast<int64_t>(block) * weight.row_tiles + tile_of(r)) * 8 + group);
  };
  const auto load_chunk_scales = [&](int chunk) {
    if constexpr (kScaling == WeightScaling::kPerChunk) {
      load_scales((min(chunk, weight.chunks - 1) + weight.group_offset_chunks) / weight.group_chunks);
    }
  };
  const auto make_operands = [&](int i) {
#pragma unroll
    for (int r = 0; r < kRowSets; ++r) {
      WeightOperand<kType>(packed[r], i, a[i % 2][r]);
      if constexpr (kScaling == WeightScaling::kPerChunk) ScaleOperand(scales[r], a[i % 2][r]);
    }
  };

  constexpr int kRegisterTiles = S::kRegisterTiles, kSharedTiles = kTokenTiles - kRegisterTiles;
  float sums[kRowSets][kTokenTiles][4], totals[kRowSets][kRegisterTiles][4];
  // [set, token tile][thread]: each thread's own
  float4* const shared_totals = reinterpret_cast<float4*>(shared + kStages * kStageVectors) + thread;

#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < weight.chunks) {
      load_weights(shared + stage * kStageVectors);
      load_tokens(shared + stage * kStageVectors, 0, kTokenCopies);
    }
    CpAsyncCommit();
  }
  uint4* slot = shared;
  uint4* slot_before = shared + (kStages - 1) * kStageVectors;  // of the chunk before
  load_chunk_scales(0);
  CpAsyncWait<kStages - 2>();
  FenceAsyncProxy();
  __syncthreads();
  load_packed(slot, 0);
  make_operands(0);

#pragma unroll 1
  for (int part = 0; part < weight.parts; ++part) {
#pragma unroll
    for (int r = 0; r < kRowSets; ++r) {
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[r][n][j] = 0.0f;
      }
    }
    if constexpr (kScaling == WeightScaling::kPerPart) load_scales(part);
    const int end = PartBegin(weight.chunks, weight.parts, part + 1);
#pragma unroll 1
    for (int chunk = PartBegin(weight.chunks, weight.parts, part); chunk < end; ++chunk) {
      const bool more = chunk + kStages - 1 < weight.chunks;
      uint4* const next_slot = slot == shared + (kStages - 1) * kStageVectors ? shared : slot + kStageVectors;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        WarpgroupArrive();
#pragma unroll
        for (int r = 0; r < kRowSets; ++r) WarpgroupMma(sums[r], a[i % 2][r], slot, 2 * i);
        WarpgroupCommit();
        load_packed(i == 3 ? next_slot : slot, (i + 1) % 4);  // behind the last chunk: what is not used
        if (i == 3) load_chunk_scales(chunk + 1);
        WarpgroupWait<1>();  // the mma before this one is done with its operands
        make_operands((i + 1) % 4);
        if (i == 1) {
          CpAsyncWait<kStages - 3>();
          FenceAsyncProxy();
          __syncthreads();  // all threads' copies of the next chunk are there, and no mma reads the chunk before
          if (more) load_weights(slot_before);
        }
        if (i > 0 && more) load_tokens(slot_before, (i - 1) * kTokenCopies / 3, i * kTokenCopies / 3);
      }
      CpAsyncCommit();
      slot_before = slot;
      slot = next_slot;
    }

    WarpgroupWait<0>();
#pragma unroll
    for (int r = 0; r < kRowSets; ++r) {
      WarpgroupSettle(sums[r]);
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        float(&sum)[4] = sums[r][n];
        if constexpr (kScaling == WeightScaling::kPerPart) ScalePart(scales[r], sum);
        if (n < kRegisterTiles) {
#pragma unroll
          for (int j = 0; j < 4; ++j) totals[r][n % kRegisterTiles][j] = part == 0 ? sum[j] : __fadd_rn(totals[r][n % kRegisterTiles][j], sum[j]);
        } else {
          float4* const total = shared_totals + (r * kSharedTiles + n - kRegisterTiles) * S::kThreads;
          if (part > 0) {
            const float4 before = *total;
            sum[0] = __fadd_rn(before.x, sum[0]);
            sum[1] = __fadd_rn(before.y, sum[1]);
            sum[2] = __fadd_rn(before.z, sum[2]);
            sum[3] = __fadd_rn(before.w, sum[3]);
          }
          if (part + 1 < weight.parts) *total = make_float4(sum[0], sum[1], sum[2], sum[3]);
        }
      }
    }
  }
  CpAsyncWait<0>();

#pragma unroll
  for (int r = 0; r < kRowSets; ++r) {
    const int row = (first_tile + r * kWarpgroupWarps) * kTileRows + group;
    const float biases[2] = {BiasOf(output, row), BiasOf(output, row + 8)};
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int token = block_token + n * 8 + 2 * member + j % 2;
        if (token < m) Store(output, token, row + j / 2 * 8, n < kRegisterTiles ? totals[r][n % kRegisterTiles][j] : sums[r][n][j], biases[j / 2]);
      }
    }
  }
}

template <WeightType kType, WeightScaling kScaling, typename S>
__global__ void __launch_bounds__(S::kThreads, 1) WarpgroupKernel(PackedView weight, const uint4* __restrict__ arranged, int m, Output output) {
  if constexpr (kHasWarpgroupMma) MultiplyTile<kType, kScaling, S>(weight, arranged, m, output);
}

// run(Shape()) for the shape of `tile`.
template <typename Run>
auto WithShape(WarpgroupTile tile, const Run& run) {
  switch (tile) {
    case WarpgroupTile::k128: return run(Shape128());
    case WarpgroupTile::k192: return run(Shape192());
    default: return run(Shape256());
  }
}

template <WeightType kType, WeightScaling kScaling, typename S>
void LaunchShape(const LinearCall& call, const uint4* arranged) {
  if constexpr (S::Stages(kLaneVectors<kType>) >= 3) {
    const PackedView view = ViewOf(call.weight);
    const dim3 grid(static_cast<unsigned int>((call.m + kTokens - 1) / kTokens), static_cast<unsigned int>((view.rows + S::kRows - 1) / S::kRows));
    Launch("linear by warpgroups", WarpgroupKernel<kType, kScaling, S>, grid, dim3(S::kThreads), S::SharedBytes(kLaneVectors<kType>), call.stream, view,
           arranged, static_cast<int>(call.m), call.output);
  } else {
    throw Error(ErrorCode::kInternal, "linear: a tile that is too large for its weights");
  }
}

bool DeviceHasWarpgroups() {
#ifdef TANDEM_CUDA_ON_CPU
  return true;
#else
  // The kernel as it was loaded: compiled for anything but sm_90a it is empty, and needs few registers.
  constexpr int kRegistersOfEmptyKernel = 64;
  cudaFuncAttributes attributes;
  Check(cudaFuncGetAttributes(&attributes, WarpgroupKernel<WeightType::kI4, WeightScaling::kPerPart, Shape256>), "a kernel's attributes");
  return attributes.numRegs > kRegistersOfEmptyKernel;
#endif
}

}  // namespace

int64_t TileOutputRows(WarpgroupTile tile) {
  return WithShape(tile, [](auto shape) { return int64_t{decltype(shape)::kRows}; });
}

bool CanRunWarpgroups(WarpgroupTile tile, WeightType type) {
  static std::mutex mutex;
  static std::vector<int> known;  // of each device: 1 or -1, 0 where not asked yet
  int device = 0;
  Check(cudaGetDevice(&device), "which device is current");
  const std::lock_guard<std::mutex> lock(mutex);
  const auto index = static_cast<size_t>(device);
  if (known.size() <= index) known.resize(index + 1, 0);
  if (known[index] == 0) known[index] = DeviceHasWarpgroups() ? 1 : -1;
  return known[index] > 0 && WithShape(tile, [&](auto shape) { return decltype(shape)::Stages(LaneVectors(type)) >= 3; });
}

int64_t WarpgroupScratchBytes(const DeviceWeight& weight, int64_t m) {
  const int64_t chunks = (weight.cols + kChunkColumns - 1) / kChunkColumns;
  return (m + kTokens - 1) / kTokens * chunks * kTokenVectors * static_cast<int64_t>(sizeof(uint4));
}

void LaunchWarpgroups(const LinearCall& call, WarpgroupTile tile, void* scratch) {
  const int chunks = ViewOf(call.weight).chunks;
  auto* const arranged = static_cast<uint4*>(scratch);
  const dim3 grid(static_cast<unsigned int>((call.m + kTokens - 1) / kTokens * kTokens),
                  static_cast<unsigned int>((chunks * 8 + kArrangeThreads - 1) / kArrangeThreads));
  Launch("rows of x for warpgroups", ArrangeKernel, grid, dim3(kArrangeThreads), 0, call.stream, call.x, static_cast<int>(call.m), call.x_stride, chunks, arranged);
  WithShape(tile, [&](auto shape) {
    using S = decltype(shape);
    const bool per_part = call.weight.scaling == WeightScaling::kPerPart;
    switch (call.weight.type) {
      case WeightType::kI4:
        return per_part ? LaunchShape<WeightType::kI4, WeightScaling::kPerPart, S>(call, arranged)
                        : LaunchShape<WeightType::kI4, WeightScaling::kPerChunk, S>(call, arranged);
      case WeightType::kI8:
        return per_part ? LaunchShape<WeightType::kI8, WeightScaling::kPerPart, S>(call, arranged)
                        : LaunchShape<WeightType::kI8, WeightScaling::kPerChunk, S>(call, arranged);
      default: return LaunchShape<WeightType::kF16, WeightScaling::kNone, S>(call, arranged);
    }
  });
}

}  // namespace tandem::cuda
