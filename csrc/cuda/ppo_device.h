// What both losses do beside their policy: moments of the advantages, a row's clipped terms, and the sums
// over rows. Two launches. The first leaves partial moments, which every block of the second merges in the
// same order; the last of its blocks to finish adds the partial sums of all, in their order. No sum depends
// on who is last.
#pragma once

#include "cuda/device.h"
#include "cuda/ppo.h"

namespace lago::cuda {

constexpr int kThreads = 128;
constexpr int kMomentThreads = 256;
constexpr int kMomentRows = 4 * kMomentThreads;  // of a block, where there are few

struct Moments {
  float count, mean, m2;  // m2: sum of squares around the mean
};

// Chan, Golub and LeVeque's pairwise update.
__device__ inline Moments Merged(Moments a, Moments b) {
  const float count = a.count + b.count, share = count == 0 ? 0 : b.count / count;
  const float delta = b.mean - a.mean;
  return {count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.count * share};
}

// Lane 0 gets the moments of all lanes.
__device__ inline Moments WarpMerged(Moments m) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    m = Merged(m, {__shfl_down_sync(kFullWarp, m.count, offset), __shfl_down_sync(kFullWarp, m.mean, offset),
                   __shfl_down_sync(kFullWarp, m.m2, offset)});
  }
  return m;
}

__device__ inline unsigned* TicketOf(float* workspace) { return reinterpret_cast<unsigned*>(workspace); }
__device__ inline Moments* MomentsOf(float* workspace) { return reinterpret_cast<Moments*>(workspace + 4); }
__device__ inline float* PartialSumsOf(float* workspace) { return workspace + kWorkspaceHeader; }

__global__ static void __launch_bounds__(kMomentThreads) MomentsKernel(Ppo ppo) {
  // the next launch finds its ticket at 0, in every replay of a graph
  if (blockIdx.x == 0 && threadIdx.x == 0) *TicketOf(ppo.workspace) = 0;
  Moments sum{0, 0, 0};
  const std::int64_t stride = std::int64_t{gridDim.x} * kMomentThreads;
#pragma unroll 4
  for (std::int64_t row = std::int64_t{blockIdx.x} * kMomentThreads + threadIdx.x; row < ppo.rows;
       row += stride) {
    const float weight = Load(ppo.weight, row), advantage = Load(ppo.advantages, row);
    if (weight != 0) sum = Merged(sum, {weight, advantage, 0});
  }
  __shared__ Moments warps[kMomentThreads / kWarp];
  sum = WarpMerged(sum);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kMomentThreads / kWarp; ++warp) sum = Merged(sum, warps[warp]);
    MomentsOf(ppo.workspace)[blockIdx.x] = sum;
  }
}

inline int MomentBlocks(std::int64_t rows) {
  return static_cast<int>(std::clamp<std::int64_t>(DivideUp(rows, kMomentRows), 1, kMomentBlocks));
}

inline cudaError_t LaunchMoments(const Ppo& ppo, cudaStream_t stream) {
  return Launch(MomentsKernel, MomentBlocks(ppo.rows), kMomentThreads, stream, ppo);
}

// What a row needs to know of the batch, and the coefficients.
struct Batch {
  float inverse_rows;  // 1 / n, n: rows of weight 1, at least 1
  float advantage_mean, advantage_scale;
  float clip_range, ent_coef, vf_coef, kl_coef, prior_temperature, clip_range_vf;
};

// Whole warps call this; every warp gets the same bits.
__device__ inline Batch LoadBatch(const Ppo& ppo, int moment_blocks) {
  Batch batch{};
  batch.clip_range = *ppo.clip_range;
  batch.ent_coef = *ppo.ent_coef;
  batch.vf_coef = *ppo.vf_coef;
  batch.kl_coef = *ppo.kl_coef;
  batch.prior_temperature = *ppo.prior_temperature;
  batch.clip_range_vf = ppo.clip_range_vf == nullptr ? 0 : *ppo.clip_range_vf;
  Moments sum{0, 0, 0};
  for (int i = threadIdx.x % kWarp; i < moment_blocks; i += kWarp) {
    sum = Merged(sum, MomentsOf(ppo.workspace)[i]);
  }
  sum = WarpMerged(sum);
  const float count = __shfl_sync(kFullWarp, sum.count, 0);
  const float mean = __shfl_sync(kFullWarp, sum.mean, 0), m2 = __shfl_sync(kFullWarp, sum.m2, 0);
  batch.inverse_rows = 1 / (count < 1 ? 1 : count);
  const bool normalize = ppo.normalize_advantage && !(count <= 1);
  batch.advantage_mean = normalize ? mean : 0;
  batch.advantage_scale = normalize ? 1 / (sqrtf(m2 / (count < 2 ? 1 : count - 1)) + 1e-8f) : 1;
  return batch;
}

// The same into the warp's own place in shared memory, where it takes no registers.
__device__ inline void ShareBatch(const Ppo& ppo, int moment_blocks, Batch* shared) {
  const Batch batch = LoadBatch(ppo, moment_blocks);
  if (threadIdx.x % kWarp == 0) *shared = batch;
  __syncwarp();
}

struct PpoRow {
  float value, old_log_prob, advantage, target, old_value, weight, kl_weight;
};

__device__ inline PpoRow LoadPpoRow(const Ppo& ppo, std::int64_t row) {
  const bool kl_weighted = ppo.kl_weight.data != nullptr;
  if (ppo.float_columns) {
    const auto at = [row](Column column) { return static_cast<const float*>(column.data)[row]; };
    return {at(ppo.values),
            at(ppo.old_log_prob),
            at(ppo.advantages),
            at(ppo.returns),
            at(ppo.old_values),
            at(ppo.weight),
            kl_weighted ? at(ppo.kl_weight) : 1};
  }
  return {Load(ppo.values, row),
          Load(ppo.old_log_prob, row),
          Load(ppo.advantages, row),
          Load(ppo.returns, row),
          Load(ppo.old_values, row),
          Load(ppo.weight, row),
          kl_weighted ? Load(ppo.kl_weight, row) : 1};
}

struct PpoTerms {
  float terms[kRowTerms];  // surrogate, value, entropy, KL, k3, clipped, weighted KL; times the weight
  float scale, kl_scale;   // w / n, and times the KL's weight
  float log_prob_grad, value_grad;
};

__device__ inline float Clamped(float x, float low, float high) {
  return x < low ? low : x > high ? high : x;  // NaN stays NaN
}

__device__ inline PpoTerms TermsOfRow(const PpoRow& row, const Batch& batch, bool clips_value, float log_prob,
                                      float entropy, float kl) {
  const float scale = row.weight * batch.inverse_rows;
  const float advantage = (row.advantage - batch.advantage_mean) * batch.advantage_scale;
  const float log_ratio = log_prob - row.old_log_prob, ratio = expf(log_ratio);
  const float plain = advantage * ratio;
  const float clipped = advantage * Clamped(ratio, 1 - batch.clip_range, 1 + batch.clip_range);
  const bool clips = clipped < plain;
  const float moved = row.value - row.old_value;
  const float value =
      clips_value ? row.old_value + Clamped(moved, -batch.clip_range_vf, batch.clip_range_vf) : row.value;
  const bool value_moves = !clips_value || !(fabsf(moved) > batch.clip_range_vf);
  const float error = row.target - value;
  PpoTerms out;
  out.terms[0] = clips ? clipped : plain;
  out.terms[1] = error * error;
  out.terms[2] = entropy;
  out.terms[3] = kl;
  out.terms[4] = expm1f(log_ratio) - log_ratio;
  out.terms[5] = fabsf(ratio - 1) > batch.clip_range ? 1 : 0;
  out.terms[6] = row.kl_weight * kl;
  out.scale = scale;
  out.kl_scale = scale * row.kl_weight;
  out.log_prob_grad = clips ? 0 : -scale * plain;
  out.value_grad = value_moves ? -2 * batch.vf_coef * scale * error : 0;
  // whatever a row of weight 0 holds, infinities too, adds nothing
  const bool counts = row.weight != 0;
#pragma unroll
  for (int i = 0; i < kRowTerms; ++i) out.terms[i] = counts ? row.weight * out.terms[i] : 0;
  if (!counts) out.log_prob_grad = out.value_grad = 0;
  return out;
}

// Adds each thread's terms over the block and leaves them in the block's partial sums.
template <int kBlockThreads>
__device__ inline void LeaveTerms(const float (&sums)[kRowTerms], float* partial) {
  __shared__ float warps[kBlockThreads / kWarp][kRowTerms];
#pragma unroll
  for (int i = 0; i < kRowTerms; ++i) {
    const float sum = GroupSum(sums[i], kWarp);
    if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp][i] = sum;
  }
  __syncthreads();
  if (threadIdx.x < kRowTerms) {
    float sum = 0;
    for (int warp = 0; warp < kBlockThreads / kWarp; ++warp) sum += warps[warp][threadIdx.x];
    partial[threadIdx.x] = sum;
  }
}

// True in all threads of the block that comes here last: the partial sums of all blocks are written then.
__device__ inline bool IsLastBlock(float* workspace) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(TicketOf(workspace), 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// The sum over blocks of one number; whole warps call this.
__device__ inline float SumOverBlocks(const float* partial, std::int64_t columns, std::int64_t column) {
  float sum = 0;
  for (unsigned block = threadIdx.x % kWarp; block < gridDim.x; block += kWarp) {
    sum += __ldcg(partial + block * columns +
                  column);  // not from a cache that the other blocks did not write to
  }
  return GroupSum(sum, kWarp);
}

// The seven statistics, by the last block.
__device__ inline void FinishStatistics(const Ppo& ppo, int moment_blocks, std::int64_t columns) {
  __shared__ float sums[kRowTerms];
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  for (int i = warp; i < kRowTerms; i += warps) {
    const float sum = SumOverBlocks(PartialSumsOf(ppo.workspace), columns, i);
    if (threadIdx.x % kWarp == 0) sums[i] = sum;
  }
  __syncthreads();
  if (warp != 0) return;
  const Batch batch = LoadBatch(ppo, moment_blocks);
  if (threadIdx.x != 0) return;
  float mean[kRowTerms];
#pragma unroll
  for (int i = 0; i < kRowTerms; ++i) mean[i] = sums[i] * batch.inverse_rows;
  mean[0] = -mean[0];
  ppo.statistics[0] = mean[0] + batch.vf_coef * mean[1] - batch.ent_coef * mean[2] + batch.kl_coef * mean[6];
#pragma unroll
  for (int i = 1; i < kStatistics; ++i) ppo.statistics[i] = mean[i - 1];
}

// Launches a kernel that walks the rows, with as many blocks as the device runs at once: a second wave that
// fills only a part of it would take as long as the first.
template <typename Call>
cudaError_t LaunchRowsKernel(void (*kernel)(Call, int), std::int64_t rows_per_block, int threads,
                             const Call& call, cudaStream_t stream) {
  int device = 0, processors = 0, blocks = 0;
  auto error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0);
  }
  if (error != cudaSuccess) return error;
  const std::int64_t rows = call.ppo.rows;
  const std::int64_t wanted = std::min<std::int64_t>(DivideUp(rows, rows_per_block), blocks * processors);
  return Launch(kernel, std::clamp<std::int64_t>(wanted, 1, kMaxBlocks), threads, stream, call,
                MomentBlocks(rows));
}

}  // namespace lago::cuda
