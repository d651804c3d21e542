// The KL alone, per row, and the gradients of each row's own KL. Symbols: kernels/README.md.
#pragma once

#include "cuda/types.h"

namespace lago::cuda {

struct PriorKlCategorical {
  const void *logits, *prior_log_probs;  // [B, A]
  const std::uint8_t* action_mask;       // [B, A], null: every action is allowed
  const float* prior_temperature;        // 0-D
  float* kl;                             // [B]
  void* logits_grad;                     // [B, A], null: not wanted
  std::int64_t rows, n_actions;
  bool prior_policy;
  Type type;  // of logits, their gradient, and prior_log_probs
};

struct PriorKlGaussian {
  const void *mean, *prior_mean;        // [B, D]
  const void *log_std, *prior_log_std;  // [D] or [B, D]
  const float* prior_temperature;       // 0-D
  float* kl;                            // [B]
  void *mean_grad, *log_std_grad;       // [B, D], null: not wanted
  std::int64_t rows, dims;
  bool log_std_per_row, prior_log_std_per_row, prior_policy;
  Type type;  // of policy, prior and gradients
};

cudaError_t LaunchPriorKlCategorical(const PriorKlCategorical& call, cudaStream_t stream);
cudaError_t LaunchPriorKlGaussian(const PriorKlGaussian& call, cudaStream_t stream);

}  // namespace lago::cuda
