// GEGLU of fp16 rows: the first half of the row times the exact GELU of the second half (kernels/geglu.h on the device).
#pragma once

#include <cstdint>

#include "kernels/cuda/device.h"

namespace tandem::cuda {

// y[i, j] = u[i, j] * gelu(u[i, f + j]), gelu(x) = 0.5 x (1 + erf(x / sqrt 2)), in fp32
//   u: [m, 2f] fp16, rows u_stride elements apart; y: [m, f] fp16, rows y_stride elements apart, no overlap
//   strides multiples of 8, 16-byte aligned; where f is a multiple of 8 this runs at memory speed
// Columns of y from f on are never written.
void Geglu(const __half* u, int64_t m, int64_t f, int64_t u_stride, __half* y, int64_t y_stride, Stream stream);

}  // namespace tandem::cuda
