// linear.cc: y = x W^T + b. LinearRef is the definition; Linear stays within the bound of linear_test.cc. The int4 layout is GLM-130B's (model-spec
// section 1.3): byte j of a row holds column 2j in its high nibble and 2j + 1 in its low one, both two's complement.
#include "kernels/linear.h"

#include <algorithm>
#include <functional>
#include <string>

#include "core/error.h"
#include "core/half.h"
#include "kernels/vector/select.h"

namespace tandem {

namespace {

template <WeightType type>
constexpr int64_t kWeightBits = type == WeightType::kF32 ? 32 : type == WeightType::kF16 ? 16 : type == WeightType::kI8 ? 8 : 4;

// Below so many multiplications a thread costs more than it saves.
constexpr int64_t kMinMultiplications = 1 << 15;
constexpr int64_t kGrain = 16;  // rows; linear_vector.inc's kPanelRows

float WeightAt(const LinearWeight& weight, int64_t o, int64_t c) {
  const uint8_t* row = static_cast<const uint8_t*>(weight.data) + o * weight.row_stride;
  switch (weight.type) {
    case WeightType::kF32: return reinterpret_cast<const float*>(row)[c];
    case WeightType::kF16: return HalfToFloat(reinterpret_cast<const uint16_t*>(row)[c]);
    case WeightType::kI8:
    case WeightType::kI4: return static_cast<float>(QuantizedAt(weight, o, c)) * ScaleAt(weight, o, c);
  }
  return 0.0f;
}

}  // namespace

void CheckWeight(const LinearWeight& weight) {
  if (weight.rows == 0 || weight.cols == 0) return;
  const bool quantised = weight.type == WeightType::kI8 || weight.type == WeightType::kI4;
  if (quantised && (weight.group_size < 1 || weight.group_offset < 0 || weight.group_offset >= weight.group_size || weight.scales == nullptr ||
                    weight.cols + weight.group_offset > weight.groups * weight.group_size)) {
    throw Error(ErrorCode::kInvalidArgument, "linear: " + std::to_string(weight.groups) + " groups of " + std::to_string(weight.group_size) +
                                                 " columns do not hold " + std::to_string(weight.cols) + " columns from offset " +
                                                 std::to_string(weight.group_offset));
  }
  if (weight.type == WeightType::kI4 && (weight.cols % 2 != 0 || weight.group_offset % 2 != 0)) {
    throw Error(ErrorCode::kInvalidArgument, "linear: int4 weights take an even number of columns and an even group offset, not " +
                                                 std::to_string(weight.cols) + " and " + std::to_string(weight.group_offset));
  }
}

int QuantizedAt(const LinearWeight& weight, int64_t o, int64_t c) {
  const uint8_t* row = static_cast<const uint8_t*>(weight.data) + o * weight.row_stride;
  if (weight.type == WeightType::kI8) return reinterpret_cast<const int8_t*>(row)[c];
  const int nibble = c % 2 == 0 ? row[c / 2] >> 4 : row[c / 2] & 15;
  return nibble < 8 ? nibble : nibble - 16;
}

float ScaleAt(const LinearWeight& weight, int64_t o, int64_t c) {
  return HalfToFloat(weight.scales[o * weight.groups + (c + weight.group_offset) / weight.group_size]);
}

void DequantizeRow(const LinearWeight& weight, int64_t o, float* out) {
  for (int64_t c = 0; c < weight.cols; ++c) out[c] = WeightAt(weight, o, c);
}

void LinearRef(const LinearWeight& weight, const float* x, int64_t m, int64_t x_stride, const float* bias, float* y, int64_t y_stride) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t o = 0; o < weight.rows; ++o) {
      double sum = bias == nullptr ? 0.0 : bias[o];
      for (int64_t c = 0; c < weight.cols; ++c) sum += static_cast<double>(x[i * x_stride + c]) * WeightAt(weight, o, c);
      y[i * y_stride + o] = static_cast<float>(sum);
    }
  }
}

}  // namespace tandem

#define TANDEM_VECTOR_FILE "kernels/linear_vector.inc"
#include "kernels/vector/each_isa.inc"

namespace tandem {

void Linear(Isa isa, const LinearWeight& weight, const float* x, int64_t m, int64_t x_stride, const float* bias, float* y, int64_t y_stride,
            ThreadPool& pool) {
  CheckWeight(weight);
  const auto linear_rows = TANDEM_SELECT(isa, LinearRows);
  if (m <= 0) return;
  const auto body = [&](int64_t begin, int64_t end, int) { linear_rows(weight, begin, end, x, m, x_stride, bias, y, y_stride); };
  const int64_t row_cost = std::max<int64_t>(m * weight.cols, 1);
  const int64_t grain = std::max(kGrain, kMinMultiplications / row_cost / kGrain * kGrain);
  pool.ParallelFor(weight.rows, grain, std::cref(body));
}

}  // namespace tandem
