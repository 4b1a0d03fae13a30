// attention.cc: attention over the paged KV cache. AttentionRef is the definition; Attention stays within the bound of attention_test.cc.
#include "kernels/attention.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "core/half.h"

namespace tandem {

// Rows that a thread takes at a time, of one head. They may be of several sequences.
constexpr int64_t kUnitRows = 16;

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

void Attention(Isa isa, const float* q, const AttentionRow* rows, int64_t m, const KvLayer& kv, float* out, ThreadPool& pool) {
  if (kv.head_dim < 1 || kv.head_dim > kMaxHeadDim || kv.block_size < 1) {
    throw Error(ErrorCode::kInvalidArgument, "attention: head size " + std::to_string(kv.head_dim) + " and block size " +
                                                 std::to_string(kv.block_size) + "; the head size may be 1 to " + std::to_string(kMaxHeadDim) + ", the block size at least 1");
  }
  CheckRows(rows, m, kv);
  const auto attend_sequence = TANDEM_SELECT(isa, AttendSequence);
  const int64_t stride = kv.num_heads * kv.head_dim;
  const int64_t row_groups = (m + kUnitRows - 1) / kUnitRows;
  const auto body = [&](int64_t begin, int64_t end, int) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t head = unit % kv.num_heads;  // neighbours in a block, so what is fetched too far is not fetched in vain
      const int64_t group_begin = unit / kv.num_heads * kUnitRows, group_end = std::min(group_begin + kUnitRows, m);
      for (int64_t i = group_begin; i < group_end;) {
        int64_t next = i + 1;
        while (next < group_end && rows[next].block_table == rows[i].block_table) ++next;
        const int64_t place = i * stride + head * kv.head_dim;
        attend_sequence(q + place, stride, rows + i, next - i, kv, head, out + place);
        i = next;
      }
    }
  };
  pool.ParallelFor(row_groups * kv.num_heads, 1, std::cref(body));
}

}  // namespace tandem
