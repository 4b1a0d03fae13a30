// The few instructions that kernels need and CUDA C++ has no name for: as PTX under nvcc, in software under the emulator, which exchanges the registers of a
// warp's lanes as the hardware does. Layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type" and "ldmatrix".
#pragma once

#include <cstdint>

#include "kernels/cuda/device.h"

namespace tandem::cuda {

// All of these are called by whole warps, lane = 4 * group + member.
//
// d[16, 8] += a[16, 16] b[16, 8], fp16 in, fp32 sums.
//   a: pairs of columns 2 * member of rows group (a[0], a[2]) and group + 8 (a[1], a[3]); a[2] and a[3] are 8 columns on
//   b: pairs of rows 2 * member of column group; b[1] is 8 rows on
//   d: columns 2 * member and the next of rows group (d[0], d[1]) and group + 8 (d[2], d[3])
// The emulated one adds products to d one by one, rounding each time, k ascending; a GPU's order and width of the sum are its own.
//
// LdMatrixX4: four 8x8 matrices of fp16. Lane i gives the address of row i % 8 of matrix i / 8, 16 bytes in shared memory, 16-byte aligned; r[j] is the
// pair of columns 2 * member of row group of matrix j. Trans: of the transposed matrices.

#ifdef TANDEM_CUDA_ON_CPU

inline void MmaM16N8K16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Registers {
    float* d;
    const uint32_t* a;
    const uint32_t* b;
  } mine = {d, a, b};
  cuda_on_cpu::WarpCollective(0xffffffffu, &mine, [](void* const lanes[32]) {
    float a[16][16], b[16][8];
    const auto half_of = [](uint32_t pair, int i) { return HalfToFloat(static_cast<uint16_t>(pair >> (16 * i))); };
    for (int lane = 0; lane < 32; ++lane) {
      const auto* from = static_cast<const Registers*>(lanes[lane]);
      if (from == nullptr) cuda_on_cpu::Trap("mma.sync in a warp some of whose lanes have ended");
      const int group = lane / 4, member = lane % 4;
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 4; ++j) a[group + j % 2 * 8][2 * member + j / 2 * 8 + i] = half_of(from->a[j], i);
        for (int j = 0; j < 2; ++j) b[2 * member + j * 8 + i][group] = half_of(from->b[j], i);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, member = lane % 4;
      for (int j = 0; j < 4; ++j) {
        float& sum = static_cast<Registers*>(lanes[lane])->d[j];
        for (int k = 0; k < 16; ++k) sum += a[group + j / 2 * 8][k] * b[k][2 * member + j % 2];
      }
    }
  });
}

template <bool kTransposed>
void LdMatrixX4As(uint32_t (&r)[4], const void* shared_row) {
  struct Registers {
    uint32_t* r;
    const void* row;
  } mine = {r, shared_row};
  if (reinterpret_cast<uintptr_t>(shared_row) % 16 != 0) cuda_on_cpu::Trap("ldmatrix from a row that is not 16-byte aligned");
  cuda_on_cpu::WarpCollective(0xffffffffu, &mine, [](void* const lanes[32]) {
    uint16_t matrices[4][8][8];
    for (int i = 0; i < 32; ++i) {
      if (lanes[i] == nullptr) cuda_on_cpu::Trap("ldmatrix in a warp some of whose lanes have ended");
      std::memcpy(matrices[i / 8][i % 8], static_cast<const Registers*>(lanes[i])->row, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, column = lane % 4 * 2;
      for (int j = 0; j < 4; ++j) {
        const uint32_t low = kTransposed ? matrices[j][column][group] : matrices[j][group][column];
        const uint32_t high = kTransposed ? matrices[j][column + 1][group] : matrices[j][group][column + 1];
        static_cast<Registers*>(lanes[lane])->r[j] = low | high << 16;
      }
    }
  });
}
inline void LdMatrixX4(uint32_t (&r)[4], const void* shared_row) { LdMatrixX4As<false>(r, shared_row); }
inline void LdMatrixX4Trans(uint32_t (&r)[4], const void* shared_row) { LdMatrixX4As<true>(r, shared_row); }

// 16 bytes of global memory to shared memory, both 16-byte aligned, zeros where not `valid`. It is there after the wait that covers its group, for the
// thread that copied; other threads need a barrier on top. Until then the place in shared memory holds anything.
inline void CpAsync16(void* shared, const void* global, bool valid) { cuda_on_cpu::StartCopy16(shared, global, valid); }
inline void CpAsyncCommit() { cuda_on_cpu::CommitCopies(); }
// Waits for all of the thread's groups but the last N.
template <int N>
void CpAsyncWait() { cuda_on_cpu::WaitForCopies(N); }

// 16 bytes that are read once, past the L1 cache.
inline uint4 LoadStreaming(const uint4* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) cuda_on_cpu::Trap("a load of 16 bytes from a place that is not 16-byte aligned");
  return *address;
}

// (x & mask) | bits.
inline uint32_t Lop3AndOr(uint32_t x, uint32_t mask, uint32_t bits) { return (x & mask) | bits; }
// Four bytes of the eight of b:a, as __byte_perm.
inline uint32_t Prmt(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
inline void PrefetchL2(const void*) {}
// The thread's x index, read anew: what is derived from it need not stay in registers.
inline int ReadThreadIndex() { return static_cast<int>(threadIdx.x); }
// 2^x to 2 units in the last place; 2^0 is 1, 2^-infinity is 0.
inline float Exp2(float x) { return std::exp2(x); }

#elif defined(__CUDACC__)

__device__ __forceinline__ uint32_t SharedAddress(const void* shared) { return static_cast<uint32_t>(__cvta_generic_to_shared(shared)); }

__device__ __forceinline__ void MmaM16N8K16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};\n"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};\n"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[2]), "r"(a[3]), "r"(b[1]));
#endif
}

__device__ __forceinline__ void LdMatrixX4(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SharedAddress(shared_row))
               : "memory");
}

__device__ __forceinline__ void LdMatrixX4Trans(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SharedAddress(shared_row))
               : "memory");
}

__device__ __forceinline__ void CpAsync16(void* shared, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(SharedAddress(shared)), "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(shared) = valid ? __ldg(static_cast<const uint4*>(global)) : make_uint4(0, 0, 0, 0);
#endif
}

__device__ __forceinline__ void CpAsyncCommit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

template <int N>
__device__ __forceinline__ void CpAsyncWait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
#endif
}

__device__ __forceinline__ uint4 LoadStreaming(const uint4* address) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(__cvta_generic_to_global(address)));
  return value;
}

__device__ __forceinline__ uint32_t Lop3AndOr(uint32_t x, uint32_t mask, uint32_t bits) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;\n" : "=r"(result) : "r"(x), "r"(mask), "r"(bits));  // 0xEA = (0xF0 & 0xCC) | 0xAA
  return result;
}

__device__ __forceinline__ uint32_t Prmt(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

__device__ __forceinline__ void PrefetchL2(const void* global) { asm volatile("prefetch.global.L2 [%0];\n" ::"l"(__cvta_generic_to_global(global))); }

__device__ __forceinline__ int ReadThreadIndex() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(index));
  return index;
}

__device__ __forceinline__ float Exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
  return result;
}

#endif

// Whether a block can have 227 KB of shared memory on the GPUs that this pass compiles for. A kernel that needs them compiles to nothing for others, where it
// cannot be launched.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasLargeShared = false;
#else
constexpr bool kHasLargeShared = true;
#endif

// Warpgroups of four warps, sm_90a alone: d[64, 128] += a[64, 16] b[16, 128], each warp with 16 rows of a and d, whose registers are those of MmaM16N8K16, as
// d[n] is of columns 8 n .. 8 n + 7. The same bits too, as a GPU showed and its tests show.
//   b: in shared memory, two of the 16-byte pieces of a row of 128 bytes for each of the 128 columns: pieces `first` and `first + 1`, the second for k = 8 .. 15.
//      rows: 1024-byte aligned; piece p of row r lies at place p ^ (r % 8) of the row (the hardware's 128-byte swizzle)
// What other threads, or cp.async, wrote to shared memory takes FenceAsyncProxy() before the barrier. WarpgroupArrive() goes before the first mma and where
// registers have changed since; an mma is done, and its registers can be read and written, when WarpgroupWait<N>() has left but N of the groups that
// WarpgroupCommit() closed. WarpgroupSettle(d) then tells the compiler that d has changed.
#if defined(TANDEM_CUDA_ON_CPU)

constexpr bool kHasWarpgroupMma = true;
inline void FenceAsyncProxy() {}
inline void WarpgroupArrive() {}
inline void WarpgroupCommit() {}
template <int N>
void WarpgroupWait() {}
inline void WarpgroupSettle(float (&)[16][4]) {}
inline void WarpgroupMma(float (&d)[16][4], const uint32_t (&a)[4], const void* rows, int first) {
  if (reinterpret_cast<uintptr_t>(rows) % 1024 != 0) cuda_on_cpu::Trap("wgmma with rows that are not 1024-byte aligned");
  const int group = cuda_on_cpu::LaneId() / 4, member = cuda_on_cpu::LaneId() % 4;
  for (int n = 0; n < 16; ++n) {
    const auto* row = static_cast<const unsigned char*>(rows) + (8 * n + group) * 128;
    uint32_t b[2];
    for (int i = 0; i < 2; ++i) std::memcpy(&b[i], row + ((first + i) ^ group) * 16 + member * 4, sizeof b[i]);
    MmaM16N8K16(d[n], a, b);
  }
}

#elif defined(__CUDACC__)

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasWarpgroupMma = false;
#else
constexpr bool kHasWarpgroupMma = true;
#endif

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
__device__ __forceinline__ void FenceAsyncProxy() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }
__device__ __forceinline__ void WarpgroupArrive() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void WarpgroupCommit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int N>
__device__ __forceinline__ void WarpgroupWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(N) : "memory");
}
__device__ __forceinline__ void WarpgroupSettle(float (&d)[16][4]) {
#pragma unroll
  for (int n = 0; n < 16; ++n) asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
}
__device__ __forceinline__ void WarpgroupMma(float (&d)[16][4], const uint32_t (&a)[4], const void* rows, int first) {
  // Address in 16 bytes; a leading offset that this swizzle does not use; 1024 bytes from 8 rows to the next 8; swizzle of 128 bytes.
  const uint64_t descriptor = static_cast<uint64_t>((SharedAddress(rows) >> 4) + static_cast<uint32_t>(first)) | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 |
                              uint64_t{1} << 62;
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "
      "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, 1, 1, 1, 0;\n"
      : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]),
        "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]),
        "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),
        "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3]),
        "+f"(d[8][0]), "+f"(d[8][1]), "+f"(d[8][2]), "+f"(d[8][3]), "+f"(d[9][0]), "+f"(d[9][1]), "+f"(d[9][2]), "+f"(d[9][3]),
        "+f"(d[10][0]), "+f"(d[10][1]), "+f"(d[10][2]), "+f"(d[10][3]), "+f"(d[11][0]), "+f"(d[11][1]), "+f"(d[11][2]), "+f"(d[11][3]),
        "+f"(d[12][0]), "+f"(d[12][1]), "+f"(d[12][2]), "+f"(d[12][3]), "+f"(d[13][0]), "+f"(d[13][1]), "+f"(d[13][2]), "+f"(d[13][3]),
        "+f"(d[14][0]), "+f"(d[14][1]), "+f"(d[14][2]), "+f"(d[14][3]), "+f"(d[15][0]), "+f"(d[15][1]), "+f"(d[15][2]), "+f"(d[15][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor));
}
#else
__device__ __forceinline__ void FenceAsyncProxy() {}
__device__ __forceinline__ void WarpgroupArrive() {}
__device__ __forceinline__ void WarpgroupCommit() {}
template <int N>
__device__ __forceinline__ void WarpgroupWait() {}
__device__ __forceinline__ void WarpgroupSettle(float (&)[16][4]) {}
__device__ __forceinline__ void WarpgroupMma(float (&)[16][4], const uint32_t (&)[4], const void*, int) {}
#endif

#endif

}  // namespace tandem::cuda
