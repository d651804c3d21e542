// The only file that knows Python. It turns addresses into pointers, refuses what would read out of
// bounds, and drops the GIL; dtype, device and contiguity are checked in kernels/<op>/cpp_fused.py.
#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "clevr_robot/push.h"
#include "core/dlpack.h"
#include "latent_cache/hash.h"
#include "latent_cache/rows.h"
#include "latent_cache/table.h"
#include "ops/adam.h"
#include "ops/gae.h"
#include "ops/mlp.h"
#include "ops/ppo_kl_categorical.h"
#include "ops/ppo_kl_gaussian.h"
#include "ops/prior_kl.h"
#include "ops/sample.h"
#include "ops/take_rows.h"

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

// Addresses on their way through Python, which would take longer to make numbers of them than some losses
// take.
template <std::size_t n>
std::array<std::uintptr_t, n> Unpacked(const py::bytes& packed) {
  const std::string_view bytes = packed;
  std::array<std::uintptr_t, n> addresses;
  if (bytes.size() != sizeof(addresses)) {
    throw std::invalid_argument("addresses: expected " + std::to_string(n) + " of them");
  }
  std::memcpy(addresses.data(), bytes.data(), sizeof(addresses));
  return addresses;
}

template <std::size_t first, std::size_t count, std::size_t n>
std::array<std::uintptr_t, count> Part(const std::array<std::uintptr_t, n>& all) {
  static_assert(first + count <= n);
  std::array<std::uintptr_t, count> part;
  std::copy_n(all.begin() + first, count, part.begin());
  return part;
}

// The address of each tensor, 0 for a None, as bytes; nothing where one is not of its kind, or torch has no
// such reader. Kinds: E float32 [rows, width], R float32 [rows], W float32 [width], S float32 [], I int64
// [rows], M bool [rows, width].
py::object Addresses(const py::tuple& tensors, const std::string& kinds, std::int64_t rows,
                     std::int64_t width) {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<TensorReader> once;
  const TensorReader& reader = once.call_once_and_store_result(MakeTensorReader).get_stored();
  if (reader.api == nullptr) return py::none();
  if (tensors.size() != kinds.size()) throw std::invalid_argument("kinds: expected one for each tensor");
  std::vector<std::uintptr_t> addresses(tensors.size());
  for (std::size_t i = 0; i < kinds.size(); ++i) {
    PyObject* object = PyTuple_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i));
    std::uintptr_t address = 0;
    if (object != Py_None) {
      lago::DlpackTensor t;
      if (!PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(reader.type.ptr()))) return py::none();
      if (reader.api->tensor_from_py_object(object, &t) != 0) {
        PyErr_Clear();  // who reads it by other means says what is wrong with it
        return py::none();
      }
      if (!Fits(t, kinds[i], rows, width)) return py::none();
      address = reinterpret_cast<std::uintptr_t>(t.data) + t.byte_offset;
    }
    addresses[i] = address;
  }
  return py::bytes(reinterpret_cast<const char*>(addresses.data()),
                   addresses.size() * sizeof(std::uintptr_t));
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

// The same, or nothing at the address 0.
template <typename T>
T* PointerOrNull(std::uintptr_t address, std::size_t count, const char* name) {
  return address == 0 ? nullptr : Pointer<T>(address, count, name);
}

lago::PpoCoefficients PpoCoefficientsAt(const std::array<std::uintptr_t, 6>& at) {
  const float no_clip = std::numeric_limits<float>::infinity();
  return {Scalar(at[0], "clip_range"),        Scalar(at[1], "ent_coef"),
          Scalar(at[2], "vf_coef"),           Scalar(at[3], "kl_coef"),
          Scalar(at[4], "prior_temperature"), at[5] == 0 ? no_clip : Scalar(at[5], "clip_range_vf")};
}

// Of inputs, coefficients and gradients.
void PpoKlGaussian(const py::bytes& addresses, std::uintptr_t statistics, std::int64_t rows,
                   std::int64_t dims, bool log_std_per_row, bool prior_log_std_per_row, bool prior_policy,
                   bool normalize_advantage, int lanes, int threads) {
  const auto all = Unpacked<21>(addresses);
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
  const lago::GaussianOutputs out{Pointer<float>(statistics, 7, "statistics"),
                                  Pointer<float>(grads[0], n, "mean_grad"),
                                  Pointer<float>(grads[1], policy_stds, "log_std_grad")};
  py::gil_scoped_release released;
  lago::UnsafePpoKlGaussian(in, c, out, shape, {prior_policy, normalize_advantage, lanes, threads});
}

void PpoKlCategorical(const py::bytes& addresses, std::uintptr_t statistics, std::int64_t rows,
                      std::int64_t actions, bool prior_policy, bool normalize_advantage, int lanes,
                      int threads) {
  const auto all = Unpacked<19>(addresses);
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
  const lago::CategoricalOutputs out{Pointer<float>(statistics, 7, "statistics"),
                                     Pointer<float>(grads[0], n, "logits_grad")};
  bool in_range;
  {
    py::gil_scoped_release released;
    in_range =
        lago::UnsafePpoKlCategorical(in, c, out, shape, {prior_policy, normalize_advantage, lanes, threads});
  }
  if (!in_range) {
    throw std::invalid_argument("actions: expected numbers from 0 to " + std::to_string(actions - 1));
  }
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

// One step of Adam; returns the gradient's norm before it was scaled.
double Adam(const std::array<std::uintptr_t, 4>& block, std::int64_t n, double lr, double beta_1,
            double beta_2, double eps, double max_norm, double step, int lanes) {
  const std::size_t count = Count(n, "n");
  const lago::AdamBlock at{
      Pointer<float>(block[0], count, "parameter"), Pointer<float>(block[1], count, "grad"),
      Pointer<float>(block[2], count, "exp_avg"), Pointer<float>(block[3], count, "exp_avg_sq"), count};
  if (!(step >= 1.0)) throw std::invalid_argument("step: counted from 1");
  py::gil_scoped_release released;
  return lago::UnsafeAdam(at, {lr, beta_1, beta_2, eps, max_norm, step, lanes});
}

// Refuses rows that are not below `limit`.
const std::int64_t* Picked(std::uintptr_t address, std::size_t rows, std::size_t limit) {
  const auto* picked = Pointer<const std::int64_t>(address, rows, "picked");
  for (std::size_t r = 0; r < rows; ++r) {
    if (picked[r] < 0 || static_cast<std::size_t>(picked[r]) >= limit) {
      throw std::invalid_argument("picked: expected numbers from 0 to " + std::to_string(limit) + " - 1");
    }
  }
  return picked;
}

// Columns are (address to read, address to write, bytes of a row).
void TakeRows(const std::vector<std::tuple<std::uintptr_t, std::uintptr_t, std::int64_t>>& columns,
              std::uintptr_t picked, std::int64_t rows, std::int64_t limit) {
  const std::size_t n = Count(rows, "rows"), of = Count(limit, "limit");
  std::vector<lago::Column> at;
  for (const auto& [from, to, bytes] : columns) {
    const std::size_t width = Count(bytes, "bytes");
    at.push_back({Pointer<const std::uint8_t>(from, of * width, "from"),
                  Pointer<std::uint8_t>(to, n * width, "to"), width});
  }
  const std::int64_t* order = Picked(picked, n, of);
  py::gil_scoped_release released;
  lago::UnsafeTakeRows(at.data(), at.size(), order, n);
}

// Networks whose parameters and gradients stay where they are; each layer is (in, out, addresses of weight,
// bias, weight_grad and bias_grad).
class Networks {
 public:
  using Layer =
      std::tuple<std::int64_t, std::int64_t, std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t>;

  Networks(const std::vector<std::vector<Layer>>& networks, bool relu, int lanes)
      : options_{relu ? lago::Activation::kRelu : lago::Activation::kTanh, lanes, 1} {
    for (const auto& layers : networks) {
      lago::Mlp& mlp = networks_.emplace_back();
      for (const auto& [in, out, weight, bias, weight_grad, bias_grad] : layers) {
        const std::size_t i = Count(in, "in"), o = Count(out, "out");
        if (i == 0 || o == 0) throw std::invalid_argument("layers: expected a width of at least 1");
        if (!mlp.empty() && mlp.back().out != i) throw std::invalid_argument("layers: widths do not fit");
        mlp.push_back({i, o, Pointer<const float>(weight, i * o, "weight"),
                       Pointer<const float>(bias, o, "bias"),
                       PointerOrNull<float>(weight_grad, i * o, "weight_grad"),
                       PointerOrNull<float>(bias_grad, o, "bias_grad")});
        has_grads_ = has_grads_ && weight_grad != 0 && bias_grad != 0;
      }
      if (mlp.empty() || mlp.front().in != networks_.front().front().in) {
        throw std::invalid_argument("networks: expected layers, and inputs of one width");
      }
    }
    if (networks_.empty()) throw std::invalid_argument("networks: expected at least one");
  }

  std::size_t Workspace(std::int64_t rows) const {
    return lago::MlpWorkspace(networks_, Count(rows, "rows"));
  }

  void Forward(std::uintptr_t x, std::int64_t rows, std::uintptr_t workspace,
               const std::vector<std::uintptr_t>& outputs, int threads) const {
    const std::size_t n = Count(rows, "rows");
    const auto* in = Pointer<const float>(x, n * networks_.front().front().in, "x");
    auto* work = Pointer<float>(workspace, lago::MlpWorkspace(networks_, n), "workspace");
    const std::vector<float*> out = OfEach<float>(outputs, n);
    py::gil_scoped_release released;
    lago::UnsafeMlpForward(networks_, in, n, With(threads), work, out);
  }

  void Backward(std::int64_t rows, std::uintptr_t workspace, const std::vector<std::uintptr_t>& output_grads,
                int threads) const {
    if (!has_grads_) throw std::invalid_argument("weight_grad: these networks were given none");
    const std::size_t n = Count(rows, "rows");
    auto* work = Pointer<float>(workspace, lago::MlpWorkspace(networks_, n), "workspace");
    const std::vector<const float*> grads = OfEach<const float>(output_grads, n);
    py::gil_scoped_release released;
    lago::UnsafeMlpBackward(networks_, n, With(threads), work, grads);
  }

 private:
  template <typename T>
  std::vector<T*> OfEach(const std::vector<std::uintptr_t>& addresses, std::size_t rows) const {
    if (addresses.size() != networks_.size()) {
      throw std::invalid_argument("outputs: expected one for each network");
    }
    std::vector<T*> found;
    for (std::size_t i = 0; i < addresses.size(); ++i) {
      found.push_back(Pointer<T>(addresses[i], rows * networks_[i].back().out, "outputs"));
    }
    return found;
  }

  lago::MlpOptions With(int threads) const { return {options_.activation, options_.lanes, threads}; }

  std::vector<lago::Mlp> networks_;
  lago::MlpOptions options_;
  bool has_grads_ = true;
};

void BindUpdate(py::module_& m) {
  m.def("adam", &Adam, py::arg("block"), py::arg("n"), py::arg("lr"), py::arg("beta_1"), py::arg("beta_2"),
        py::arg("eps"), py::arg("max_norm"), py::arg("step"), py::arg("lanes"));
  m.def("take_rows", &TakeRows, py::arg("columns"), py::arg("picked_ptr"), py::arg("rows"), py::arg("limit"));
  py::class_<Networks>(m, "Networks")
      .def(py::init<const std::vector<std::vector<Networks::Layer>>&, bool, int>(), py::arg("networks"),
           py::arg("relu"), py::arg("lanes"))
      .def("workspace", &Networks::Workspace, py::arg("rows"))
      .def("forward", &Networks::Forward, py::arg("x_ptr"), py::arg("rows"), py::arg("workspace_ptr"),
           py::arg("output_ptrs"), py::arg("threads"))
      .def("backward", &Networks::Backward, py::arg("rows"), py::arg("workspace_ptr"),
           py::arg("output_grad_ptrs"), py::arg("threads"));
}

// The latent cache: keys [n] are two 64-bit integers each.

std::array<std::uint64_t, 2> HashBytes(const std::string& bytes, std::array<std::uint64_t, 2> seed) {
  const lago::Key key = lago::HashBytes(bytes.data(), bytes.size(), {seed[0], seed[1]});
  return {key.low, key.high};
}

// Returns the first row that is not finite, or `rows`.
std::size_t HashObservations(std::uintptr_t states_ptr, std::uintptr_t ids_ptr, std::uintptr_t seeds_ptr,
                             std::uintptr_t keys_ptr, std::int64_t rows, std::int64_t width,
                             std::int64_t instructions, double resolution, int threads) {
  const std::size_t n = Count(rows, "rows"), s = Count(width, "width"),
                    m = Count(instructions, "instructions");
  const lago::Observations in{Pointer<const float>(states_ptr, n * s, "states"),
                              Pointer<const std::int64_t>(ids_ptr, n, "ids"),
                              Pointer<const lago::Key>(seeds_ptr, m, "seeds"),
                              n,
                              s,
                              resolution};
  auto* keys = Pointer<lago::Key>(keys_ptr, n, "keys");
  py::gil_scoped_release released;
  for (std::size_t i = 0; i < n; ++i) {
    if (in.ids[i] < 0 || in.ids[i] >= instructions) throw std::invalid_argument("ids: of no instruction");
  }
  return lago::UnsafeHashRows(in, threads, keys);
}

std::size_t DistinctKeys(std::uintptr_t keys_ptr, std::uintptr_t first_ptr, std::uintptr_t inverse_ptr,
                         std::int64_t rows) {
  const std::size_t n = Count(rows, "rows");
  const auto* keys = Pointer<const lago::Key>(keys_ptr, n, "keys");
  auto* first = Pointer<std::int64_t>(first_ptr, n, "first");
  auto* inverse = Pointer<std::int64_t>(inverse_ptr, n, "inverse");
  py::gil_scoped_release released;
  return lago::UnsafeDistinct(keys, n, first, inverse);
}

void SealRows(std::uintptr_t keys_ptr, std::uintptr_t encoded_ptr, std::uintptr_t seals_ptr,
              std::int64_t rows, std::int64_t row_bytes) {
  const std::size_t n = Count(rows, "rows"), width = Count(row_bytes, "row_bytes");
  const auto* keys = Pointer<const lago::Key>(keys_ptr, n, "keys");
  const auto* encoded = Pointer<const std::uint8_t>(encoded_ptr, n * width, "encoded");
  auto* seals = Pointer<std::uint64_t>(seals_ptr, n, "seals");
  py::gil_scoped_release released;
  lago::UnsafeSeal(keys, encoded, n, width, seals);
}

// Returns the first row that cannot be stored, or `rows`, and whether it is too large (else it is no number).
std::tuple<std::size_t, bool> EncodeRows(const lago::LatentTable& table, std::uintptr_t rows_ptr,
                                         std::uintptr_t encoded_ptr, std::int64_t rows) {
  const lago::RowCodec& codec = table.codec();
  const std::size_t n = Count(rows, "rows");
  const auto* in = Pointer<const float>(rows_ptr, n * codec.width(), "rows");
  auto* encoded = Pointer<std::uint8_t>(encoded_ptr, n * codec.row_bytes(), "encoded");
  py::gil_scoped_release released;
  for (std::size_t i = 0; i < n; ++i) {
    const lago::RowFault fault = codec.Encode(in + i * codec.width(), encoded + i * codec.row_bytes());
    if (fault != lago::RowFault::kNone) return {i, fault == lago::RowFault::kTooLarge};
  }
  return {n, false};
}

void LookupRows(lago::LatentTable& table, std::uintptr_t keys_ptr, std::uintptr_t rows_ptr,
                std::uintptr_t hit_ptr, std::int64_t rows) {
  const std::size_t n = Count(rows, "rows");
  const auto* keys = Pointer<const lago::Key>(keys_ptr, n, "keys");
  auto* out = Pointer<float>(rows_ptr, n * table.codec().width(), "rows");
  auto* hit = Pointer<std::uint8_t>(hit_ptr, n, "hit");
  py::gil_scoped_release released;
  table.UnsafeLookup(keys, n, out, hit);
}

void InsertRows(lago::LatentTable& table, std::uintptr_t keys_ptr, std::uintptr_t encoded_ptr,
                std::uintptr_t stored_ptr, std::int64_t rows) {
  const std::size_t n = Count(rows, "rows");
  const auto* keys = Pointer<const lago::Key>(keys_ptr, n, "keys");
  const auto* encoded = Pointer<const std::uint8_t>(encoded_ptr, n * table.codec().row_bytes(), "encoded");
  auto* stored = Pointer<float>(stored_ptr, n * table.codec().width(), "stored");
  py::gil_scoped_release released;
  table.UnsafeInsert(keys, encoded, n, stored);
}

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

void BindLatentCache(py::module_& m) {
  m.def("hash_bytes", &HashBytes, py::arg("bytes"), py::arg("seed"));
  m.def("hash_observations", &HashObservations, py::arg("states_ptr"), py::arg("ids_ptr"),
        py::arg("seeds_ptr"), py::arg("keys_ptr"), py::arg("rows"), py::arg("width"), py::arg("instructions"),
        py::arg("resolution"), py::arg("threads"));
  m.def("distinct_keys", &DistinctKeys, py::arg("keys_ptr"), py::arg("first_ptr"), py::arg("inverse_ptr"),
        py::arg("rows"));
  m.def("seal_rows", &SealRows, py::arg("keys_ptr"), py::arg("encoded_ptr"), py::arg("seals_ptr"),
        py::arg("rows"), py::arg("row_bytes"));
  py::enum_<lago::RowFormat>(m, "RowFormat")
      .value("float32", lago::RowFormat::kFloat32)
      .value("float16", lago::RowFormat::kFloat16)
      .value("int8", lago::RowFormat::kInt8);
  py::class_<lago::LatentTable>(m, "LatentTable")
      .def(py::init([](lago::RowFormat format, const std::vector<std::size_t>& parts,
                       std::int64_t budget_bytes, std::int64_t shards, int threads, bool portable) {
             return new lago::LatentTable(lago::RowCodec(format, parts, portable),
                                          Count(budget_bytes, "budget_bytes"), Count(shards, "shards"),
                                          threads);
           }),
           py::arg("format"), py::arg("parts"), py::arg("budget_bytes"), py::arg("shards"),
           py::arg("threads"), py::arg("portable"))
      .def_property_readonly("capacity", &lago::LatentTable::capacity)
      .def_property_readonly("width", [](const lago::LatentTable& table) { return table.codec().width(); })
      .def_property_readonly("row_bytes",
                             [](const lago::LatentTable& table) { return table.codec().row_bytes(); })
      .def("encode", &EncodeRows, py::arg("rows_ptr"), py::arg("encoded_ptr"), py::arg("rows"))
      .def("lookup", &LookupRows, py::arg("keys_ptr"), py::arg("rows_ptr"), py::arg("hit_ptr"),
           py::arg("rows"))
      .def("insert", &InsertRows, py::arg("keys_ptr"), py::arg("encoded_ptr"), py::arg("stored_ptr"),
           py::arg("rows"))
      .def("clear", &lago::LatentTable::Clear, py::call_guard<py::gil_scoped_release>())
      .def("stats", [](lago::LatentTable& table) {
        lago::TableStats stats;
        {
          py::gil_scoped_release released;
          stats = table.Stats();
        }
        py::dict found;
        found["hits"] = stats.hits;
        found["misses"] = stats.misses;
        found["inserted"] = stats.inserted;
        found["evicted"] = stats.evicted;
        found["rows"] = stats.rows;
        found["bytes"] = stats.bytes;
        return found;
      });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native CPU kernels; reached through lago_fast.ops, which checks the arguments.";
  m.def("addresses", &Addresses, py::arg("tensors"), py::arg("kinds"), py::arg("rows"), py::arg("width"));
  m.def("gae", &Gae, py::arg("rewards_ptr"), py::arg("values_ptr"), py::arg("next_values_ptr"),
        py::arg("terminated_ptr"), py::arg("truncated_ptr"), py::arg("valid_ptr"), py::arg("advantages_ptr"),
        py::arg("returns_ptr"), py::arg("n_steps"), py::arg("n_envs"), py::arg("gamma"),
        py::arg("gae_lambda"));
  m.def("ppo_kl_gaussian", &PpoKlGaussian, py::arg("addresses"), py::arg("statistics_ptr"), py::arg("rows"),
        py::arg("dims"), py::arg("log_std_per_row"), py::arg("prior_log_std_per_row"),
        py::arg("prior_policy"), py::arg("normalize_advantage"), py::arg("lanes"), py::arg("threads"));
  m.def("ppo_kl_categorical", &PpoKlCategorical, py::arg("addresses"), py::arg("statistics_ptr"),
        py::arg("rows"), py::arg("actions"), py::arg("prior_policy"), py::arg("normalize_advantage"),
        py::arg("lanes"), py::arg("threads"));
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
  BindUpdate(m);
  m.def("clevr_push", &ClevrPush, py::arg("qpos_ptr"), py::arg("qvel_ptr"), py::arg("ctrl_ptr"),
        py::arg("substeps_ptr"), py::arg("diverged_ptr"), py::arg("rows"), py::arg("threads"));
  BindLatentCache(m);
}
