// Which instruction set the kernels use. Chosen once from the CPU, or forced (tests, benchmarks, TANDEM_ISA).
#pragma once

namespace tandem {

// kGeneric is plain C++ that the compiler may vectorise; kAvx512 means F, BW, DQ and VL; kAvx512Vnni differs from it in the kernels that multiply integers
// only; kNeon is ARMv8.2 with products of bytes.
enum class Isa { kGeneric, kAvx2, kAvx512, kAvx512Vnni, kNeon };

constexpr Isa kAllIsas[] = {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Vnni, Isa::kNeon};

// Those of the processor family that this is compiled for: each contains the ones before it.
#if defined(__x86_64__)
constexpr Isa kIsasOfFamily[] = {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Vnni};
#elif defined(__aarch64__)
constexpr Isa kIsasOfFamily[] = {Isa::kGeneric, Isa::kNeon};
#else
constexpr Isa kIsasOfFamily[] = {Isa::kGeneric};
#endif

Isa CpuIsa();  // the best that this CPU has
bool IsaSupported(Isa isa);
// The one to use: CpuIsa(), or what the environment variable TANDEM_ISA names, if it is set. Throws kInvalidArgument if that is no instruction set or
// this CPU lacks it.
Isa BestIsa();
const char* IsaName(Isa isa);  // "generic", "avx2", "avx512", "avx512vnni", "neon"

}  // namespace tandem
