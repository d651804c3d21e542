// Generalised advantage estimation. Symbols: kernels/README.md.
#pragma once

#include "cuda/types.h"

namespace lago::cuda {

struct Gae {
  const float *rewards, *values, *next_values;         // [T, N]
  const std::uint8_t *terminated, *truncated, *valid;  // [T, N]
  float *advantages, *returns;                         // [T, N]
  std::int64_t n_steps, n_envs;
  float gamma, decay;  // decay: gamma * lambda
};

cudaError_t LaunchGae(const Gae& call, cudaStream_t stream);

}  // namespace lago::cuda
