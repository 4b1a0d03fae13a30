// GEGLU: the first half of the row times the exact GELU of the second half.
#pragma once

#include <cstdint>

#include "core/cpu_features.h"
#include "core/thread_pool.h"
#include "kernels/quantize_rows.h"

namespace tandem {

// y[i, j] = u[i, j] * gelu(u[i, f + j]), gelu(x) = 0.5 x (1 + erf(x / sqrt 2)), exact to a few fp32 ulps
//   u: [m, 2f] dense; y: [m, f] dense; y may be u's memory only if m == 1
void Geglu(Isa isa, const float* u, int64_t m, int64_t f, float* y, ThreadPool& pool);

// The same y, f = segments.cols columns of it, as QuantizeRows would make int8 of it, with the same bits.
//   to: QuantizedBytes(segments, m) bytes, 64-byte aligned
void GegluQuantized(Isa isa, const ColumnSegments& segments, const float* u, int64_t m, void* to, ThreadPool& pool);

void GegluRef(const float* u, int64_t m, int64_t f, float* y);

}  // namespace tandem
