// Generalised advantage estimation over a rollout [n_steps, n_envs], row-major.
// The definition is kernels/gae/reference.py; tests/kernels/test_gae.py holds this to it.
#ifndef LAGO_OPS_GAE_H_
#define LAGO_OPS_GAE_H_

#include <cstddef>
#include <cstdint>

namespace lago {

struct GaeInputs {
  const float* rewards;
  const float* values;       // of the observation that was acted on
  const float* next_values;  // of the observation that the step returned, terminal ones included
  const std::uint8_t* terminated;
  const std::uint8_t* truncated;
  const std::uint8_t* valid;  // 0 on autoreset rows
};

struct GaeOutputs {
  float* advantages;
  float* returns;
};

struct GaeShape {
  std::size_t n_steps;
  std::size_t n_envs;
};

// Unsafe: every pointer must hold n_steps * n_envs elements, and outputs must not overlap inputs.
void UnsafeGae(const GaeInputs& in, const GaeOutputs& out, GaeShape shape, float gamma, float gae_lambda);

}  // namespace lago

#endif  // LAGO_OPS_GAE_H_
