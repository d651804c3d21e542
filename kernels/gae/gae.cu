// Generalised advantage estimation: a thread per env walks its steps backwards. What a step needs besides its
// successor's advantage is read for several steps at once, so that their loads overlap.
// Test: pytest tests/kernels/test_cuda_emulated.py tests/kernels/test_cuda.py

#include "cuda/device.h"
#include "cuda/gae.h"

namespace lago::cuda {
namespace {

constexpr int kThreads = 64;  // few, so that few envs spread over several multiprocessors
constexpr int kSteps = 8;

__global__ void __launch_bounds__(kThreads) GaeKernel(Gae gae) {
  const std::int64_t env = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (env >= gae.n_envs) return;
  float carry = 0;
  for (std::int64_t last = gae.n_steps - 1; last >= 0; last -= kSteps) {
    float delta[kSteps], value[kSteps];
    bool valid[kSteps], alive[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (last < i) continue;
      const std::int64_t at = (last - i) * gae.n_envs + env;
      const bool terminated = gae.terminated[at] != 0;
      valid[i] = gae.valid[at] != 0;
      alive[i] = valid[i] && !terminated && gae.truncated[at] == 0;
      value[i] = gae.values[at];
      // selected, not multiplied: what follows a termination may be anything
      delta[i] = gae.rewards[at] + gae.gamma * (terminated ? 0 : gae.next_values[at]) - value[i];
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (last < i) continue;
      const std::int64_t at = (last - i) * gae.n_envs + env;
      carry = valid[i] ? delta[i] + gae.decay * (alive[i] ? carry : 0) : 0;
      gae.advantages[at] = carry;
      gae.returns[at] = carry + value[i];
    }
  }
}

}  // namespace

cudaError_t LaunchGae(const Gae& call, cudaStream_t stream) {
  if (call.n_steps == 0 || call.n_envs == 0) return cudaSuccess;
  return Launch(GaeKernel, DivideUp(call.n_envs, kThreads), kThreads, stream, call);
}

}  // namespace lago::cuda
