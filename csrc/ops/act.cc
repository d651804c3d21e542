#include "ops/act.h"

#include <cmath>
#include <limits>
#include <vector>

namespace lago {

void UnsafeActGaussian(const GaussianAct& act) {
  constexpr float kHalfLogTwoPi = 0.918938533204672742f;
  std::vector<float> std_dev(act.dims);
  for (std::size_t d = 0; d < act.dims; ++d) std_dev[d] = std::exp(act.log_std[d]);
  for (std::size_t r = 0; r < act.rows; ++r) {
    const std::size_t at = r * act.dims;
    float log_prob = 0.0f;
    for (std::size_t d = 0; d < act.dims; ++d) {
      const float noise = act.noise[at + d];
      act.actions[at + d] = act.mean[at + d] + std_dev[d] * noise;
      act.log_std_rows[at + d] = act.log_std[d];
      log_prob += -0.5f * noise * noise - act.log_std[d] - kHalfLogTwoPi;
    }
    act.log_prob[r] = log_prob;
  }
}

std::size_t UnsafeActCategorical(const CategoricalAct& act) {
  for (std::size_t r = 0; r < act.rows; ++r) {
    const float* logits = act.logits + r * act.n_actions;
    const float* noise = act.noise + r * act.n_actions;
    float max = -std::numeric_limits<float>::infinity();
    for (std::size_t i = 0; i < act.n_actions; ++i) max = logits[i] > max ? logits[i] : max;
    double sum = 0.0;
    float highest = -1.0f;
    std::size_t chosen = 0;
    for (std::size_t i = 0; i < act.n_actions; ++i) {
      const float weight = std::exp(logits[i] - max);
      sum += static_cast<double>(weight);
      if (weight / noise[i] > highest) {
        highest = weight / noise[i];
        chosen = i;
      }
    }
    if (!std::isfinite(sum)) return r;
    act.actions[r] = static_cast<std::int64_t>(chosen);
    act.log_prob[r] = static_cast<float>(static_cast<double>(logits[chosen] - max) - std::log(sum));
  }
  return act.rows;
}

}  // namespace lago
