// A step of Adam over one block of parameters, after scaling its gradient to a largest norm.
// The definition is kernels/adam/reference.py.
#ifndef LAGO_OPS_ADAM_H_
#define LAGO_OPS_ADAM_H_

#include <cstddef>

namespace lago {

// [n] each, none overlapping another.
struct AdamBlock {
  float* parameter;
  float* grad;  // scaled in place
  float* exp_avg;
  float* exp_avg_sq;
  std::size_t n;
};

struct AdamOptions {
  double lr, beta_1, beta_2, eps;
  double max_norm;  // of the gradient
  double step;      // counted from 1
  int lanes;        // floats at once, at most: 4 (portable), 8 (AVX2) or 16 (AVX-512)
};

// Returns the gradient's norm before it was scaled.
double UnsafeAdam(const AdamBlock& block, const AdamOptions& options);

}  // namespace lago

#endif  // LAGO_OPS_ADAM_H_
