// The categorical loss and its gradients. A row of up to kLargeRow actions lies in the registers of G lanes,
// which read it once; a longer row takes a block, which reads it twice (categorical_row.h). Each kernel
// writes a row's gradients and adds its terms in the same pass; ppo_device.h sums them. Derivation:
// kernels/README.md. Test: pytest tests/kernels/test_cuda_emulated.py tests/kernels/test_cuda.py

#include "cuda/categorical_row.h"
#include "cuda/ppo_device.h"
#include "cuda/ppo_kl_categorical.h"

namespace lago::cuda {
namespace {

// G lanes hold a row, each K vectors of V elements, a vector of the next lane after one of the last.
template <typename T, int G, int K, int V>
__global__ void __launch_bounds__(kThreads, K* V <= 12 ? 5 : 2)
    RowsKernel(PpoKlCategorical call, int moment_blocks) {
  constexpr int kElements = K * V, kRowsOfWarp = kWarp / G;
  const Ppo& ppo = call.ppo;
  const int lane = threadIdx.x % kWarp, member = lane % G;
  const std::int64_t warp = std::int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
  const std::int64_t stride = std::int64_t{gridDim.x} * (kThreads / kWarp) * kRowsOfWarp;
  const int n_actions = static_cast<int>(call.n_actions);
  const float inverse_temperature = 1 / *ppo.prior_temperature;
  __shared__ Batch batches[kThreads / kWarp];
  Batch& batch = batches[threadIdx.x / kWarp];
  bool knows_batch = false;
  float sums[kRowTerms] = {};
  for (std::int64_t first = warp * kRowsOfWarp; first < ppo.rows; first += stride) {
    const bool exists = first + lane / G < ppo.rows;
    const std::int64_t row = exists ? first + lane / G : ppo.rows - 1;
    const std::int64_t offset = row * call.n_actions;
    const T *logits = static_cast<const T*>(call.logits) + offset,
            *prior_log_probs = static_cast<const T*>(call.prior_log_probs) + offset;
    float policy[kElements], prior[kElements];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int i = (k * G + member) * V;
#pragma unroll
      for (int v = 0; v < V; ++v) policy[k * V + v] = prior[k * V + v] = -INFINITY;
      if (i >= n_actions) continue;
      LoadVector<T, V>(logits + i, policy + k * V);
      LoadVector<T, V>(prior_log_probs + i, prior + k * V);
    }
    const PpoRow columns = LoadPpoRow(ppo, row);
    const std::int64_t wide_action = call.actions[row];
    if (!knows_batch) {  // while the first loads are under way
      ShareBatch(ppo, moment_blocks, &batch);
      knows_batch = true;
    }
    if (call.action_mask != nullptr) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const int i = (k * G + member) * V;
        if (i < n_actions) ApplyMask<V>(call.action_mask + offset + i, policy + k * V, prior + k * V);
      }
    }
    const bool has_action = wide_action >= 0 && wide_action < n_actions;
    const int action = has_action ? static_cast<int>(wide_action) : -1;

    float q[kElements], policy_max = -INFINITY, prior_max = -INFINITY, policy_sum = 0, prior_sum = 0;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      prior[e] *= inverse_temperature;
      policy_max = fmaxf(policy_max, policy[e]);
      prior_max = fmaxf(prior_max, prior[e]);
    }
    policy_max = GroupMax(policy_max, G);
    prior_max = GroupMax(prior_max, G);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      policy[e] -= policy_max;
      prior[e] -= prior_max;
      q[e] = SoftmaxExp(policy[e]);
      policy_sum += q[e];
      prior_sum += SoftmaxExp(prior[e]);
    }
    policy_sum = GroupSum(policy_sum, G);
    const float policy_log_sum = logf(policy_sum), prior_log_sum = logf(GroupSum(prior_sum, G));
    const float inverse_sum = 1 / policy_sum;

    // From here on `policy` holds log q, then q log q, and `prior` log p, then the part of dKL/dlogits that
    // needs no sum over the row.
    float log_prob = 0, entropy = 0, kl = 0;
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const int e = k * V + v;
        q[e] *= inverse_sum;
        policy[e] -= policy_log_sum;
        prior[e] -= prior_log_sum;
        if ((k * G + member) * V + v == action) log_prob = policy[e];
      }
    }
    if (ppo.prior_policy) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const float p = SoftmaxExp(prior[e]);
        kl += p == 0 ? 0 : p * (prior[e] - policy[e]);  // 0 log 0 = 0
        prior[e] = q[e] - p;
      }
    } else {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        prior[e] = q[e] == 0 ? 0 : q[e] * (policy[e] - prior[e]);
        kl += prior[e];
      }
    }
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      policy[e] = q[e] == 0 ? 0 : q[e] * policy[e];
      entropy -= policy[e];
    }
    log_prob = GroupSum(log_prob, G);
    entropy = GroupSum(entropy, G);
    kl = GroupSum(kl, G);
    if (!has_action) log_prob = NAN;

    const PpoTerms terms = TermsOfRow(columns, batch, ppo.clip_range_vf != nullptr, log_prob, entropy, kl);
    if (!exists) continue;
    if (member == 0) {
#pragma unroll
      for (int i = 0; i < kRowTerms; ++i) sums[i] += terms.terms[i];
      Store(ppo.values_grad, row, terms.value_grad);
    }
    const float of_entropy = terms.scale * batch.ent_coef, of_kl = terms.kl_scale * batch.kl_coef;
    const float of_q = of_entropy * entropy - (ppo.prior_policy ? 0 : of_kl * kl) - terms.log_prob_grad;
    T* grad = static_cast<T*>(call.logits_grad) + offset;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int i = (k * G + member) * V;
      if (i >= n_actions) continue;
      float out[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const int e = k * V + v;
        const float taken = i + v == action ? terms.log_prob_grad : 0;
        out[v] = columns.weight == 0 ? 0 : q[e] * of_q + of_entropy * policy[e] + of_kl * prior[e] + taken;
      }
      StoreVector<T, V>(grad + i, out);
    }
  }
  LeaveTerms<kThreads>(sums, PartialSumsOf(ppo.workspace) + std::int64_t{blockIdx.x} * kRowTerms);
  if (IsLastBlock(ppo.workspace)) FinishStatistics(ppo, moment_blocks, kRowTerms);
}

template <typename T, int V>
__global__ void __launch_bounds__(kRowThreads) LargeRowsKernel(PpoKlCategorical call, int moment_blocks) {
  const Ppo& ppo = call.ppo;
  __shared__ Batch batches[kRowThreads / kWarp];
  Batch& batch = batches[threadIdx.x / kWarp];
  ShareBatch(ppo, moment_blocks, &batch);
  const std::int64_t begin = std::int64_t{threadIdx.x} * V, stride = std::int64_t{kRowThreads} * V;
  float sums[kRowTerms] = {};
  for (std::int64_t row = blockIdx.x; row < ppo.rows; row += gridDim.x) {
    const auto elements = ElementsOf<T>(call.logits, call.prior_log_probs, call.action_mask,
                                        batch.prior_temperature, row, call.n_actions);
    const PpoRow columns = LoadPpoRow(ppo, row);
    const std::int64_t action = call.actions[row];
    const auto state = BlockMerged(Scan<V>(elements, begin, call.n_actions, stride, ppo.prior_policy));
    const CategoricalRow summary = Summary(state, ppo.prior_policy);
    float logit = NAN, unused;
    if (action >= 0 && action < call.n_actions) elements.template Read<1>(action, &logit, &unused);
    const PpoTerms terms = TermsOfRow(columns, batch, ppo.clip_range_vf != nullptr,
                                      summary.PolicyLogProb(logit), summary.entropy, summary.kl);
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < kRowTerms; ++i) sums[i] += terms.terms[i];
      Store(ppo.values_grad, row, terms.value_grad);
    }
    T* grad = static_cast<T*>(call.logits_grad) + row * call.n_actions;
#pragma unroll 2
    for (std::int64_t i = begin; i < call.n_actions; i += stride) {
      float policy[V], prior[V], out[V];
      elements.template Read<V>(i, policy, prior);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float log_q = summary.PolicyLogProb(policy[v]), q = expf(log_q);
        const float of_entropy = q == 0 ? 0 : q * (log_q + summary.entropy);
        const float of_kl = summary.KlGrad(log_q, summary.PriorLogProb(prior[v]), ppo.prior_policy);
        const float of_log_prob = (i + v == action ? 1 : 0) - q;
        const float grad_of_row = terms.log_prob_grad * of_log_prob +
                                  terms.scale * batch.ent_coef * of_entropy +
                                  terms.kl_scale * batch.kl_coef * of_kl;
        out[v] = columns.weight == 0 ? 0 : grad_of_row;
      }
      StoreVector<T, V>(grad + i, out);
    }
  }
  LeaveTerms<kRowThreads>(sums, PartialSumsOf(ppo.workspace) + std::int64_t{blockIdx.x} * kRowTerms);
  if (IsLastBlock(ppo.workspace)) FinishStatistics(ppo, moment_blocks, kRowTerms);
}

template <typename T, int G, int K, int V>
cudaError_t LaunchRows(const PpoKlCategorical& call, cudaStream_t stream) {
  return LaunchRowsKernel(RowsKernel<T, G, K, V>, kThreads / G, kThreads, call, stream);
}

template <typename T, int V>
cudaError_t LaunchLargeRows(const PpoKlCategorical& call, cudaStream_t stream) {
  return LaunchRowsKernel(LargeRowsKernel<T, V>, 1, kRowThreads, call, stream);
}

template <typename T>
cudaError_t LaunchFor(const PpoKlCategorical& call, cudaStream_t stream) {
  const std::int64_t n = call.n_actions;
  const bool vectors = Fits(call.logits, n, 4, sizeof(T)) && Fits(call.prior_log_probs, n, 4, sizeof(T)) &&
                       Fits(call.logits_grad, n, 4, sizeof(T)) && Fits(call.action_mask, n, 4, 1);
  if (vectors) {
    if (n <= 4) return LaunchRows<T, 1, 1, 4>(call, stream);
    if (n <= 16) return LaunchRows<T, 2, 2, 4>(call, stream);
    if (n <= 48) return LaunchRows<T, 4, 3, 4>(call, stream);
    if (n <= 96) return LaunchRows<T, 8, 3, 4>(call, stream);
    if (n <= 384) return LaunchRows<T, 32, 3, 4>(call, stream);
    if (n <= kLargeRow) return LaunchRows<T, 32, 8, 4>(call, stream);
    return LaunchLargeRows<T, 4>(call, stream);
  }
  if (n <= 4) return LaunchRows<T, 1, 4, 1>(call, stream);
  if (n <= 16) return LaunchRows<T, 4, 4, 1>(call, stream);
  if (n <= 48) return LaunchRows<T, 8, 6, 1>(call, stream);
  if (n <= 128) return LaunchRows<T, 32, 4, 1>(call, stream);
  if (n <= 384) return LaunchRows<T, 32, 12, 1>(call, stream);
  if (n <= kLargeRow) return LaunchRows<T, 32, 32, 1>(call, stream);
  return LaunchLargeRows<T, 1>(call, stream);
}

}  // namespace

cudaError_t LaunchPpoKlCategorical(const PpoKlCategorical& call, cudaStream_t stream) {
  const auto error = LaunchMoments(call.ppo, stream);
  if (error != cudaSuccess) return error;
  return ForType(call.type, [&](auto type) { return LaunchFor<decltype(type)>(call, stream); });
}

}  // namespace lago::cuda
