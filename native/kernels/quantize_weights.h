// fp16 weights to INT8 or INT4, as GLM-130B's quantization/functional.py does on a CPU, bit for bit (model/import/quantize.ts has the same in TypeScript).
//
// For each row and group of columns:
//   scale = half(max |w| / (2^(bits - 1) - 1)),  q = int8(round(half(w / scale))), ties to even; where scale is 0, q is 0
// w / scale is rounded to fp32 first. Nothing is clamped: with a subnormal scale the quotient can pass 127 and wraps.
#pragma once

#include <cstdint>

#include "core/cpu_features.h"

namespace tandem {

//   w: [rows, cols] fp16, dense; bits: 8 or 4; groups divides cols, and for 4 bits cols / groups is even
//   q: [rows, cols] int8, or [rows, cols / 2] with the even column in the high nibble; scales: [rows, groups] fp16. Neither may overlap w.
// Returns the first row that holds an infinite or NaN weight, after which nothing is written; or -1. The same bits for every instruction set.
int64_t QuantizeWeights(Isa isa, const uint16_t* w, int64_t rows, int64_t cols, int64_t groups, int bits, uint8_t* q, uint16_t* scales);

// The definition.
int64_t QuantizeWeightsRef(const uint16_t* w, int64_t rows, int64_t cols, int64_t groups, int bits, uint8_t* q, uint16_t* scales);

}  // namespace tandem
