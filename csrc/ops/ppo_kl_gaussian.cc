#include "ops/ppo_kl_gaussian.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace lago {
namespace {

constexpr std::size_t kGroupRows = 8;  // a multiple of every instruction set's lanes
constexpr std::size_t kBlockRows = 64;
constexpr double kHalfLog2Pi = 0.91893853320467274178;

// A per-element number that is either one tile of 8 * D repeated for all groups of eight rows, or one per
// element.
struct Table {
  float* data;
  std::size_t group_stride;
};

// Working memory of one call, carved out of one allocation.
struct Scratch {
  Table log_std, std, inv_std;       // of the policy
  Table prior_log_std, prior_scale;  // tempered; scale is 1 / std, or std where the KL is KL(prior || policy)
  float *z, *log_prob_terms;         // [kBlockRows, D]
  float *weight, *log_prob_grad;     // [kBlockRows, D], the row's number at each of its elements
  float *row_log_prob, *row_grad;    // [kBlockRows]
  float* log_std_grad_tile;          // [8, D]
};

// Over rows, times their weights.
struct Sums {
  double policy, squared_errors, log_std, prior_kl, approx_kl, clipped;
};

// What is the same for all rows.
struct Uniform {
  std::size_t dims;
  bool prior_policy, clips_value;
  float log_prob_constant;  // -D log(2 pi) / 2
  float half_log_temperature;
  float advantage_mean, advantage_scale;
  float clip_range, ratio_low, ratio_high, clip_range_vf;
  float inv_rows, value_grad, kl_grad, entropy_grad;  // the last three: coefficients over the number of rows
};

struct Moments {
  double count, mean, std;
};

#define LAGO_TARGET
#define LAGO_LANES 4
namespace portable {
#include "core/vec.inc"
#include "ops/ppo_kl_gaussian.inc"
}  // namespace portable
#undef LAGO_TARGET
#undef LAGO_LANES

#if defined(__x86_64__)
#define LAGO_TARGET __attribute__((target("avx2,fma")))
#define LAGO_LANES 8
namespace avx2 {
#include "core/vec.inc"
#include "ops/ppo_kl_gaussian.inc"
}  // namespace avx2
#undef LAGO_TARGET
#undef LAGO_LANES
#endif

// The functions of one instruction set.
struct Kernels {
  decltype(&portable::AdvantageMoments) advantage_moments;
  decltype(&portable::FillPolicyTables) fill_policy_tables;
  decltype(&portable::FillPriorTables) fill_prior_tables;
  decltype(&portable::Block) block;
};

Kernels Choose(bool portable_asked) {
#if defined(__x86_64__)
  if (!portable_asked && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return {avx2::AdvantageMoments, avx2::FillPolicyTables, avx2::FillPriorTables, avx2::Block};
  }
#endif
  static_cast<void>(portable_asked);
  return {portable::AdvantageMoments, portable::FillPolicyTables, portable::FillPriorTables, portable::Block};
}

// Gives out pieces of one zeroed allocation.
class Arena {
 public:
  explicit Arena(std::size_t size) : memory_(size, 0.0f) {}
  float* Take(std::size_t size) {
    float* taken = memory_.data() + used_;
    used_ += size;
    return taken;
  }

 private:
  std::vector<float> memory_;
  std::size_t used_ = 0;
};

// The rows that do not fill a group of eight, copied among rows of zeros, and room for their gradients.
class Tail {
 public:
  Tail(const GaussianInputs& in, const GaussianShape& shape, std::size_t first)
      : shape_(shape), first_(first), rows_(shape.rows - first), arena_(kGroupRows * (7 * shape.dims + 7)) {
    const std::size_t dims = shape.dims;
    padded = {Pad(in.mean, dims),
              shape.log_std_per_row ? Pad(in.log_std, dims) : in.log_std,
              Pad(in.values, 1),
              Pad(in.actions, dims),
              Pad(in.old_log_prob, 1),
              Pad(in.advantages, 1),
              Pad(in.returns, 1),
              Pad(in.old_values, 1),
              Pad(in.weight, 1),
              Pad(in.prior_mean, dims),
              shape.prior_log_std_per_row ? Pad(in.prior_log_std, dims) : in.prior_log_std};
    grads = {nullptr, arena_.Take(kGroupRows * dims), arena_.Take(kGroupRows * dims),
             arena_.Take(kGroupRows)};
  }

  void CopyGradsTo(const GaussianOutputs& out) const {
    const std::size_t element = first_ * shape_.dims, n = rows_ * shape_.dims;
    std::copy_n(grads.mean_grad, n, out.mean_grad + element);
    std::copy_n(grads.values_grad, rows_, out.values_grad + first_);
    if (shape_.log_std_per_row) std::copy_n(grads.log_std_grad, n, out.log_std_grad + element);
  }

  GaussianInputs padded;
  GaussianOutputs grads;

 private:
  const float* Pad(const float* from, std::size_t width) {
    float* to = arena_.Take(kGroupRows * width);
    std::copy_n(from + first_ * width, rows_ * width, to);
    return to;
  }

  GaussianShape shape_;
  std::size_t first_, rows_;
  Arena arena_;
};

// The pointers at row `first`.
GaussianInputs From(const GaussianInputs& in, const GaussianShape& shape, std::size_t first) {
  const std::size_t element = first * shape.dims;
  return {in.mean + element,
          in.log_std + (shape.log_std_per_row ? element : 0),
          in.values + first,
          in.actions + element,
          in.old_log_prob + first,
          in.advantages + first,
          in.returns + first,
          in.old_values + first,
          in.weight + first,
          in.prior_mean + element,
          in.prior_log_std + (shape.prior_log_std_per_row ? element : 0)};
}

GaussianOutputs From(const GaussianOutputs& out, const GaussianShape& shape, std::size_t first) {
  const std::size_t element = first * shape.dims;
  return {out.statistics, out.mean_grad + element, out.log_std_grad + (shape.log_std_per_row ? element : 0),
          out.values_grad + first};
}

// A [D] row as the [8, D] tile that the tables repeat.
std::vector<float> Tile(const float* row, std::size_t dims) {
  std::vector<float> tile(kGroupRows * dims);
  for (std::size_t i = 0; i < tile.size(); ++i) tile[i] = row[i % dims];
  return tile;
}

Uniform MakeUniform(const GaussianCoefficients& c, std::size_t dims, const Moments& moments,
                    const GaussianOptions& options) {
  const bool normalize = options.normalize_advantage && moments.count > 1.0;
  const double rows = std::max(moments.count, 1.0);
  Uniform u;
  u.dims = dims;
  u.prior_policy = options.prior_policy;
  u.clips_value = c.clip_range_vf < std::numeric_limits<float>::infinity();
  u.log_prob_constant = static_cast<float>(-kHalfLog2Pi * static_cast<double>(dims));
  u.half_log_temperature = 0.5f * std::log(c.prior_temperature);
  u.advantage_mean = normalize ? static_cast<float>(moments.mean) : 0.0f;
  u.advantage_scale = normalize ? static_cast<float>(1.0 / (moments.std + 1e-8)) : 1.0f;
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

void WriteStatistics(const Sums& sums, const GaussianCoefficients& c, std::size_t dims, double count,
                     float* statistics) {
  const double rows = std::max(count, 1.0);
  const double policy_loss = -sums.policy / rows;
  const double value_loss = sums.squared_errors / rows;
  const double entropy = (sums.log_std + (0.5 + kHalfLog2Pi) * static_cast<double>(dims) * count) / rows;
  const double prior_kl = sums.prior_kl / rows;
  const double loss = policy_loss + c.vf_coef * value_loss - c.ent_coef * entropy + c.kl_coef * prior_kl;
  const double all[] = {loss,     policy_loss,           value_loss,         entropy,
                        prior_kl, sums.approx_kl / rows, sums.clipped / rows};
  std::transform(std::begin(all), std::end(all), statistics, [](double x) { return static_cast<float>(x); });
}

}  // namespace

void UnsafePpoKlGaussian(const GaussianInputs& in, const GaussianCoefficients& coefficients,
                         const GaussianOutputs& out, const GaussianShape& shape,
                         const GaussianOptions& options) {
  const Kernels kernels = Choose(options.portable);
  const std::size_t dims = shape.dims, block = kBlockRows * dims, tile = kGroupRows * dims;
  const Moments moments = kernels.advantage_moments(in.advantages, in.weight, shape.rows);
  const Uniform uniform = MakeUniform(coefficients, dims, moments, options);

  Arena arena(9 * block + tile + 2 * kBlockRows);
  const auto table = [&](bool per_row) {
    return Table{arena.Take(per_row ? block : tile), per_row ? tile : 0};
  };
  Scratch scratch;
  scratch.log_std = table(shape.log_std_per_row);
  scratch.std = table(shape.log_std_per_row);
  scratch.inv_std = table(shape.log_std_per_row);
  scratch.prior_log_std = table(shape.prior_log_std_per_row);
  scratch.prior_scale = table(shape.prior_log_std_per_row);
  for (float** p : {&scratch.z, &scratch.log_prob_terms, &scratch.weight, &scratch.log_prob_grad}) {
    *p = arena.Take(block);
  }
  scratch.row_log_prob = arena.Take(kBlockRows);
  scratch.row_grad = arena.Take(kBlockRows);
  scratch.log_std_grad_tile = arena.Take(tile);
  if (!shape.log_std_per_row) {
    kernels.fill_policy_tables(scratch, Tile(in.log_std, dims).data(), tile);
  }
  if (!shape.prior_log_std_per_row) {
    kernels.fill_prior_tables(scratch, uniform, Tile(in.prior_log_std, dims).data(), tile);
  }

  Sums sums = {};
  std::vector<double> log_std_grad_tile(tile, 0.0);
  const std::size_t whole = shape.rows / kGroupRows * kGroupRows;
  for (std::size_t first = 0; first < whole; first += kBlockRows) {
    const std::size_t groups = std::min(kBlockRows, whole - first) / kGroupRows;
    kernels.block(scratch, uniform, From(in, shape, first), From(out, shape, first), shape, groups, &sums,
                  log_std_grad_tile.data());
  }
  if (whole < shape.rows) {
    const Tail tail(in, shape, whole);
    kernels.block(scratch, uniform, tail.padded, tail.grads, shape, 1, &sums, log_std_grad_tile.data());
    tail.CopyGradsTo(out);
  }
  if (!shape.log_std_per_row) {
    for (std::size_t d = 0; d < dims; ++d) {
      double sum = 0.0;
      for (std::size_t i = d; i < tile; i += dims) sum += log_std_grad_tile[i];
      out.log_std_grad[d] = static_cast<float>(sum);
    }
  }
  WriteStatistics(sums, coefficients, dims, moments.count, out.statistics);
}

}  // namespace lago
