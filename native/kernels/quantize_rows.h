// Activations as int8, for the linear layers that multiply integers (packed_linear.h).
//
// A row is cut into segments of at most 128 columns: one begins at every multiple of 128 and at every border of the weight's scale groups, so that a
// segment has one scale on either side. For the segment's values x:
//   scale = max |x| / 127,  q = round(x * (127 / max |x|)), ties to even, all in fp32: x ~ q * scale, q in -127..127
// A maximum below 1e-30 counts as 0: scale and all q are 0. Where a value is infinite or NaN, scale is NaN and all q are 0.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/cpu_features.h"
#include "core/thread_pool.h"

namespace tandem {

constexpr int64_t kSegmentColumns = 128;
constexpr float kSmallestMaximum = 1e-30f;  // its inverse times 127 is finite

// The segments of rows of `cols` columns; the groups are LinearWeight's.
class ColumnSegments {
 public:
  // Goes through the segments in order:  for (auto s = segments.First(); s.begin < cols; s.Next())
  struct Segment {
    const ColumnSegments* of;
    int64_t begin, end;
    int64_t group, group_end;

    int64_t length() const { return end - begin; }
    void Next() {
      begin = end;
      if (begin == group_end) {
        ++group;
        group_end += of->group_size;
      }
      SetEnd();
    }
    void SetEnd() { end = std::min({begin / kSegmentColumns * kSegmentColumns + kSegmentColumns, group_end, of->cols}); }
  };

  ColumnSegments() = default;
  ColumnSegments(int64_t cols, int64_t group_size, int64_t group_offset);

  Segment First() const {
    Segment first{this, 0, 0, 0, group_size - group_offset};
    first.SetEnd();
    return first;
  }

  int64_t cols = 0;
  int64_t group_size = 1;
  int64_t group_offset = 0;
  int64_t count = 0;  // segments
  // Columns, each segment's rounded up to a multiple of 8, or 4.
  int64_t cols_in_eights = 0;
  int64_t cols_in_fours = 0;
};

// Quantised rows lie in tiles of at most kTileTokens consecutive rows: tile t of m rows holds the rows from TileBegin(m, t) on. A tile holds, segment by
// segment: kSegmentColumns int8 of each row, filled up with zeros; the scale of each row, fp32; the sum of q of each row, int32.
constexpr int64_t kTileTokens = 12;
constexpr int64_t kQuantizedSegmentBytes = kSegmentColumns + 4 + 4;

inline int64_t NumTiles(int64_t m) { return (m + kTileTokens - 1) / kTileTokens; }
inline int64_t TileBegin(int64_t m, int64_t tile) { return tile * m / NumTiles(m); }
inline int64_t TileOf(int64_t m, int64_t row) { return ((row + 1) * NumTiles(m) - 1) / m; }  // TileBegin(tile) <= row < TileBegin(tile + 1)
inline int64_t QuantizedBytes(const ColumnSegments& segments, int64_t m) { return m * segments.count * kQuantizedSegmentBytes; }

//   x: [m, segments.cols], rows x_stride floats apart; to: QuantizedBytes(segments, m) bytes, 64-byte aligned
// The same bits for every instruction set, whatever the number of threads.
void QuantizeRows(Isa isa, const ColumnSegments& segments, const float* x, int64_t m, int64_t x_stride, void* to, ThreadPool& pool);

// The definition, of one segment of n values: q: [n].
void QuantizeSegmentRef(const float* x, int64_t n, int8_t* q, float* scale);

}  // namespace tandem
