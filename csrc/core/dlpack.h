// The part of DLPack's stable binary interface that reads tensors (github.com/dmlc/dlpack, version 1.3):
// names and order are DLPack's. A type of tensors offers the table of functions as its
// `__dlpack_c_exchange_api__`.
#ifndef LAGO_CORE_DLPACK_H_
#define LAGO_CORE_DLPACK_H_

#include <cstdint>

namespace lago {

constexpr std::uint32_t kDlpackMajorVersion = 1;
constexpr std::int32_t kDlpackCpu = 1;

enum class DlpackCode : std::uint8_t { kInt = 0, kFloat = 2, kBool = 6 };

struct DlpackTensor {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t ndim;
  std::uint8_t code, bits;
  std::uint16_t lanes;
  std::int64_t *shape, *strides;
  std::uint64_t byte_offset;
};

struct DlpackExchangeApi {
  std::uint32_t major_version, minor_version;
  DlpackExchangeApi* older;
  void* not_used[3];
  // Borrows: the tensor must outlive what is read. -1 and a Python exception where it cannot be described.
  int (*tensor_from_py_object)(void* py_object, DlpackTensor* out);
};

}  // namespace lago

#endif  // LAGO_CORE_DLPACK_H_
