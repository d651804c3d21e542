#include "ops/ppo_kl_gaussian.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/ppo_moments.h"
#include "core/threads.h"

namespace lago {
namespace {

constexpr std::size_t kGroupRows = 16;  // a multiple of every instruction set's lanes
// Rows that a block's sums in float32 and its scratch are for. Where nothing is kept per element, more.
constexpr std::size_t kBlockRows = 64, kRegisterBlockRows = 256;
constexpr std::size_t kChunkElements = 16384;   // what a thread takes at once
constexpr std::size_t kThreadElements = 32768;  // below it one thread is faster
constexpr double kHalfLog2Pi = 0.91893853320467274178;

// A per-element number that is either one tile of kGroupRows * D repeated for all groups of rows, or
// one per element.
struct Table {
  float* data;
  std::size_t group_stride;
};

// Working memory of one call, carved out of one allocation.
struct Scratch {
  Table log_std, inv_variance;              // of the policy
  Table gap, ratio;                         // see GapOf and VarianceRatio
  float* prior_log_std;                     // [kGroupRows, D], where it is the same for all rows
  float *score, *squares, *log_prob_terms;  // [kBlockRows, D], see ElementsForward
  float *weight, *pull, *log_prob_grad;     // [kBlockRows, D], the row's number at each of its elements
  float *row_log_prob, *row_grad;           // [rows of a block]
  float* row_pull;                          // [kBlockRows], what the row's KL weighs in the loss
  float* log_std_grad_tile;                 // [kGroupRows, D]
};

// What is the same for all rows.
struct GaussianUniform {
  PpoUniform ppo;
  std::size_t dims;
  float log_prob_constant;  // -D log(2 pi) / 2, less the log stds where they are the same for all rows
  float half_log_temperature;
};

// The functions of one instruction set.
struct Kernels {
  PpoMoments (*advantage_moments)(const float* advantages, const float* weight, std::size_t rows);
  void (*fill_policy_tables)(Scratch scratch, const float* log_std, std::size_t n);
  void (*fill_prior_tables)(Scratch scratch, GaussianUniform uniform);
  void (*block)(Scratch scratch, GaussianUniform uniform, const GaussianInputs& in,
                const GaussianOutputs& out, const GaussianShape& shape, std::size_t rows, PpoSums* sums,
                double* log_std_grad_tile);
};

// Whether what is per row is summed and spread in registers.
bool GoesInRegisters(const GaussianShape& shape) {
  const std::size_t d = shape.dims;
  return !shape.log_std_per_row && (d == 1 || d == 2 || d == 4 || d == 8);
}

#define LAGO_KERNEL "ops/ppo_kl_gaussian.inc"
#include "core/each_target.inc"

// Gives out pieces of one zeroed allocation, which begin with a cache line where their sizes are of whole
// ones.
class Arena {
 public:
  explicit Arena(std::size_t size) : memory_(size + kLine, 0.0f) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.data()) / sizeof(float);
    used_ = (kLine - address % kLine) % kLine;
  }
  float* Take(std::size_t size) {
    float* taken = memory_.data() + used_;
    used_ += size;
    return taken;
  }

 private:
  static constexpr std::size_t kLine = 64 / sizeof(float);

  std::vector<float> memory_;
  std::size_t used_;
};

// The rows that do not fill a group, copied among rows of zeros, and room for their gradients.
class Tail {
 public:
  Tail(const GaussianInputs& in, const GaussianShape& shape, std::size_t first)
      : shape_(shape), first_(first), rows_(shape.rows - first), arena_(kGroupRows * (7 * shape.dims + 8)) {
    const std::size_t dims = shape.dims;
    values_grad_ = arena_.Take(kGroupRows);
    padded = {Pad(in.mean, dims),
              shape.log_std_per_row ? Pad(in.log_std, dims) : in.log_std,
              Pad(in.actions, dims),
              Pad(in.prior_mean, dims),
              shape.prior_log_std_per_row ? Pad(in.prior_log_std, dims) : in.prior_log_std,
              {Pad(in.rows.values, 1), Pad(in.rows.old_log_prob, 1), Pad(in.rows.advantages, 1),
               Pad(in.rows.returns, 1), Pad(in.rows.old_values, 1), Pad(in.rows.weight, 1), values_grad_,
               in.rows.kl_weight == nullptr ? nullptr : Pad(in.rows.kl_weight, 1)}};
    grads = {nullptr, arena_.Take(kGroupRows * dims), arena_.Take(kGroupRows * dims)};
  }

  void CopyGradsTo(const GaussianOutputs& out, float* values_grad) const {
    const std::size_t element = first_ * shape_.dims, n = rows_ * shape_.dims;
    std::copy_n(grads.mean_grad, n, out.mean_grad + element);
    std::copy_n(values_grad_, rows_, values_grad + first_);
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
  float* values_grad_;
};

// The pointers at row `first`.
GaussianInputs From(const GaussianInputs& in, const GaussianShape& shape, std::size_t first) {
  const std::size_t element = first * shape.dims;
  return {in.mean + element,
          in.log_std + (shape.log_std_per_row ? element : 0),
          in.actions + element,
          in.prior_mean + element,
          in.prior_log_std + (shape.prior_log_std_per_row ? element : 0),
          RowsFrom(in.rows, first)};
}

GaussianOutputs From(const GaussianOutputs& out, const GaussianShape& shape, std::size_t first) {
  const std::size_t element = first * shape.dims;
  return {out.statistics, out.mean_grad + element, out.log_std_grad + (shape.log_std_per_row ? element : 0)};
}

// A [D] row as the tile [kGroupRows, D] that the tables repeat.
std::vector<float> Tile(const float* row, std::size_t dims) {
  std::vector<float> tile(kGroupRows * dims);
  for (std::size_t i = 0; i < tile.size(); ++i) tile[i] = row[i % dims];
  return tile;
}

// Working memory of one thread, but for the tables that all rows share.
Scratch MakeScratch(Arena& arena, const GaussianShape& shape, const Scratch& shared, std::size_t block_rows) {
  const std::size_t block = block_rows * shape.dims, tile = kGroupRows * shape.dims;
  Scratch scratch = shared;
  const auto table = [&] { return Table{arena.Take(block), tile}; };
  for (float** p : {&scratch.row_log_prob, &scratch.row_grad}) *p = arena.Take(block_rows);
  if (GoesInRegisters(shape)) return scratch;
  if (shape.log_std_per_row) {
    scratch.log_std = table();
    scratch.inv_variance = table();
  }
  if (shape.log_std_per_row || shape.prior_log_std_per_row) {
    scratch.gap = table();
    scratch.ratio = table();
  }
  for (float** p : {&scratch.score, &scratch.squares, &scratch.log_prob_terms, &scratch.weight,
                    &scratch.log_prob_grad, &scratch.pull}) {
    *p = arena.Take(block);
  }
  scratch.row_pull = arena.Take(block_rows);
  scratch.log_std_grad_tile = arena.Take(tile);
  return scratch;
}

}  // namespace

void UnsafePpoKlGaussian(const GaussianInputs& inputs, const PpoCoefficients& coefficients,
                         const GaussianOutputs& out, const GaussianShape& shape, const PpoOptions& options) {
  const Kernels& kernels = Choose(options.lanes);
  const std::size_t dims = shape.dims, tile = kGroupRows * dims;
  const PpoMoments moments = MomentsOf(inputs.rows, shape.rows, options.threads, kernels.advantage_moments);
  GaussianInputs in = inputs;
  const bool unweighted = moments.all_count && in.rows.kl_weight == nullptr;
  if (unweighted && GoesInRegisters(shape)) in.rows.weight = nullptr;
  double log_prob_constant = -kHalfLog2Pi * static_cast<double>(dims);
  if (!shape.log_std_per_row) {
    for (std::size_t d = 0; d < dims; ++d) log_prob_constant -= static_cast<double>(in.log_std[d]);
  }
  const GaussianUniform uniform{MakePpoUniform(coefficients, moments, options), dims,
                                static_cast<float>(log_prob_constant),
                                0.5f * std::log(coefficients.prior_temperature)};

  // The boundaries depend on the shape alone, and so do the sums.
  const std::size_t block_rows = GoesInRegisters(shape) ? kRegisterBlockRows : kBlockRows;
  const std::size_t chunk_rows = block_rows * std::max<std::size_t>(1, kChunkElements / (block_rows * dims));
  const std::size_t chunks = (shape.rows + chunk_rows - 1) / chunk_rows;
  const int threads = shape.rows * dims < kThreadElements ? 1 : std::max(1, options.threads);

  Arena arena(5 * tile + static_cast<std::size_t>(threads) *
                             ((GoesInRegisters(shape) ? 0 : 10) * block_rows * dims + tile + 3 * block_rows));
  Scratch shared = {};
  for (Table* table : {&shared.log_std, &shared.inv_variance, &shared.gap, &shared.ratio}) {
    *table = {arena.Take(tile), 0};
  }
  shared.prior_log_std = arena.Take(tile);
  if (!shape.log_std_per_row) kernels.fill_policy_tables(shared, Tile(in.log_std, dims).data(), tile);
  if (!shape.prior_log_std_per_row) {
    const std::vector<float> prior_log_std = Tile(in.prior_log_std, dims);
    std::copy(prior_log_std.begin(), prior_log_std.end(), shared.prior_log_std);
    if (!shape.log_std_per_row) kernels.fill_prior_tables(shared, uniform);
  }
  std::vector<Scratch> scratch;
  for (int thread = 0; thread < threads; ++thread)
    scratch.push_back(MakeScratch(arena, shape, shared, block_rows));

  std::vector<PpoSums> sums(chunks);
  std::vector<double> log_std_grad_tiles(chunks * tile, 0.0);
  const std::size_t whole = shape.rows / kGroupRows * kGroupRows;
  ParallelFor(chunks, threads, [&](std::size_t chunk, int thread) {
    const Scratch& own = scratch[static_cast<std::size_t>(thread)];
    double* log_std_grad_tile = log_std_grad_tiles.data() + chunk * tile;
    const std::size_t end = std::min((chunk + 1) * chunk_rows, whole);
    for (std::size_t first = chunk * chunk_rows; first < end; first += block_rows) {
      kernels.block(own, uniform, From(in, shape, first), From(out, shape, first), shape,
                    std::min(block_rows, end - first), &sums[chunk], log_std_grad_tile);
    }
  });
  if (whole < shape.rows) {
    const Tail tail(inputs, shape, whole);
    kernels.block(scratch[0], uniform, tail.padded, tail.grads, shape, kGroupRows, &sums[chunks - 1],
                  log_std_grad_tiles.data() + (chunks - 1) * tile);
    tail.CopyGradsTo(out, in.rows.values_grad);
  }
  PpoSums total;
  for (const PpoSums& part : sums) total += part;
  // total.entropy is the sum of the rows' log stds, where these differ.
  if (!shape.log_std_per_row) {
    std::vector<double> grad(dims);
    for (std::size_t i = 0; i < log_std_grad_tiles.size(); i += dims) {
      for (std::size_t d = 0; d < dims; ++d) grad[d] += log_std_grad_tiles[i + d];
    }
    for (std::size_t d = 0; d < dims; ++d) {
      total.entropy += moments.count * static_cast<double>(in.log_std[d]);
      out.log_std_grad[d] = static_cast<float>(grad[d] - moments.count * uniform.ppo.entropy_grad);
    }
  }
  total.entropy += (0.5 + kHalfLog2Pi) * static_cast<double>(dims) * moments.count;
  WritePpoStatistics(total, coefficients, moments.count, out.statistics);
}

}  // namespace lago
