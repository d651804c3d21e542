// What else an update does: networks, Adam, and rows by their numbers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/parts.h"
#include "bindings/pointers.h"
#include "ops/act.h"
#include "ops/adam.h"
#include "ops/mlp.h"
#include "ops/take_rows.h"

namespace py = pybind11;

namespace lago::bindings {
namespace {

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

  // Of a diagonal Gaussian. What the two networks say, mean and value, goes where the actor stores its
  // answers.
  void ActGaussian(const std::array<std::uintptr_t, 9>& at, std::int64_t rows, int threads) const {
    CheckActs();
    const std::size_t n = Count(rows, "rows"), dims = networks_[0].back().out;
    const auto* in = Pointer<const float>(at[0], n * networks_.front().front().in, "observations");
    auto* mean = Pointer<float>(at[1], n * dims, "mean");
    auto* values = Pointer<float>(at[4], n, "values");
    auto* work = Pointer<float>(at[7], lago::MlpWorkspace(networks_, n), "workspace");
    const lago::GaussianAct act{mean,
                                Pointer<const float>(at[8], dims, "log_std"),
                                Pointer<const float>(at[6], n * dims, "noise"),
                                Pointer<float>(at[3], n * dims, "actions"),
                                Pointer<float>(at[5], n, "log_prob"),
                                Pointer<float>(at[2], n * dims, "log_std_rows"),
                                n,
                                dims};
    py::gil_scoped_release released;
    lago::UnsafeMlpForward(networks_, in, n, With(threads), work, {mean, values});
    lago::UnsafeActGaussian(act);
  }

  // The same of a categorical policy, logits and value; returns the first row whose logits are none.
  std::size_t ActCategorical(const std::array<std::uintptr_t, 7>& at, std::int64_t rows, int threads) const {
    CheckActs();
    const std::size_t n = Count(rows, "rows"), n_actions = networks_[0].back().out;
    const auto* in = Pointer<const float>(at[0], n * networks_.front().front().in, "observations");
    auto* logits = Pointer<float>(at[1], n * n_actions, "logits");
    auto* values = Pointer<float>(at[3], n, "values");
    auto* work = Pointer<float>(at[6], lago::MlpWorkspace(networks_, n), "workspace");
    const lago::CategoricalAct act{logits,
                                   Pointer<const float>(at[5], n * n_actions, "noise"),
                                   Pointer<std::int64_t>(at[2], n, "actions"),
                                   Pointer<float>(at[4], n, "log_prob"),
                                   n,
                                   n_actions};
    py::gil_scoped_release released;
    lago::UnsafeMlpForward(networks_, in, n, With(threads), work, {logits, values});
    return lago::UnsafeActCategorical(act);
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

  void CheckActs() const {
    if (networks_.size() != 2 || networks_[1].back().out != 1) {
      throw std::invalid_argument("networks: expected an actor and a critic");
    }
  }

  lago::MlpOptions With(int threads) const { return {options_.activation, options_.lanes, threads}; }

  std::vector<lago::Mlp> networks_;
  lago::MlpOptions options_;
  bool has_grads_ = true;
};

}  // namespace

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
      .def("act_categorical", &Networks::ActCategorical, py::arg("at"), py::arg("rows"), py::arg("threads"))
      .def("act_gaussian", &Networks::ActGaussian, py::arg("at"), py::arg("rows"), py::arg("threads"))
      .def("backward", &Networks::Backward, py::arg("rows"), py::arg("workspace_ptr"),
           py::arg("output_grad_ptrs"), py::arg("threads"));
}

}  // namespace lago::bindings
