// Actions of a diagonal Gaussian from standard normal noise, and their log-probabilities.
// The definition is GaussianActor in kernels/mlp/reference.py.
#ifndef LAGO_OPS_ACT_GAUSSIAN_H_
#define LAGO_OPS_ACT_GAUSSIAN_H_

#include <cstddef>

namespace lago {

struct GaussianAct {
  const float* mean;     // [rows, dims]
  const float* log_std;  // [dims]
  const float* noise;    // [rows, dims]
  float* actions;        // [rows, dims]
  float* log_prob;       // [rows]
  float* log_std_rows;   // [rows, dims], the log std again on each row
  std::size_t rows, dims;
};

// Unsafe: the pointers hold what their comments say.
void UnsafeActGaussian(const GaussianAct& act);

}  // namespace lago

#endif  // LAGO_OPS_ACT_GAUSSIAN_H_
