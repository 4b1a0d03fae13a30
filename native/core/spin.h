// Waiting for another thread or process that is expected within microseconds.
#pragma once

#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tandem {

inline void Pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Looks until condition() is true or `most` has passed; returns whether it is. Keeps the core busy: only for as long as nobody else can need it, or for
// less than going to sleep takes.
template <typename Condition>
bool SpinUntil(std::chrono::microseconds most, const Condition& condition) {
  constexpr int kLooks = 64;  // between two looks at the clock
  for (int i = 0; i < kLooks; ++i) {
    if (condition()) return true;
    Pause();
  }
  for (const auto end = std::chrono::steady_clock::now() + most; std::chrono::steady_clock::now() < end;) {
    for (int i = 0; i < kLooks; ++i) {
      if (condition()) return true;
      Pause();
    }
  }
  return condition();
}

}  // namespace tandem
