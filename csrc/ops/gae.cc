#include "ops/gae.h"

#include <vector>

namespace lago {
namespace {

// One time step of all envs; `following` is the advantage row of the step after it.
void GaeRow(const GaeInputs& in, const GaeOutputs& out, const float* __restrict__ following,
            std::size_t offset, std::size_t n_envs, float gamma, float decay) {
  const float* __restrict__ rewards = in.rewards + offset;
  const float* __restrict__ values = in.values + offset;
  const float* __restrict__ next_values = in.next_values + offset;
  const std::uint8_t* __restrict__ terminated = in.terminated + offset;
  const std::uint8_t* __restrict__ truncated = in.truncated + offset;
  const std::uint8_t* __restrict__ valid = in.valid + offset;
  float* __restrict__ advantages = out.advantages + offset;
  float* __restrict__ returns = out.returns + offset;

  for (std::size_t n = 0; n < n_envs; ++n) {
    // Selected, never multiplied by zero: a NaN in a place that does not count must not spread.
    const float bootstrap = terminated[n] ? 0.0f : gamma * next_values[n];
    const float carried = (terminated[n] | truncated[n]) ? 0.0f : decay * following[n];
    const float advantage = valid[n] ? rewards[n] + bootstrap - values[n] + carried : 0.0f;
    advantages[n] = advantage;
    returns[n] = advantage + values[n];
  }
}

}  // namespace

void UnsafeGae(const GaeInputs& in, const GaeOutputs& out, GaeShape shape, float gamma, float gae_lambda) {
  const std::vector<float> after_the_end(shape.n_envs, 0.0f);
  const float* following = after_the_end.data();
  for (std::size_t t = shape.n_steps; t-- > 0;) {
    const std::size_t offset = t * shape.n_envs;
    GaeRow(in, out, following, offset, shape.n_envs, gamma, gamma * gae_lambda);
    following = out.advantages + offset;
  }
}

}  // namespace lago
