// PPO's clipped surrogate, value loss, entropy and exact KL to a prior for a diagonal Gaussian policy:
// the loss, its statistics and its gradients in one pass over the rows.
// The definition is kernels/ppo_kl_gaussian/reference.py; the gradients are derived in kernels/README.md.
#ifndef LAGO_OPS_PPO_KL_GAUSSIAN_H_
#define LAGO_OPS_PPO_KL_GAUSSIAN_H_

#include <cstddef>

namespace lago {

// [B, D] or [B], row-major. A log std is [D], or [B, D] where its flag in GaussianShape says so.
struct GaussianInputs {
  const float* mean;
  const float* log_std;
  const float* values;
  const float* actions;
  const float* old_log_prob;
  const float* advantages;
  const float* returns;
  const float* old_values;
  const float* weight;
  const float* prior_mean;
  const float* prior_log_std;
};

struct GaussianCoefficients {
  float clip_range;
  float ent_coef;
  float vf_coef;
  float kl_coef;
  float prior_temperature;
  float clip_range_vf;  // infinity: the value is not clipped
};

struct GaussianOutputs {
  float* statistics;  // [7]: loss, policy, value, entropy, prior_kl, approx_kl, clip_fraction
  float* mean_grad;
  float* log_std_grad;  // the shape of log_std
  float* values_grad;
};

struct GaussianShape {
  std::size_t rows;
  std::size_t dims;
  bool log_std_per_row;
  bool prior_log_std_per_row;
};

struct GaussianOptions {
  bool prior_policy;  // KL(prior || policy) in place of KL(policy || prior)
  bool normalize_advantage;
  bool portable;  // no AVX2, even where the processor has it
};

// Unsafe: the pointers must hold what GaussianShape says, and outputs must not overlap inputs.
void UnsafePpoKlGaussian(const GaussianInputs& in, const GaussianCoefficients& coefficients,
                         const GaussianOutputs& out, const GaussianShape& shape,
                         const GaussianOptions& options);

}  // namespace lago

#endif  // LAGO_OPS_PPO_KL_GAUSSIAN_H_
