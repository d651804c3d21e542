// Actions with log-probability, entropy and KL to a prior, from Philox4x32-10.
#pragma once

#include "cuda/types.h"

namespace lago::cuda {

struct SampleCategorical {
  const void *logits, *prior_log_probs;  // [B, A]; no prior: null
  const std::uint8_t* action_mask;       // [B, A], null: every action is allowed
  const float* prior_temperature;        // 0-D
  const std::int64_t* state;             // [2], seed and step
  std::int64_t* actions;                 // [B]
  float *log_prob, *entropy, *prior_kl;  // [B]; prior_kl is null without a prior
  std::int64_t rows, n_actions;
  bool prior_policy;
  Type type;  // of logits and prior_log_probs
};

struct SampleGaussian {
  const void *mean, *prior_mean;         // [B, D]; no prior: null
  const void *log_std, *prior_log_std;   // [D] or [B, D]; no prior: null
  const float* prior_temperature;        // 0-D
  const std::int64_t* state;             // [2], seed and step
  float* actions;                        // [B, D]
  float *log_prob, *entropy, *prior_kl;  // [B]; prior_kl is null without a prior
  std::int64_t rows, dims;
  bool log_std_per_row, prior_log_std_per_row, prior_policy;
  Type type;  // of policy and prior
};

cudaError_t LaunchSampleCategorical(const SampleCategorical& call, cudaStream_t stream);
cudaError_t LaunchSampleGaussian(const SampleGaussian& call, cudaStream_t stream);

}  // namespace lago::cuda
