// The moments of a minibatch's advantages, which PPO normalises them by, over several threads.
#ifndef LAGO_CORE_PPO_MOMENTS_H_
#define LAGO_CORE_PPO_MOMENTS_H_

#include <algorithm>
#include <cstddef>
#include <vector>

#include "core/ppo_rows.h"
#include "core/threads.h"

namespace lago {

// `of_few` goes through so many rows one after the other, on one thread.
inline PpoMoments MomentsOf(const PpoRows& in, std::size_t rows, int threads,
                            PpoMoments (*of_few)(const float* advantages, const float* weight,
                                                 std::size_t rows)) {
  constexpr std::size_t kChunkRows = 8192;
  constexpr std::size_t kThreadRows = 32768;  // below it one thread is faster
  std::vector<PpoMoments> parts((rows + kChunkRows - 1) / kChunkRows);
  ParallelFor(parts.size(), rows < kThreadRows ? 1 : threads, [&](std::size_t chunk, int) {
    const std::size_t first = chunk * kChunkRows;
    parts[chunk] = of_few(in.advantages + first, in.weight + first, std::min(kChunkRows, rows - first));
  });
  PpoMoments all;
  for (const PpoMoments& part : parts) all += part;
  return all;
}

}  // namespace lago

#endif  // LAGO_CORE_PPO_MOMENTS_H_
