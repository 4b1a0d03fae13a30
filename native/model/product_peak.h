// How many products this machine's vector units make: the floor of a prefill is its multiplications over this.
#pragma once

#include <atomic>

#include "core/cpu_features.h"

namespace tandem {

// Products of 4-bit weights and int8 activations, summed exactly, per second of `threads` threads: the best of three runs of `isa`'s instructions for it, all
// in registers. VNNI: vpdpbusd. AVX-512 and AVX2: vpmaddubsw and vpaddw, and vpmaddwd and vpaddd for every eighth of these, before 16 bits overflow.
// Generic: what the compiler makes of 16-bit products and 32-bit sums. Takes a fraction of a second. Throws
// kInvalidArgument, kAborted when `cancelled`.
double MeasureProductPeak(Isa isa, int threads, const std::atomic<bool>& cancelled);

}  // namespace tandem
