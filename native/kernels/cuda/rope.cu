// rope.cu: rotary embedding over the whole head ("rotate half", model-spec section 2).
#include "kernels/cuda/rope.h"

#include <string>

namespace tandem::cuda {
namespace {

constexpr int kWarps = 4;  // of a block; each has one head of one row

// Elements j, j + 1 (low) and half + j, half + j + 1 (high) of a head.
struct Quad {
  float2 low, high;
};

__device__ __forceinline__ Quad LoadQuad(const __half* head, int half, int j) {
  return {__half22float2(*reinterpret_cast<const __half2*>(head + j)), __half22float2(*reinterpret_cast<const __half2*>(head + half + j))};
}

__device__ __forceinline__ Quad Rotate(const Quad& x, float2 cos, float2 sin) {
  Quad y;
  y.low = make_float2(x.low.x * cos.x - x.high.x * sin.x, x.low.y * cos.y - x.high.y * sin.y);
  y.high = make_float2(x.high.x * cos.x + x.low.x * sin.x, x.high.y * cos.y + x.low.y * sin.y);
  return y;
}

__device__ __forceinline__ void StoreQuad(const Quad& x, int half, int j, __half* head) {
  *reinterpret_cast<__half2*>(head + j) = __floats2half2_rn(x.low.x, x.low.y);
  *reinterpret_cast<__half2*>(head + half + j) = __floats2half2_rn(x.high.x, x.high.y);
}

__device__ __forceinline__ signed char Quantize(float x, float scale) { return static_cast<signed char>(fminf(fmaxf(rintf(x / scale), -127.0f), 127.0f)); }

__device__ __forceinline__ void StoreQuad(const Quad& x, float scale, int half, int j, signed char* head) {
  *reinterpret_cast<char2*>(head + j) = make_char2(Quantize(x.low.x, scale), Quantize(x.low.y, scale));
  *reinterpret_cast<char2*>(head + half + j) = make_char2(Quantize(x.high.x, scale), Quantize(x.high.y, scale));
}

__device__ __forceinline__ float Largest(float largest, const Quad& x) {
  return fmaxf(largest, fmaxf(fmaxf(fabsf(x.low.x), fabsf(x.low.y)), fmaxf(fabsf(x.high.x), fabsf(x.high.y))));
}

// The scale of a token's head, the same in all lanes: rounded to fp16 before anything is divided by it.
__device__ __forceinline__ __half ScaleOf(float largest) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
  return __float2half(fmaxf(largest / 127.0f, kLeastKvScale));
}

// What is read is not what is written, so that all of a head can be on its way before the first store.
template <KvType kType>
__global__ void __launch_bounds__(kWarps * kWarpSize)
    RotaryKernel(const __half* __restrict__ qkv, int64_t m, int64_t qkv_stride, const KvSlot* __restrict__ slots, const float* __restrict__ cos,
                 const float* __restrict__ sin, CudaKvLayer kv, __half* __restrict__ q_out, int64_t q_stride) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  const int64_t row = unit / kv.num_heads, head = unit % kv.num_heads;
  if (row >= m) return;
  const int dim = static_cast<int>(kv.head_dim), half = dim / 2, first = 2 * static_cast<int>(threadIdx.x % kWarpSize);
  const KvSlot slot = slots[row];
  const __half* q = qkv + row * qkv_stride + head * 3 * dim;
  const __half *k = q + dim, *v = k + dim;
  __half* q_to = q_out + row * q_stride + head * dim;
  const float *row_cos = cos + static_cast<int64_t>(slot.position) * half, *row_sin = sin + static_cast<int64_t>(slot.position) * half;
  const auto rotated = [&](const __half* x, int j) {
    return Rotate(LoadQuad(x, half, j), *reinterpret_cast<const float2*>(row_cos + j), *reinterpret_cast<const float2*>(row_sin + j));
  };

  constexpr int kStep = 2 * kWarpSize;
  const bool has_place = slot.block < kv.num_blocks;
  const int64_t place = has_place ? KvPlace(kv, slot.block, head, slot.offset) : 0;
  float largest_k = 0.0f, largest_v = 0.0f;
  for (int j = first; j < half; j += kStep) {
    const Quad new_q = rotated(q, j), new_k = rotated(k, j), new_v = LoadQuad(v, half, j);
    StoreQuad(new_q, half, j, q_to);
    if (kType == KvType::kI8) {
      largest_k = Largest(largest_k, new_k);
      largest_v = Largest(largest_v, new_v);
    } else if (has_place) {
      StoreQuad(new_k, half, j, static_cast<__half*>(kv.k) + place);
      StoreQuad(new_v, half, j, static_cast<__half*>(kv.v) + place);
    }
  }
  if (kType == KvType::kF16 || !has_place) return;

  // Once more, now that the scales are known; the row is in the L1 cache.
  const __half k_scale = ScaleOf(largest_k), v_scale = ScaleOf(largest_v);
  if (first == 0) {
    kv.k_scales[place / dim] = k_scale;
    kv.v_scales[place / dim] = v_scale;
  }
  for (int j = first; j < half; j += kStep) {
    StoreQuad(rotated(k, j), __half2float(k_scale), half, j, static_cast<signed char*>(kv.k) + place);
    StoreQuad(LoadQuad(v, half, j), __half2float(v_scale), half, j, static_cast<signed char*>(kv.v) + place);
  }
}

constexpr int kCopyThreads = 256;

// A thread has the same word of every block of its plane, so that the pairs take effect in their order without any barrier.
template <typename Word>
__global__ void __launch_bounds__(kCopyThreads) CopyKvBlocksKernel(char* base, int64_t plane_stride_bytes, int64_t block_words, const uint2* pairs, int64_t count) {
  const int64_t word = static_cast<int64_t>(blockIdx.y) * kCopyThreads + threadIdx.x;
  if (word >= block_words) return;
  Word* plane = reinterpret_cast<Word*>(base + blockIdx.x * plane_stride_bytes) + word;
  for (int64_t i = 0; i < count; ++i) plane[pairs[i].y * block_words] = plane[pairs[i].x * block_words];
}

}  // namespace

void RotaryAndWriteKv(const __half* qkv, int64_t m, int64_t qkv_stride, const KvSlot* slots, const float* cos, const float* sin, const CudaKvLayer& kv,
                      __half* q_out, int64_t q_stride, Stream stream) {
  if (kv.head_dim < 8 || kv.head_dim % 8 != 0) {
    throw Error(ErrorCode::kInvalidArgument, "rotary: head size " + std::to_string(kv.head_dim) + "; on a GPU it must be a multiple of 8");
  }
  const int64_t units = m * kv.num_heads;
  if (units == 0) return;
  const auto kernel = kv.type == KvType::kF16 ? RotaryKernel<KvType::kF16> : RotaryKernel<KvType::kI8>;
  Launch("rotary", kernel, dim3(static_cast<unsigned>((units + kWarps - 1) / kWarps)), dim3(kWarps * kWarpSize), 0, stream, qkv, m, qkv_stride, slots, cos, sin,
         kv, q_out, q_stride);
}

void CopyKvBlocks(void* base, int64_t plane_stride_bytes, int64_t planes, int64_t block_bytes, const uint2* pairs, int64_t count, Stream stream) {
  if (planes == 0 || block_bytes == 0 || count == 0) return;
  const uint64_t alignment = static_cast<uint64_t>(reinterpret_cast<uintptr_t>(base)) | static_cast<uint64_t>(plane_stride_bytes | block_bytes);
  const int64_t word_bytes = alignment % 16 == 0 ? 16 : alignment % 4 == 0 ? 4 : 1;
  const int64_t words = block_bytes / word_bytes;
  const auto kernel = word_bytes == 16  ? CopyKvBlocksKernel<uint4>
                      : word_bytes == 4 ? CopyKvBlocksKernel<uint32_t>
                                        : CopyKvBlocksKernel<unsigned char>;
  const dim3 grid(static_cast<unsigned>(planes), static_cast<unsigned>((words + kCopyThreads - 1) / kCopyThreads));
  Launch("copy of KV blocks", kernel, grid, dim3(kCopyThreads), 0, stream, static_cast<char*>(base), plane_stride_bytes, words, pairs, count);
}

}  // namespace tandem::cuda
