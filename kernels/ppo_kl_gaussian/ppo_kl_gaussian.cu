// The Gaussian loss and its gradients. A row lies in the registers of G lanes, which read it once, write its
// gradients and add its terms in the same pass; ppo_device.h sums them. The gradient of a log std that all
// rows share is summed like the terms. Derivation: kernels/README.md. Test: pytest
// tests/kernels/test_cuda_emulated.py tests/kernels/test_cuda.py

#include "cuda/gaussian_kl.h"
#include "cuda/ppo_device.h"
#include "cuda/ppo_kl_gaussian.h"

namespace lago::cuda {
namespace {

constexpr float kHalfLog2Pi = 0.91893853320467274f;

// G lanes hold a row, each K vectors of V dimensions, a vector of the next lane after one of the last.
template <typename T, int G, int K, int V>
__global__ void __launch_bounds__(kThreads, K* V <= 4 ? 5 : 3)
    RowsKernel(PpoKlGaussian call, int moment_blocks) {
  constexpr int kElements = K * V, kRowsOfWarp = kWarp / G, kWarps = kThreads / kWarp;
  const Ppo& ppo = call.ppo;
  const int dims = static_cast<int>(call.dims);
  const int lane = threadIdx.x % kWarp, member = lane % G;
  const std::int64_t warp = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  const std::int64_t stride = std::int64_t{gridDim.x} * kWarps * kRowsOfWarp;
  const float half_log_temperature = 0.5f * logf(*ppo.prior_temperature);
  __shared__ Batch batches[kThreads / kWarp];
  Batch& batch = batches[threadIdx.x / kWarp];
  bool knows_batch = false;
  float sums[kRowTerms] = {}, std_sums[kElements] = {};
  for (std::int64_t first = warp * kRowsOfWarp; first < ppo.rows; first += stride) {
    const bool exists = first + lane / G < ppo.rows;
    const std::int64_t row = exists ? first + lane / G : ppo.rows - 1;
    const std::int64_t offset = row * dims;
    const std::int64_t std_offset = call.log_std_per_row ? offset : 0;
    const std::int64_t prior_std_offset = call.prior_log_std_per_row ? offset : 0;
    float mean[kElements], log_std[kElements], action[kElements], prior_mean[kElements], prior_std[kElements];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int d = (k * G + member) * V, e = k * V;
      if (d < dims) {
        LoadVector<T, V>(static_cast<const T*>(call.mean) + offset + d, mean + e);
        LoadVector<T, V>(static_cast<const T*>(call.actions) + offset + d, action + e);
        LoadVector<T, V>(static_cast<const T*>(call.prior_mean) + offset + d, prior_mean + e);
        LoadVector<T, V>(static_cast<const T*>(call.log_std) + std_offset + d, log_std + e);
        LoadVector<T, V>(static_cast<const T*>(call.prior_log_std) + prior_std_offset + d, prior_std + e);
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          mean[e + v] = action[e + v] = prior_mean[e + v] = log_std[e + v] = prior_std[e + v] = 0;
        }
      }
    }
    const PpoRow columns = LoadPpoRow(ppo, row);
    if (!knows_batch) {  // while the first loads are under way
      ShareBatch(ppo, moment_blocks, &batch);
      knows_batch = true;
    }

    // From here on `mean` and `log_std` hold the gradients of log pi, the prior's arrays those of the KL.
    float log_prob = 0, entropy = 0, kl = 0;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const bool here = (k * G + member) * V < dims;
#pragma unroll
      for (int e = k * V; e < (k + 1) * V; ++e) {
        const auto term = KlOfGaussians(mean[e], log_std[e], prior_mean[e],
                                        prior_std[e] + half_log_temperature, ppo.prior_policy);
        const float inverse_std = expf(-log_std[e]), z = (action[e] - mean[e]) * inverse_std;
        log_prob += here ? -0.5f * z * z - log_std[e] - kHalfLog2Pi : 0;
        entropy += here ? log_std[e] + 0.5f + kHalfLog2Pi : 0;
        kl += here ? term.kl : 0;
        mean[e] = z * inverse_std;
        log_std[e] = z * z - 1;
        prior_mean[e] = term.mean_grad;
        prior_std[e] = term.log_std_grad;
      }
    }
    log_prob = GroupSum(log_prob, G);
    entropy = GroupSum(entropy, G);
    kl = GroupSum(kl, G);

    const PpoTerms terms = TermsOfRow(columns, batch, ppo.clip_range_vf != nullptr, log_prob, entropy, kl);
    if (!exists) continue;
    if (member == 0) {
#pragma unroll
      for (int i = 0; i < kRowTerms; ++i) sums[i] += terms.terms[i];
      Store(ppo.values_grad, row, terms.value_grad);
    }
    const float of_kl = terms.kl_scale * batch.kl_coef, of_entropy = terms.scale * batch.ent_coef;
    const bool counts = columns.weight != 0;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int d = (k * G + member) * V;
      if (d >= dims) continue;
      float mean_grad[V], std_grad[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const int e = k * V + v;
        mean_grad[v] = counts ? terms.log_prob_grad * mean[e] + of_kl * prior_mean[e] : 0;
        std_grad[v] = counts ? terms.log_prob_grad * log_std[e] + of_kl * prior_std[e] - of_entropy : 0;
        std_sums[e] += std_grad[v];
      }
      StoreVector<T, V>(static_cast<T*>(call.mean_grad) + offset + d, mean_grad);
      if (call.log_std_per_row) StoreVector<T, V>(static_cast<T*>(call.log_std_grad) + offset + d, std_grad);
    }
  }

  const std::int64_t n_columns = kRowTerms + (call.log_std_per_row ? 0 : dims);
  float* partial = PartialSumsOf(ppo.workspace) + blockIdx.x * n_columns;
  if (!call.log_std_per_row) {
    __shared__ float warps[kWarps][G * kElements];
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      float sum = std_sums[e];
      // over the rows of the warp
#pragma unroll
      for (int lanes = G; lanes < kWarp; lanes *= 2) sum += __shfl_xor_sync(kFullWarp, sum, lanes);
      if (lane < G) warps[threadIdx.x / kWarp][(e / V * G + member) * V + e % V] = sum;
    }
    __syncthreads();
    for (int d = threadIdx.x; d < dims; d += kThreads) {
      float sum = 0;
      for (int i = 0; i < kWarps; ++i) sum += warps[i][d];
      partial[kRowTerms + d] = sum;
    }
  }
  LeaveTerms<kThreads>(sums, partial);
  if (!IsLastBlock(ppo.workspace)) return;
  FinishStatistics(ppo, moment_blocks, n_columns);
  if (call.log_std_per_row) return;
  for (int d = threadIdx.x / kWarp; d < dims; d += kWarps) {
    const float sum = SumOverBlocks(PartialSumsOf(ppo.workspace), n_columns, kRowTerms + d);
    if (lane == 0) Store(static_cast<T*>(call.log_std_grad) + d, sum);
  }
}

template <typename T, int G, int K, int V>
cudaError_t LaunchRows(const PpoKlGaussian& call, cudaStream_t stream) {
  return LaunchRowsKernel(RowsKernel<T, G, K, V>, kThreads / G, kThreads, call, stream);
}

template <typename T>
cudaError_t LaunchFor(const PpoKlGaussian& call, cudaStream_t stream) {
  const std::int64_t n = call.dims;
  bool vectors = true;
  for (const void* array :
       {call.mean, call.actions, call.prior_mean, call.log_std, call.prior_log_std,
        static_cast<const void*>(call.mean_grad), static_cast<const void*>(call.log_std_grad)}) {
    vectors = vectors && Fits(array, n, 4, sizeof(T));
  }
  if (vectors) {
    if (n <= 4) return LaunchRows<T, 1, 1, 4>(call, stream);
    if (n <= 16) return LaunchRows<T, 4, 1, 4>(call, stream);
    if (n <= 64) return LaunchRows<T, 8, 2, 4>(call, stream);
    return LaunchRows<T, 32, 3, 4>(call, stream);
  }
  if (n <= 4) return LaunchRows<T, 1, 4, 1>(call, stream);
  if (n <= 32) return LaunchRows<T, 8, 4, 1>(call, stream);
  return LaunchRows<T, 32, 12, 1>(call, stream);
}

}  // namespace

cudaError_t LaunchPpoKlGaussian(const PpoKlGaussian& call, cudaStream_t stream) {
  const auto error = LaunchMoments(call.ppo, stream);
  if (error != cudaSuccess) return error;
  return ForType(call.type, [&](auto type) { return LaunchFor<decltype(type)>(call, stream); });
}

}  // namespace lago::cuda
