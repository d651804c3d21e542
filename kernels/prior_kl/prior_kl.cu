// The KL of each row and, where wanted, its gradients. G lanes share a row, or a block where it is long; a
// categorical row is read once for the KL and again, from the cache, for the gradient.
// Derivation: kernels/README.md. Test: pytest tests/kernels/test_cuda_emulated.py tests/kernels/test_cuda.py

#include "cuda/categorical_row.h"
#include "cuda/gaussian_kl.h"
#include "cuda/prior_kl.h"

namespace lago::cuda {
namespace {

constexpr int kThreads = 256;

// `team` threads share a row: at most a warp, or all of the block where kLarge.
template <typename T, int V, bool kLarge>
__global__ void __launch_bounds__(kLarge ? kRowThreads : kThreads)
    CategoricalKernel(PriorKlCategorical call, int team) {
  const int rows_of_block = static_cast<int>(blockDim.x) / team,
            member = static_cast<int>(threadIdx.x) % team;
  const std::int64_t wanted = std::int64_t{blockIdx.x} * rows_of_block + threadIdx.x / team;
  const bool exists = wanted < call.rows;
  const std::int64_t row = exists ? wanted : call.rows - 1;
  const auto elements = ElementsOf<T>(call.logits, call.prior_log_probs, call.action_mask,
                                      *call.prior_temperature, row, call.n_actions);
  const std::int64_t begin = std::int64_t{member} * V, stride = std::int64_t{team} * V;
  const auto part = Scan<V>(elements, begin, call.n_actions, stride, call.prior_policy);
  const CategoricalRow summary =
      Summary(kLarge ? BlockMerged(part) : GroupMerged(part, team), call.prior_policy);
  if (!exists) return;
  if (member == 0) call.kl[row] = summary.kl;
  if (call.logits_grad == nullptr) return;
  T* grad = static_cast<T*>(call.logits_grad) + row * call.n_actions;
#pragma unroll 2
  for (std::int64_t i = begin; i < call.n_actions; i += stride) {
    float policy[V], prior[V], out[V];
    elements.template Read<V>(i, policy, prior);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      out[v] =
          summary.KlGrad(summary.PolicyLogProb(policy[v]), summary.PriorLogProb(prior[v]), call.prior_policy);
    }
    StoreVector<T, V>(grad + i, out);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) GaussianKernel(PriorKlGaussian call, int team) {
  const int rows_of_block = kThreads / team, member = static_cast<int>(threadIdx.x) % team;
  const std::int64_t wanted = std::int64_t{blockIdx.x} * rows_of_block + threadIdx.x / team;
  const bool exists = wanted < call.rows;
  const std::int64_t row = exists ? wanted : call.rows - 1, offset = row * call.dims;
  const float half_log_temperature = 0.5f * logf(*call.prior_temperature);
  float kl = 0;
  for (std::int64_t d = member; d < call.dims; d += team) {
    const float log_std = ToFloat(static_cast<const T*>(call.log_std)[call.log_std_per_row ? offset + d : d]);
    const float prior_log_std =
        ToFloat(static_cast<const T*>(call.prior_log_std)[call.prior_log_std_per_row ? offset + d : d]);
    const auto term = KlOfGaussians(ToFloat(static_cast<const T*>(call.mean)[offset + d]), log_std,
                                    ToFloat(static_cast<const T*>(call.prior_mean)[offset + d]),
                                    prior_log_std + half_log_temperature, call.prior_policy);
    kl += term.kl;
    if (exists && call.mean_grad != nullptr) {
      Store(static_cast<T*>(call.mean_grad) + offset + d, term.mean_grad);
      Store(static_cast<T*>(call.log_std_grad) + offset + d, term.log_std_grad);
    }
  }
  kl = GroupSum(kl, team);
  if (exists && member == 0) call.kl[row] = kl;
}

template <typename T, int V>
cudaError_t LaunchCategorical(const PriorKlCategorical& call, cudaStream_t stream) {
  if (call.n_actions > kLargeRow) {
    return Launch(CategoricalKernel<T, V, true>, call.rows, kRowThreads, stream, call, kRowThreads);
  }
  const int team = GroupFor(call.n_actions);
  const std::int64_t blocks = DivideUp(call.rows, kThreads / team);
  return Launch(CategoricalKernel<T, V, false>, blocks, kThreads, stream, call, team);
}

}  // namespace

cudaError_t LaunchPriorKlCategorical(const PriorKlCategorical& call, cudaStream_t stream) {
  if (call.rows == 0) return cudaSuccess;
  return ForType(call.type, [&](auto type) {
    using T = decltype(type);
    const bool vectors = Fits(call.logits, call.n_actions, 4, sizeof(T)) &&
                         Fits(call.action_mask, call.n_actions, 4, 1) &&
                         Fits(call.prior_log_probs, call.n_actions, 4, sizeof(T)) &&
                         Fits(call.logits_grad, call.n_actions, 4, sizeof(T));
    return vectors ? LaunchCategorical<T, 4>(call, stream) : LaunchCategorical<T, 1>(call, stream);
  });
}

cudaError_t LaunchPriorKlGaussian(const PriorKlGaussian& call, cudaStream_t stream) {
  if (call.rows == 0) return cudaSuccess;
  const int team = GroupFor(call.dims);
  const std::int64_t blocks = DivideUp(call.rows, kThreads / team);
  return ForType(call.type, [&](auto type) {
    return Launch(GaussianKernel<decltype(type)>, blocks, kThreads, stream, call, team);
  });
}

}  // namespace lago::cuda
