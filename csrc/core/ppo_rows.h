// What PPO does with a row whose log-probability is known, the same for every kind of policy.
// The part that is compiled for each instruction set is core/vec_ppo_rows.inc.
#ifndef LAGO_CORE_PPO_ROWS_H_
#define LAGO_CORE_PPO_ROWS_H_

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <iterator>
#include <limits>

namespace lago {

struct PpoCoefficients {
  float clip_range;
  float ent_coef;
  float vf_coef;
  float kl_coef;
  float prior_temperature;
  float clip_range_vf;  // infinity: the value is not clipped
};

struct PpoOptions {
  bool prior_policy;  // KL(prior || policy) in place of KL(policy || prior)
  bool normalize_advantage;
  int lanes;    // floats at once, at most: 4 (portable), 8 (AVX2) or 16 (AVX-512)
  int threads;  // at most; results do not depend on it
};

// [B] each; only values_grad is written. weight is 0 or 1, and null where it is 1 for all; kl_weight is null
// where every row's KL weighs 1.
struct PpoRows {
  const float* values;
  const float* old_log_prob;
  const float* advantages;
  const float* returns;
  const float* old_values;
  const float* weight;
  float* values_grad;
  const float* kl_weight;
};

inline PpoRows RowsFrom(const PpoRows& rows, std::size_t first) {
  return {rows.values + first,      rows.old_log_prob + first,
          rows.advantages + first,  rows.returns + first,
          rows.old_values + first,  rows.weight == nullptr ? nullptr : rows.weight + first,
          rows.values_grad + first, rows.kl_weight == nullptr ? nullptr : rows.kl_weight + first};
}

// Of the advantages of rows of weight 1: how many, their mean, and the sum of their squared distances from
// it.
struct PpoMoments {
  double count = 0.0, mean = 0.0, squares = 0.0;
  bool all_count = true;  // no row weighs less

  // Those of both (Chan, Golub and LeVeque, 1983).
  PpoMoments& operator+=(const PpoMoments& other) {
    all_count = all_count && other.all_count;
    if (other.count == 0.0) return *this;
    const double both = count + other.count, step = other.mean - mean;
    mean += step * (other.count / both);
    squares += other.squares + step * step * (count * (other.count / both));
    count = both;
    return *this;
  }

  // Unbiased.
  double Std() const { return std::sqrt(squares / std::max(count - 1.0, 1.0)); }
};

// What is the same for all rows.
struct PpoUniform {
  bool prior_policy, clips_value;
  float advantage_mean, advantage_scale;
  float clip_range, ratio_low, ratio_high, clip_range_vf;
  float inv_rows, value_grad, kl_grad, entropy_grad;  // the last three: coefficients over the number of rows
};

inline PpoUniform MakePpoUniform(const PpoCoefficients& c, const PpoMoments& moments,
                                 const PpoOptions& options) {
  const bool normalize = options.normalize_advantage && moments.count > 1.0;
  const double rows = std::max(moments.count, 1.0);
  PpoUniform u;
  u.prior_policy = options.prior_policy;
  u.clips_value = c.clip_range_vf < std::numeric_limits<float>::infinity();
  u.advantage_mean = normalize ? static_cast<float>(moments.mean) : 0.0f;
  u.advantage_scale = normalize ? static_cast<float>(1.0 / (moments.Std() + 1e-8)) : 1.0f;
  u.clip_range = c.clip_range;
  u.ratio_low = 1.0f - c.clip_range;
  u.ratio_high = 1.0f + c.clip_range;
  u.clip_range_vf = c.clip_range_vf;
  u.inv_rows = static_cast<float>(1.0 / rows);
  u.value_grad = static_cast<float>(2.0 * c.vf_coef / rows);
  u.kl_grad = static_cast<float>(c.kl_coef / rows);
  u.entropy_grad = static_cast<float>(c.ent_coef / rows);
  return u;
}

// Over rows, times their weights; kl_loss is what the KLs add to the loss.
struct PpoSums {
  double policy = 0.0, squared_errors = 0.0, entropy = 0.0, prior_kl = 0.0, kl_loss = 0.0;
  double approx_kl = 0.0, clipped = 0.0;

  PpoSums& operator+=(const PpoSums& other) {
    policy += other.policy;
    squared_errors += other.squared_errors;
    entropy += other.entropy;
    prior_kl += other.prior_kl;
    kl_loss += other.kl_loss;
    approx_kl += other.approx_kl;
    clipped += other.clipped;
    return *this;
  }
};

// Writes [7]: loss, policy, value, entropy, prior_kl, approx_kl, clip_fraction.
inline void WritePpoStatistics(const PpoSums& sums, const PpoCoefficients& c, double count,
                               float* statistics) {
  const double rows = std::max(count, 1.0);
  const double policy_loss = -sums.policy / rows;
  const double value_loss = sums.squared_errors / rows;
  const double entropy = sums.entropy / rows;
  const double prior_kl = sums.prior_kl / rows;
  const double loss = policy_loss + c.vf_coef * value_loss - c.ent_coef * entropy + sums.kl_loss;
  const double all[] = {loss,     policy_loss,           value_loss,         entropy,
                        prior_kl, sums.approx_kl / rows, sums.clipped / rows};
  std::transform(std::begin(all), std::end(all), statistics, [](double x) { return static_cast<float>(x); });
}

}  // namespace lago

#endif  // LAGO_CORE_PPO_ROWS_H_
