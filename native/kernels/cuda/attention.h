// Attention of query rows over the paged KV cache on the device: kernels/attention.h, in fp16 with fp32 scores and sums.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cuda/device.h"
#include "kernels/cuda/kv_layout.h"

namespace tandem::cuda {

// A row's tokens are taken in parts of so many, each from a fresh state; the states are merged in the order of the parts.
constexpr int64_t kAttentionPart = 256;

// Largest head size. GLM-130B has 128.
constexpr int64_t kMaxCudaHeadDim = 256;

// One query row. It attends to tokens 0 .. visible - 1 of the sequence whose blocks are tables[table_offset ..]; visible >= 1.
struct CudaAttentionRow {
  uint32_t table_offset;
  uint32_t visible;
};

// Adjacent rows of one sequence, that is of one table_offset, which share their reads of K and V. row_count 0: nothing to do, as in a graph whose batch is
// not full. first_slot, for AttentionSplit alone: where the tile's rows keep their states in the scratch, one slot a row.
struct CudaAttentionTile {
  uint32_t first_row;
  uint32_t row_count;
  uint32_t first_slot;
};

struct CudaAttentionBatch {
  const __half* q = nullptr;  // [rows, num_heads * head_dim], rows q_stride elements apart, a multiple of 8; 16-byte aligned
  __half* out = nullptr;      // the same shape, rows out_stride apart; may be q's memory (with q's stride)
  int64_t q_stride = 0;
  int64_t out_stride = 0;
  const CudaAttentionRow* rows = nullptr;  // on the device, as all of these
  const uint32_t* tables = nullptr;
  CudaKvLayer kv;  // block_size a multiple of 8, head_dim a multiple of 8 and at most kMaxCudaHeadDim; V of the tokens that a tile's rows see must be finite
};

// Rows that a tile may have.
constexpr int64_t kSplitTileRows = 16;
int64_t WholeTileRows(int64_t head_dim);

// Puts the runs of rows with one table_offset into tiles: those of up to kSplitTileRows rows for AttentionSplit, longer ones for AttentionWhole.
void BuildAttentionTiles(const std::vector<CudaAttentionRow>& rows, int64_t head_dim, std::vector<CudaAttentionTile>* split,
                         std::vector<CudaAttentionTile>* whole);

// Bytes that AttentionSplit needs for tiles of `slots` rows in all.
int64_t AttentionScratchBytes(int64_t slots, int64_t max_parts, int64_t num_heads, int64_t head_dim);

// out[i, head, :] = softmax(q . k / sqrt(head_dim)) v over the row's visible tokens, for the rows of the tiles.
// A row's result has the same bits from either function, in whatever tile it is and whatever the other rows are.
//
// AttentionSplit: for a few rows of each sequence (decode). Each part of a tile and head is work of its own, in a grid of num_tiles x max_parts, so that a
// captured graph stays right as sequences grow: no row may see more than max_parts * kAttentionPart tokens. num_tiles at most 65535.
// AttentionWhole: for long runs (prefill), without a scratch.
// Throws kInvalidArgument for shapes that they do not take.
void AttentionSplit(const CudaAttentionBatch& batch, const CudaAttentionTile* tiles, int64_t num_tiles, int64_t slots, int64_t max_parts, void* scratch,
                    Stream stream);
void AttentionWhole(const CudaAttentionBatch& batch, const CudaAttentionTile* tiles, int64_t num_tiles, Stream stream);

}  // namespace tandem::cuda
