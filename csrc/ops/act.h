// Actions of a policy from noise, and their log-probabilities.
// The definitions are the actors in kernels/mlp/reference.py.
#ifndef LAGO_OPS_ACT_H_
#define LAGO_OPS_ACT_H_

#include <cstddef>
#include <cstdint>

namespace lago {

// A diagonal Gaussian's, from standard normal noise.
struct GaussianAct {
  const float* mean;     // [rows, dims]
  const float* log_std;  // [dims]
  const float* noise;    // [rows, dims]
  float* actions;        // [rows, dims]
  float* log_prob;       // [rows]
  float* log_std_rows;   // [rows, dims], the log std again on each row
  std::size_t rows, dims;
};

// A categorical policy's, from noise of the exponential distribution of rate 1: the action whose probability
// over its noise is largest (Efraimidis and Spirakis 2006).
struct CategoricalAct {
  const float* logits;    // [rows, n_actions]
  const float* noise;     // [rows, n_actions]
  std::int64_t* actions;  // [rows]
  float* log_prob;        // [rows]
  std::size_t rows, n_actions;
};

// Unsafe: the pointers hold what their comments say.
void UnsafeActGaussian(const GaussianAct& act);

// Returns the first row whose logits are no distribution, for NaN, +inf, or -inf alone; `rows` where all are.
std::size_t UnsafeActCategorical(const CategoricalAct& act);

}  // namespace lago

#endif  // LAGO_OPS_ACT_H_
