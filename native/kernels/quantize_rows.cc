// quantize_rows.cc: activations to int8. QuantizeSegmentRef is the definition; the vector versions have its bits.
#include "kernels/quantize_rows.h"

#include <cmath>
#include <functional>
#include <limits>

#include "kernels/vector/select.h"

namespace tandem {

namespace {

constexpr int64_t kMinElements = 1 << 14;   // of a thread: less costs more to hand out than to do

}  // namespace

ColumnSegments::ColumnSegments(int64_t cols, int64_t group_size, int64_t group_offset)
    : cols(cols), group_size(group_size), group_offset(group_offset) {
  for (Segment s = First(); s.begin < cols; s.Next()) {
    ++count;
    cols_in_eights += (s.length() + 7) / 8 * 8;
    cols_in_fours += (s.length() + 3) / 4 * 4;
  }
}

void QuantizeSegmentRef(const float* x, int64_t n, int8_t* q, float* scale) {
  float maximum = 0.0f;
  bool finite = true;
  for (int64_t c = 0; c < n; ++c) {
    maximum = std::max(maximum, std::abs(x[c]));
    finite = finite && std::isfinite(x[c]);
  }
  const bool zero = !finite || maximum < kSmallestMaximum;
  *scale = !finite ? std::numeric_limits<float>::quiet_NaN() : zero ? 0.0f : maximum / 127.0f;
  for (int64_t c = 0; c < n; ++c) q[c] = zero ? int8_t{0} : static_cast<int8_t>(std::nearbyint(x[c] * (127.0f / maximum)));
}

}  // namespace tandem

#define TANDEM_VECTOR_FILE "kernels/quantize_rows_vector.inc"
#include "kernels/vector/each_isa.inc"

namespace tandem {

void QuantizeRows(Isa isa, const ColumnSegments& segments, const float* x, int64_t m, int64_t x_stride, void* to, ThreadPool& pool) {
  const auto quantize_row = TANDEM_SELECT(isa, QuantizeRow);
  if (m <= 0) return;
  const auto tiles = [&](int64_t begin, int64_t end, int) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = TileBegin(m, tile), rows = TileBegin(m, tile + 1) - first;
      uint8_t* tile_to = static_cast<uint8_t*>(to) + QuantizedBytes(segments, first);
      for (int64_t row = 0; row < rows; ++row) quantize_row(segments, x + (first + row) * x_stride, rows, row, tile_to);
    }
  };
  const int64_t grain = std::max<int64_t>(1, kMinElements / (kTileTokens * std::max<int64_t>(segments.cols, 1)));
  pool.ParallelFor(NumTiles(m), grain, std::cref(tiles));
}

}  // namespace tandem
