#include "ops/prior_kl.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lago {
namespace {

constexpr std::size_t kMaxLanes = 16;

// The functions of one instruction set.
struct Kernels {
  void (*categorical)(const CategoricalKl& task, const PriorKlOptions& options, float* scratch);
  void (*gaussian)(const GaussianKl& task, const PriorKlOptions& options, float* scratch);
};

#define LAGO_KERNEL "ops/prior_kl.inc"
#include "core/each_target.inc"

}  // namespace

void UnsafePriorKlCategorical(const CategoricalKl& task, const PriorKlOptions& options) {
  std::vector<float> scratch(3 * (task.actions + kMaxLanes));
  Choose(options.lanes).categorical(task, options, scratch.data());
}

void UnsafePriorKlGaussian(const GaussianKl& task, const PriorKlOptions& options) {
  std::vector<float> scratch(task.dims);
  Choose(options.lanes).gaussian(task, options, scratch.data());
}

}  // namespace lago
