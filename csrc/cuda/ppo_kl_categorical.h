// The categorical loss and its gradients. Symbols: kernels/README.md.
#pragma once

#include "cuda/ppo.h"

namespace lago::cuda {

struct PpoKlCategorical {
  Ppo ppo;
  const void *logits, *prior_log_probs;  // [B, A]
  const std::uint8_t* action_mask;       // [B, A], null: every action is allowed
  const std::int64_t* actions;           // [B]
  void* logits_grad;                     // [B, A]
  std::int64_t n_actions;
  Type type;  // of logits, their gradient, and prior_log_probs
};

cudaError_t LaunchPpoKlCategorical(const PpoKlCategorical& call, cudaStream_t stream);

}  // namespace lago::cuda
