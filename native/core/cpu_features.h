// Which instruction set the kernels use. Chosen once from the CPU, or forced (tests, benchmarks, TANDEM_ISA).
#pragma once

namespace tandem {

// kGeneric is plain C++ that the compiler may vectorise (SSE2, NEON); kAvx512 means F, BW, DQ and VL. Each set contains the ones before it. kAvx512Vnni
// differs from kAvx512 in the kernels that multiply integers only.
enum class Isa { kGeneric, kAvx2, kAvx512, kAvx512Vnni };

constexpr Isa kAllIsas[] = {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Vnni};

Isa CpuIsa();  // the best that this CPU has
bool IsaSupported(Isa isa);
// The one to use: CpuIsa(), or what the environment variable TANDEM_ISA names, if it is set. Throws kInvalidArgument if that is no instruction set or
// this CPU lacks it.
Isa BestIsa();
const char* IsaName(Isa isa);  // "generic", "avx2", "avx512", "avx512vnni"

}  // namespace tandem
