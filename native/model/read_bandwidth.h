// How fast this machine reads main memory: the floor of a decode step is the bytes of the weights over this.
#pragma once

#include <atomic>
#include <cstdint>

namespace tandem {

// Bytes per second of the best of `repeats` sequential passes over `bytes` of memory, shared out over `threads` threads. `bytes` is well above the last
// cache's size for the figure to mean main memory. Throws kInvalidArgument, kOutOfMemory, kAborted when `cancelled`.
double MeasureReadBandwidth(int64_t bytes, int threads, int repeats, const std::atomic<bool>& cancelled);

}  // namespace tandem
