// The CUDA part of the bindings. It turns addresses into pointers, refuses counts and addresses that would be
// read out of bounds, drops the GIL, and raises what CUDA reports; dtype, device, shape and contiguity are
// checked in kernels/<op>/cuda_fused.py.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/gae.h"
#include "cuda/ppo.h"
#include "cuda/ppo_kl_categorical.h"
#include "cuda/ppo_kl_gaussian.h"
#include "cuda/prior_kl.h"
#include "cuda/sample.h"

namespace py = pybind11;

namespace {

using lago::cuda::Type;
using Address = std::uintptr_t;

// Where a call runs: the device's number and torch's current stream on it.
using Place = std::array<std::int64_t, 2>;

Type TypeOf(int type) {
  if (type < 0 || type > 2) throw std::invalid_argument("type: expected 0, 1 or 2");
  return static_cast<Type>(type);
}

std::size_t SizeOf(Type type) { return type == Type::kFloat32 ? 4 : 2; }

// The address of an array of `count` elements, which is 0 in torch when there are none.
void* Array(Address address, std::int64_t count, std::size_t element, const char* name) {
  if (count < 0) throw std::invalid_argument(std::string(name) + ": negative count");
  if (address == 0 && count > 0) {
    throw std::invalid_argument(std::string(name) + ": null address of an array that is not empty");
  }
  if (address % element != 0) throw std::invalid_argument(std::string(name) + ": misaligned address");
  return reinterpret_cast<void*>(address);
}

template <typename T>
T* Pointer(Address address, std::int64_t count, const char* name) {
  return static_cast<T*>(Array(address, count, sizeof(T), name));
}

// The same where 0 says that there is none.
template <typename T>
T* Optional(Address address, std::int64_t count, const char* name) {
  return address == 0 ? nullptr : Pointer<T>(address, count, name);
}

void* OptionalArray(Address address, std::int64_t count, std::size_t element, const char* name) {
  return address == 0 ? nullptr : Array(address, count, element, name);
}

std::int64_t Counted(std::int64_t count, std::int64_t least, const char* name) {
  if (count < least) throw std::invalid_argument(std::string(name) + ": too small a count");
  return count;
}

void Require(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// Runs `launch` on the place's device and stream, without the GIL, and raises its error.
template <typename F>
void RunOn(const Place& place, F&& launch) {
  cudaError_t error = cudaSuccess;
  {
    py::gil_scoped_release released;
    const int device = static_cast<int>(place[0]);
    int previous = 0;
    error = cudaGetDevice(&previous);
    if (error == cudaSuccess && device != previous) error = cudaSetDevice(device);
    if (error == cudaSuccess) {
      error = launch(reinterpret_cast<cudaStream_t>(static_cast<Address>(place[1])));
      if (device != previous) {
        const cudaError_t restored = cudaSetDevice(previous);
        error = error == cudaSuccess ? restored : error;
      }
    }
  }
  Require(error);
}

// seven inputs, of which the last may be none, then the gradient of values
using Columns = std::array<std::pair<Address, int>, 8>;

lago::cuda::Ppo PpoOf(const Columns& columns, const std::array<Address, 6>& coefficients, Address statistics,
                      Address workspace, std::int64_t workspace_floats, std::int64_t needed_floats,
                      std::int64_t rows, bool prior_policy, bool normalize_advantage) {
  static constexpr const char* kNames[] = {"values",     "old_log_prob", "advantages", "returns",
                                           "old_values", "weight",       "kl_weight",  "values_grad"};
  static constexpr const char* kCoefficients[] = {"clip_range", "ent_coef",          "vf_coef",
                                                  "kl_coef",    "prior_temperature", "clip_range_vf"};
  if (workspace_floats < needed_floats) throw std::invalid_argument("workspace: too small");
  lago::cuda::Ppo ppo{};
  lago::cuda::Column* inputs[] = {&ppo.values,     &ppo.old_log_prob, &ppo.advantages, &ppo.returns,
                                  &ppo.old_values, &ppo.weight,       &ppo.kl_weight};
  ppo.float_columns = true;
  for (int i = 0; i < 7; ++i) {
    const Type type = TypeOf(columns[i].second);
    if (i == 6 && columns[i].first == 0) continue;
    *inputs[i] = {Array(columns[i].first, rows, SizeOf(type), kNames[i]), type};
    ppo.float_columns = ppo.float_columns && type == Type::kFloat32;
  }
  const Type type = TypeOf(columns[7].second);
  ppo.values_grad = {Array(columns[7].first, rows, SizeOf(type), kNames[7]), type};
  const float** pointers[] = {&ppo.clip_range, &ppo.ent_coef,          &ppo.vf_coef,
                              &ppo.kl_coef,    &ppo.prior_temperature, &ppo.clip_range_vf};
  for (int i = 0; i < 5; ++i) *pointers[i] = Pointer<const float>(coefficients[i], 1, kCoefficients[i]);
  ppo.clip_range_vf = Optional<const float>(coefficients[5], 1, kCoefficients[5]);
  ppo.statistics = Pointer<float>(statistics, lago::cuda::kStatistics, "statistics");
  ppo.workspace = Pointer<float>(workspace, workspace_floats, "workspace");
  ppo.rows = rows;
  ppo.prior_policy = prior_policy;
  ppo.normalize_advantage = normalize_advantage;
  return ppo;
}

void PpoKlCategorical(const std::array<Address, 5>& arrays, int type, const Columns& columns,
                      const std::array<Address, 6>& coefficients, Address statistics, Address workspace,
                      std::int64_t workspace_floats, std::int64_t rows, std::int64_t n_actions,
                      bool prior_policy, bool normalize_advantage, const Place& place) {
  const std::int64_t n = Counted(rows, 0, "rows") * Counted(n_actions, 1, "n_actions");
  lago::cuda::PpoKlCategorical call{};
  call.ppo = PpoOf(columns, coefficients, statistics, workspace, workspace_floats,
                   lago::cuda::PpoWorkspaceFloats(rows, lago::cuda::kRowTerms), rows, prior_policy,
                   normalize_advantage);
  call.type = TypeOf(type);
  call.logits = Array(arrays[0], n, SizeOf(call.type), "logits");
  call.prior_log_probs = Array(arrays[1], n, SizeOf(call.type), "prior_log_probs");
  call.action_mask = Optional<const std::uint8_t>(arrays[2], n, "action_mask");
  call.actions = Pointer<const std::int64_t>(arrays[3], rows, "actions");
  call.logits_grad = Array(arrays[4], n, SizeOf(call.type), "logits_grad");
  call.n_actions = n_actions;
  RunOn(place, [&](cudaStream_t stream) { return lago::cuda::LaunchPpoKlCategorical(call, stream); });
}

void PpoKlGaussian(const std::array<Address, 7>& arrays, int type, const Columns& columns,
                   const std::array<Address, 6>& coefficients, Address statistics, Address workspace,
                   std::int64_t workspace_floats, std::int64_t rows, std::int64_t dims, bool log_std_per_row,
                   bool prior_log_std_per_row, bool prior_policy, bool normalize_advantage,
                   const Place& place) {
  const std::int64_t n = Counted(rows, 0, "rows") * Counted(dims, 1, "dims");
  if (dims > lago::cuda::kMaxDims) throw std::invalid_argument("dims: too many");
  const std::int64_t stds = log_std_per_row ? n : dims, prior_stds = prior_log_std_per_row ? n : dims;
  const std::int64_t sums = lago::cuda::GaussianColumns(dims, log_std_per_row);
  lago::cuda::PpoKlGaussian call{};
  call.ppo = PpoOf(columns, coefficients, statistics, workspace, workspace_floats,
                   lago::cuda::PpoWorkspaceFloats(rows, sums), rows, prior_policy, normalize_advantage);
  call.type = TypeOf(type);
  const std::size_t element = SizeOf(call.type);
  call.mean = Array(arrays[0], n, element, "mean");
  call.log_std = Array(arrays[1], stds, element, "log_std");
  call.actions = Array(arrays[2], n, element, "actions");
  call.prior_mean = Array(arrays[3], n, element, "prior_mean");
  call.prior_log_std = Array(arrays[4], prior_stds, element, "prior_log_std");
  call.mean_grad = Array(arrays[5], n, element, "mean_grad");
  call.log_std_grad = Array(arrays[6], stds, element, "log_std_grad");
  call.dims = dims;
  call.log_std_per_row = log_std_per_row;
  call.prior_log_std_per_row = prior_log_std_per_row;
  RunOn(place, [&](cudaStream_t stream) { return lago::cuda::LaunchPpoKlGaussian(call, stream); });
}

void PriorKlCategorical(const std::array<Address, 6>& arrays, int type, std::int64_t rows,
                        std::int64_t n_actions, bool prior_policy, const Place& place) {
  const std::int64_t n = Counted(rows, 0, "rows") * Counted(n_actions, 1, "n_actions");
  lago::cuda::PriorKlCategorical call{};
  call.type = TypeOf(type);
  call.logits = Array(arrays[0], n, SizeOf(call.type), "logits");
  call.prior_log_probs = Array(arrays[1], n, SizeOf(call.type), "prior_log_probs");
  call.action_mask = Optional<const std::uint8_t>(arrays[2], n, "action_mask");
  call.prior_temperature = Pointer<const float>(arrays[3], 1, "prior_temperature");
  call.kl = Pointer<float>(arrays[4], rows, "kl");
  call.logits_grad = OptionalArray(arrays[5], n, SizeOf(call.type), "logits_grad");
  call.rows = rows;
  call.n_actions = n_actions;
  call.prior_policy = prior_policy;
  RunOn(place, [&](cudaStream_t stream) { return lago::cuda::LaunchPriorKlCategorical(call, stream); });
}

void PriorKlGaussian(const std::array<Address, 8>& arrays, int type, std::int64_t rows, std::int64_t dims,
                     bool log_std_per_row, bool prior_log_std_per_row, bool prior_policy,
                     const Place& place) {
  const std::int64_t n = Counted(rows, 0, "rows") * Counted(dims, 1, "dims");
  lago::cuda::PriorKlGaussian call{};
  call.type = TypeOf(type);
  const std::size_t element = SizeOf(call.type);
  call.mean = Array(arrays[0], n, element, "mean");
  call.log_std = Array(arrays[1], log_std_per_row ? n : dims, element, "log_std");
  call.prior_mean = Array(arrays[2], n, element, "prior_mean");
  call.prior_log_std = Array(arrays[3], prior_log_std_per_row ? n : dims, element, "prior_log_std");
  call.prior_temperature = Pointer<const float>(arrays[4], 1, "prior_temperature");
  call.kl = Pointer<float>(arrays[5], rows, "kl");
  call.mean_grad = OptionalArray(arrays[6], n, element, "mean_grad");
  call.log_std_grad = OptionalArray(arrays[7], n, element, "log_std_grad");
  if ((call.mean_grad == nullptr) != (call.log_std_grad == nullptr)) {
    throw std::invalid_argument("mean_grad: expected both gradients or none");
  }
  call.rows = rows;
  call.dims = dims;
  call.log_std_per_row = log_std_per_row;
  call.prior_log_std_per_row = prior_log_std_per_row;
  call.prior_policy = prior_policy;
  RunOn(place, [&](cudaStream_t stream) { return lago::cuda::LaunchPriorKlGaussian(call, stream); });
}

void SampleCategorical(const std::array<Address, 9>& arrays, int type, std::int64_t rows,
                       std::int64_t n_actions, bool prior_policy, const Place& place) {
  const std::int64_t n = Counted(rows, 0, "rows") * Counted(n_actions, 1, "n_actions");
  lago::cuda::SampleCategorical call{};
  call.type = TypeOf(type);
  call.logits = Array(arrays[0], n, SizeOf(call.type), "logits");
  call.prior_log_probs = OptionalArray(arrays[1], n, SizeOf(call.type), "prior_log_probs");
  call.action_mask = Optional<const std::uint8_t>(arrays[2], n, "action_mask");
  call.prior_temperature = Pointer<const float>(arrays[3], 1, "prior_temperature");
  call.state = Pointer<const std::int64_t>(arrays[4], 2, "state");
  call.actions = Pointer<std::int64_t>(arrays[5], rows, "actions");
  call.log_prob = Pointer<float>(arrays[6], rows, "log_prob");
  call.entropy = Pointer<float>(arrays[7], rows, "entropy");
  call.prior_kl = Optional<float>(arrays[8], rows, "prior_kl");
  call.rows = rows;
  call.n_actions = n_actions;
  call.prior_policy = prior_policy;
  RunOn(place, [&](cudaStream_t stream) { return lago::cuda::LaunchSampleCategorical(call, stream); });
}

void SampleGaussian(const std::array<Address, 10>& arrays, int type, std::int64_t rows, std::int64_t dims,
                    bool log_std_per_row, bool prior_log_std_per_row, bool prior_policy, const Place& place) {
  const std::int64_t n = Counted(rows, 0, "rows") * Counted(dims, 1, "dims");
  lago::cuda::SampleGaussian call{};
  call.type = TypeOf(type);
  const std::size_t element = SizeOf(call.type);
  call.mean = Array(arrays[0], n, element, "mean");
  call.log_std = Array(arrays[1], log_std_per_row ? n : dims, element, "log_std");
  call.prior_mean = OptionalArray(arrays[2], n, element, "prior_mean");
  call.prior_log_std = OptionalArray(arrays[3], prior_log_std_per_row ? n : dims, element, "prior_log_std");
  call.prior_temperature = Pointer<const float>(arrays[4], 1, "prior_temperature");
  call.state = Pointer<const std::int64_t>(arrays[5], 2, "state");
  call.actions = Pointer<float>(arrays[6], n, "actions");
  call.log_prob = Pointer<float>(arrays[7], rows, "log_prob");
  call.entropy = Pointer<float>(arrays[8], rows, "entropy");
  call.prior_kl = Optional<float>(arrays[9], rows, "prior_kl");
  if (call.prior_kl != nullptr && (call.prior_mean == nullptr || call.prior_log_std == nullptr)) {
    throw std::invalid_argument("prior_kl: expected a prior");
  }
  call.rows = rows;
  call.dims = dims;
  call.log_std_per_row = log_std_per_row;
  call.prior_log_std_per_row = prior_log_std_per_row;
  call.prior_policy = prior_policy;
  RunOn(place, [&](cudaStream_t stream) { return lago::cuda::LaunchSampleGaussian(call, stream); });
}

void Gae(const std::array<Address, 8>& arrays, std::int64_t n_steps, std::int64_t n_envs, double gamma,
         double decay, const Place& place) {
  const std::int64_t n = Counted(n_steps, 0, "n_steps") * Counted(n_envs, 0, "n_envs");
  lago::cuda::Gae call{};
  call.rewards = Pointer<const float>(arrays[0], n, "rewards");
  call.values = Pointer<const float>(arrays[1], n, "values");
  call.next_values = Pointer<const float>(arrays[2], n, "next_values");
  call.terminated = Pointer<const std::uint8_t>(arrays[3], n, "terminated");
  call.truncated = Pointer<const std::uint8_t>(arrays[4], n, "truncated");
  call.valid = Pointer<const std::uint8_t>(arrays[5], n, "valid");
  call.advantages = Pointer<float>(arrays[6], n, "advantages");
  call.returns = Pointer<float>(arrays[7], n, "returns");
  call.n_steps = n_steps;
  call.n_envs = n_envs;
  call.gamma = static_cast<float>(gamma);
  call.decay = static_cast<float>(decay);
  RunOn(place, [&](cudaStream_t stream) { return lago::cuda::LaunchGae(call, stream); });
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels; reached through lago_fast.ops, which checks the arguments.";
  m.attr("MAX_DIMS") = lago::cuda::kMaxDims;
  m.def("categorical_workspace",
        [](std::int64_t rows) { return lago::cuda::PpoWorkspaceFloats(rows, lago::cuda::kRowTerms); });
  m.def("gaussian_workspace", [](std::int64_t rows, std::int64_t dims, bool log_std_per_row) {
    return lago::cuda::PpoWorkspaceFloats(rows, lago::cuda::GaussianColumns(dims, log_std_per_row));
  });
  m.def("ppo_kl_categorical", &PpoKlCategorical, py::arg("arrays"), py::arg("type"), py::arg("columns"),
        py::arg("coefficients"), py::arg("statistics"), py::arg("workspace"), py::arg("workspace_floats"),
        py::arg("rows"), py::arg("n_actions"), py::arg("prior_policy"), py::arg("normalize_advantage"),
        py::arg("place"));
  m.def("ppo_kl_gaussian", &PpoKlGaussian, py::arg("arrays"), py::arg("type"), py::arg("columns"),
        py::arg("coefficients"), py::arg("statistics"), py::arg("workspace"), py::arg("workspace_floats"),
        py::arg("rows"), py::arg("dims"), py::arg("log_std_per_row"), py::arg("prior_log_std_per_row"),
        py::arg("prior_policy"), py::arg("normalize_advantage"), py::arg("place"));
  m.def("prior_kl_categorical", &PriorKlCategorical, py::arg("arrays"), py::arg("type"), py::arg("rows"),
        py::arg("n_actions"), py::arg("prior_policy"), py::arg("place"));
  m.def("prior_kl_gaussian", &PriorKlGaussian, py::arg("arrays"), py::arg("type"), py::arg("rows"),
        py::arg("dims"), py::arg("log_std_per_row"), py::arg("prior_log_std_per_row"),
        py::arg("prior_policy"), py::arg("place"));
  m.def("sample_categorical", &SampleCategorical, py::arg("arrays"), py::arg("type"), py::arg("rows"),
        py::arg("n_actions"), py::arg("prior_policy"), py::arg("place"));
  m.def("sample_gaussian", &SampleGaussian, py::arg("arrays"), py::arg("type"), py::arg("rows"),
        py::arg("dims"), py::arg("log_std_per_row"), py::arg("prior_log_std_per_row"),
        py::arg("prior_policy"), py::arg("place"));
  m.def("gae", &Gae, py::arg("arrays"), py::arg("n_steps"), py::arg("n_envs"), py::arg("gamma"),
        py::arg("decay"), py::arg("place"));
}
