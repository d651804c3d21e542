// Actions with log-probability, entropy and KL to the prior. The random numbers of a row come from
// Philox4x32-10 on (seed, step, row), so that no generator has a state on the device. G lanes share a row, or
// a block where it is long. The definition is reference.py. Test: pytest tests/kernels/test_cuda_emulated.py
// tests/kernels/test_cuda.py

#include "cuda/categorical_row.h"
#include "cuda/gaussian_kl.h"
#include "cuda/sample.h"

namespace lago::cuda {
namespace {

constexpr int kThreads = 256;
constexpr float kHalfLog2Pi = 0.91893853320467274f;

struct Words {
  std::uint32_t word[4];
};

// Four words of a row. Salmon et al., SC 2011.
__device__ Words Philox(std::uint32_t row, std::uint32_t block, const std::int64_t* state) {
  const auto seed = static_cast<std::uint64_t>(state[0]), step = static_cast<std::uint64_t>(state[1]);
  std::uint32_t c0 = row, c1 = block;
  auto c2 = static_cast<std::uint32_t>(step), c3 = static_cast<std::uint32_t>(step >> 32);
  auto k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const std::uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const std::uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// A number in (0, 1), exact.
__device__ float Uniform(std::uint32_t word) {
  return (static_cast<float>(word >> 9) + 0.5f) * (1.0f / (1 << 23));
}

__device__ void Normals(const Words& words, float (&z)[4]) {
#pragma unroll
  for (int pair = 0; pair < 4; pair += 2) {
    const float radius = sqrtf(-2 * logf(Uniform(words.word[pair])));
    float sine, cosine;
    sincospif(2 * Uniform(words.word[pair + 1]), &sine, &cosine);
    z[pair] = radius * cosine;
    z[pair + 1] = radius * sine;
  }
}

// The sum of x over the lanes of the group up to this one.
__device__ float GroupPrefix(float x, int member, int group) {
  for (int offset = 1; offset < group; offset *= 2) {
    const float below = __shfl_up_sync(kFullWarp, x, offset);
    if (member >= offset) x += below;
  }
  return x;
}

// Weight e^(logit - max) of an element.
template <typename T>
__device__ float WeightOf(const CategoricalElements<T>& elements, const CategoricalRow& row, std::int64_t i) {
  float logit, unused;
  elements.template Read<1>(i, &logit, &unused);
  return expf(logit - row.policy_max);
}

// The first element from `begin` on at which the cumulative weight exceeds `target`; where rounding leaves
// none, the last one of positive weight. The lanes of a group get the same answer; groups may differ in all
// their arguments.
template <typename T>
__device__ std::int64_t Pick(const CategoricalElements<T>& elements, const CategoricalRow& row,
                             std::int64_t begin, std::int64_t end, float target, int member, int group) {
  const unsigned lane = threadIdx.x % kWarp;
  const unsigned members = (group == kWarp ? kFullWarp : (1u << group) - 1) << (lane - member);
  std::int64_t found = -1, last = begin;
  float before = 0;
  for (std::int64_t first = begin; first < end; first += group) {
    const std::int64_t i = first + member;
    const float weight = i < end ? WeightOf(elements, row, i) : 0;
    const float reached = before + GroupPrefix(weight, member, group);
    const unsigned over = __ballot_sync(kFullWarp, weight > 0 && reached > target) & members;
    const unsigned positive = __ballot_sync(kFullWarp, weight > 0) & members;
    if (over != 0 && found < 0) found = first + __ffs(over) - 1 - (lane - member);
    if (positive != 0) last = first + 31 - __clz(positive) - (lane - member);
    before = __shfl_sync(kFullWarp, reached, lane - member + group - 1);
  }
  return found < 0 ? last : found;
}

// The same over a block of kRowThreads: each warp owns a segment of the row; all of them search the one that
// holds the target.
template <typename T>
__device__ std::int64_t PickByBlock(const CategoricalElements<T>& elements, const CategoricalRow& row,
                                    std::int64_t n_actions, float u) {
  constexpr int kWarps = kRowThreads / kWarp;
  __shared__ float segments[kWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const std::int64_t length = (n_actions + kWarps - 1) / kWarps;
  float sum = 0;
  for (std::int64_t i = warp * length + lane; i < n_actions && i < (warp + 1) * length; i += kWarp) {
    sum += WeightOf(elements, row, i);
  }
  sum = GroupSum(sum, kWarp);
  if (lane == 0) segments[warp] = sum;
  __syncthreads();
  float total = 0, before = 0;
  for (int i = 0; i < kWarps; ++i) total += segments[i];
  const float target = u * total;
  int chosen = 0;
  float reached = 0;
  for (int i = 0; i < kWarps; ++i) {
    // the last segment of positive weight where rounding leaves none above the target
    if (segments[i] > 0 && reached <= target) {
      chosen = i;
      before = reached;
    }
    reached += segments[i];
  }
  const std::int64_t begin = chosen * length, end = min(begin + length, n_actions);
  return Pick(elements, row, begin, end, target - before, lane, kWarp);
}

// `team` threads share a row: at most a warp, or all of the block where kLarge.
template <typename T, bool kLarge>
__global__ void __launch_bounds__(kLarge ? kRowThreads : kThreads)
    CategoricalKernel(SampleCategorical call, int team) {
  const int rows_of_block = static_cast<int>(blockDim.x) / team,
            member = static_cast<int>(threadIdx.x) % team;
  const std::int64_t wanted = std::int64_t{blockIdx.x} * rows_of_block + threadIdx.x / team;
  const bool exists = wanted < call.rows;
  const std::int64_t row = exists ? wanted : call.rows - 1;
  const auto elements = ElementsOf<T>(call.logits, call.prior_log_probs, call.action_mask,
                                      *call.prior_temperature, row, call.n_actions);
  const RowState part = Scan<1>(elements, member, call.n_actions, team, call.prior_policy);
  const RowState state = kLarge ? BlockMerged(part) : GroupMerged(part, team);
  const CategoricalRow summary = Summary(state, call.prior_policy);
  const float u = Uniform(Philox(static_cast<std::uint32_t>(row), 0, call.state).word[0]);
  std::int64_t action;
  if constexpr (kLarge) {
    action = PickByBlock(elements, summary, call.n_actions, u);
  } else {
    const float total = call.prior_policy ? state.right_sum : state.left_sum;
    action = Pick(elements, summary, 0, call.n_actions, u * total, member, team);
  }
  if (!exists || member != 0) return;
  float logit, unused;
  elements.template Read<1>(action, &logit, &unused);
  call.actions[row] = action;
  call.log_prob[row] = summary.PolicyLogProb(logit);
  call.entropy[row] = summary.entropy;
  if (call.prior_kl != nullptr) call.prior_kl[row] = summary.kl;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4) GaussianKernel(SampleGaussian call, int team) {
  const int rows_of_block = kThreads / team, member = static_cast<int>(threadIdx.x) % team;
  const std::int64_t wanted = std::int64_t{blockIdx.x} * rows_of_block + threadIdx.x / team;
  const bool exists = wanted < call.rows;
  const std::int64_t row = exists ? wanted : call.rows - 1, offset = row * call.dims;
  const float half_log_temperature = 0.5f * logf(*call.prior_temperature);
  float log_prob = 0, entropy = 0, kl = 0;
  // a block of Philox gives four dimensions
  for (std::int64_t block = member; block * 4 < call.dims; block += team) {
    float z[4];
    Normals(Philox(static_cast<std::uint32_t>(row), static_cast<std::uint32_t>(block), call.state), z);
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const std::int64_t d = block * 4 + v;
      if (d >= call.dims) continue;
      const float mean = ToFloat(static_cast<const T*>(call.mean)[offset + d]);
      const float log_std =
          ToFloat(static_cast<const T*>(call.log_std)[call.log_std_per_row ? offset + d : d]);
      log_prob += -0.5f * z[v] * z[v] - log_std - kHalfLog2Pi;
      entropy += log_std + 0.5f + kHalfLog2Pi;
      if (call.prior_kl != nullptr) {
        const float prior_mean = ToFloat(static_cast<const T*>(call.prior_mean)[offset + d]);
        const float prior_log_std =
            ToFloat(static_cast<const T*>(call.prior_log_std)[call.prior_log_std_per_row ? offset + d : d]);
        kl +=
            KlOfGaussians(mean, log_std, prior_mean, prior_log_std + half_log_temperature, call.prior_policy)
                .kl;
      }
      if (exists) call.actions[offset + d] = mean + expf(log_std) * z[v];
    }
  }
  log_prob = GroupSum(log_prob, team);
  entropy = GroupSum(entropy, team);
  kl = GroupSum(kl, team);
  if (!exists || member != 0) return;
  call.log_prob[row] = log_prob;
  call.entropy[row] = entropy;
  if (call.prior_kl != nullptr) call.prior_kl[row] = kl;
}

}  // namespace

cudaError_t LaunchSampleCategorical(const SampleCategorical& call, cudaStream_t stream) {
  if (call.rows == 0) return cudaSuccess;
  return ForType(call.type, [&](auto type) {
    using T = decltype(type);
    if (call.n_actions > kLargeRow) {
      return Launch(CategoricalKernel<T, true>, call.rows, kRowThreads, stream, call, kRowThreads);
    }
    const int team = GroupFor(call.n_actions);
    return Launch(CategoricalKernel<T, false>, DivideUp(call.rows, kThreads / team), kThreads, stream, call,
                  team);
  });
}

cudaError_t LaunchSampleGaussian(const SampleGaussian& call, cudaStream_t stream) {
  if (call.rows == 0) return cudaSuccess;
  const int team = GroupFor(call.dims);
  return ForType(call.type, [&](auto type) {
    return Launch(GaussianKernel<decltype(type)>, DivideUp(call.rows, kThreads / team), kThreads, stream,
                  call, team);
  });
}

}  // namespace lago::cuda
