// From addresses and counts that Python hands over to pointers; what would read out of bounds is refused.
#ifndef LAGO_BINDINGS_POINTERS_H_
#define LAGO_BINDINGS_POINTERS_H_

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace lago::bindings {

// The address of an array of `count` elements, which is 0 in torch when there are none.
template <typename T>
T* Pointer(std::uintptr_t address, std::size_t count, const char* name) {
  if (address == 0 && count > 0) {
    throw std::invalid_argument(std::string(name) + ": null address of an array that is not empty");
  }
  if (address % alignof(T) != 0) throw std::invalid_argument(std::string(name) + ": misaligned address");
  return reinterpret_cast<T*>(address);
}

inline std::size_t Count(std::int64_t count, const char* name) {
  if (count < 0) throw std::invalid_argument(std::string(name) + ": negative count");
  return static_cast<std::size_t>(count);
}

// The number at the address of a 0-D tensor.
inline float Scalar(std::uintptr_t address, const char* name) {
  return *Pointer<const float>(address, 1, name);
}

// The same, or nothing at the address 0.
template <typename T>
T* PointerOrNull(std::uintptr_t address, std::size_t count, const char* name) {
  return address == 0 ? nullptr : Pointer<T>(address, count, name);
}

}  // namespace lago::bindings

#endif  // LAGO_BINDINGS_POINTERS_H_
