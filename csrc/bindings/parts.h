// The parts of the native module: each adds its functions and classes.
#ifndef LAGO_BINDINGS_PARTS_H_
#define LAGO_BINDINGS_PARTS_H_

#include <pybind11/pybind11.h>

namespace lago::bindings {

void BindAddresses(pybind11::module_& m);
void BindOps(pybind11::module_& m);
void BindUpdate(pybind11::module_& m);
void BindLatentCache(pybind11::module_& m);
void BindClevrRobot(pybind11::module_& m);

}  // namespace lago::bindings

#endif  // LAGO_BINDINGS_PARTS_H_
