#include "ops/act_gaussian.h"

#include <cmath>
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

}  // namespace lago
