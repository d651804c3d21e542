// The Gaussian loss and its gradients. Symbols: kernels/README.md.
#pragma once

#include "cuda/ppo.h"

namespace lago::cuda {

constexpr std::int64_t kMaxDims = 384;

struct PpoKlGaussian {
  Ppo ppo;
  const void *mean, *actions, *prior_mean;  // [B, D]
  const void *log_std, *prior_log_std;      // [D] or [B, D]
  void *mean_grad, *log_std_grad;           // as mean and log_std
  bool log_std_per_row, prior_log_std_per_row;
  std::int64_t dims;  // at most kMaxDims
  Type type;          // of all of these
};

// How many numbers a block sums: the gradient of a shared log std is one more per dimension.
inline std::int64_t GaussianColumns(std::int64_t dims, bool log_std_per_row) {
  return kRowTerms + (log_std_per_row ? 0 : dims);
}

cudaError_t LaunchPpoKlGaussian(const PpoKlGaussian& call, cudaStream_t stream);

}  // namespace lago::cuda
