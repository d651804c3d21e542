// The native module. Nothing outside this folder knows Python: a binding turns addresses into pointers,
// refuses what would read out of bounds, and drops the GIL.
#include "bindings/parts.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native CPU kernels; reached through lago_fast.ops, which checks the arguments.";
  lago::bindings::BindAddresses(m);
  lago::bindings::BindOps(m);
  lago::bindings::BindUpdate(m);
  lago::bindings::BindLatentCache(m);
  lago::bindings::BindClevrRobot(m);
}
