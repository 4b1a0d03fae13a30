// A host emulator of the part of CUDA that the kernels use, so that every kernel runs in tests on a machine without a GPU. A .cu file compiles as plain C++
// with TANDEM_CUDA_ON_CPU; a launch runs block after block, each thread of a block as a fiber that runs until it reaches a barrier, a warp collective or its
// end. Who goes first is a setting (SetThreadOrder): a kernel that lacks a barrier computes something else in one of the orders. It is for correctness, not
// for speed, and it is strict where a GPU is lenient: dynamic shared memory and fresh allocations hold NaN, lanes of a warp never run in lockstep, and a
// barrier that some threads never reach is an error.
//
// What it does not show: static __shared__ arrays keep what an earlier block left in them; device pointers are host pointers, so host code may follow
// them unpunished; a data race between two writes of which either result is right in all orders.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#include "core/half.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static  // blocks run one after the other

// ---------------------------------------------------------------------------------------------------------------------------------------------------------
// Vector types

#define TANDEM_VECTOR_TYPE(Base, name, bytes)                                                                             \
  struct name##2 { Base x, y; } __attribute__((aligned(2 * bytes)));                                                      \
  struct name##3 { Base x, y, z; };                                                                                       \
  struct name##4 { Base x, y, z, w; } __attribute__((aligned(4 * bytes > 16 ? 16 : 4 * bytes)));                          \
  inline name##2 make_##name##2(Base x, Base y) { return {x, y}; }                                                        \
  inline name##3 make_##name##3(Base x, Base y, Base z) { return {x, y, z}; }                                             \
  inline name##4 make_##name##4(Base x, Base y, Base z, Base w) { return {x, y, z, w}; }
TANDEM_VECTOR_TYPE(signed char, char, 1)
TANDEM_VECTOR_TYPE(unsigned char, uchar, 1)
TANDEM_VECTOR_TYPE(short, short, 2)
TANDEM_VECTOR_TYPE(unsigned short, ushort, 2)
TANDEM_VECTOR_TYPE(int, int, 4)
TANDEM_VECTOR_TYPE(unsigned int, uint, 4)
TANDEM_VECTOR_TYPE(float, float, 4)
TANDEM_VECTOR_TYPE(double, double, 8)
TANDEM_VECTOR_TYPE(long long, longlong, 8)
TANDEM_VECTOR_TYPE(unsigned long long, ulonglong, 8)
#undef TANDEM_VECTOR_TYPE

struct dim3 {
  unsigned int x = 1, y = 1, z = 1;
  constexpr dim3(unsigned int x_size = 1, unsigned int y_size = 1, unsigned int z_size = 1) : x(x_size), y(y_size), z(z_size) {}
};

// Those of the fiber that runs.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ---------------------------------------------------------------------------------------------------------------------------------------------------------
// The host API. What a stream is given happens as late as can be, when somebody waits for it: host memory that is used again too early, or read, shows. While
// a stream is captured it happens at each launch of the graph; on the default stream at once.

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorNotReady = 600,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchFailure = 719,
  cudaErrorStreamCaptureUnsupported = 900,
};
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal, cudaStreamCaptureModeRelaxed };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
constexpr unsigned int cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2, cudaEventBlockingSync = 1, cudaHostAllocDefault = 0;

using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;
using cudaGraph_t = struct CUgraph_st*;
using cudaGraphExec_t = struct CUgraphExec_st*;

struct cudaDeviceProp {
  char name[256];
  size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
  int major, minor, multiProcessorCount, warpSize, maxThreadsPerBlock, l2CacheSize;
};

const char* cudaGetErrorName(cudaError_t status);
const char* cudaGetErrorString(cudaError_t status);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes);
cudaError_t cudaMalloc(void** memory, size_t bytes);
cudaError_t cudaFree(void* memory);
cudaError_t cudaMallocHost(void** memory, size_t bytes);
cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned int flags);
cudaError_t cudaFreeHost(void* memory);
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream = nullptr);
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height, cudaMemcpyKind kind,
                              cudaStream_t stream = nullptr);
cudaError_t cudaMemset(void* memory, int value, size_t bytes);
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream = nullptr);
cudaError_t cudaStreamCreate(cudaStream_t* stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned int flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamQuery(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned int flags = 0);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags = 0);
cudaError_t cudaGraphUpload(cudaGraphExec_t executable, cudaStream_t stream);
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable);
cudaError_t cudaEventCreate(cudaEvent_t* event);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned int flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = nullptr);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to);

template <typename T>
cudaError_t cudaMalloc(T** memory, size_t bytes) { return cudaMalloc(reinterpret_cast<void**>(memory), bytes); }
template <typename T>
cudaError_t cudaMallocHost(T** memory, size_t bytes) { return cudaMallocHost(reinterpret_cast<void**>(memory), bytes); }
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) { return cudaSuccess; }

// ---------------------------------------------------------------------------------------------------------------------------------------------------------
// The emulator's own interface

namespace tandem::cuda_on_cpu {

// In which order the blocks of a launch run, and, at each turn, the threads of a block that can go on. kRandom draws anew at each turn.
enum class ThreadOrder { kForward, kBackward, kRandom };
void SetThreadOrder(ThreadOrder order, uint32_t seed = 1);

// What cudaMalloc may give in all; 16 GB at first.
void SetTotalMemory(size_t bytes);

// Gives the stream the run of `thread` for each thread of each block. It, or the wait that runs it, throws kInternal for a launch that a GPU would refuse (more than
// 1024 threads, 227 KB of dynamic shared memory), a deadlock, a warp collective that lanes disagree about, a write behind the dynamic shared memory.
void Launch(std::function<void()> thread, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream);

// In a kernel: the dynamic shared memory of the block, 128-byte aligned.
void* DynamicShared();

// In a kernel: waits until all lanes of the mask that have not ended are here with the same `run`; then the last one calls it for all.
// lanes[i] is lane i's `mine`, null for a lane that does not take part.
using WarpOperation = void (*)(void* const lanes[32]);
void WarpCollective(uint32_t mask, void* mine, WarpOperation run);

// In a kernel: waits for all threads of the block that have not ended. Returns how many of them gave a true value.
int BlockBarrier(bool value);

// In a kernel: how a thread's cp.async behaves at its latest and at its earliest: the destination holds NaN from the start of a copy until the wait that
// covers the copy's group, and the source is read at that wait.
void StartCopy16(void* to, const void* from, bool valid);
void CommitCopies();
void WaitForCopies(int groups_left);

// In a kernel: ends the launch with an error.
[[noreturn]] void Trap(const char* what);

template <typename T>
struct Exchange {
  T value, result;
  int source;  // a lane, or -1 to keep one's own
};

// Reads another lane's value. One that does not take part gives NaN bits.
template <typename T>
T ShuffleFrom(uint32_t mask, T value, int source) {
  static_assert(std::is_trivially_copyable<T>::value, "shuffles move plain values");
  Exchange<T> mine = {value, value, source};
  WarpCollective(mask, &mine, [](void* const lanes[32]) {
    for (int i = 0; i < 32; ++i) {
      auto* lane = static_cast<Exchange<T>*>(lanes[i]);
      if (lane == nullptr || lane->source < 0) continue;
      if (const auto* other = static_cast<const Exchange<T>*>(lanes[lane->source])) {
        lane->result = other->value;
      } else {
        std::memset(static_cast<void*>(&lane->result), 0xff, sizeof(T));
      }
    }
  });
  return mine.result;
}

inline int LaneId() {
  return static_cast<int>((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32);
}

template <typename To, typename From>
To BitCast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(static_cast<void*>(&to), &from, sizeof(To));
  return to;
}

// Rounds once, to nearest even: the double becomes a float that is odd where inexact, whose rounding to half then cannot tie by accident.
inline uint16_t DoubleToHalf(double value) {
  float rounded = static_cast<float>(value);
  if (std::isfinite(rounded) && static_cast<double>(rounded) != value) {
    if (std::abs(static_cast<double>(rounded)) > std::abs(value)) rounded = std::nextafter(rounded, 0.0f);
    rounded = BitCast<float>(BitCast<uint32_t>(rounded) | 1u);
  }
  return FloatToHalf(rounded);
}

// a * b + c for halves, rounded once. The product is exact in double; where the sum is not, its last bit is made odd for the same reason.
inline uint16_t FmaHalf(float a, float b, float c) {
  const double product = static_cast<double>(a) * b, sum = product + c;
  const double product_part = sum - c, error = (product - product_part) + (c - (sum - product_part));
  if (!std::isfinite(sum) || error == 0.0) return DoubleToHalf(sum);
  uint64_t bits = BitCast<uint64_t>(sum);
  if ((bits & 1u) == 0) bits += (error > 0) == (sum > 0) ? 1u : ~uint64_t{0};
  return DoubleToHalf(BitCast<double>(bits));
}

}  // namespace tandem::cuda_on_cpu

// ---------------------------------------------------------------------------------------------------------------------------------------------------------
// Barriers, votes, shuffles, atomics

inline void __syncthreads() { tandem::cuda_on_cpu::BlockBarrier(false); }
inline int __syncthreads_count(int value) { return tandem::cuda_on_cpu::BlockBarrier(value != 0); }
inline int __syncthreads_or(int value) { return tandem::cuda_on_cpu::BlockBarrier(value != 0) != 0; }
inline int __syncthreads_and(int value) { return tandem::cuda_on_cpu::BlockBarrier(value == 0) == 0; }
inline void __syncwarp(unsigned int mask = 0xffffffffu) { tandem::cuda_on_cpu::WarpCollective(mask, &mask, [](void* const*) {}); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
[[noreturn]] inline void __trap() { tandem::cuda_on_cpu::Trap("__trap()"); }

inline unsigned int __ballot_sync(unsigned int mask, int value) {
  struct Vote {
    bool value;
    unsigned int result;
  } mine = {value != 0, 0};
  tandem::cuda_on_cpu::WarpCollective(mask, &mine, [](void* const lanes[32]) {
    unsigned int result = 0;
    for (int i = 0; i < 32; ++i) {
      if (lanes[i] != nullptr && static_cast<Vote*>(lanes[i])->value) result |= 1u << i;
    }
    for (int i = 0; i < 32; ++i) {
      if (lanes[i] != nullptr) static_cast<Vote*>(lanes[i])->result = result;
    }
  });
  return mine.result;
}
inline int __any_sync(unsigned int mask, int value) { return __ballot_sync(mask, value) != 0; }
inline int __all_sync(unsigned int mask, int value) { return __ballot_sync(mask, !value) == 0; }

template <typename T>
T __shfl_sync(unsigned int mask, T value, int source, int width = 32) {
  return tandem::cuda_on_cpu::ShuffleFrom(mask, value, (tandem::cuda_on_cpu::LaneId() & ~(width - 1)) | (source & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(unsigned int mask, T value, int lane_mask, int width = 32) {
  const int lane = tandem::cuda_on_cpu::LaneId(), source = lane ^ lane_mask;
  return tandem::cuda_on_cpu::ShuffleFrom(mask, value, source < (lane | (width - 1)) + 1 ? source : -1);
}
template <typename T>
T __shfl_up_sync(unsigned int mask, T value, unsigned int delta, int width = 32) {
  const int lane = tandem::cuda_on_cpu::LaneId(), source = lane - static_cast<int>(delta);
  return tandem::cuda_on_cpu::ShuffleFrom(mask, value, source >= (lane & ~(width - 1)) ? source : -1);
}
template <typename T>
T __shfl_down_sync(unsigned int mask, T value, unsigned int delta, int width = 32) {
  const int lane = tandem::cuda_on_cpu::LaneId(), source = lane + static_cast<int>(delta);
  return tandem::cuda_on_cpu::ShuffleFrom(mask, value, source <= (lane | (width - 1)) ? source : -1);
}

// A fiber is never interrupted, so a plain read and write is atomic. All return the old value.
#define TANDEM_ATOMIC(name, new_value)                                                              \
  template <typename T>                                                                             \
  T name(T* address, typename std::common_type<T>::type value) {                                    \
    const T old = *address;                                                                         \
    *address = static_cast<T>(new_value);                                                           \
    return old;                                                                                     \
  }
TANDEM_ATOMIC(atomicAdd, old + value)
TANDEM_ATOMIC(atomicSub, old - value)
TANDEM_ATOMIC(atomicMax, old > value ? old : value)
TANDEM_ATOMIC(atomicMin, old < value ? old : value)
TANDEM_ATOMIC(atomicAnd, old & value)
TANDEM_ATOMIC(atomicOr, old | value)
TANDEM_ATOMIC(atomicXor, old ^ value)
TANDEM_ATOMIC(atomicExch, value)
TANDEM_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
#undef TANDEM_ATOMIC
template <typename T>
T atomicCAS(T* address, typename std::common_type<T>::type expected, typename std::common_type<T>::type value) {
  const T old = *address;
  if (old == expected) *address = value;
  return old;
}

// ---------------------------------------------------------------------------------------------------------------------------------------------------------
// Arithmetic

// C libraries declare the first ones under these very names.
#define __expf(x) expf(x)
#define __exp10f(x) powf(10.0f, x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __powf(x, y) powf(x, y)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define rsqrtf(x) (1.0f / sqrtf(x))
inline float __frsqrt_rn(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline int __float2int_rd(float x) { return static_cast<int>(std::floor(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned int x) { return static_cast<float>(x); }

inline unsigned int __float_as_uint(float x) { return tandem::cuda_on_cpu::BitCast<unsigned int>(x); }
inline int __float_as_int(float x) { return tandem::cuda_on_cpu::BitCast<int>(x); }
inline float __uint_as_float(unsigned int x) { return tandem::cuda_on_cpu::BitCast<float>(x); }
inline float __int_as_float(int x) { return tandem::cuda_on_cpu::BitCast<float>(x); }

inline int __popc(unsigned int x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned int>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned int __umulhi(unsigned int x, unsigned int y) { return static_cast<unsigned int>((static_cast<uint64_t>(x) * y) >> 32); }
inline unsigned int __funnelshift_r(unsigned int low, unsigned int high, unsigned int shift) {
  return static_cast<unsigned int>(((static_cast<uint64_t>(high) << 32) | low) >> (shift & 31));
}
inline unsigned int __byte_perm(unsigned int x, unsigned int y, unsigned int selector) {
  const uint64_t bytes = (static_cast<uint64_t>(y) << 32) | x;
  unsigned int result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned int choice = selector >> (4 * i);
    const auto byte = static_cast<unsigned int>(bytes >> (8 * (choice & 7))) & 0xffu;
    result |= ((choice & 8) != 0 ? (byte >> 7) * 0xffu : byte) << (8 * i);  // bit 3 spreads the byte's sign
  }
  return result;
}
inline int __dp4a(int x, int y, int sum) {
  for (int shift = 0; shift < 32; shift += 8) sum += static_cast<int8_t>(x >> shift) * static_cast<int8_t>(y >> shift);
  return sum;
}

template <typename T>
T __ldg(const T* address) { return *address; }
template <typename T>
T __ldcs(const T* address) { return *address; }
template <typename T>
T __ldcg(const T* address) { return *address; }
template <typename T>
void __stcs(T* address, T value) { *address = value; }
template <typename T>
void __stcg(T* address, T value) { *address = value; }

#define TANDEM_MIN_MAX(T)                                 \
  inline T min(T a, T b) { return b < a ? b : a; }        \
  inline T max(T a, T b) { return a < b ? b : a; }
TANDEM_MIN_MAX(int)
TANDEM_MIN_MAX(unsigned int)
TANDEM_MIN_MAX(long)
TANDEM_MIN_MAX(unsigned long)
TANDEM_MIN_MAX(long long)
TANDEM_MIN_MAX(unsigned long long)
#undef TANDEM_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }

// ---------------------------------------------------------------------------------------------------------------------------------------------------------
// Halves. A sum, difference, product or quotient in float rounds to the same half as the exact one, since a float has more than twice a half's bits.

struct __half {
  uint16_t bits;
  __half() = default;
  __half(float value) : bits(tandem::FloatToHalf(value)) {}
  operator float() const { return tandem::HalfToFloat(bits); }
};
struct __attribute__((aligned(4))) __half2 {
  __half x, y;
  __half2() = default;
  __half2(__half low, __half high) : x(low), y(high) {}
};
using half = __half;
using half2 = __half2;

inline __half __ushort_as_half(unsigned short bits) { return tandem::cuda_on_cpu::BitCast<__half>(bits); }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline __half __float2half(float value) { return __half(value); }
inline __half __float2half_rn(float value) { return __half(value); }
inline float __half2float(__half value) { return static_cast<float>(value); }
inline __half __int2half_rn(int value) { return __ushort_as_half(tandem::cuda_on_cpu::DoubleToHalf(value)); }
inline int __half2int_rn(__half value) { return static_cast<int>(std::nearbyint(static_cast<float>(value))); }

#define TANDEM_HALF_OPERATION(symbol, name)                                                                                                     \
  inline __half name(__half a, __half b) { return __half(static_cast<float>(a) symbol static_cast<float>(b)); }                                 \
  inline __half operator symbol(__half a, __half b) { return name(a, b); }                                                                      \
  inline __half2 name##2(__half2 a, __half2 b) { return {name(a.x, b.x), name(a.y, b.y)}; }                                                     \
  inline __half2 operator symbol(__half2 a, __half2 b) { return name##2(a, b); }
TANDEM_HALF_OPERATION(+, __hadd)
TANDEM_HALF_OPERATION(-, __hsub)
TANDEM_HALF_OPERATION(*, __hmul)
#undef TANDEM_HALF_OPERATION
inline __half __hdiv(__half a, __half b) { return __half(static_cast<float>(a) / static_cast<float>(b)); }
inline __half __hfma(__half a, __half b, __half c) { return __ushort_as_half(tandem::cuda_on_cpu::FmaHalf(a, b, c)); }
inline __half __hneg(__half a) { return __ushort_as_half(static_cast<unsigned short>(a.bits ^ 0x8000u)); }
inline __half __habs(__half a) { return __ushort_as_half(a.bits & 0x7fffu); }
inline __half __hmax(__half a, __half b) { return __half(std::fmax(static_cast<float>(a), static_cast<float>(b))); }
inline __half __hmin(__half a, __half b) { return __half(std::fmin(static_cast<float>(a), static_cast<float>(b))); }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }
inline __half2 __hneg2(__half2 a) { return {__hneg(a.x), __hneg(a.y)}; }
inline __half2 __habs2(__half2 a) { return {__habs(a.x), __habs(a.y)}; }
inline __half2 __hmax2(__half2 a, __half2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }
inline __half2 __hmin2(__half2 a, __half2 b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }
inline __half2 __halves2half2(__half low, __half high) { return {low, high}; }
inline __half2 __half2half2(__half value) { return {value, value}; }
inline __half2 __float2half2_rn(float value) { return {__half(value), __half(value)}; }
inline __half2 __floats2half2_rn(float low, float high) { return {__half(low), __half(high)}; }
inline __half2 __float22half2_rn(float2 value) { return {__half(value.x), __half(value.y)}; }
inline float2 __half22float2(__half2 value) { return {static_cast<float>(value.x), static_cast<float>(value.y)}; }
inline __half __low2half(__half2 value) { return value.x; }
inline __half __high2half(__half2 value) { return value.y; }
inline float __low2float(__half2 value) { return static_cast<float>(value.x); }
inline float __high2float(__half2 value) { return static_cast<float>(value.y); }
