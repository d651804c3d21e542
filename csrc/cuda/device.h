// Building blocks of the kernels: launches, conversions, vectors of elements, reductions within a warp.
// Whole warps reach every reduction: rows past the end are computed again and not written.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/types.h"

namespace lago::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

template <typename... Parameters, typename... Arguments>
cudaError_t Launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads, cudaStream_t stream,
                   Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Calls `launch` with a value of the element type.
template <typename F>
cudaError_t ForType(Type type, F&& launch) {
  switch (type) {
    case Type::kFloat32:
      return launch(float{});
    case Type::kBFloat16:
      return launch(__nv_bfloat16{});
    case Type::kFloat16:
      return launch(__half{});
  }
  return cudaErrorInvalidValue;
}

inline std::int64_t DivideUp(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

__device__ inline float ToFloat(float x) { return x; }
__device__ inline float ToFloat(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float ToFloat(__half x) { return __half2float(x); }
__device__ inline void Store(float* to, float x) { *to = x; }
__device__ inline void Store(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }
__device__ inline void Store(__half* to, float x) { *to = __float2half_rn(x); }

__device__ inline float Load(Column column, std::int64_t i) {
  switch (column.type) {
    case Type::kBFloat16:
      return ToFloat(static_cast<const __nv_bfloat16*>(column.data)[i]);
    case Type::kFloat16:
      return ToFloat(static_cast<const __half*>(column.data)[i]);
    default:
      return static_cast<const float*>(column.data)[i];
  }
}

__device__ inline void Store(MutableColumn column, std::int64_t i, float x) {
  switch (column.type) {
    case Type::kBFloat16:
      return Store(static_cast<__nv_bfloat16*>(column.data) + i, x);
    case Type::kFloat16:
      return Store(static_cast<__half*>(column.data) + i, x);
    default:
      return Store(static_cast<float*>(column.data) + i, x);
  }
}

// V neighbours that one instruction moves.
template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
  T item[V];
};

template <typename T, int V>
__device__ inline void LoadVector(const T* from, float* to) {
  const auto vector = *reinterpret_cast<const Vector<T, V>*>(from);
#pragma unroll
  for (int v = 0; v < V; ++v) to[v] = ToFloat(vector.item[v]);
}

template <typename T, int V>
__device__ inline void StoreVector(T* to, const float* from) {
  Vector<T, V> vector;
#pragma unroll
  for (int v = 0; v < V; ++v) Store(&vector.item[v], from[v]);
  *reinterpret_cast<Vector<T, V>*>(to) = vector;
}

// Whether rows of `length` elements from `address` on can be moved in vectors of `width`; null can.
inline bool Fits(const void* address, std::int64_t length, int width, std::size_t element) {
  return length % width == 0 && reinterpret_cast<std::uintptr_t>(address) % (width * element) == 0;
}

// e^x for a softmax, x at most 0: off by |x| roundings, which e^x makes small beside the largest weight.
__device__ inline float SoftmaxExp(float x) { return __expf(x); }

// Sums and maxima over aligned groups of 2^k lanes, the same bits in all of them.
__device__ inline float GroupSum(float x, int group) {
#pragma unroll
  for (int offset = group / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

__device__ inline float GroupMax(float x, int group) {
#pragma unroll
  for (int offset = group / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, offset));
  return x;
}

// How many lanes share a row of `length` elements.
inline int GroupFor(std::int64_t length) {
  int group = 1;
  while (group < kWarp && group * 4 < length) group *= 2;
  return group;
}

}  // namespace lago::cuda
