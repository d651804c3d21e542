#include "bindings/addresses.h"

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/parts.h"
#include "core/dlpack.h"

namespace py = pybind11;

namespace lago::bindings {
namespace {

// torch's way to read a tensor without a Python call for each of its properties; null before torch 2.10.
struct TensorReader {
  py::handle type;
  const lago::DlpackExchangeApi* api = nullptr;
};

TensorReader MakeTensorReader() {
  TensorReader reader;
  reader.type = py::object(py::module_::import("torch").attr("Tensor")).release();
  const py::object capsule = py::getattr(reader.type, "__dlpack_c_exchange_api__", py::none());
  if (capsule.is_none()) return reader;
  auto* api =
      static_cast<const lago::DlpackExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  while (api != nullptr && api->major_version != lago::kDlpackMajorVersion) api = api->older;
  reader.api = api;
  return reader;
}

bool IsContiguous(const lago::DlpackTensor& t) {
  std::int64_t stride = 1;
  bool packed = true;
  for (std::int32_t d = t.ndim - 1; d >= 0; --d) {
    if (t.shape[d] == 0) return true;
    packed = packed && (t.shape[d] == 1 || t.strides == nullptr || t.strides[d] == stride);
    stride *= t.shape[d];
  }
  return packed;
}

bool Fits(const lago::DlpackTensor& t, char kind, std::int64_t rows, std::int64_t width) {
  const auto is = [&](lago::DlpackCode code, int bits) {
    return t.code == static_cast<std::uint8_t>(code) && t.bits == bits && t.lanes == 1;
  };
  const bool per_element = t.ndim == 2 && t.shape[0] == rows && t.shape[1] == width;
  const bool per_row = t.ndim == 1 && t.shape[0] == rows;
  if (t.device_type != lago::kDlpackCpu || !IsContiguous(t)) return false;
  switch (kind) {
    case 'E':
      return per_element && is(lago::DlpackCode::kFloat, 32);
    case 'R':
      return per_row && is(lago::DlpackCode::kFloat, 32);
    case 'W':
      return t.ndim == 1 && t.shape[0] == width && is(lago::DlpackCode::kFloat, 32);
    case 'S':
      return t.ndim == 0 && is(lago::DlpackCode::kFloat, 32);
    case 'I':
      return per_row && is(lago::DlpackCode::kInt, 64);
    case 'M':
      return per_element && is(lago::DlpackCode::kBool, 8);
    default:
      throw std::invalid_argument(std::string("kinds: no kind of tensor is called ") + kind);
  }
}

std::optional<std::vector<std::uintptr_t>> Addresses(const py::tuple& tensors, std::string_view kinds,
                                                     std::int64_t rows, std::int64_t width) {
  std::vector<std::uintptr_t> addresses(tensors.size());
  if (!ReadAddresses(tensors, kinds, rows, width, addresses.data())) return std::nullopt;
  return addresses;
}

}  // namespace

bool ReadAddresses(const py::tuple& tensors, std::string_view kinds, std::int64_t rows, std::int64_t width,
                   std::uintptr_t* addresses) {
  if (tensors.size() != kinds.size()) throw std::invalid_argument("kinds: expected one for each tensor");
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<TensorReader> once;
  const TensorReader& reader = once.call_once_and_store_result(MakeTensorReader).get_stored();
  for (std::size_t i = 0; i < kinds.size(); ++i) {
    PyObject* object = PyTuple_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i));
    addresses[i] = 0;
    if (object == Py_None) continue;
    if (kinds[i] == 'A') {
      addresses[i] = PyLong_AsUnsignedLongLong(object);
      if (PyErr_Occurred() != nullptr) throw py::error_already_set();
      continue;
    }
    lago::DlpackTensor t;
    if (reader.api == nullptr) return false;
    if (!PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(reader.type.ptr()))) return false;
    if (reader.api->tensor_from_py_object(object, &t) != 0) {
      PyErr_Clear();  // who reads it by other means says what is wrong with it
      return false;
    }
    if (!Fits(t, kinds[i], rows, width)) return false;
    addresses[i] = reinterpret_cast<std::uintptr_t>(t.data) + t.byte_offset;
  }
  return true;
}

void BindAddresses(py::module_& m) {
  m.def("addresses", &Addresses, py::arg("tensors"), py::arg("kinds"), py::arg("rows"), py::arg("width"));
}

}  // namespace lago::bindings
