// embedding.cc: lookup of token embeddings. Conversion from fp16 is exact, so every instruction set gives the same values.
#include "kernels/embedding.h"

#include <algorithm>
#include <functional>

#define TANDEM_VECTOR_FILE "kernels/embedding_vector.inc"
#include "kernels/vector/each_isa.inc"

namespace tandem {

namespace {

template <typename RowToFloat>
void EmbedRows(int64_t rows, int64_t cols, uint32_t first_token, const uint32_t* tokens, int64_t m, float* y, ThreadPool& pool, RowToFloat row_to_float) {
  const auto body = [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      float* out = y + i * cols;
      const int64_t row = static_cast<int64_t>(tokens[i]) - first_token;
      if (row < 0 || row >= rows) {
        std::fill(out, out + cols, 0.0f);
      } else {
        row_to_float(row, out);
      }
    }
  };
  pool.ParallelFor(m, std::max<int64_t>(1, 4096 / std::max<int64_t>(cols, 1)), std::cref(body));
}

}  // namespace

void Embed(const LinearWeight& table, uint32_t first_token, const uint32_t* tokens, int64_t m, float* y, ThreadPool& pool) {
  const auto half_row_to_float = TANDEM_SELECT(BestIsa(), HalfRowToFloat);
  EmbedRows(table.rows, table.cols, first_token, tokens, m, y, pool, [&](int64_t row, float* out) {
    if (table.type != WeightType::kF16) return DequantizeRow(table, row, out);
    half_row_to_float(reinterpret_cast<const uint16_t*>(static_cast<const char*>(table.data) + row * table.row_stride), table.cols, out);
  });
}

void Embed(const PackedWeight& table, uint32_t first_token, const uint32_t* tokens, int64_t m, float* y, ThreadPool& pool) {
  EmbedRows(table.rows, table.cols(), first_token, tokens, m, y, pool, [&](int64_t row, float* out) { DequantizeRow(table, row, out); });
}

}  // namespace tandem
