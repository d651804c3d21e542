// The only file that knows Python. It turns addresses into pointers, refuses what would read out of
// bounds, and drops the GIL; dtype, device and contiguity are checked in kernels/<op>/cpp_fused.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "ops/gae.h"
#include "ops/ppo_kl_gaussian.h"

namespace py = pybind11;

namespace {

// The address of an array of `count` elements, which is 0 in torch when there are none.
template <typename T>
T* Pointer(std::uintptr_t address, std::size_t count, const char* name) {
  if (address == 0 && count > 0) {
    throw std::invalid_argument(std::string(name) + ": null address of an array that is not empty");
  }
  if (address % alignof(T) != 0) throw std::invalid_argument(std::string(name) + ": misaligned address");
  return reinterpret_cast<T*>(address);
}

std::size_t Count(std::int64_t count, const char* name) {
  if (count < 0) throw std::invalid_argument(std::string(name) + ": negative count");
  return static_cast<std::size_t>(count);
}

void Gae(std::uintptr_t rewards_ptr, std::uintptr_t values_ptr, std::uintptr_t next_values_ptr,
         std::uintptr_t terminated_ptr, std::uintptr_t truncated_ptr, std::uintptr_t valid_ptr,
         std::uintptr_t advantages_ptr, std::uintptr_t returns_ptr, std::int64_t n_steps, std::int64_t n_envs,
         double gamma, double gae_lambda) {
  const lago::GaeShape shape{Count(n_steps, "n_steps"), Count(n_envs, "n_envs")};
  const std::size_t n = shape.n_steps * shape.n_envs;
  const lago::GaeInputs in{Pointer<const float>(rewards_ptr, n, "rewards"),
                           Pointer<const float>(values_ptr, n, "values"),
                           Pointer<const float>(next_values_ptr, n, "next_values"),
                           Pointer<const std::uint8_t>(terminated_ptr, n, "terminated"),
                           Pointer<const std::uint8_t>(truncated_ptr, n, "truncated"),
                           Pointer<const std::uint8_t>(valid_ptr, n, "valid")};
  const lago::GaeOutputs out{Pointer<float>(advantages_ptr, n, "advantages"),
                             Pointer<float>(returns_ptr, n, "returns")};
  py::gil_scoped_release released;
  lago::UnsafeGae(in, out, shape, static_cast<float>(gamma), static_cast<float>(gae_lambda));
}

// The number at the address of a 0-D tensor.
float Scalar(std::uintptr_t address, const char* name) { return *Pointer<const float>(address, 1, name); }

void PpoKlGaussian(const std::array<std::uintptr_t, 11>& inputs,
                   const std::array<std::uintptr_t, 6>& coefficients,
                   const std::array<std::uintptr_t, 4>& outputs, std::int64_t rows, std::int64_t dims,
                   bool log_std_per_row, bool prior_log_std_per_row, bool prior_policy,
                   bool normalize_advantage, bool portable) {
  const lago::GaussianShape shape{Count(rows, "rows"), Count(dims, "dims"), log_std_per_row,
                                  prior_log_std_per_row};
  if (shape.dims == 0) throw std::invalid_argument("dims: expected at least one action dimension");
  const std::size_t b = shape.rows, n = shape.rows * shape.dims;
  const std::size_t policy_stds = log_std_per_row ? n : shape.dims;
  const std::size_t prior_stds = prior_log_std_per_row ? n : shape.dims;
  const lago::GaussianInputs in{Pointer<const float>(inputs[0], n, "mean"),
                                Pointer<const float>(inputs[1], policy_stds, "log_std"),
                                Pointer<const float>(inputs[2], b, "values"),
                                Pointer<const float>(inputs[3], n, "actions"),
                                Pointer<const float>(inputs[4], b, "old_log_prob"),
                                Pointer<const float>(inputs[5], b, "advantages"),
                                Pointer<const float>(inputs[6], b, "returns"),
                                Pointer<const float>(inputs[7], b, "old_values"),
                                Pointer<const float>(inputs[8], b, "weight"),
                                Pointer<const float>(inputs[9], n, "prior_mean"),
                                Pointer<const float>(inputs[10], prior_stds, "prior_log_std")};
  const float no_clip = std::numeric_limits<float>::infinity();
  const lago::GaussianCoefficients c{
      Scalar(coefficients[0], "clip_range"),
      Scalar(coefficients[1], "ent_coef"),
      Scalar(coefficients[2], "vf_coef"),
      Scalar(coefficients[3], "kl_coef"),
      Scalar(coefficients[4], "prior_temperature"),
      coefficients[5] == 0 ? no_clip : Scalar(coefficients[5], "clip_range_vf")};
  const lago::GaussianOutputs out{
      Pointer<float>(outputs[0], 7, "statistics"), Pointer<float>(outputs[1], n, "mean_grad"),
      Pointer<float>(outputs[2], policy_stds, "log_std_grad"), Pointer<float>(outputs[3], b, "values_grad")};
  py::gil_scoped_release released;
  lago::UnsafePpoKlGaussian(in, c, out, shape, {prior_policy, normalize_advantage, portable});
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native CPU kernels; reached through lago_fast.ops, which checks the arguments.";
  m.def("gae", &Gae, py::arg("rewards_ptr"), py::arg("values_ptr"), py::arg("next_values_ptr"),
        py::arg("terminated_ptr"), py::arg("truncated_ptr"), py::arg("valid_ptr"), py::arg("advantages_ptr"),
        py::arg("returns_ptr"), py::arg("n_steps"), py::arg("n_envs"), py::arg("gamma"),
        py::arg("gae_lambda"));
  m.def("ppo_kl_gaussian", &PpoKlGaussian, py::arg("inputs"), py::arg("coefficients"), py::arg("outputs"),
        py::arg("rows"), py::arg("dims"), py::arg("log_std_per_row"), py::arg("prior_log_std_per_row"),
        py::arg("prior_policy"), py::arg("normalize_advantage"), py::arg("portable"));
}
