// CLEVR-Robot's physics.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings/parts.h"
#include "bindings/pointers.h"
#include "clevr_robot/push.h"

namespace py = pybind11;

namespace lago::bindings {
namespace {

void ClevrPush(std::uintptr_t qpos_ptr, std::uintptr_t qvel_ptr, std::uintptr_t ctrl_ptr,
               std::uintptr_t substeps_ptr, std::uintptr_t diverged_ptr, std::int64_t rows, int threads) {
  const std::size_t n = Count(rows, "rows");
  const lago::ClevrScenes scenes{Pointer<double>(qpos_ptr, n * lago::kClevrPositions, "qpos"),
                                 Pointer<double>(qvel_ptr, n * lago::kClevrVelocities, "qvel"),
                                 Pointer<const double>(ctrl_ptr, n * 2, "ctrl"),
                                 Pointer<const std::int64_t>(substeps_ptr, n, "substeps"),
                                 Pointer<std::uint8_t>(diverged_ptr, n, "diverged"),
                                 n};
  py::gil_scoped_release released;
  lago::UnsafeClevrPush(scenes, threads);
}

}  // namespace

void BindClevrRobot(py::module_& m) {
  m.def("clevr_push", &ClevrPush, py::arg("qpos_ptr"), py::arg("qvel_ptr"), py::arg("ctrl_ptr"),
        py::arg("substeps_ptr"), py::arg("diverged_ptr"), py::arg("rows"), py::arg("threads"));
}

}  // namespace lago::bindings
