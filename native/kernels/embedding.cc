// embedding.cc: lookup of token embeddings. Conversion from fp16 is exact, so every instruction set gives the same values.
#include "kernels/embedding.h"

#include <algorithm>
#include <functional>

#define TANDEM_VECTOR_FILE "kernels/embedding_vector.inc"
#include "kernels/vector/each_isa.inc"

namespace tandem {

void Embed(const LinearWeight& table, uint32_t first_token, const uint32_t* tokens, int64_t m, float* y, ThreadPool& pool) {
  if (table.type != WeightType::kF32 && table.type != WeightType::kF16) {
    throw Error(ErrorCode::kInvalidArgument, "embedding: the table is quantised, only fp32 and fp16 are supported");
  }
  const auto half_row_to_float = TANDEM_SELECT(BestIsa(), HalfRowToFloat);
  const auto body = [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      float* out = y + i * table.cols;
      const int64_t row = static_cast<int64_t>(tokens[i]) - first_token;
      if (row < 0 || row >= table.rows) {
        std::fill(out, out + table.cols, 0.0f);
        continue;
      }
      const char* data = static_cast<const char*>(table.data) + row * table.row_stride;
      if (table.type == WeightType::kF16) {
        half_row_to_float(reinterpret_cast<const uint16_t*>(data), table.cols, out);
      } else {
        std::copy_n(reinterpret_cast<const float*>(data), table.cols, out);
      }
    }
  };
  pool.ParallelFor(m, std::max<int64_t>(1, 4096 / std::max<int64_t>(table.cols, 1)), std::cref(body));
}

}  // namespace tandem
