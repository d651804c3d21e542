// When a batch is worth more than one thread.
#ifndef LAGO_LATENT_CACHE_PARALLEL_H_
#define LAGO_LATENT_CACHE_PARALLEL_H_

#include <algorithm>
#include <cstddef>

namespace lago {

// Waking a thread costs tens of microseconds: one is worth its cost from this many copied bytes on.
constexpr std::size_t kBytesPerThread = std::size_t{1} << 20;

inline int ThreadsFor(std::size_t bytes, int most) {
  return static_cast<int>(
      std::clamp(bytes / kBytesPerThread, std::size_t{1}, static_cast<std::size_t>(std::max(most, 1))));
}

}  // namespace lago

#endif  // LAGO_LATENT_CACHE_PARALLEL_H_
