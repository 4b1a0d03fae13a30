// Token embedding lookup in one rank's block of vocabulary rows.
#pragma once

#include <cstdint>

#include "kernels/linear.h"
#include "kernels/packed_linear.h"

namespace tandem {

// y[i, :] = table[tokens[i] - first_token, :] where first_token <= tokens[i] < first_token + table.rows, else zeros
//   table: [rows, cols]; y: [m, cols] dense
void Embed(const LinearWeight& table, uint32_t first_token, const uint32_t* tokens, int64_t m, float* y, ThreadPool& pool);
void Embed(const PackedWeight& table, uint32_t first_token, const uint32_t* tokens, int64_t m, float* y, ThreadPool& pool);

}  // namespace tandem
