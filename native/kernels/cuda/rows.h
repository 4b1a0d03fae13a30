// Picks rows of activations, and tokens.
#pragma once

#include <cstdint>

#include "kernels/cuda/device.h"

namespace tandem::cuda {

// dst[i, :] = src[rows[i], :] for i < count
//   src, dst: [*, columns] fp16, rows `stride` elements apart, stride a multiple of 8, 16-byte aligned, no overlap
//   rows: [count], device memory
// Columns of dst from `columns` on are never written.
void GatherRows(const __half* src, const uint32_t* rows, int64_t count, int64_t columns, int64_t stride, __half* dst, Stream stream);

// tokens[i] = sampled[from[i]] for i < count with from[i] >= 0; 0 where that is no token of the vocabulary (a row that could not be sampled has none)
//   all in device memory
void TakeSamples(const uint32_t* sampled, const int32_t* from, int64_t count, int64_t vocab, uint32_t* tokens, Stream stream);

}  // namespace tandem::cuda
