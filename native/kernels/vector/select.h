// Choice among the versions that each_isa.inc makes of a function.
#pragma once

#include <iterator>
#include <string>

#include "core/cpu_features.h"
#include "core/error.h"

namespace tandem {

// `versions` are those that this processor family has: generic; then avx2, avx512 and avx512vnni, or neon.
template <typename Function, typename... Functions>
Function SelectVersion(Isa isa, Function generic, Functions... versions) {
  if (!IsaSupported(isa)) {
    throw Error(ErrorCode::kInvalidArgument, std::string("this CPU has no ") + IsaName(isa) + ", the best it has is " + IsaName(CpuIsa()));
  }
  const Function all[] = {generic, versions...};
  for (size_t i = 0; i < std::size(all) && i < std::size(kIsasOfFamily); ++i) {
    if (kIsasOfFamily[i] == isa) return all[i];
  }
  return generic;
}

}  // namespace tandem
