// Which instruction set the kernels use. Chosen once from the CPU, or forced (tests, benchmarks).
#pragma once

namespace tandem {

// kGeneric is plain C++ that the compiler may vectorise (SSE2, NEON); kAvx512 means F, BW, DQ and VL.
enum class Isa { kGeneric, kAvx2, kAvx512 };

bool IsaSupported(Isa isa);
Isa BestIsa();
const char* IsaName(Isa isa);  // "generic", "avx2", "avx512"

}  // namespace tandem
