// Drives csrc/core/threads and the two losses on several threads without Python: every chunk once, sums that
// do not depend on the number of threads, several callers at once, a fork. Run under a sanitizer by `make
// tsan`.

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "core/threads.h"
#include "ops/ppo_kl_categorical.h"
#include "ops/ppo_kl_gaussian.h"

namespace {

#define CHECK(condition)                                                                 \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      std::fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                      \
    }                                                                                    \
  } while (false)

constexpr std::size_t kRows = 9001, kActions = 40, kDims = 5;
constexpr lago::PpoCoefficients kCoefficients = {0.2f, 0.01f, 0.5f, 0.3f, 1.5f, 0.4f};

std::vector<float> Normal(std::size_t n, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> numbers(n);
  for (float& x : numbers) x = normal(generator);
  return numbers;
}

// What both losses read and write; plain memory, so that a sanitizer sees every access.
struct Batch {
  std::vector<float> values = Normal(kRows, 1), old_log_prob = Normal(kRows, 2),
                     advantages = Normal(kRows, 3);
  std::vector<float> returns = Normal(kRows, 4), old_values = Normal(kRows, 5), weight;
  std::vector<float> logits = Normal(kRows * kActions, 6), prior = Normal(kRows * kActions, 7);
  std::vector<float> mean = Normal(kRows * kDims, 8), actions = Normal(kRows * kDims, 9);
  std::vector<float> log_std = Normal(kDims, 10), prior_log_std = Normal(kRows * kDims, 11);
  std::vector<std::int64_t> chosen;

  Batch() {
    for (std::size_t r = 0; r < kRows; ++r) {
      chosen.push_back(static_cast<std::int64_t>(r % kActions));
      weight.push_back(r % 5 == 4 ? 0.0f : 1.0f);
    }
  }

  lago::PpoRows Rows(float* values_grad) const {
    return {values.data(),     old_log_prob.data(), advantages.data(), returns.data(),
            old_values.data(), weight.data(),       values_grad};
  }

  // Every number that a loss gives, in one vector.
  std::vector<float> Categorical(int threads, int lanes) const {
    std::vector<float> out(7 + kRows * kActions + kRows);
    const lago::CategoricalInputs in = {logits.data(), chosen.data(), prior.data(), nullptr,
                                        Rows(out.data() + 7 + kRows * kActions)};
    CHECK(lago::UnsafePpoKlCategorical(in, kCoefficients, {out.data(), out.data() + 7}, {kRows, kActions},
                                       {false, true, lanes, threads}));
    return out;
  }

  std::vector<float> Gaussian(int threads, int lanes) const {
    std::vector<float> out(7 + kRows * kDims + kDims + kRows);
    float* log_std_grad = out.data() + 7 + kRows * kDims;
    const lago::GaussianInputs in = {mean.data(),    log_std.data(),       actions.data(),
                                     actions.data(), prior_log_std.data(), Rows(log_std_grad + kDims)};
    lago::UnsafePpoKlGaussian(in, kCoefficients, {out.data(), out.data() + 7, log_std_grad},
                              {kRows, kDims, false, true}, {false, true, lanes, threads});
    return out;
  }
};

bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void EveryChunkOnce() {
  for (const int threads : {0, 1, 2, 3, 8}) {
    for (const std::size_t chunks : {0, 1, 2, 7, 1000}) {
      std::vector<int> taken(chunks);
      std::vector<std::atomic<int>> busy(8);
      std::atomic<std::size_t> sum{0};
      lago::ParallelFor(chunks, threads, [&](std::size_t chunk, int thread) {
        CHECK(thread >= 0 && thread < std::max(threads, 1));
        CHECK(busy[static_cast<std::size_t>(thread)].fetch_add(1) == 0);
        ++taken[chunk];
        sum += chunk + 1;
        busy[static_cast<std::size_t>(thread)].fetch_sub(1);
      });
      for (const int times : taken) CHECK(times == 1);
      CHECK(sum == chunks * (chunks + 1) / 2);
    }
  }
}

void TheSameBitsOnAnyThreads(const Batch& batch) {
  for (const int lanes : {4, 8, 16}) {
    const auto categorical = batch.Categorical(1, lanes), gaussian = batch.Gaussian(1, lanes);
    for (const int threads : {2, 3, 8}) {
      CHECK(SameBits(categorical, batch.Categorical(threads, lanes)));
      CHECK(SameBits(gaussian, batch.Gaussian(threads, lanes)));
    }
  }
}

void SeveralCallers(const Batch& batch) {
  const auto categorical = batch.Categorical(1, 16), gaussian = batch.Gaussian(1, 16);
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int times = 0; times < 5; ++times) {
        CHECK(SameBits(categorical, batch.Categorical(2, 16)));
        CHECK(SameBits(gaussian, batch.Gaussian(3, 16)));
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
}

[[maybe_unused]] void AfterAFork(const Batch& batch) {
  const auto expected = batch.Gaussian(2, 16);
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    alarm(60);
    _exit(SameBits(expected, batch.Gaussian(2, 16)) ? 0 : 1);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(status == 0);
  CHECK(SameBits(expected, batch.Gaussian(2, 16)));
}

}  // namespace

int main() {
  const Batch batch;
  EveryChunkOnce();
  TheSameBitsOnAnyThreads(batch);
  SeveralCallers(batch);
#ifndef __SANITIZE_THREAD__  // which cannot start threads in a forked child
  AfterAFork(batch);
#endif
  std::puts("threads: every chunk once, the same bits on any number of threads");
}
