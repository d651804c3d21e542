#include "ops/sample.h"

#include <cmath>
#include <limits>
#include <utility>
#include <vector>

namespace lago {
namespace {

constexpr double kHalfLog2Pi = 0.91893853320467274178;
constexpr double kTwoPi = 6.28318530717958647693;

// A word as a number in (0, 1).
double UniformOf(std::uint32_t word) { return (static_cast<double>(word >> 9) + 0.5) * 0x1p-23; }

// Over the allowed actions of a row: each exp(x - max x), their sum, its log, and where they start to be 0.
class Softmax {
 public:
  void Set(const float* x, float inv_temperature, const std::uint8_t* mask, std::size_t n) {
    weights_.resize(n);
    logits_.resize(n);
    float max = -std::numeric_limits<float>::infinity();
    for (std::size_t i = 0; i < n; ++i) {
      const bool allowed = mask == nullptr || mask[i] != 0;
      logits_[i] = allowed ? x[i] * inv_temperature : -std::numeric_limits<float>::infinity();
      if (!(logits_[i] <= max)) max = logits_[i];
    }
    sum_ = 0.0;
    for (std::size_t i = 0; i < n; ++i) {
      logits_[i] -= max;
      weights_[i] = std::exp(logits_[i]);
      sum_ += static_cast<double>(weights_[i]);
    }
    log_sum_ = std::log(sum_);
  }

  std::size_t size() const { return weights_.size(); }
  double sum() const { return sum_; }
  double weight(std::size_t i) const { return static_cast<double>(weights_[i]); }
  double log_prob(std::size_t i) const { return static_cast<double>(logits_[i]) - log_sum_; }

 private:
  std::vector<float> weights_, logits_;
  double sum_, log_sum_;
};

// The first action whose cumulative weight is above u of the sum; rounding may leave none: then the last of
// all.
std::size_t Invert(const Softmax& policy, double u) {
  const double wanted = u * policy.sum();
  double reached = 0.0;
  std::size_t last = 0;
  for (std::size_t i = 0; i < policy.size(); ++i) {
    if (policy.weight(i) == 0.0) continue;
    reached += policy.weight(i);
    last = i;
    if (reached > wanted) break;
  }
  return last;
}

double Entropy(const Softmax& policy) {
  double sum = 0.0;
  for (std::size_t i = 0; i < policy.size(); ++i) {
    if (policy.weight(i) != 0.0) sum -= policy.weight(i) * policy.log_prob(i);
  }
  return sum / policy.sum();
}

double Kl(const Softmax& left, const Softmax& right) {
  double sum = 0.0;
  for (std::size_t i = 0; i < left.size(); ++i) {
    if (left.weight(i) != 0.0) sum += left.weight(i) * (left.log_prob(i) - right.log_prob(i));
  }
  return sum / left.sum();
}

}  // namespace

std::array<std::uint32_t, 4> Philox(std::uint32_t row, std::uint32_t block, const SampleState& state) {
  const auto seed = static_cast<std::uint64_t>(state.seed), step = static_cast<std::uint64_t>(state.step);
  std::array<std::uint32_t, 4> c = {row, block, static_cast<std::uint32_t>(step),
                                    static_cast<std::uint32_t>(step >> 32)};
  auto k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53} * c[0], p1 = std::uint64_t{0xCD9E8D57} * c[2];
    c = {static_cast<std::uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<std::uint32_t>(p1),
         static_cast<std::uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<std::uint32_t>(p0)};
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return c;
}

void UnsafeSampleCategorical(const CategoricalSample& task, const SampleState& state,
                             const SampleOptions& options) {
  const std::size_t n = task.n_actions;
  Softmax policy, prior;
  for (std::size_t r = 0; r < task.rows; ++r) {
    const std::uint8_t* mask = task.action_mask == nullptr ? nullptr : task.action_mask + r * n;
    policy.Set(task.logits + r * n, 1.0f, mask, n);
    const std::size_t action = Invert(policy, UniformOf(Philox(static_cast<std::uint32_t>(r), 0, state)[0]));
    task.actions[r] = static_cast<std::int64_t>(action);
    task.log_prob[r] = static_cast<float>(policy.log_prob(action));
    task.entropy[r] = static_cast<float>(Entropy(policy));
    if (task.prior_log_probs == nullptr) continue;
    prior.Set(task.prior_log_probs + r * n, 1.0f / options.prior_temperature, mask, n);
    task.prior_kl[r] = static_cast<float>(options.prior_policy ? Kl(prior, policy) : Kl(policy, prior));
  }
}

void UnsafeSampleGaussian(const GaussianSample& task, const SampleState& state,
                          const SampleOptions& options) {
  const std::size_t dims = task.dims;
  // p^(1/tau) of a Gaussian is the Gaussian with variance tau * sigma^2.
  const double half_log_temperature = 0.5 * std::log(static_cast<double>(options.prior_temperature));
  for (std::size_t r = 0; r < task.rows; ++r) {
    const std::size_t element = r * dims;
    const float* log_std = task.log_std + (task.log_std_per_row ? element : 0);
    double log_prob = 0.0, entropy = 0.0, kl = 0.0;
    std::array<double, 4> z;
    for (std::size_t d = 0; d < dims; ++d) {
      if (d % 4 == 0) {
        const auto words = Philox(static_cast<std::uint32_t>(r), static_cast<std::uint32_t>(d / 4), state);
        for (std::size_t pair = 0; pair < 4; pair += 2) {
          const double radius = std::sqrt(-2.0 * std::log(UniformOf(words[pair])));
          const double angle = kTwoPi * UniformOf(words[pair + 1]);
          z[pair] = radius * std::cos(angle);
          z[pair + 1] = radius * std::sin(angle);
        }
      }
      const double mean = task.mean[element + d], s = log_std[d], normal = z[d % 4];
      task.actions[element + d] = static_cast<float>(mean + std::exp(s) * normal);
      log_prob += -0.5 * normal * normal - s - kHalfLog2Pi;
      entropy += s + 0.5 + kHalfLog2Pi;
      if (task.prior_mean == nullptr) continue;
      const double prior_s =
          task.prior_log_std[(task.prior_log_std_per_row ? element : 0) + d] + half_log_temperature;
      const double distance = mean - task.prior_mean[element + d];
      const double s1 = options.prior_policy ? prior_s : s, s2 = options.prior_policy ? s : prior_s;
      kl += s2 - s1 + 0.5 * (std::exp(2.0 * s1) + distance * distance) * std::exp(-2.0 * s2) - 0.5;
    }
    task.log_prob[r] = static_cast<float>(log_prob);
    task.entropy[r] = static_cast<float>(entropy);
    if (task.prior_mean != nullptr) task.prior_kl[r] = static_cast<float>(kl);
  }
}

}  // namespace lago
