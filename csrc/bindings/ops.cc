// The ops: advantages, losses, the KL to the prior, and sampling. dtype, device and contiguity are checked in
// kernels/<op>/cpp_fused.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>

#include "bindings/addresses.h"
#include "bindings/parts.h"
#include "bindings/pointers.h"
#include "ops/gae.h"
#include "ops/ppo_kl_categorical.h"
#include "ops/ppo_kl_gaussian.h"
#include "ops/prior_kl.h"
#include "ops/sample.h"

namespace py = pybind11;

namespace lago::bindings {
namespace {

template <std::size_t first, std::size_t count, std::size_t n>
std::array<std::uintptr_t, count> Part(const std::array<std::uintptr_t, n>& all) {
  static_assert(first + count <= n);
  std::array<std::uintptr_t, count> part;
  std::copy_n(all.begin() + first, count, part.begin());
  return part;
}

// A loss's statistics, each to the address that is its own.
void WriteOutputs(const std::array<float, 7>& statistics, const std::array<std::uintptr_t, 7>& addresses) {
  for (std::size_t i = 0; i < statistics.size(); ++i) {
    *Pointer<float>(addresses[i], 1, "outputs") = statistics[i];
  }
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

lago::PpoCoefficients PpoCoefficientsAt(const std::array<std::uintptr_t, 6>& at) {
  const float no_clip = std::numeric_limits<float>::infinity();
  return {Scalar(at[0], "clip_range"),        Scalar(at[1], "ent_coef"),
          Scalar(at[2], "vf_coef"),           Scalar(at[3], "kl_coef"),
          Scalar(at[4], "prior_temperature"), at[5] == 0 ? no_clip : Scalar(at[5], "clip_range_vf")};
}

// `tensors`: inputs, coefficients, gradients and outputs. False, and nothing is done, where ReadAddresses
// says so.
bool PpoKlGaussian(const py::tuple& tensors, std::string_view kinds, std::int64_t rows, std::int64_t dims,
                   bool log_std_per_row, bool prior_log_std_per_row, bool prior_policy,
                   bool normalize_advantage, int lanes, int threads) {
  std::array<std::uintptr_t, 28> all;
  if (tensors.size() != all.size()) throw std::invalid_argument("tensors: expected 28 of them");
  if (!ReadAddresses(tensors, kinds, rows, dims, all.data())) return false;
  const auto inputs = Part<0, 12>(all);
  const auto grads = Part<18, 3>(all);
  const lago::GaussianShape shape{Count(rows, "rows"), Count(dims, "dims"), log_std_per_row,
                                  prior_log_std_per_row};
  if (shape.dims == 0) throw std::invalid_argument("dims: expected at least one action dimension");
  const std::size_t b = shape.rows, n = shape.rows * shape.dims;
  const std::size_t policy_stds = log_std_per_row ? n : shape.dims;
  const std::size_t prior_stds = prior_log_std_per_row ? n : shape.dims;
  const lago::GaussianInputs in{
      Pointer<const float>(inputs[0], n, "mean"),
      Pointer<const float>(inputs[1], policy_stds, "log_std"),
      Pointer<const float>(inputs[3], n, "actions"),
      Pointer<const float>(inputs[9], n, "prior_mean"),
      Pointer<const float>(inputs[10], prior_stds, "prior_log_std"),
      {Pointer<const float>(inputs[2], b, "values"), Pointer<const float>(inputs[4], b, "old_log_prob"),
       Pointer<const float>(inputs[5], b, "advantages"), Pointer<const float>(inputs[6], b, "returns"),
       Pointer<const float>(inputs[7], b, "old_values"), Pointer<const float>(inputs[8], b, "weight"),
       Pointer<float>(grads[2], b, "values_grad"), PointerOrNull<const float>(inputs[11], b, "kl_weight")}};
  const lago::PpoCoefficients c = PpoCoefficientsAt(Part<12, 6>(all));
  std::array<float, 7> statistics;
  const lago::GaussianOutputs out{statistics.data(), Pointer<float>(grads[0], n, "mean_grad"),
                                  Pointer<float>(grads[1], policy_stds, "log_std_grad")};
  {
    py::gil_scoped_release released;
    lago::UnsafePpoKlGaussian(in, c, out, shape, {prior_policy, normalize_advantage, lanes, threads});
  }
  WriteOutputs(statistics, Part<21, 7>(all));
  return true;
}

bool PpoKlCategorical(const py::tuple& tensors, std::string_view kinds, std::int64_t rows,
                      std::int64_t actions, bool prior_policy, bool normalize_advantage, int lanes,
                      int threads) {
  std::array<std::uintptr_t, 26> all;
  if (tensors.size() != all.size()) throw std::invalid_argument("tensors: expected 26 of them");
  if (!ReadAddresses(tensors, kinds, rows, actions, all.data())) return false;
  const auto inputs = Part<0, 11>(all);
  const auto grads = Part<17, 2>(all);
  const lago::CategoricalShape shape{Count(rows, "rows"), Count(actions, "actions")};
  if (shape.actions == 0) throw std::invalid_argument("logits: expected at least one action");
  const std::size_t b = shape.rows, n = shape.rows * shape.actions;
  const lago::CategoricalInputs in{
      Pointer<const float>(inputs[0], n, "logits"),
      Pointer<const std::int64_t>(inputs[2], b, "actions"),
      Pointer<const float>(inputs[8], n, "prior_log_probs"),
      PointerOrNull<const std::uint8_t>(inputs[9], n, "action_mask"),
      {Pointer<const float>(inputs[1], b, "values"), Pointer<const float>(inputs[3], b, "old_log_prob"),
       Pointer<const float>(inputs[4], b, "advantages"), Pointer<const float>(inputs[5], b, "returns"),
       Pointer<const float>(inputs[6], b, "old_values"), Pointer<const float>(inputs[7], b, "weight"),
       Pointer<float>(grads[1], b, "values_grad"), PointerOrNull<const float>(inputs[10], b, "kl_weight")}};
  const lago::PpoCoefficients c = PpoCoefficientsAt(Part<11, 6>(all));
  std::array<float, 7> statistics;
  const lago::CategoricalOutputs out{statistics.data(), Pointer<float>(grads[0], n, "logits_grad")};
  bool in_range;
  {
    py::gil_scoped_release released;
    in_range =
        lago::UnsafePpoKlCategorical(in, c, out, shape, {prior_policy, normalize_advantage, lanes, threads});
  }
  if (!in_range) {
    throw std::invalid_argument("actions: expected numbers from 0 to " + std::to_string(actions - 1));
  }
  WriteOutputs(statistics, Part<19, 7>(all));
  return true;
}

void PriorKlCategorical(std::uintptr_t logits, std::uintptr_t prior_log_probs, std::uintptr_t action_mask,
                        std::uintptr_t kl, std::uintptr_t logits_grad, std::int64_t rows,
                        std::int64_t actions, std::uintptr_t prior_temperature, bool prior_policy,
                        int lanes) {
  const std::size_t b = Count(rows, "rows"), a = Count(actions, "actions"), n = b * a;
  if (a == 0) throw std::invalid_argument("logits: expected at least one action");
  const lago::CategoricalKl task{Pointer<const float>(logits, n, "logits"),
                                 Pointer<const float>(prior_log_probs, n, "prior_log_probs"),
                                 PointerOrNull<const std::uint8_t>(action_mask, n, "action_mask"),
                                 Pointer<float>(kl, b, "kl"),
                                 PointerOrNull<float>(logits_grad, n, "logits_grad"),
                                 b,
                                 a};
  const lago::PriorKlOptions options{Scalar(prior_temperature, "prior_temperature"), prior_policy, lanes};
  py::gil_scoped_release released;
  lago::UnsafePriorKlCategorical(task, options);
}

void PriorKlGaussian(const std::array<std::uintptr_t, 4>& inputs, std::uintptr_t kl, std::uintptr_t mean_grad,
                     std::uintptr_t log_std_grad, std::int64_t rows, std::int64_t dims, bool log_std_per_row,
                     bool prior_log_std_per_row, std::uintptr_t prior_temperature, bool prior_policy,
                     int lanes) {
  const std::size_t b = Count(rows, "rows"), d = Count(dims, "dims"), n = b * d;
  const lago::GaussianKl task{Pointer<const float>(inputs[0], n, "mean"),
                              Pointer<const float>(inputs[1], log_std_per_row ? n : d, "log_std"),
                              Pointer<const float>(inputs[2], n, "prior_mean"),
                              Pointer<const float>(inputs[3], prior_log_std_per_row ? n : d, "prior_log_std"),
                              Pointer<float>(kl, b, "kl"),
                              PointerOrNull<float>(mean_grad, n, "mean_grad"),
                              PointerOrNull<float>(log_std_grad, n, "log_std_grad"),
                              b,
                              d,
                              log_std_per_row,
                              prior_log_std_per_row};
  if ((task.mean_grad == nullptr) != (task.log_std_grad == nullptr)) {
    throw std::invalid_argument("log_std_grad: expected with mean_grad or not at all");
  }
  const lago::PriorKlOptions options{Scalar(prior_temperature, "prior_temperature"), prior_policy, lanes};
  py::gil_scoped_release released;
  lago::UnsafePriorKlGaussian(task, options);
}

lago::SampleState StateAt(std::uintptr_t address) {
  const auto* state = Pointer<const std::int64_t>(address, 2, "state");
  return {state[0], state[1]};
}

void SampleCategorical(const std::array<std::uintptr_t, 3>& inputs,
                       const std::array<std::uintptr_t, 4>& outputs, std::int64_t rows, std::int64_t actions,
                       std::uintptr_t state, std::uintptr_t prior_temperature, bool prior_policy) {
  const std::size_t b = Count(rows, "rows"), a = Count(actions, "actions"), n = b * a;
  if (a == 0) throw std::invalid_argument("logits: expected at least one action");
  const lago::CategoricalSample task{Pointer<const float>(inputs[0], n, "logits"),
                                     PointerOrNull<const float>(inputs[1], n, "prior_log_probs"),
                                     PointerOrNull<const std::uint8_t>(inputs[2], n, "action_mask"),
                                     Pointer<std::int64_t>(outputs[0], b, "actions"),
                                     Pointer<float>(outputs[1], b, "log_prob"),
                                     Pointer<float>(outputs[2], b, "entropy"),
                                     PointerOrNull<float>(outputs[3], b, "prior_kl"),
                                     b,
                                     a};
  if (task.prior_log_probs != nullptr && task.prior_kl == nullptr && b > 0) {
    throw std::invalid_argument("prior_kl: expected with a prior");
  }
  const lago::SampleOptions options{Scalar(prior_temperature, "prior_temperature"), prior_policy};
  const lago::SampleState at = StateAt(state);
  py::gil_scoped_release released;
  lago::UnsafeSampleCategorical(task, at, options);
}

void SampleGaussian(const std::array<std::uintptr_t, 4>& inputs, const std::array<std::uintptr_t, 4>& outputs,
                    std::int64_t rows, std::int64_t dims, bool log_std_per_row, bool prior_log_std_per_row,
                    std::uintptr_t state, std::uintptr_t prior_temperature, bool prior_policy) {
  const std::size_t b = Count(rows, "rows"), d = Count(dims, "dims"), n = b * d;
  const lago::GaussianSample task{
      Pointer<const float>(inputs[0], n, "mean"),
      Pointer<const float>(inputs[1], log_std_per_row ? n : d, "log_std"),
      PointerOrNull<const float>(inputs[2], n, "prior_mean"),
      PointerOrNull<const float>(inputs[3], prior_log_std_per_row ? n : d, "prior_log_std"),
      Pointer<float>(outputs[0], n, "actions"),
      Pointer<float>(outputs[1], b, "log_prob"),
      Pointer<float>(outputs[2], b, "entropy"),
      PointerOrNull<float>(outputs[3], b, "prior_kl"),
      b,
      d,
      log_std_per_row,
      prior_log_std_per_row};
  if (task.prior_mean != nullptr && (task.prior_log_std == nullptr || task.prior_kl == nullptr) && b > 0) {
    throw std::invalid_argument("prior_log_std: expected with prior_mean, and prior_kl too");
  }
  const lago::SampleOptions options{Scalar(prior_temperature, "prior_temperature"), prior_policy};
  const lago::SampleState at = StateAt(state);
  py::gil_scoped_release released;
  lago::UnsafeSampleGaussian(task, at, options);
}

}  // namespace

void BindOps(py::module_& m) {
  m.def("gae", &Gae, py::arg("rewards_ptr"), py::arg("values_ptr"), py::arg("next_values_ptr"),
        py::arg("terminated_ptr"), py::arg("truncated_ptr"), py::arg("valid_ptr"), py::arg("advantages_ptr"),
        py::arg("returns_ptr"), py::arg("n_steps"), py::arg("n_envs"), py::arg("gamma"),
        py::arg("gae_lambda"));
  m.def("ppo_kl_gaussian", &PpoKlGaussian, py::arg("tensors"), py::arg("kinds"), py::arg("rows"),
        py::arg("dims"), py::arg("log_std_per_row"), py::arg("prior_log_std_per_row"),
        py::arg("prior_policy"), py::arg("normalize_advantage"), py::arg("lanes"), py::arg("threads"));
  m.def("ppo_kl_categorical", &PpoKlCategorical, py::arg("tensors"), py::arg("kinds"), py::arg("rows"),
        py::arg("actions"), py::arg("prior_policy"), py::arg("normalize_advantage"), py::arg("lanes"),
        py::arg("threads"));
  m.def("prior_kl_categorical", &PriorKlCategorical, py::arg("logits_ptr"), py::arg("prior_log_probs_ptr"),
        py::arg("action_mask_ptr"), py::arg("kl_ptr"), py::arg("logits_grad_ptr"), py::arg("rows"),
        py::arg("actions"), py::arg("prior_temperature_ptr"), py::arg("prior_policy"), py::arg("lanes"));
  m.def("prior_kl_gaussian", &PriorKlGaussian, py::arg("inputs"), py::arg("kl_ptr"), py::arg("mean_grad_ptr"),
        py::arg("log_std_grad_ptr"), py::arg("rows"), py::arg("dims"), py::arg("log_std_per_row"),
        py::arg("prior_log_std_per_row"), py::arg("prior_temperature_ptr"), py::arg("prior_policy"),
        py::arg("lanes"));
  m.def("sample_categorical", &SampleCategorical, py::arg("inputs"), py::arg("outputs"), py::arg("rows"),
        py::arg("actions"), py::arg("state_ptr"), py::arg("prior_temperature_ptr"), py::arg("prior_policy"));
  m.def("sample_gaussian", &SampleGaussian, py::arg("inputs"), py::arg("outputs"), py::arg("rows"),
        py::arg("dims"), py::arg("log_std_per_row"), py::arg("prior_log_std_per_row"), py::arg("state_ptr"),
        py::arg("prior_temperature_ptr"), py::arg("prior_policy"));
  m.def(
      "philox",
      [](std::uint32_t row, std::uint32_t block, std::int64_t seed, std::int64_t step) {
        return lago::Philox(row, block, {seed, step});
      },
      py::arg("row"), py::arg("block"), py::arg("seed"), py::arg("step"));
}

}  // namespace lago::bindings
