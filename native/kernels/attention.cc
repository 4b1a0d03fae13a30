// attention.cc: attention over the paged KV cache. AttentionRef is the definition; Attention stays within the bound of attention_test.cc.
#include "kernels/attention.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "core/half.h"

namespace tandem {
namespace {

// What one thread computes at a time: rows of one head, or heads of one row.
constexpr int64_t kUnitRows = 48;
constexpr int64_t kUnitHeads = 16;
constexpr int64_t kUnitsPerThread = 4;

// A row's tokens are summed up in parts that different threads may take: of at least kLeastPart tokens, at most kMaxParts of them.
constexpr int64_t kLeastPart = 256;
constexpr int64_t kMaxParts = 8;

// Depends on `visible` alone, as the sums of a row do.
int64_t PartTokens(int64_t visible) {
  int64_t tokens = kLeastPart;
  while (tokens * kMaxParts < visible) tokens *= 2;
  return tokens;
}

// The state of a row and head after some of its tokens: sums of V, [PaddedDim], with weights relative to the largest score; that score; the weights' sum.
int64_t PaddedDim(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }
int64_t StateSize(int64_t head_dim) { return PaddedDim(head_dim) + 16; }
constexpr int64_t kMaxStateSize = kMaxHeadDim + 16;

// Half a megabyte on the stack: where the states of all parts do not fit, parts are not spread over threads.
constexpr int64_t kMaxSplitStates = (1 << 17) / kMaxStateSize;

}  // namespace
}  // namespace tandem

#define TANDEM_VECTOR_FILE "kernels/attention_vector.inc"
#include "kernels/vector/each_isa.inc"

namespace tandem {

namespace {

double KvAt(const void* data, KvType type, int64_t index) {
  return type == KvType::kF16 ? HalfToFloat(static_cast<const uint16_t*>(data)[index]) : static_cast<const float*>(data)[index];
}

// Every block that the rows name must exist: a wrong id would read another's memory.
void CheckRows(const AttentionRow* rows, int64_t m, const KvLayer& kv) {
  for (int64_t i = 0; i < m; ++i) {
    if (rows[i].visible < 1) throw Error(ErrorCode::kInvalidArgument, "attention: row " + std::to_string(i) + " sees no token");
    const bool checked = i > 0 && rows[i].block_table == rows[i - 1].block_table && rows[i].visible <= rows[i - 1].visible;
    if (checked) continue;
    for (int64_t b = 0; b * kv.block_size < rows[i].visible; ++b) {
      if (rows[i].block_table[b] < kv.num_blocks) continue;
      throw Error(ErrorCode::kInvalidArgument, "attention: row " + std::to_string(i) + " names KV block " + std::to_string(rows[i].block_table[b]) +
                                                   ", there are " + std::to_string(kv.num_blocks));
    }
  }
}

}  // namespace

void AttentionRef(const float* q, const AttentionRow* rows, int64_t m, const KvLayer& kv, float* out) {
  const int64_t stride = kv.num_heads * kv.head_dim;
  std::vector<double> scores, sums;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t head = 0; head < kv.num_heads; ++head) {
      const float* query = q + i * stride + head * kv.head_dim;
      const auto place = [&](int64_t t) {
        return ((rows[i].block_table[t / kv.block_size] * kv.num_heads + head) * kv.block_size + t % kv.block_size) * kv.head_dim;
      };
      scores.assign(static_cast<size_t>(rows[i].visible), 0.0);
      double max = -std::numeric_limits<double>::infinity();
      for (int64_t t = 0; t < rows[i].visible; ++t) {
        double score = 0.0;
        for (int64_t j = 0; j < kv.head_dim; ++j) score += query[j] * KvAt(kv.k, kv.type, place(t) + j);
        scores[static_cast<size_t>(t)] = score / std::sqrt(static_cast<double>(kv.head_dim));
        max = std::max(max, scores[static_cast<size_t>(t)]);
      }
      double weight_sum = 0.0;
      sums.assign(static_cast<size_t>(kv.head_dim), 0.0);
      for (int64_t t = 0; t < rows[i].visible; ++t) {
        const double weight = std::exp(scores[static_cast<size_t>(t)] - max);
        weight_sum += weight;
        for (int64_t j = 0; j < kv.head_dim; ++j) sums[static_cast<size_t>(j)] += weight * KvAt(kv.v, kv.type, place(t) + j);
      }
      for (int64_t j = 0; j < kv.head_dim; ++j) {
        out[i * stride + head * kv.head_dim + j] = static_cast<float>(sums[static_cast<size_t>(j)] / weight_sum);
      }
    }
  }
}

namespace {

struct Kernels {
  void (*attend_part)(const float* q, int64_t q_stride, const AttentionRow* rows, int64_t m, const KvLayer& kv, int64_t first_head, int64_t heads,
                      int64_t begin, int64_t end, float* states);
  void (*merge_state)(float* state, float* later, int64_t head_dim);
};

void Finish(const float* state, int64_t head_dim, float* out) {
  const float inverse = 1.0f / state[PaddedDim(head_dim) + 1];
  for (int64_t j = 0; j < head_dim; ++j) out[j] = state[j] * inverse;
}

// m <= kUnitRows rows of one sequence whose parts are of one size, `heads` <= kUnitHeads; one of the two is 1. q and out: the first head's part of the
// first row.
void Attend(const Kernels& kernels, const float* q, const AttentionRow* rows, int64_t m, const KvLayer& kv, int64_t first_head, int64_t heads, float* out) {
  alignas(64) float states[kUnitRows * kMaxStateSize];
  alignas(64) float later[kUnitRows * kMaxStateSize];
  const int64_t stride = kv.num_heads * kv.head_dim, state_size = StateSize(kv.head_dim), part = PartTokens(rows[0].visible);
  int64_t longest = 0;
  for (int64_t r = 0; r < m; ++r) longest = std::max(longest, rows[r].visible);
  for (int64_t begin = 0; begin < longest; begin += part) {
    kernels.attend_part(q, stride, rows, m, kv, first_head, heads, begin, begin + part, begin == 0 ? states : later);
    for (int64_t i = 0; begin > 0 && i < m * heads; ++i) {
      if (begin < rows[i / heads].visible) kernels.merge_state(states + i * state_size, later + i * state_size, kv.head_dim);
    }
  }
  for (int64_t i = 0; i < m * heads; ++i) Finish(states + i * state_size, kv.head_dim, out + i / heads * stride + i % heads * kv.head_dim);
}

// Few rows: every part of every row is work of its own.
void AttendSplit(const Kernels& kernels, const float* q, const AttentionRow* rows, int64_t m, const KvLayer& kv, int64_t unit_heads, float* out,
                 ThreadPool& pool) {
  alignas(64) float states[kMaxSplitStates * kMaxStateSize];
  const int64_t stride = kv.num_heads * kv.head_dim, state_size = StateSize(kv.head_dim), head_units = (kv.num_heads + unit_heads - 1) / unit_heads;
  const auto state_of = [&](int64_t row, int64_t part, int64_t head) { return states + ((row * kMaxParts + part) * kv.num_heads + head) * state_size; };
  const auto attend = [&](int64_t begin, int64_t end, int) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t head = unit % head_units * unit_heads, part = unit / head_units % kMaxParts, row = unit / head_units / kMaxParts;
      const int64_t tokens = PartTokens(rows[row].visible), first = part * tokens;
      if (first >= rows[row].visible) continue;
      kernels.attend_part(q + row * stride + head * kv.head_dim, stride, rows + row, 1, kv, head, std::min(unit_heads, kv.num_heads - head), first,
                          first + tokens, state_of(row, part, head));
    }
  };
  pool.ParallelFor(m * kMaxParts * head_units, 1, std::cref(attend));
  for (int64_t row = 0; row < m; ++row) {
    const int64_t tokens = PartTokens(rows[row].visible);
    for (int64_t head = 0; head < kv.num_heads; ++head) {
      for (int64_t part = 1; part * tokens < rows[row].visible; ++part) kernels.merge_state(state_of(row, 0, head), state_of(row, part, head), kv.head_dim);
      Finish(state_of(row, 0, head), kv.head_dim, out + row * stride + head * kv.head_dim);
    }
  }
}

}  // namespace

void Attention(Isa isa, const float* q, const AttentionRow* rows, int64_t m, const KvLayer& kv, float* out, ThreadPool& pool) {
  if (kv.head_dim < 1 || kv.head_dim > kMaxHeadDim || kv.block_size < 1) {
    throw Error(ErrorCode::kInvalidArgument, "attention: head size " + std::to_string(kv.head_dim) + " and block size " +
                                                 std::to_string(kv.block_size) + "; the head size may be 1 to " + std::to_string(kMaxHeadDim) + ", the block size at least 1");
  }
  CheckRows(rows, m, kv);
  if (m == 0) return;
  const Kernels kernels = {TANDEM_SELECT(isa, AttendPart), TANDEM_SELECT(isa, MergeState)};
  const int64_t wanted_units = pool.num_threads() == 1 ? 1 : pool.num_threads() * kUnitsPerThread;
  const auto heads_for = [&](int64_t pieces) {
    return std::clamp<int64_t>(kv.num_heads * pieces / wanted_units, 1, std::min(kUnitHeads, kv.num_heads));
  };
  int64_t longest = 0;
  bool shared = false;
  for (int64_t i = 0; i < m; ++i) {
    longest = std::max(longest, rows[i].visible);
    shared = shared || (i > 0 && rows[i].block_table == rows[i - 1].block_table);
  }
  const bool few = m * kv.num_heads < wanted_units * kUnitHeads && pool.num_threads() > 1;
  if (few && longest > kLeastPart && m * kv.num_heads * kMaxParts <= kMaxSplitStates) {
    AttendSplit(kernels, q, rows, m, kv, heads_for(m * (longest / kLeastPart + 1)), out, pool);
    return;
  }
  const int64_t unit_rows = shared ? std::clamp<int64_t>(m * kv.num_heads / wanted_units, 1, kUnitRows) : 1;
  const int64_t unit_heads = heads_for((m + unit_rows - 1) / unit_rows);
  const int64_t row_units = (m + unit_rows - 1) / unit_rows, head_units = (kv.num_heads + unit_heads - 1) / unit_heads;
  const auto body = [&](int64_t begin, int64_t end, int) {
    for (int64_t unit = begin; unit < end; ++unit) {
      // The rows of a sequence one after the other, while its K and V of these heads are at hand.
      const int64_t first_head = unit / row_units * unit_heads, heads = std::min(unit_heads, kv.num_heads - first_head);
      const int64_t unit_begin = unit % row_units * unit_rows, unit_end = std::min(unit_begin + unit_rows, m);
      for (int64_t i = unit_begin; i < unit_end;) {
        const auto goes_along = [&](const AttentionRow& row) {
          return row.block_table == rows[i].block_table && PartTokens(row.visible) == PartTokens(rows[i].visible);
        };
        int64_t next = i + 1;
        while (next < unit_end && goes_along(rows[next])) ++next;
        const int64_t heads_at_once = next - i == 1 ? heads : 1;
        for (int64_t head = first_head; head < first_head + heads; head += heads_at_once) {
          const int64_t place = (i * kv.num_heads + head) * kv.head_dim;
          Attend(kernels, q + place, rows + i, next - i, kv, head, heads_at_once, out + place);
        }
        i = next;
      }
    }
  };
  pool.ParallelFor(row_units * head_units, 1, std::cref(body));
}

}  // namespace tandem
