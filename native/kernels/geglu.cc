// geglu.cc: u1 * gelu(u2) with the exact GELU x * Phi(x), not the tanh form (model-spec section 2). GegluRef is the definition.
#include "kernels/geglu.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#define TANDEM_VECTOR_FILE "kernels/geglu_vector.inc"
#include "kernels/vector/each_isa.inc"

namespace tandem {

// What a thread takes at a time of a row, elements or segments: one row alone is work for several threads.
constexpr int64_t kSpan = 1024, kSpanSegments = 8;

void GegluRef(const float* u, int64_t m, int64_t f, float* y) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < f; ++j) {
      const double x = u[i * 2 * f + f + j];
      y[i * f + j] = static_cast<float>(u[i * 2 * f + j] * (0.5 * x * (1.0 + std::erf(x / std::sqrt(2.0)))));
    }
  }
}

void Geglu(Isa isa, const float* u, int64_t m, int64_t f, float* y, ThreadPool& pool) {
  const auto geglu_span = TANDEM_SELECT(isa, GegluSpan);
  const int64_t spans = (f + kSpan - 1) / kSpan;
  const auto body = [&](int64_t begin, int64_t end, int) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t i = unit / spans, j = unit % spans * kSpan;
      const float* row = u + i * 2 * f;
      geglu_span(row + j, row + f + j, std::min(kSpan, f - j), y + i * f + j);
    }
  };
  pool.ParallelFor(m * spans, std::max<int64_t>(1, 1024 / std::max<int64_t>(f, 1)), std::cref(body));
}

void GegluQuantized(Isa isa, const ColumnSegments& segments, const float* u, int64_t m, void* to, ThreadPool& pool) {
  const auto geglu_segments = TANDEM_SELECT(isa, GegluSegments);
  const int64_t f = segments.cols, spans = (segments.count + kSpanSegments - 1) / kSpanSegments;
  const auto body = [&](int64_t begin, int64_t end, int) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t i = unit / spans, first = unit % spans * kSpanSegments, last = std::min(first + kSpanSegments, segments.count);
      const int64_t tile = TileOf(m, i), tile_begin = TileBegin(m, tile);
      uint8_t* tile_to = static_cast<uint8_t*>(to) + QuantizedBytes(segments, tile_begin);
      geglu_segments(segments, first, last, u + i * 2 * f, u + i * 2 * f + f, TileBegin(m, tile + 1) - tile_begin, i - tile_begin, tile_to);
    }
  };
  pool.ParallelFor(m * spans, std::max<int64_t>(1, 1024 / std::max<int64_t>(f, 1)), std::cref(body));
}

}  // namespace tandem
