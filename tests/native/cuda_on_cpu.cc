// Fibers instead of a GPU's threads: see cuda_on_cpu.h.
#include "cuda_on_cpu.h"

#include <setjmp.h>
#include <ucontext.h>

#include <memory>
#include <stdexcept>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

constexpr std::size_t kStackBytes = 64 * 1024;
constexpr std::uint32_t kPoison = 0x7fc00bad;  // a NaN

// What a group of threads waits at; they are let through together.
struct Barrier {
  unsigned expected = 0, arrived = 0, round = 0;
};

struct Warp {
  Barrier barrier;
  std::uint32_t values[2][kWarp];  // by round: a lane may be one ahead of the others
};

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  bool started = false, done = true;
  const Barrier* waits_for = nullptr;
  unsigned round = 0;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
Barrier block_barrier;
jmp_buf scheduler;
Fiber* running = nullptr;
const std::function<void()>* body = nullptr;
bool backwards = false;

void Yield() {
  if (_setjmp(running->at) == 0) _longjmp(scheduler, 1);
}

// A fiber outlives its thread and runs that of the next block.
void Main() {
  for (;;) {
    (*body)();
    running->done = true;
    Yield();
  }
}

void Resume(Fiber* fiber) {
  running = fiber;
  if (_setjmp(scheduler) != 0) return;
  if (fiber->started) _longjmp(fiber->at, 1);
  fiber->started = true;
  getcontext(&fiber->start);
  fiber->start.uc_stack.ss_sp = fiber->stack.get();
  fiber->start.uc_stack.ss_size = kStackBytes;
  fiber->start.uc_link = nullptr;
  makecontext(&fiber->start, Main, 0);
  setcontext(&fiber->start);
}

void Wait(Barrier* barrier) {
  if (++barrier->arrived == barrier->expected) {
    barrier->arrived = 0;
    ++barrier->round;
    return;
  }
  running->waits_for = barrier;
  running->round = barrier->round;
  Yield();
}

void RunBlock(unsigned threads) {
  block_barrier = {threads, 0, 0};
  warps.assign((threads + kWarp - 1) / kWarp, Warp{});
  for (unsigned i = 0; i < warps.size(); ++i) {
    warps[i].barrier.expected = std::min<unsigned>(kWarp, threads - i * kWarp);
    for (auto& values : warps[i].values) std::fill(std::begin(values), std::end(values), kPoison);
  }
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i]->done = false;
    fibers[i]->waits_for = nullptr;
  }
  for (unsigned left = threads; left > 0;) {
    bool moved = false;
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned thread = backwards ? threads - 1 - i : i;
      Fiber* fiber = fibers[thread].get();
      if (fiber->done) continue;
      if (fiber->waits_for != nullptr && fiber->waits_for->round == fiber->round) continue;
      fiber->waits_for = nullptr;
      threadIdx.x = thread;
      Resume(fiber);
      moved = true;
      if (fiber->done) --left;
    }
    if (!moved) {
      fibers.clear();  // they stand where they wait
      throw std::runtime_error("a thread waits for one that is done or waits elsewhere");
    }
  }
}

}  // namespace

void WaitForBlock() { Wait(&block_barrier); }
void WaitForWarp() { Wait(&warps[threadIdx.x / kWarp].barrier); }

const std::uint32_t* Exchanged(std::uint32_t value) {
  Warp& warp = warps[threadIdx.x / kWarp];
  auto& values = warp.values[warp.barrier.round % 2];
  values[threadIdx.x % kWarp] = value;
  Wait(&warp.barrier);
  return values;
}

std::uint32_t Exchange(std::uint32_t value, unsigned source) { return Exchanged(value)[source]; }

std::uint32_t Ballot(std::uint32_t value) {
  const std::uint32_t* values = Exchanged(value);
  std::uint32_t ballot = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) ballot |= (values[lane] != 0 ? 1u : 0u) << lane;
  return ballot;
}

void Run(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  body = &kernel;
  blockDim = dim3(threads);
  gridDim = dim3(blocks);
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  for (unsigned i = 0; i < blocks; ++i) {
    blockIdx.x = backwards ? blocks - 1 - i : i;
    RunBlock(threads);
  }
}

}  // namespace emulator

// For tests: blocks and threads in the reverse order.
extern "C" __attribute__((visibility("default"))) void lago_emulate_backwards(bool on) {
  emulator::backwards = on;
}

float __bfloat162float(__nv_bfloat16 x) {
  const std::uint32_t bits = std::uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

__nv_bfloat16 __float2bfloat16_rn(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float sign = x.bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction == 0 ? sign * INFINITY : NAN;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  return sign * std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
}

__half __float2half_rn(float x) {
  const std::uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return {0x7fff};
  const float size = std::fabs(x);
  if (size == 0) return {sign};
  if (size >= 65520) return {static_cast<std::uint16_t>(sign | 0x7c00)};
  int exponent = 0;
  std::frexp(size, &exponent);                    // size = f 2^exponent, f in [1/2, 1)
  const int unit = std::max(exponent - 11, -24);  // the exponent of the last bit
  const auto units = static_cast<std::uint16_t>(std::nearbyint(std::ldexp(size, -unit)));
  // 1024 units are the next exponent's first number, so that rounding up carries over by itself
  const int biased = unit + 24;
  return {static_cast<std::uint16_t>(sign | ((biased << 10) + units))};
}
