// The KL between two Gaussians of one dimension, in the direction asked for. Derivation: kernels/README.md.
#pragma once

#include "cuda/device.h"

namespace lago::cuda {

struct GaussianKl {
  float kl, mean_grad, log_std_grad;  // gradients with respect to the policy
};

__device__ inline GaussianKl KlOfGaussians(float mean, float log_std, float prior_mean, float prior_log_std,
                                           bool prior_policy) {
  const float delta = mean - prior_mean;
  const float left = prior_policy ? prior_log_std : log_std;
  const float right = prior_policy ? log_std : prior_log_std;
  const float variance = expf(2 * left), precision = expf(-2 * right);
  const float scaled = (variance + delta * delta) * precision;
  return {right - left + 0.5f * scaled - 0.5f, delta * precision,
          prior_policy ? 1 - scaled : variance * precision - 1};
}

}  // namespace lago::cuda
