// Tests of the emulator itself and of the emulated instructions.
#include <cmath>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/half.h"
#include "kernels/cuda/instructions.h"
#include "test/cuda/device_test.h"

namespace tandem::test {

namespace {

using cuda::Launch;
using cuda_on_cpu::ThreadOrder;

constexpr int kThreads = 96;

// Turns each block's values around; of no use without its barrier.
template <bool kBarrier>
__global__ void Reverse(int* values) {
  TANDEM_DYNAMIC_SHARED(int, shared);
  int* mine = values + blockIdx.x * blockDim.x;
  shared[threadIdx.x] = mine[threadIdx.x];
  if (kBarrier) __syncthreads();
  mine[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

template <bool kBarrier>
bool ReversesRight() {
  std::vector<int> values(3 * kThreads);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<int>(i);
  DeviceArray<int> device(values);
  Launch("Reverse", Reverse<kBarrier>, dim3(3), dim3(kThreads), kThreads * sizeof(int), nullptr, device.get());
  const std::vector<int> result = device.Download();
  for (int i = 0; i < 3 * kThreads; ++i) {
    if (result[static_cast<size_t>(i)] != i / kThreads * kThreads + kThreads - 1 - i % kThreads) return false;
  }
  return true;
}

}  // namespace

TEST(emulator_runs_barriers_in_every_order) {
  ForEachThreadOrder([] { CHECK(ReversesRight<true>()); });
}

TEST(emulator_shows_a_missing_barrier_in_every_order) {
  ForEachThreadOrder([] { CHECK(!ReversesRight<false>()); });
}

namespace {

// Each thread adds the left neighbour's value 50 times, in two buffers in turn, with one barrier a turn; some threads end early.
__global__ void ManyBarriers(int* out) {
  __shared__ int buffers[2][kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  buffers[0][thread] = thread;
  __syncthreads();
  for (int turn = 0; turn < 50; ++turn) {
    buffers[1 - turn % 2][thread] = buffers[turn % 2][thread] + buffers[turn % 2][(thread + kThreads - 1) % kThreads];
    __syncthreads();
  }
  out[thread] = buffers[0][thread];
  if (thread % 3 == 0) return;
  out[kThreads + thread] = __syncthreads_count(thread % 2) + 1000 * __syncthreads_or(thread == 7) + 2000 * __syncthreads_or(thread == 9) +
                           4000 * __syncthreads_and(thread % 3 != 0) + 8000 * __syncthreads_and(thread != 7);
}

}  // namespace

TEST(emulator_keeps_turns_apart_and_counts_the_threads_that_are_left) {
  std::vector<unsigned> expected(kThreads);
  for (int i = 0; i < kThreads; ++i) expected[static_cast<size_t>(i)] = static_cast<unsigned>(i);
  for (int turn = 0; turn < 50; ++turn) {
    std::vector<unsigned> next(kThreads);
    for (size_t i = 0; i < kThreads; ++i) next[i] = expected[i] + expected[(i + kThreads - 1) % kThreads];
    expected = next;
  }
  ForEachThreadOrder([&] {
    DeviceArray<int> out(2 * kThreads);
    Launch("ManyBarriers", ManyBarriers, dim3(1), dim3(kThreads), 0, nullptr, out.get());
    const std::vector<int> result = out.Download();
    for (size_t i = 0; i < kThreads; ++i) CHECK_EQ(static_cast<unsigned>(result[i]), expected[i]);
    for (size_t i = 0; i < kThreads; ++i) CHECK_EQ(result[kThreads + i], i % 3 == 0 ? -1 : 32 + 1000 + 4000);
  });
}

namespace {

// Rows of 40 values: a full warp and one of 8 lanes.
__global__ void Shuffles(int64_t* out) {
  const int lane = static_cast<int>(threadIdx.x);
  const unsigned mask = lane < 32 ? 0xffffffffu : 0xffu;
  const int64_t value = 1000000000000 + lane;
  out[lane] = __shfl_sync(mask, value, 3);
  out[40 + lane] = __shfl_xor_sync(mask, value, 5);
  out[80 + lane] = __shfl_up_sync(mask, value, 2u);
  out[120 + lane] = __shfl_down_sync(mask, value, 2u, 8);
  out[160 + lane] = __shfl_sync(mask, value, 9, 8);
  out[200 + lane] = static_cast<int64_t>(__ballot_sync(mask, lane % 3 == 0));
  out[240 + lane] = __any_sync(mask, lane == 33) * 10 + __all_sync(mask, lane >= 32);
  if (lane % 2 == 0 && lane < 32) {
    const __half2 pair = __shfl_xor_sync(0x55555555u, __floats2half2_rn(static_cast<float>(lane), 0.5f), 2);
    out[280 + lane] = static_cast<int64_t>(__low2float(pair)) * 2 + static_cast<int64_t>(__high2float(pair) * 2);
  }
}

}  // namespace

TEST(emulator_shuffles_and_votes) {
  ForEachThreadOrder([] {
    DeviceArray<int64_t> out(320);
    Launch("Shuffles", Shuffles, dim3(1), dim3(40), 0, nullptr, out.get());
    const std::vector<int64_t> result = out.Download();
    for (int64_t lane = 0; lane < 40; ++lane) {
      const auto at = [&](int64_t row) { return result[static_cast<size_t>(row * 40 + lane)]; };
      const int64_t base = 1000000000000, warp = lane / 32 * 32, in_warp = lane % 32;
      CHECK_EQ(at(0), base + warp + 3);
      CHECK_EQ(at(1), base + (lane ^ 5));
      CHECK_EQ(at(2), base + (in_warp < 2 ? lane : lane - 2));
      CHECK_EQ(at(3), base + (lane % 8 < 6 ? lane + 2 : lane));
      CHECK_EQ(at(4), base + lane / 8 * 8 + 1);
      CHECK_EQ(at(5), warp == 0 ? int64_t{0x49249249} : int64_t{0x92});
      CHECK_EQ(at(6), warp == 0 ? 0 : 11);
      CHECK_EQ(at(7), lane % 2 == 0 && lane < 32 ? (lane ^ 2) * 2 + 1 : -1);
    }
  });
}

namespace {

// Through ldmatrix and mma, one warp: d[16, 8] = c + a[16, 16] b[16, 8]; b as columns (ldmatrix) or rows (ldmatrix.trans).
template <bool kRows>
__global__ void MatrixProduct(const __half* a, const __half* b, const float* c, float* d) {
  __shared__ __align__(16) __half a_shared[16][24];
  __shared__ __align__(16) __half b_shared[16][24];
  const int lane = static_cast<int>(threadIdx.x), group = lane / 4, member = lane % 4;
  for (int i = lane; i < 256; i += 32) a_shared[i / 16][i % 16] = a[i];
  for (int i = lane; i < 128; i += 32) (kRows ? b_shared[i / 8][i % 8] : b_shared[i % 8][i / 8]) = b[i];
  __syncwarp();
  uint32_t a_registers[4], b_registers[4];
  cuda::LdMatrixX4(a_registers, &a_shared[lane % 16][lane / 16 * 8]);
  if (kRows) {
    cuda::LdMatrixX4Trans(b_registers, &b_shared[lane % 16][0]);
  } else {
    cuda::LdMatrixX4(b_registers, &b_shared[lane % 8][lane / 8 % 2 * 8]);
  }
  float sums[4];
  for (int j = 0; j < 4; ++j) sums[j] = c[(group + j / 2 * 8) * 8 + 2 * member + j % 2];
  cuda::MmaM16N8K16(sums, a_registers, {b_registers[0], b_registers[1]});
  for (int j = 0; j < 4; ++j) d[(group + j / 2 * 8) * 8 + 2 * member + j % 2] = sums[j];
}

}  // namespace

TEST(emulator_multiplies_matrices) {
  const std::vector<float> a = RoundToHalf(RandomFloats(256, 1)), b = RoundToHalf(RandomFloats(128, 2)), c = RandomFloats(128, 3);
  ForEachThreadOrder([&] {
    for (const bool rows : {false, true}) {
      DeviceArray<__half> a_device(ToHalf(a)), b_device(ToHalf(b));
      DeviceArray<float> c_device(c), d_device(128);
      Launch("MatrixProduct", rows ? MatrixProduct<true> : MatrixProduct<false>, dim3(1), dim3(32), 0, nullptr, a_device.get(), b_device.get(),
             c_device.get(), d_device.get());
      const std::vector<float> d = d_device.Download();
      for (size_t i = 0; i < 16; ++i) {
        for (size_t j = 0; j < 8; ++j) {
          double sum = c[i * 8 + j];
          for (size_t k = 0; k < 16; ++k) sum += static_cast<double>(a[i * 16 + k]) * b[k * 8 + j];
          CHECK_NEAR("d", d[i * 8 + j], sum, 1e-5);
        }
      }
    }
  });
}

namespace {

// Two groups of copies under way; what is seen too early and after each wait. The second copy of each thread is one of zeros.
__global__ void Copies(const uint4* from, unsigned* out) {
  __shared__ uint4 buffer[64];
  const unsigned thread = threadIdx.x;
  buffer[thread] = make_uint4(1, 1, 1, 1);
  cuda::CpAsync16(&buffer[thread], from + thread, true);
  cuda::CpAsyncCommit();
  cuda::CpAsync16(&buffer[32 + thread], from + thread, false);
  cuda::CpAsyncCommit();
  out[thread] = buffer[thread].y;
  cuda::CpAsyncWait<1>();
  out[32 + thread] = buffer[thread].y;
  out[64 + thread] = buffer[32 + thread].y;
  cuda::CpAsyncWait<0>();
  out[96 + thread] = buffer[32 + thread].y;
}

}  // namespace

TEST(emulator_copies_arrive_with_the_wait_for_their_group) {
  std::vector<uint4> from;
  for (unsigned i = 0; i < 32; ++i) from.push_back(make_uint4(i, 100 + i, i, i));
  ForEachThreadOrder([&] {
    DeviceArray<uint4> from_device(from);
    DeviceArray<unsigned> out(128);
    Launch("Copies", Copies, dim3(1), dim3(32), 0, nullptr, from_device.get(), out.get());
    const std::vector<unsigned> result = out.Download();
    for (unsigned i = 0; i < 32; ++i) {
      CHECK_EQ(result[i], 0xffffffffu);
      CHECK_EQ(result[32 + i], 100 + i);
      CHECK_EQ(result[64 + i], 0xffffffffu);
      CHECK_EQ(result[96 + i], 0u);
    }
  });
}

namespace {

__global__ void BarrierOfSome() {
  if (threadIdx.x != 5) __syncthreads();
  __syncwarp();
}
__global__ void ShuffleOfSome(int* out) {
  if (threadIdx.x < 16) {
    out[0] = __shfl_sync(0xffffffffu, 1, 0);
  } else {
    __syncwarp();
  }
}
__global__ void WriteBehindShared() {
  TANDEM_DYNAMIC_SHARED(int, shared);
  shared[threadIdx.x] = 0;
}
__global__ void AddOne(int* value) { *value += 1; }
__global__ void ReadShared(int* out) {
  TANDEM_DYNAMIC_SHARED(int, shared);
  out[blockIdx.x] = shared[0];
  shared[0] = 5;
}

}  // namespace

TEST(emulator_reports_what_would_hang_or_harm_a_gpu) {
  DeviceArray<int> out(4);
  ForEachThreadOrder([&] {
    CHECK_THROWS(Launch("BarrierOfSome", BarrierOfSome, dim3(1), dim3(32), 0, nullptr), ErrorCode::kInternal);
    CHECK_THROWS(Launch("ShuffleOfSome", ShuffleOfSome, dim3(1), dim3(32), 0, nullptr, out.get()), ErrorCode::kInternal);
    CHECK_THROWS(Launch("WriteBehindShared", WriteBehindShared, dim3(1), dim3(32), 31 * sizeof(int), nullptr), ErrorCode::kInternal);
    Launch("WriteBehindShared", WriteBehindShared, dim3(1), dim3(32), 32 * sizeof(int), nullptr);
    CHECK_THROWS(Launch("AddOne", AddOne, dim3(1), dim3(1025), 0, nullptr, out.get()), ErrorCode::kInternal);
    CHECK_THROWS(Launch("AddOne", AddOne, dim3(1), dim3(1), 232449, nullptr, out.get()), ErrorCode::kInternal);
    CHECK_THROWS(Launch("AddOne", AddOne, dim3(0), dim3(1), 0, nullptr, out.get()), ErrorCode::kInternal);
    Launch("ReadShared", ReadShared, dim3(4), dim3(1), sizeof(int), nullptr, out.get());
    for (const int seen : out.Download()) CHECK_EQ(seen, -1);
  });
}

TEST(emulator_does_what_a_stream_was_given_when_it_is_waited_for) {
  cudaStream_t stream = nullptr;
  cudaEvent_t event = nullptr;
  CHECK(cudaStreamCreate(&stream) == cudaSuccess && cudaEventCreate(&event) == cudaSuccess);
  int source = 1, first = 0, second = 0;
  cudaMemcpyAsync(&first, &source, sizeof source, cudaMemcpyDefault, stream);
  cudaEventRecord(event, stream);
  cudaMemcpyAsync(&second, &source, sizeof source, cudaMemcpyDefault, stream);
  source = 2;  // too early
  CHECK_EQ(first, 0);
  cudaEventSynchronize(event);
  CHECK_EQ(first, 2);
  CHECK_EQ(second, 0);  // behind the event
  source = 3;
  cudaStreamSynchronize(stream);
  CHECK_EQ(second, 3);
  cudaEventDestroy(event);
  cudaStreamDestroy(stream);
}

TEST(emulator_records_graphs_and_runs_them_again) {
  cudaStream_t stream = nullptr;
  cuda::Check(cudaStreamCreate(&stream), "stream");
  DeviceArray<int> value(std::vector<int>{10}), copy(1);
  cuda::Check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "begin");
  Launch("AddOne", AddOne, dim3(3), dim3(1), 0, stream, value.get());
  cuda::Check(cudaMemcpyAsync(copy.get(), value.get(), sizeof(int), cudaMemcpyDeviceToDevice, stream), "copy");
  CHECK_EQ(cudaStreamSynchronize(stream), cudaErrorStreamCaptureUnsupported);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  cuda::Check(cudaStreamEndCapture(stream, &graph), "end");
  cuda::Check(cudaGraphInstantiate(&executable, graph), "instantiate");
  cuda::Check(cudaGraphDestroy(graph), "destroy");
  CHECK_EQ(value.Download()[0], 10);
  for (const int expected : {13, 16, 19}) {
    cuda::Check(cudaGraphLaunch(executable, stream), "launch");
    Sync(stream);
    CHECK_EQ(copy.Download()[0], expected);
  }
  cuda::Check(cudaGraphExecDestroy(executable), "destroy");
  cuda::Check(cudaStreamDestroy(stream), "destroy");
}

TEST(emulator_gives_no_more_memory_than_there_is) {
  size_t free_bytes = 0, total_bytes = 0;
  cuda::Check(cudaMemGetInfo(&free_bytes, &total_bytes), "memory");
  void* memory = nullptr;
  CHECK_EQ(cudaMalloc(&memory, free_bytes + 1), cudaErrorMemoryAllocation);
  CHECK(memory == nullptr);
  {
    DeviceArray<char> some(1000);
    size_t left = 0;
    cuda::Check(cudaMemGetInfo(&left, &total_bytes), "memory");
    CHECK(left <= free_bytes - 1000);
    for (const char byte : some.Download()) CHECK_EQ(byte, char{-1});
  }
  size_t after = 0;
  cuda::Check(cudaMemGetInfo(&after, &total_bytes), "memory");
  CHECK_EQ(after, free_bytes);
}

TEST(emulator_rounds_halves_once) {
  CHECK_EQ(__half_as_ushort(__hfma(__half(1.0f), __half(1.0f), __half(0x1p-11f))), 0x3c00);  // a tie goes to even
  CHECK_EQ(__half_as_ushort(__hfma(__half(0x1p-11f), __half(1.0f), __half(1.0f + 0x1p-10f))), 0x3c02);  // up, to even as well
  // 2051 - 2^-20 and 2049 + 2^-20: a float takes them for ties.
  CHECK_EQ(__half_as_ushort(__hfma(__half(1.0f + 0x1p-10f), __half(1.0f - 0x1p-10f), __half(2050.0f))), 0x6801);
  CHECK_EQ(__half_as_ushort(__hfma(__half(1.0f + 0x1p-10f), __half(0x1p-10f - 1.0f), __half(2050.0f))), 0x6801);
  CHECK_EQ(__half_as_ushort(__hfma(__half(0x1p-24f), __half(0x1p-24f), __half(32768.0f))), 0x7800);
  CHECK_EQ(__half_as_ushort(__hfma(__half(-0x1p-24f), __half(0x1p-24f), __half(0x1p-24f))), 0x0001);
  CHECK_EQ(__half_as_ushort(__hfma(__half(65504.0f), __half(2.0f), __half(0.0f))), 0x7c00);
  // The error of a product alone, by fma, is exact where it is a half.
  const std::vector<float> values = RoundToHalf(RandomFloats(2000, 5, 30.0f));
  for (size_t i = 0; i + 1 < values.size(); i += 2) {
    const __half a(values[i]), b(values[i + 1]), product = a * b;
    const double error = static_cast<double>(values[i]) * values[i + 1] - static_cast<double>(__half2float(product));
    CHECK_EQ(static_cast<double>(__half2float(__hfma(a, b, __hneg(product)))), error);
  }
}

TEST(emulator_permutes_bytes) {
  CHECK_EQ(__byte_perm(0x33221100u, 0x77665544u, 0x7410u), 0x77441100u);
  CHECK_EQ(__byte_perm(0x33221180u, 0x77665544u, 0x989bu), 0x00ff0000u);
  CHECK_EQ(cuda::Lop3AndOr(0x12345678u, 0x00ff00ffu, 0x64006400u), 0x64346478u);
  CHECK_EQ(__umulhi(0xffffffffu, 0xffffffffu), 0xfffffffeu);
}

}  // namespace tandem::test
