// Choice among the versions that each_isa.inc makes of a function.
#pragma once

#include <string>

#include "core/cpu_features.h"
#include "core/error.h"

namespace tandem {

template <typename Function>
Function SelectVersion(Isa isa, Function generic, Function avx2, Function avx512, Function avx512vnni) {
  if (!IsaSupported(isa)) {
    throw Error(ErrorCode::kInvalidArgument, std::string("this CPU has no ") + IsaName(isa) + ", the best it has is " + IsaName(CpuIsa()));
  }
  switch (isa) {
    case Isa::kAvx2: return avx2;
    case Isa::kAvx512: return avx512;
    case Isa::kAvx512Vnni: return avx512vnni;
    case Isa::kGeneric: break;
  }
  return generic;
}

}  // namespace tandem
