#include "core/cpu_features.h"

#include <cstdlib>
#include <string>

#include "core/error.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace tandem {

#if defined(__x86_64__)
// Half-precision conversion instructions; older compilers' __builtin_cpu_supports does not know them. That the operating system saves the AVX
// registers is part of the check for avx2.
static bool CpuHasF16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & (1u << 29)) != 0;
}

static Isa DetectIsa() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !CpuHasF16c()) return Isa::kGeneric;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (!avx512) return Isa::kAvx2;
  return __builtin_cpu_supports("avx512vnni") ? Isa::kAvx512Vnni : Isa::kAvx512;
}
#elif defined(__aarch64__) && defined(__linux__)
static Isa DetectIsa() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0 ? Isa::kNeon : Isa::kGeneric; }
#elif defined(__aarch64__)
static Isa DetectIsa() { return Isa::kNeon; }  // every such Apple machine
#else
static Isa DetectIsa() { return Isa::kGeneric; }
#endif

static Isa IsaOfEnvironment() {
  const char* name = std::getenv("TANDEM_ISA");
  if (name == nullptr || *name == '\0') return CpuIsa();
  std::string supported;
  for (const Isa isa : kIsasOfFamily) {
    if (!IsaSupported(isa)) break;
    if (std::string(name) == IsaName(isa)) return isa;
    supported += std::string(supported.empty() ? "" : ", ") + IsaName(isa);
  }
  throw Error(ErrorCode::kInvalidArgument, std::string("TANDEM_ISA: this CPU has no \"") + name + "\", it has " + supported);
}

Isa CpuIsa() {
  static const Isa best = DetectIsa();
  return best;
}

bool IsaSupported(Isa isa) {
  for (const Isa supported : kIsasOfFamily) {
    if (supported == isa) return true;
    if (supported == CpuIsa()) break;
  }
  return false;
}

Isa BestIsa() {
  static const Isa best = IsaOfEnvironment();
  return best;
}

const char* IsaName(Isa isa) {
  switch (isa) {
    case Isa::kGeneric: return "generic";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx512Vnni: return "avx512vnni";
    case Isa::kNeon: return "neon";
  }
  return "unknown";
}

}  // namespace tandem
