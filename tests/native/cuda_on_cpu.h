// As much of CUDA as the kernels use, on the CPU, for tests only: the .cu files are compiled as C++ with this
// folder first on the include path. Blocks run one after another, in either order; the threads of a block are
// fibers that run, in either order, until they wait for others. A barrier that some thread never reaches is
// an error, and so is one that lanes of a warp reach apart. Not modelled: caches, timing, the rounding of
// approximate instructions, and what two threads do between two barriers at once.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1) : x(x_), y(1), z(1) {}
};

// The thread that runs.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr int kWarp = 32;

// Waits for all threads of the block, or of the warp.
void WaitForBlock();
void WaitForWarp();

// Each lane of the warp leaves a value and gets that of lane `source`, or a bit for each that is not 0.
std::uint32_t Exchange(std::uint32_t value, unsigned source);
std::uint32_t Ballot(std::uint32_t value);

void Run(unsigned blocks, unsigned threads, const std::function<void()>& kernel);

template <typename T>
T Shuffled(unsigned lanes, T value, unsigned source) {
  static_assert(sizeof(T) == sizeof(std::uint32_t));
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = Exchange(lanes == 0xffffffffu ? bits : 0xffffffffu, source);  // the kernels use whole warps only
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

}  // namespace emulator

inline void __syncthreads() { emulator::WaitForBlock(); }
inline void __syncwarp() { emulator::WaitForWarp(); }
inline void __threadfence() {}

template <typename T>
T __shfl_sync(unsigned lanes, T value, int lane) {
  return emulator::Shuffled(lanes, value, static_cast<unsigned>(lane) % emulator::kWarp);
}
template <typename T>
T __shfl_xor_sync(unsigned lanes, T value, int offset) {
  return emulator::Shuffled(lanes, value, threadIdx.x % emulator::kWarp ^ static_cast<unsigned>(offset));
}
template <typename T>
T __shfl_down_sync(unsigned lanes, T value, int offset) {
  const unsigned lane = threadIdx.x % emulator::kWarp, source = lane + static_cast<unsigned>(offset);
  return emulator::Shuffled(lanes, value, source < emulator::kWarp ? source : lane);
}
template <typename T>
T __shfl_up_sync(unsigned lanes, T value, int offset) {
  const unsigned lane = threadIdx.x % emulator::kWarp;
  return emulator::Shuffled(lanes, value, lane < static_cast<unsigned>(offset) ? lane : lane - offset);
}
inline unsigned __ballot_sync(unsigned lanes, bool vote) {
  return emulator::Ballot(lanes == 0xffffffffu ? vote : 1);
}

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  const unsigned old = *address;
  *address += value;
  return old;
}
inline float __ldcg(const float* address) { return *address; }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __clz(unsigned x) { return x == 0 ? 32 : __builtin_clz(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(std::uint64_t{a} * b >> 32); }
// As the hardware does it: the product is rounded before it becomes an exponent.
inline float __expf(float x) { return std::exp2(x * 1.4426950408889634f); }
inline void sincospif(float x, float* sine, float* cosine) {
  const double angle = 3.14159265358979323846 * x;
  *sine = static_cast<float>(std::sin(angle));
  *cosine = static_cast<float>(std::cos(angle));
}

struct __nv_bfloat16 {
  std::uint16_t bits;
};
struct __half {
  std::uint16_t bits;
};
float __bfloat162float(__nv_bfloat16 x);
__nv_bfloat16 __float2bfloat16_rn(float x);
float __half2float(__half x);
__half __float2half_rn(float x);

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid value";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
// Few, so that small batches are walked in several rounds.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 2;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, std::size_t) {
  *blocks = 2;
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (config->gridDim.x == 0 || config->blockDim.x == 0 || config->blockDim.x > 1024)
    return cudaErrorInvalidValue;
  emulator::Run(config->gridDim.x, config->blockDim.x, [&] { kernel(arguments...); });
  return cudaSuccess;
}
