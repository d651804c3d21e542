// What launchers and the binding share: addresses on the device with the type of what lies there.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace lago::cuda {

// The numbers are those of TYPES in kernels/<op>/cuda_fused.py.
enum class Type : std::int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A [B] input or output of any floating type.
struct Column {
  const void* data;
  Type type;
};

struct MutableColumn {
  void* data;
  Type type;
};

}  // namespace lago::cuda
