#include "ops/ppo_kl_categorical.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/ppo_moments.h"
#include "core/threads.h"

namespace lago {
namespace {

constexpr std::size_t kMaxLanes = 16;
constexpr std::size_t kMaxBlockRows = 64;
constexpr std::size_t kBlockElements = 2048;    // of a block, so that its arrays stay in the first cache
constexpr std::size_t kShortRow = 64;           // actions of a row, up to which transposing rows pays
constexpr std::size_t kPrefetched = 1024;       // actions of a row; longer ones the processor fetches itself
constexpr std::size_t kChunkElements = 16384;   // what a thread takes at once
constexpr std::size_t kThreadElements = 65536;  // below it one thread is faster

// Working memory of one thread. The arrays [rows, stride] hold rows of whole vectors, those of rows whole
// vectors too.
struct Scratch {
  float *e, *v, *f;  // [rows, stride], rows of whole vectors
  std::size_t stride;
  float* fours[4];  // [rows, 4]
  // [rows], whole vectors
  float *max_x, *max_y, *sum_e, *sum_ed, *sum_f, *sum_gap, *log_prob, *log_prob_grad, *constant, *slope,
      *by_f;
};

// What is the same for all rows.
struct CategoricalUniform {
  PpoUniform ppo;
  std::size_t actions, prefetched;
  float inv_temperature, ent_coef, kl_coef;
};

// The functions of one instruction set.
struct Kernels {
  PpoMoments (*advantage_moments)(const float* advantages, const float* weight, std::size_t rows);
  void (*block)(Scratch scratch, const CategoricalUniform& uniform, const CategoricalInputs& in,
                float* logits_grad, std::size_t rows, PpoSums* sums);
};

#define LAGO_KERNEL "ops/ppo_kl_categorical.inc"
#include "core/each_target.inc"

std::size_t RoundUp(std::size_t n, std::size_t unit) { return (n + unit - 1) / unit * unit; }

constexpr std::size_t kRowArrays = 11;  // of Scratch, each of one float a row
constexpr std::size_t kFours = 4;       // of four floats a row

std::size_t ScratchSize(std::size_t block_rows, std::size_t stride) {
  return 3 * block_rows * stride + (kRowArrays + 4 * kFours) * RoundUp(block_rows, kMaxLanes);
}

Scratch MakeScratch(float* memory, std::size_t block_rows, std::size_t stride) {
  const std::size_t n = block_rows * stride, rows = RoundUp(block_rows, kMaxLanes);
  float* next = memory + 3 * n;
  const auto take = [&](std::size_t size) { return std::exchange(next, next + size); };
  Scratch s = {};
  s.e = memory;
  s.v = memory + n;
  s.f = memory + 2 * n;
  s.stride = stride;
  for (float*& fours : s.fours) fours = take(4 * rows);
  for (float** p : {&s.max_x, &s.max_y, &s.sum_e, &s.sum_ed, &s.sum_f, &s.sum_gap, &s.log_prob,
                    &s.log_prob_grad, &s.constant, &s.slope, &s.by_f}) {
    *p = take(rows);
  }
  return s;
}

// The pointers at row `first`.
CategoricalInputs From(const CategoricalInputs& in, std::size_t first, std::size_t actions) {
  const std::size_t element = first * actions;
  return {in.logits + element, in.actions + first, in.prior_log_probs + element,
          in.action_mask == nullptr ? nullptr : in.action_mask + element, RowsFrom(in.rows, first)};
}

}  // namespace

bool UnsafePpoKlCategorical(const CategoricalInputs& in, const PpoCoefficients& coefficients,
                            const CategoricalOutputs& out, const CategoricalShape& shape,
                            const PpoOptions& options) {
  const std::size_t actions = shape.actions, stride = RoundUp(actions, kMaxLanes);
  const Kernels& kernels = Choose(options.lanes);
  const PpoMoments moments = MomentsOf(in.rows, shape.rows, options.threads, kernels.advantage_moments);
  const CategoricalUniform uniform{MakePpoUniform(coefficients, moments, options),
                                   actions,
                                   actions,
                                   1.0f / coefficients.prior_temperature,
                                   coefficients.ent_coef,
                                   coefficients.kl_coef};

  // The boundaries depend on the shape alone, and so do the sums.
  std::size_t block_rows = std::max<std::size_t>(1, std::min(kMaxBlockRows, kBlockElements / stride));
  if (block_rows > kMaxLanes) block_rows = block_rows / kMaxLanes * kMaxLanes;
  const std::size_t chunk_rows = RoundUp(std::max<std::size_t>(1, kChunkElements / stride), block_rows);
  const std::size_t chunks = RoundUp(shape.rows, chunk_rows) / chunk_rows;
  const int threads = shape.rows * actions < kThreadElements ? 1 : std::max(1, options.threads);

  const std::size_t scratch_size = ScratchSize(block_rows, stride);
  std::vector<float> memory(scratch_size * static_cast<std::size_t>(threads), 1.0f);
  std::vector<PpoSums> sums(chunks);
  std::atomic<bool> are_actions{true};
  ParallelFor(chunks, threads, [&](std::size_t chunk, int thread) {
    float* own = memory.data() + scratch_size * static_cast<std::size_t>(thread);
    const Scratch scratch = MakeScratch(own, block_rows, stride);
    const std::size_t begin = chunk * chunk_rows, end = std::min(begin + chunk_rows, shape.rows);
    // a negative number is a large one here
    const auto is_action = [&](std::int64_t a) { return static_cast<std::uint64_t>(a) < actions; };
    if (!std::all_of(in.actions + begin, in.actions + end, is_action)) return are_actions.store(false);
    for (std::size_t first = begin; first < end; first += block_rows) {
      kernels.block(scratch, uniform, From(in, first, actions), out.logits_grad + first * actions,
                    std::min(block_rows, end - first), &sums[chunk]);
    }
  });
  if (!are_actions.load()) return false;
  PpoSums total;
  for (const PpoSums& part : sums) total += part;
  WritePpoStatistics(total, coefficients, moments.count, out.statistics);
  return true;
}

}  // namespace lago
