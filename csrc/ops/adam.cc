#include "ops/adam.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lago {
namespace {

// What is the same for all elements.
struct AdamUniform {
  float scale;  // of the gradient
  float one_minus_beta_1, beta_2, one_minus_beta_2;
  float step_size, inv_root_correction_2, eps;
};

// The functions of one instruction set.
struct Kernels {
  double (*squared_norm)(const float* x, std::size_t n);
  void (*update)(const AdamBlock& block, const AdamUniform& uniform);
};

#define LAGO_KERNEL "ops/adam.inc"
#include "core/each_target.inc"

}  // namespace

double UnsafeAdam(const AdamBlock& block, const AdamOptions& options) {
  const Kernels& kernels = Choose(options.lanes);
  const double norm = std::sqrt(kernels.squared_norm(block.grad, block.n));
  const double scale = options.max_norm / (norm + 1e-6);
  AdamUniform u;
  // a norm that is NaN passes through, as it does in torch
  u.scale = static_cast<float>(scale >= 1.0 ? 1.0 : scale);
  u.one_minus_beta_1 = static_cast<float>(1.0 - options.beta_1);
  u.beta_2 = static_cast<float>(options.beta_2);
  u.one_minus_beta_2 = static_cast<float>(1.0 - options.beta_2);
  u.step_size = static_cast<float>(options.lr / (1.0 - std::pow(options.beta_1, options.step)));
  u.inv_root_correction_2 = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(options.beta_2, options.step)));
  u.eps = static_cast<float>(options.eps);
  kernels.update(block, u);
  return norm;
}

}  // namespace lago
