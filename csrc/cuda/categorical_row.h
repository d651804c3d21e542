// One pass over a row of logits and of the prior, by any number of threads: maxima, sums of exponentials,
// entropy and KL at once, each rescaled when a larger maximum is met (online softmax, arXiv 1805.02867).
#pragma once

#include "cuda/device.h"

namespace lago::cuda {

constexpr int kLargeRow = 1024;  // longer rows take a block each
constexpr int kRowThreads = 512;

// Sums over a part of the row; "left" is the left side of the KL, whose probabilities weigh its terms.
struct RowState {
  float left_max, left_sum, left_own;     // max l, sum e^(l - max), sum e^(l - max) (l - max)
  float right_max, right_sum, right_own;  // the same of the right side
  float cross;                            // sum e^(l - max) (r - right max)
};

// Its maxima are below every logit that counts, but finite: differences of maxima stay finite.
__device__ inline RowState EmptyRow() { return {-1e30f, 0, 0, -1e30f, 0, 0, 0}; }

__device__ inline void Rescale(RowState& s, float left_max, float right_max) {
  const float left_shift = s.left_max - left_max, right_shift = s.right_max - right_max;
  const float left_scale = SoftmaxExp(left_shift), right_scale = SoftmaxExp(right_shift);
  s.left_sum *= left_scale;
  s.right_sum *= right_scale;
  // what the scale rounds to nothing may have been infinite
  s.left_own = (left_scale == 0 ? 0 : left_scale * s.left_own) + s.left_sum * left_shift;
  s.cross = (left_scale == 0 ? 0 : left_scale * s.cross) + s.left_sum * right_shift;
  s.right_own = (right_scale == 0 ? 0 : right_scale * s.right_own) + s.right_sum * right_shift;
  s.left_max = left_max;
  s.right_max = right_max;
}

__device__ inline void AddElement(RowState& s, float left, float right) {
  const float l = left - s.left_max, r = right - s.right_max;
  const float left_weight = SoftmaxExp(l), right_weight = SoftmaxExp(r);
  s.left_sum += left_weight;
  s.right_sum += right_weight;
  // 0 log 0 = 0
  s.left_own += left_weight == 0 ? 0 : left_weight * l;
  s.cross += left_weight == 0 ? 0 : left_weight * r;
  s.right_own += right_weight == 0 ? 0 : right_weight * r;
}

__device__ inline RowState Merged(RowState a, RowState b) {
  const float left_max = fmaxf(a.left_max, b.left_max), right_max = fmaxf(a.right_max, b.right_max);
  Rescale(a, left_max, right_max);
  Rescale(b, left_max, right_max);
  return {left_max,         a.left_sum + b.left_sum,   a.left_own + b.left_own,
          right_max,        a.right_sum + b.right_sum, a.right_own + b.right_own,
          a.cross + b.cross};
}

__device__ inline RowState ShuffledXor(const RowState& s, int offset) {
  return {__shfl_xor_sync(kFullWarp, s.left_max, offset),  __shfl_xor_sync(kFullWarp, s.left_sum, offset),
          __shfl_xor_sync(kFullWarp, s.left_own, offset),  __shfl_xor_sync(kFullWarp, s.right_max, offset),
          __shfl_xor_sync(kFullWarp, s.right_sum, offset), __shfl_xor_sync(kFullWarp, s.right_own, offset),
          __shfl_xor_sync(kFullWarp, s.cross, offset)};
}

__device__ inline RowState GroupMerged(RowState s, int group) {
  for (int offset = group / 2; offset > 0; offset /= 2) s = Merged(s, ShuffledXor(s, offset));
  return s;
}

// Merges over a block of kRowThreads, the same bits in all of them.
__device__ inline RowState BlockMerged(RowState s) {
  constexpr int kWarps = kRowThreads / kWarp;
  __shared__ RowState states[kWarps];
  s = GroupMerged(s, kWarp);
  __syncthreads();  // the last call may still be read
  if (threadIdx.x % kWarp == 0) states[threadIdx.x / kWarp] = s;
  __syncthreads();
  return GroupMerged(states[threadIdx.x % kWarps], kWarps);
}

// Excludes what the mask does not allow.
template <int V>
__device__ inline void ApplyMask(const std::uint8_t* mask, float* policy, float* prior) {
  const auto allowed = *reinterpret_cast<const Vector<std::uint8_t, V>*>(mask);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (allowed.item[v] == 0) policy[v] = prior[v] = -INFINITY;
  }
}

// A row of policy and prior as its threads read it. T: the element type.
template <typename T>
struct CategoricalElements {
  const T *logits, *prior_log_probs;  // no prior: null, read as 0
  const std::uint8_t* mask;           // null: every action is allowed
  float inverse_temperature;

  template <int V>
  __device__ void Read(std::int64_t i, float* policy, float* prior) const {
    LoadVector<T, V>(logits + i, policy);
#pragma unroll
    for (int v = 0; v < V; ++v) prior[v] = 0;
    if (prior_log_probs != nullptr) LoadVector<T, V>(prior_log_probs + i, prior);
#pragma unroll
    for (int v = 0; v < V; ++v) prior[v] *= inverse_temperature;
    if (mask != nullptr) ApplyMask<V>(mask + i, policy, prior);
  }
};

template <typename T>
__device__ inline CategoricalElements<T> ElementsOf(const void* logits, const void* prior_log_probs,
                                                    const std::uint8_t* mask, float temperature,
                                                    std::int64_t row, std::int64_t n_actions) {
  const std::int64_t first = row * n_actions;
  return {static_cast<const T*>(logits) + first,
          prior_log_probs == nullptr ? nullptr : static_cast<const T*>(prior_log_probs) + first,
          mask == nullptr ? nullptr : mask + first, 1 / temperature};
}

// The part of the row from `begin` on, in steps of `stride`, both multiples of V.
template <int V, typename T>
__device__ inline RowState Scan(const CategoricalElements<T>& row, std::int64_t begin, std::int64_t end,
                                std::int64_t stride, bool prior_policy) {
  RowState state = EmptyRow();
#pragma unroll 2
  for (std::int64_t i = begin; i < end; i += stride) {
    float policy[V], prior[V];
    row.template Read<V>(i, policy, prior);
    float left[V], right[V], left_max = state.left_max, right_max = state.right_max;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      left[v] = prior_policy ? prior[v] : policy[v];
      right[v] = prior_policy ? policy[v] : prior[v];
      left_max = fmaxf(left_max, left[v]);
      right_max = fmaxf(right_max, right[v]);
    }
    Rescale(state, left_max, right_max);
#pragma unroll
    for (int v = 0; v < V; ++v) AddElement(state, left[v], right[v]);
  }
  return state;
}

// What the whole row says.
struct CategoricalRow {
  float policy_max, policy_log_sum, prior_max, prior_log_sum;
  float entropy, kl;

  __device__ float PolicyLogProb(float logit) const { return logit - policy_max - policy_log_sum; }
  __device__ float PriorLogProb(float logit) const { return logit - prior_max - prior_log_sum; }
  // d KL / d logit
  __device__ float KlGrad(float log_prob, float prior_log_prob, bool prior_policy) const {
    const float q = SoftmaxExp(log_prob);
    if (prior_policy) return q - SoftmaxExp(prior_log_prob);
    return q == 0 ? 0 : q * (log_prob - prior_log_prob - kl);
  }
};

__device__ inline CategoricalRow Summary(const RowState& s, bool prior_policy) {
  const float left_log = logf(s.left_sum), right_log = logf(s.right_sum);
  const float kl = (s.left_own - s.cross) / s.left_sum - left_log + right_log;
  if (prior_policy) {
    return {s.right_max, right_log, s.left_max, left_log, right_log - s.right_own / s.right_sum, kl};
  }
  return {s.left_max, left_log, s.right_max, right_log, left_log - s.left_own / s.left_sum, kl};
}

}  // namespace lago::cuda
