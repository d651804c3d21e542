// The exact KL between a policy and a prior, row by row, and its gradients with respect to the policy.
// The definition is kernels/prior_kl/reference.py; the gradients are derived in kernels/README.md.
#ifndef LAGO_OPS_PRIOR_KL_H_
#define LAGO_OPS_PRIOR_KL_H_

#include <cstddef>
#include <cstdint>

namespace lago {

struct PriorKlOptions {
  float prior_temperature;
  bool prior_policy;  // KL(prior || policy) in place of KL(policy || prior)
  int lanes;          // floats at once, at most: 4 (portable), 8 (AVX2) or 16 (AVX-512)
};

// [B, A], row-major.
struct CategoricalKl {
  const float* logits;
  const float* prior_log_probs;
  const std::uint8_t* action_mask;  // null: every action is allowed
  float* kl;                        // [B]
  float* logits_grad;               // null: not wanted
  std::size_t rows, actions;
};

// [B, D], row-major; a log std is [D], or [B, D] where its flag says so.
struct GaussianKl {
  const float* mean;
  const float* log_std;
  const float* prior_mean;
  const float* prior_log_std;
  float* kl;            // [B]
  float* mean_grad;     // null: neither gradient is wanted
  float* log_std_grad;  // [B, D]
  std::size_t rows, dims;
  bool log_std_per_row, prior_log_std_per_row;
};

// Unsafe: the pointers must hold what their comments say, and outputs must not overlap inputs.
void UnsafePriorKlCategorical(const CategoricalKl& task, const PriorKlOptions& options);
void UnsafePriorKlGaussian(const GaussianKl& task, const PriorKlOptions& options);

}  // namespace lago

#endif  // LAGO_OPS_PRIOR_KL_H_
