// How the losses read tensors: their addresses, without a Python call for each property of each.
#ifndef LAGO_BINDINGS_ADDRESSES_H_
#define LAGO_BINDINGS_ADDRESSES_H_

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string_view>

namespace lago::bindings {

// Writes the address of each tensor, 0 for a None. False where one is not of its kind, or torch has no such
// reader. Kinds, a letter for each: E float32 [rows, width], R float32 [rows], W float32 [width], S float32
// [], I int64 [rows], M bool [rows, width], A not a tensor but an address.
bool ReadAddresses(const pybind11::tuple& tensors, std::string_view kinds, std::int64_t rows,
                   std::int64_t width, std::uintptr_t* addresses);

}  // namespace lago::bindings

#endif  // LAGO_BINDINGS_ADDRESSES_H_
