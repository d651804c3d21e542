// What both losses take beside their policy, and the workspace that they need.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/types.h"

namespace lago::cuda {

constexpr int kStatistics = 7;
constexpr int kRowTerms = 7;  // the sums over rows behind the statistics
constexpr int kMomentBlocks = 128;
constexpr std::int64_t kMaxBlocks = 2048;

struct Ppo {
  Column values, old_log_prob, advantages, returns, old_values, weight;  // [B]
  Column kl_weight;  // [B], null where every row's KL weighs 1
  // 0-D, on the device; clip_range_vf is null where values are not clipped
  const float *clip_range, *ent_coef, *vf_coef, *kl_coef, *prior_temperature, *clip_range_vf;
  float* statistics;          // [7]
  MutableColumn values_grad;  // [B]
  float* workspace;           // PpoWorkspaceFloats
  std::int64_t rows;
  bool prior_policy, normalize_advantage;
  bool float_columns;  // all that are there, so that no row has to ask
};

// The ticket of the last block and the partial moments come first, then each block's partial sums.
constexpr std::int64_t kWorkspaceHeader = 4 + 3 * kMomentBlocks;

// The size of the workspace where each block sums `columns` numbers.
inline std::int64_t PpoWorkspaceFloats(std::int64_t rows, std::int64_t columns) {
  return kWorkspaceHeader + std::clamp<std::int64_t>(rows, 1, kMaxBlocks) * columns;
}

}  // namespace lago::cuda
