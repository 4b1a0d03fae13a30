// What the kernel tests share: seeded random data, the instruction sets to try, thread pools.
#pragma once

#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "core/cpu_features.h"
#include "core/thread_pool.h"
#include "test/test.h"

namespace tandem::test {

// Numbers with magnitudes around 1, none of them special.
inline std::vector<float> RandomFloats(int64_t count, uint32_t seed, float scale = 1.0f) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

// Runs the test body for every instruction set that this CPU has, and says which ones are left out.
inline void ForEachIsa(const std::function<void(Isa)>& body) {
  for (const Isa isa : kAllIsas) {
    if (IsaSupported(isa)) {
      body(isa);
    } else {
      Skip(std::string(IsaName(isa)) + ": this CPU does not have it");
    }
  }
}

// Columns from 0 past two vectors of the widest instruction set, and some long ragged ones.
inline std::vector<int64_t> RaggedSizes() {
  std::vector<int64_t> sizes;
  for (int64_t n = 0; n <= 40; ++n) sizes.push_back(n);
  for (const int64_t n : {63, 64, 65, 127, 255, 257, 1000, 1023, 1024, 1025, 1031, 2051}) sizes.push_back(n);
  return sizes;
}

}  // namespace tandem::test
