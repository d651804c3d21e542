// PPO's clipped surrogate, value loss, entropy and exact KL to a prior for a categorical policy:
// the loss, its statistics and its gradients in one pass over the rows.
// The definition is kernels/ppo_kl_categorical/reference.py; the gradients are derived in kernels/README.md.
#ifndef LAGO_OPS_PPO_KL_CATEGORICAL_H_
#define LAGO_OPS_PPO_KL_CATEGORICAL_H_

#include <cstddef>
#include <cstdint>

#include "core/ppo_rows.h"

namespace lago {

// [B, A] or [B], row-major.
struct CategoricalInputs {
  const float* logits;
  const std::int64_t* actions;
  const float* prior_log_probs;
  const std::uint8_t* action_mask;  // null: every action is allowed
  PpoRows rows;
};

struct CategoricalOutputs {
  float* statistics;  // [7]: loss, policy, value, entropy, prior_kl, approx_kl, clip_fraction
  float* logits_grad;
};

struct CategoricalShape {
  std::size_t rows;
  std::size_t actions;
};

// Returns false where an action is not in [0, A); the outputs are then unspecified.
// Unsafe: the pointers must hold what CategoricalShape says, and outputs must not overlap inputs.
bool UnsafePpoKlCategorical(const CategoricalInputs& in, const PpoCoefficients& coefficients,
                            const CategoricalOutputs& out, const CategoricalShape& shape,
                            const PpoOptions& options);

}  // namespace lago

#endif  // LAGO_OPS_PPO_KL_CATEGORICAL_H_
