// Actions of a policy with their log-probability, the policy's entropy and its KL to a prior.
// The definition is kernels/sample/reference.py: random words from Philox4x32-10 (Salmon et al., "Parallel
// random numbers: as easy as 1, 2, 3", SC 2011), which depend on seed, step and row alone.
#ifndef LAGO_OPS_SAMPLE_H_
#define LAGO_OPS_SAMPLE_H_

#include <array>
#include <cstddef>
#include <cstdint>

namespace lago {

struct SampleState {
  std::int64_t seed, step;
};

struct SampleOptions {
  float prior_temperature;
  bool prior_policy;  // KL(prior || policy) in place of KL(policy || prior)
};

// [B, A], row-major; outputs are [B].
struct CategoricalSample {
  const float* logits;
  const float* prior_log_probs;     // null: no KL
  const std::uint8_t* action_mask;  // null: every action is allowed
  std::int64_t* actions;
  float* log_prob;
  float* entropy;
  float* prior_kl;  // null where prior_log_probs is
  std::size_t rows, n_actions;
};

// [B, D], row-major; a log std is [D], or [B, D] where its flag says so; outputs are [B] but for the actions.
struct GaussianSample {
  const float* mean;
  const float* log_std;
  const float* prior_mean;  // null: no KL
  const float* prior_log_std;
  float* actions;
  float* log_prob;
  float* entropy;
  float* prior_kl;  // null where prior_mean is
  std::size_t rows, dims;
  bool log_std_per_row, prior_log_std_per_row;
};

// Four random words of one block of one row.
std::array<std::uint32_t, 4> Philox(std::uint32_t row, std::uint32_t block, const SampleState& state);

// Unsafe: the pointers must hold what their comments say, and outputs must not overlap inputs.
void UnsafeSampleCategorical(const CategoricalSample& task, const SampleState& state,
                             const SampleOptions& options);
void UnsafeSampleGaussian(const GaussianSample& task, const SampleState& state, const SampleOptions& options);

}  // namespace lago

#endif  // LAGO_OPS_SAMPLE_H_
