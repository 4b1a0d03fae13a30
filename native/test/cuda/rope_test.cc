#include "kernels/cuda/rope.h"

#include <cmath>
#include <random>

#include "test/cuda/device_test.h"

namespace tandem::test {

namespace {

// A device cache of one layer, poisoned.
struct Cache {
  Cache(KvType type, int64_t num_blocks, int64_t num_heads, int64_t block_size, int64_t head_dim)
      : tokens(num_blocks * num_heads * block_size),
        bytes(tokens * head_dim * (type == KvType::kF16 ? 2 : 1)),
        k(bytes),
        v(bytes),
        k_scales(tokens),
        v_scales(tokens) {
    const bool is_int8 = type == KvType::kI8;
    layer = {{k.get(), v.get(), type, num_blocks, num_heads, block_size, head_dim}, is_int8 ? k_scales.get() : nullptr, is_int8 ? v_scales.get() : nullptr};
  }
  int64_t tokens, bytes;
  DeviceArray<unsigned char> k, v;
  DeviceArray<__half> k_scales, v_scales;
  cuda::CudaKvLayer layer;
};

float HalfAt(const std::vector<unsigned char>& memory, int64_t i) {
  __half value;
  std::memcpy(&value, memory.data() + 2 * i, sizeof value);
  return __half2float(value);
}

}  // namespace

TEST(cuda_rotary_rotates_and_writes_keys_and_values) {
  ForEachThreadOrder([] {
    for (const KvType type : {KvType::kF16, KvType::kI8}) {
      for (const int64_t head_dim : {8, 16, 24, 32, 40, 64, 72, 128, 136, 256}) {
        const int64_t m = 6, num_heads = 3, num_blocks = 4, block_size = 3, half = head_dim / 2;
        const RotaryTable table = MakeRotaryTable(50, head_dim, 10000.0, RotaryPrecision::kF32);
        const DeviceArray<float> cos(table.cos), sin(table.sin);
        Cache cache(type, num_blocks, num_heads, block_size, head_dim);
        const std::vector<KvSlot> slots = {{0, 3, 0}, {49, 0, 2}, {7, 2, 1}, {5, cuda::kNoBlock, 0}, {7, 3, 2}, {1, 1, 1}};
        const DeviceArray<KvSlot> slots_on_device(slots);
        const int64_t qkv_stride = (num_heads * 3 * head_dim + 63) / 64 * 64 + 64, q_stride = (num_heads * head_dim + 63) / 64 * 64;
        std::vector<float> qkv = RoundToHalf(RandomFloats(m * qkv_stride, static_cast<uint32_t>(head_dim)));
        for (int64_t j = 0; j < head_dim; ++j) qkv[static_cast<size_t>(2 * head_dim + j)] = 0.0f;  // v of the first head and row: no scale to divide by
        const DeviceArray<__half> qkv_on_device(ToHalf(qkv));
        DeviceArray<__half> q_on_device(m * q_stride);
        cuda::RotaryAndWriteKv(qkv_on_device.get(), m, qkv_stride, slots_on_device.get(), cos.get(), sin.get(), cache.layer, q_on_device.get(), q_stride, nullptr);
        const std::vector<__half> q = q_on_device.Download();
        const std::vector<unsigned char> k = cache.k.Download(), v = cache.v.Download();
        const std::vector<__half> k_scales = cache.k_scales.Download(), v_scales = cache.v_scales.Download();

        std::vector<bool> written(static_cast<size_t>(cache.tokens), false);
        for (int64_t i = 0; i < m; ++i) {
          const KvSlot& slot = slots[static_cast<size_t>(i)];
          for (int64_t j = num_heads * head_dim; j < q_stride; ++j) CHECK_EQ(__half_as_ushort(q[static_cast<size_t>(i * q_stride + j)]), 0xffff);
          for (int64_t head = 0; head < num_heads; ++head) {
            const float* in = qkv.data() + i * qkv_stride + head * 3 * head_dim;
            const auto rotated = [&](const float* x, int64_t j) {
              const size_t place = static_cast<size_t>(slot.position * half + j % half);
              const double c = table.cos[place], s = table.sin[place];
              return j < half ? x[j] * c - x[j + half] * s : x[j] * c + x[j - half] * s;
            };
            const auto rounding = [&](const float* x, int64_t j) { return (std::abs(x[j]) + std::abs(x[(j + half) % head_dim])) * 0x1p-22; };
            const auto half_rounding = [](double x) { return std::abs(x) * 0x1p-11 + 0x1p-25; };
            double largest_k = 0.0, largest_v = 0.0;
            for (int64_t j = 0; j < head_dim; ++j) {
              const double value = rotated(in, j);
              CHECK_NEAR("q", __half2float(q[static_cast<size_t>(i * q_stride + head * head_dim + j)]), value, rounding(in, j) + half_rounding(value));
              largest_k = std::max(largest_k, std::abs(rotated(in + head_dim, j)));
              largest_v = std::max(largest_v, std::abs(static_cast<double>(in[2 * head_dim + j])));
            }
            if (slot.block == cuda::kNoBlock) continue;
            const int64_t token = (slot.block * num_heads + head) * block_size + slot.offset;
            written[static_cast<size_t>(token)] = true;
            const float k_scale = __half2float(k_scales[static_cast<size_t>(token)]), v_scale = __half2float(v_scales[static_cast<size_t>(token)]);
            if (type == KvType::kI8) {
              CHECK_NEAR("k scale", k_scale, std::max(largest_k / 127, static_cast<double>(cuda::kLeastKvScale)), largest_k / 127 * 0x1.01p-11);
              CHECK_EQ(v_scale, __half2float(__float2half(std::max(static_cast<float>(largest_v) / 127.0f, cuda::kLeastKvScale))));
            }
            for (int64_t j = 0; j < head_dim; ++j) {
              const double key = rotated(in + head_dim, j), value = in[2 * head_dim + j];
              if (type == KvType::kF16) {
                CHECK_NEAR("k", HalfAt(k, token * head_dim + j), key, rounding(in + head_dim, j) + half_rounding(key));
                CHECK_EQ(HalfAt(v, token * head_dim + j), static_cast<float>(value));
              } else {
                const auto int8_at = [&](const std::vector<unsigned char>& memory) { return static_cast<int8_t>(memory[static_cast<size_t>(token * head_dim + j)]); };
                // Half a step; and for the largest, a scale that was rounded down.
                CHECK_NEAR("k", int8_at(k) * k_scale, key, k_scale * 0.5 * 1.13 + rounding(in + head_dim, j));
                CHECK_NEAR("v", int8_at(v) * v_scale, value, v_scale * 0.5 * 1.13);
                CHECK(int8_at(k) >= -127 && int8_at(v) >= -127);
              }
            }
          }
        }
        const int64_t token_bytes = cache.bytes / cache.tokens;
        for (int64_t token = 0; token < cache.tokens; ++token) {
          if (!written[static_cast<size_t>(token)] || type == KvType::kF16) {
            CHECK_EQ(__half_as_ushort(k_scales[static_cast<size_t>(token)]), 0xffff);
            CHECK_EQ(__half_as_ushort(v_scales[static_cast<size_t>(token)]), 0xffff);
          }
          if (written[static_cast<size_t>(token)]) continue;
          for (int64_t byte = token * token_bytes; byte < (token + 1) * token_bytes; ++byte) {
            CHECK_EQ(k[static_cast<size_t>(byte)], 0xff);
            CHECK_EQ(v[static_cast<size_t>(byte)], 0xff);
          }
        }
      }
    }
  });
}

TEST(cuda_rotary_rows_have_the_same_bits_in_every_batch) {
  ForEachThreadOrder([] {
    for (const KvType type : {KvType::kF16, KvType::kI8}) {
      const int64_t m = 7, num_heads = 5, head_dim = 40, stride = 640, q_stride = 256;
      const RotaryTable table = MakeRotaryTable(16, head_dim, 10000.0, RotaryPrecision::kF32);
      const DeviceArray<float> cos(table.cos), sin(table.sin);
      const DeviceArray<__half> qkv(ToHalf(RandomFloats(m * stride, 1)));
      std::vector<KvSlot> slots;
      for (uint32_t i = 0; i < m; ++i) slots.push_back({2 * i, i / 4, i % 4});
      const DeviceArray<KvSlot> slots_on_device(slots);
      Cache together(type, 2, num_heads, 4, head_dim), alone(type, 2, num_heads, 4, head_dim);
      DeviceArray<__half> q_together(m * q_stride), q_alone(m * q_stride);
      cuda::RotaryAndWriteKv(qkv.get(), m, stride, slots_on_device.get(), cos.get(), sin.get(), together.layer, q_together.get(), q_stride, nullptr);
      for (int64_t i = 0; i < m; ++i) {
        cuda::RotaryAndWriteKv(qkv.get() + i * stride, 1, stride, slots_on_device.get() + i, cos.get(), sin.get(), alone.layer, q_alone.get() + i * q_stride, q_stride,
                               nullptr);
      }
      CHECK(together.k.Download() == alone.k.Download() && together.v.Download() == alone.v.Download());
      CHECK_EQ(std::memcmp(together.k_scales.Download().data(), alone.k_scales.Download().data(), static_cast<size_t>(2 * together.tokens)), 0);
      CHECK_EQ(std::memcmp(together.v_scales.Download().data(), alone.v_scales.Download().data(), static_cast<size_t>(2 * together.tokens)), 0);
      CHECK_EQ(std::memcmp(q_together.Download().data(), q_alone.Download().data(), static_cast<size_t>(2 * m * q_stride)), 0);
    }
  });
}

TEST(cuda_rotary_refuses_odd_head_sizes) {
  Cache cache(KvType::kF16, 1, 1, 1, 12);
  CHECK_THROWS(cuda::RotaryAndWriteKv(nullptr, 1, 64, nullptr, nullptr, nullptr, cache.layer, nullptr, 64, nullptr), ErrorCode::kInvalidArgument);
}

TEST(cuda_copies_of_kv_blocks_take_effect_in_order) {
  ForEachThreadOrder([] {
    std::mt19937 generator(1);
    for (const int64_t block_bytes : {3, 4, 16, 20, 4096, 4112, 5000}) {
      const int64_t planes = 3, blocks = 5, plane_stride = (blocks * block_bytes + 15) / 16 * 16 + (block_bytes % 16 == 0 ? 16 : block_bytes % 4 == 0 ? 4 : 1);
      std::vector<unsigned char> expected(static_cast<size_t>(planes * plane_stride));
      for (unsigned char& byte : expected) byte = static_cast<unsigned char>(generator());
      DeviceArray<unsigned char> memory(expected);
      // Chains, a block onto itself, a block written twice.
      const std::vector<uint2> pairs = {make_uint2(0, 1), make_uint2(1, 2), make_uint2(4, 4), make_uint2(3, 1), make_uint2(2, 0), make_uint2(1, 3), make_uint2(0, 4)};
      const DeviceArray<uint2> pairs_on_device(pairs);
      cuda::CopyKvBlocks(memory.get(), plane_stride, planes, block_bytes, pairs_on_device.get(), static_cast<int64_t>(pairs.size()), nullptr);
      for (const uint2& pair : pairs) {
        for (int64_t plane = 0; plane < planes; ++plane) {
          unsigned char* base = expected.data() + plane * plane_stride;
          std::memmove(base + pair.y * block_bytes, base + pair.x * block_bytes, static_cast<size_t>(block_bytes));
        }
      }
      CHECK(memory.Download() == expected);
    }
  });
}

}  // namespace tandem::test
