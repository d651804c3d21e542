// PPO's clipped surrogate, value loss, entropy and exact KL to a prior for a diagonal Gaussian policy:
// the loss, its statistics and its gradients in one pass over the rows.
// The definition is kernels/ppo_kl_gaussian/reference.py; the gradients are derived in kernels/README.md.
#ifndef LAGO_OPS_PPO_KL_GAUSSIAN_H_
#define LAGO_OPS_PPO_KL_GAUSSIAN_H_

#include <cstddef>

#include "core/ppo_rows.h"

namespace lago {

// [B, D] or [B], row-major. A log std is [D], or [B, D] where its flag in GaussianShape says so.
struct GaussianInputs {
  const float* mean;
  const float* log_std;
  const float* actions;
  const float* prior_mean;
  const float* prior_log_std;
  PpoRows rows;
};

struct GaussianOutputs {
  float* statistics;  // [7]: loss, policy, value, entropy, prior_kl, approx_kl, clip_fraction
  float* mean_grad;
  float* log_std_grad;  // the shape of log_std
};

struct GaussianShape {
  std::size_t rows;
  std::size_t dims;
  bool log_std_per_row;
  bool prior_log_std_per_row;
};

// Unsafe: the pointers must hold what GaussianShape says, and outputs must not overlap inputs.
void UnsafePpoKlGaussian(const GaussianInputs& in, const PpoCoefficients& coefficients,
                         const GaussianOutputs& out, const GaussianShape& shape, const PpoOptions& options);

}  // namespace lago

#endif  // LAGO_OPS_PPO_KL_GAUSSIAN_H_
