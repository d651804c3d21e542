"""The CUDA kernels without a GPU: the .cu files compiled as C++ over tests/native, against float64 autograd.

What this does not show: that nvcc's code for a GPU does the same (test_cuda.py does), and data races within a block.
"""

import ctypes
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lago_fast import ops
from lago_fast.errors import ImplUnavailable
from lago_fast.kernels.gae import cuda_fused as gae
from lago_fast.kernels.gae import reference as gae_reference
from lago_fast.kernels.ppo_kl_categorical import cuda_fused as categorical
from lago_fast.kernels.ppo_kl_categorical import eager as categorical_eager
from lago_fast.kernels.ppo_kl_categorical.reference import Inputs as CategoricalInputs
from lago_fast.kernels.ppo_kl_gaussian import cuda_fused as gaussian
from lago_fast.kernels.prior_kl import cuda_fused as prior_kl
from lago_fast.kernels.prior_kl import reference as prior_kl_reference
from lago_fast.kernels.sample import cuda_fused as sample
from lago_fast.kernels.sample import reference as sample_reference
from tests.kernels.cuda_cases import (
    HALVES,
    assert_close,
    assert_same_bits,
    coefficients,
    converted,
    draw_categorical,
    draw_gaussian,
    eager_of,
    poisoned,
)

ROOT = Path(__file__).resolve().parents[2]
STUBS = ROOT / "tests" / "native"
UNITS = [*sorted((ROOT / "kernels").glob("*/*.cu")), ROOT / "csrc" / "bindings" / "cuda.cc", STUBS / "cuda_on_cpu.cc"]
HEADERS = [*sorted((ROOT / "csrc" / "cuda").glob("*.h")), *sorted(STUBS.glob("*.h"))]
FLAGS = "-std=c++17 -O1 -fPIC -U_FORTIFY_SOURCE -fno-strict-aliasing -Wall -Werror -Wno-unknown-pragmas"

NO_STREAM = 0
STATE = torch.tensor([7, 3])


def build(folder: Path, compiler: list[str]) -> Path:
    """Compile the kernels with the stub headers and return the module's path."""
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed")
    includes = [f"-I{path}" for path in (STUBS, ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include"))]

    def run(*arguments: str) -> None:
        done = subprocess.run([*compiler, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def compiled(unit: Path) -> str:
        run(*FLAGS.split(), *includes, "-c", "-x", "c++", str(unit), "-o", str(folder / f"{unit.name}.o"))
        return str(folder / f"{unit.name}.o")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, UNITS))
    run("-shared", *objects, "-o", str(folder / "linking.so"))
    (folder / "linking.so").rename(folder / "_cuda.so")
    return folder / "_cuda.so"


@pytest.fixture(scope="session")
def native(request):
    """The module `_cuda`, computing on the CPU; built once per state of its sources."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler {compiler[0]!r} on the PATH")
    digest = hashlib.sha256(repr((FLAGS, compiler, sysconfig.get_platform(), sysconfig.get_python_version())).encode())
    for path in (*UNITS, *HEADERS):
        digest.update(path.read_bytes())
    folder = Path(request.config.cache.mkdir(f"cuda_on_cpu_{digest.hexdigest()[:16]}"))
    path = folder / "_cuda.so" if (folder / "_cuda.so").exists() else build(folder, compiler)
    spec = importlib.util.spec_from_file_location("_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def backwards(native):
    """A function that has blocks and threads run in the reverse order, until the test's end."""
    switch = ctypes.CDLL(native.__file__).lago_emulate_backwards
    switch.argtypes = [ctypes.c_bool]
    yield switch
    switch(False)


def fused(native, x, c, *, kl_direction="policy_prior", normalize_advantage=True, out="poisoned"):
    """Compute a loss by the emulated kernels, into buffers of NaN unless told otherwise."""
    module = categorical if isinstance(x, CategoricalInputs) else gaussian
    if out == "poisoned":
        out = poisoned(x)
    return module.launch(native, NO_STREAM, x, c, kl_direction, normalize_advantage, out)


def assert_loss(native, x, c, *, rtol: float = 2e-6, **options) -> None:
    eager = eager_of(x)
    wide = converted(x, torch.float64), converted(c, torch.float64)
    truth = [t for part in eager.loss_and_grads(*wide, **options) for t in part]
    plain = [t for part in eager.loss_and_grads(x, c, **options) for t in part]
    got = [t for part in fused(native, x, c, **options) for t in part]
    assert_close((*eager.Outputs._fields, *eager.Grads._fields), truth, plain, got, rtol)


direction = pytest.mark.parametrize("kl_direction", ["policy_prior", "prior_policy"])
either_loss = pytest.mark.parametrize(
    "draw",
    [
        lambda rows: draw_categorical(rows, 5),
        lambda rows: draw_categorical(rows, 40),
        lambda rows: draw_gaussian(rows, 4),
    ],
    ids=["categorical5", "categorical40", "gaussian4"],
)


class TestLosses:
    @direction
    @pytest.mark.parametrize("n_actions", [2, 3, 4, 8, 18, 40])
    @pytest.mark.parametrize("rows", [1, 7, 63])
    def test_categorical_shapes(self, native, rows, n_actions, kl_direction):
        for masked in (False, True):
            x = draw_categorical(rows, n_actions, masked=masked)
            assert_loss(native, x, coefficients(), kl_direction=kl_direction)

    @direction
    @pytest.mark.parametrize("n_actions", [64, 96, 127, 257, 384, 500, 1000, 1001])
    def test_categorical_rows_of_more_lanes(self, native, n_actions, kl_direction):
        x = draw_categorical(11, n_actions, masked=True)
        assert_loss(native, x, coefficients(), kl_direction=kl_direction)
        assert_loss(native, x._replace(action_mask=None), coefficients(), kl_direction=kl_direction)

    @direction
    @pytest.mark.parametrize("n_actions", [1025, 32000])
    def test_categorical_rows_of_a_block(self, native, n_actions, kl_direction):
        for masked in (False, True):
            x = draw_categorical(6, n_actions, masked=masked)
            assert_loss(native, x, coefficients(), kl_direction=kl_direction)

    @direction
    @pytest.mark.parametrize("per_row", [False, True])
    @pytest.mark.parametrize("dims", [1, 2, 3, 4, 8, 16, 17, 40, 65, 100])
    @pytest.mark.parametrize("rows", [1, 7, 63])
    def test_gaussian_shapes(self, native, rows, dims, per_row, kl_direction):
        x = draw_gaussian(rows, dims, std_per_row=per_row, prior_per_row=not per_row)
        assert_loss(native, x, coefficients(), kl_direction=kl_direction)

    @direction
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("n", [3, 4, 17, 1500])
    def test_a_weight_of_each_rows_kl(self, native, n, dtype, kl_direction):
        x = draw_categorical(33, n, masked=n == 17, kl_weighted=True)
        assert_loss(native, converted(x, dtype), coefficients(), kl_direction=kl_direction)
        if n <= 17:
            y = draw_gaussian(33, n, std_per_row=n == 4, kl_weighted=True)
            assert_loss(native, converted(y, dtype), coefficients(), kl_direction=kl_direction)

    @either_loss
    def test_several_rounds_over_several_blocks(self, native, draw):
        assert_loss(native, draw(2049), coefficients())

    def test_many_rows(self, native):
        assert_loss(native, draw_gaussian(65537, 1), coefficients())

    @either_loss
    @pytest.mark.parametrize("clip_range_vf", [None, 0.05, 0.7])
    @pytest.mark.parametrize("normalize_advantage", [False, True])
    def test_value_clipping_and_advantages_as_they_are(self, native, draw, clip_range_vf, normalize_advantage):
        c = coefficients(0.1, 0.02, 0.7, 0.5, 0.6, clip_range_vf)
        assert_loss(native, draw(100), c, normalize_advantage=normalize_advantage)

    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize("n", [3, 4, 18, 40, 1200])
    def test_half_types(self, native, dtype, n):
        assert_loss(native, converted(draw_categorical(9, n, masked=n == 18), dtype), coefficients())
        if n <= 40:
            assert_loss(native, converted(draw_gaussian(9, n), dtype), coefficients())

    @pytest.mark.parametrize("dtype", HALVES)
    def test_types_may_differ(self, native, dtype):
        x = draw_categorical(9, 5)
        x = x._replace(logits=x.logits.to(dtype), values=x.values.to(dtype))
        assert_loss(native, x, coefficients())
        assert fused(native, x, coefficients(), out=None)[1].logits.dtype == dtype
        y = draw_gaussian(9, 3)
        y = y._replace(mean=y.mean.to(dtype), weight=y.weight.to(dtype))
        assert_loss(native, y, coefficients())
        assert [g.dtype for g in fused(native, y, coefficients(), out=None)[1]] == [dtype, torch.float32, torch.float32]

    def test_misaligned_and_strided_tensors_are_read_as_what_they_show(self, native):
        x = draw_categorical(30, 8, masked=True)
        expected = fused(native, x, coefficients())
        shifted = torch.cat([torch.zeros(1), x.logits.flatten()])[1:].view(30, 8)
        assert shifted.data_ptr() % 16
        for got, same in zip(fused(native, x._replace(logits=shifted), coefficients()), expected, strict=True):
            for a, b in zip(got, same, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        strided = x._replace(
            prior_log_probs=x.prior_log_probs.T.contiguous().T,
            values=x.values.repeat_interleave(2)[::2],
            action_mask=x.action_mask.T.contiguous().T,
        )
        assert_same_bits(fused(native, strided, coefficients()), expected)

    def test_a_policy_and_a_prior_that_exclude_actions(self, native):
        x = draw_categorical(20, 6)
        x.logits[:, 1] = -torch.inf
        x = x._replace(actions=torch.where(x.actions == 1, 0, x.actions))
        assert_loss(native, x, coefficients())
        x.prior_log_probs[:, 1] = -torch.inf
        for kl_direction in ("policy_prior", "prior_policy"):
            assert_loss(native, x, coefficients(), kl_direction=kl_direction)
        x.prior_log_probs[:, 2] = -torch.inf
        assert_loss(native, x, coefficients(), kl_direction="prior_policy")

    @pytest.mark.parametrize("n_actions", [6, 1500])
    def test_an_infinite_kl_is_infinite(self, native, n_actions):
        x = draw_categorical(20, n_actions)
        x.prior_log_probs[3, 2] = -torch.inf
        outputs, grads = fused(native, x, coefficients())
        assert outputs.prior_kl == torch.inf
        finite = torch.arange(20) != 3
        truth = categorical_eager.loss_and_grads(converted(x, torch.float64), converted(coefficients(), torch.float64))[
            1
        ]
        torch.testing.assert_close(grads.logits[finite].double(), truth.logits[finite], rtol=1e-4, atol=1e-7)

    def test_an_impossible_action_of_infinite_kl_is_forgotten(self, native):
        # met before the maximum, where its weight is not yet nothing
        x = draw_categorical(4, 1500)
        x.logits[:, 0], x.prior_log_probs[:, 0], x.logits[:, 1:] = -2000.0, -torch.inf, x.logits[:, 1:].abs()
        x = x._replace(actions=x.actions.clamp(min=1))
        assert_loss(native, x, coefficients(), rtol=1e-5)

    @pytest.mark.parametrize("offset", [-1e4, 1e4])
    def test_logits_far_from_zero(self, native, offset):
        for n_actions in (5, 1500):
            x = draw_categorical(9, n_actions)
            assert_loss(native, x._replace(logits=(x.logits.round() + offset)), coefficients(), rtol=1e-5)

    @either_loss
    def test_advantages_far_from_zero(self, native, draw):
        x = draw(3000)
        assert_loss(native, x._replace(advantages=x.advantages + 1e4), coefficients(), rtol=1e-5)

    @pytest.mark.parametrize("log_std", [-20.0, -8.0, 2.0])
    def test_log_std_at_its_bounds(self, native, log_std):
        x = draw_gaussian(40, 3)
        std = torch.tensor(log_std).exp()
        x = x._replace(log_std=torch.full((3,), log_std), actions=x.mean + torch.randn(40, 3) * std)
        old = torch.distributions.Normal(x.mean.double(), x.log_std.double().exp()).log_prob(x.actions.double())
        x = x._replace(old_log_prob=old.sum(-1).float())
        # a log-probability of about 60 carries a rounding error of 4e-6, which its ratio multiplies
        assert_loss(native, x, coefficients(), rtol=2e-5)

    def test_ratio_at_the_edge_of_the_clip(self, native):
        x = draw_gaussian(16, 1)
        x = x._replace(actions=x.mean, log_std=torch.zeros(1), weight=torch.ones(16))
        log_prob = torch.distributions.Normal(x.mean, 1.0).log_prob(x.actions).sum(-1)
        ratios = torch.tensor([0.5, 1.5, 0.49, 1.51]).repeat(4)
        assert_loss(native, x._replace(old_log_prob=log_prob - ratios.log()), coefficients(0.5))

    @either_loss
    @pytest.mark.parametrize("valid_rows", [[], [3]])
    def test_no_valid_row_and_one(self, native, draw, valid_rows):
        weight = torch.zeros(11)
        weight[valid_rows] = 1
        x = draw(11)._replace(weight=weight)
        assert_loss(native, x, coefficients())
        if not valid_rows:
            assert not any(t.any() for part in fused(native, x, coefficients()) for t in part)

    @either_loss
    def test_an_invalid_row_adds_nothing_whatever_it_holds(self, native, draw):
        x = draw(20)
        expected = fused(native, x, coefficients())
        invalid = x.weight == 0
        x.old_log_prob[invalid] = -1e4
        x.advantages[invalid] = torch.inf
        x.returns[invalid] = torch.nan
        assert_same_bits(fused(native, x, coefficients()), expected)

    @either_loss
    def test_no_rows(self, native, draw):
        outputs, grads = fused(native, draw(0), coefficients())
        assert not any(t.any() for t in (*outputs, *grads))

    @either_loss
    @pytest.mark.parametrize("name", ["values", "old_log_prob", "advantages", "returns", "weight"])
    def test_a_nan_in_a_valid_row_shows_in_the_loss(self, native, draw, name):
        x = draw(20)
        getattr(x, name)[2] = float("nan")
        assert fused(native, x, coefficients())[0].loss.isnan()

    @pytest.mark.parametrize("n_actions", [5, 40, 1500])
    def test_a_nan_or_an_action_out_of_bounds_shows_in_the_loss(self, native, n_actions):
        for name, wrong in (("logits", float("nan")), ("prior_log_probs", float("nan")), ("actions", n_actions)):
            x = draw_categorical(20, n_actions)
            getattr(x, name)[2] = wrong
            assert fused(native, x, coefficients())[0].loss.isnan(), name

    @either_loss
    def test_same_bits_in_any_order_of_blocks_and_threads(self, native, backwards, draw):
        x = draw(1500)
        first = fused(native, x, coefficients())
        assert_same_bits(fused(native, x, coefficients()), first)
        backwards(True)
        assert_same_bits(fused(native, x, coefficients()), first)

    def test_large_rows_in_any_order(self, native, backwards):
        x = draw_categorical(7, 1500)
        first = fused(native, x, coefficients())
        backwards(True)
        assert_same_bits(fused(native, x, coefficients()), first)

    @pytest.mark.parametrize(
        ("name", "broken"),
        [
            ("logits", lambda t: t[0]),
            ("values", lambda t: t.unsqueeze(1)),
            ("actions", lambda t: t.int()),
            ("weight", lambda t: t.bool()),
            ("advantages", lambda t: t.double()),
            ("prior_log_probs", lambda t: t.to("meta")),
            ("action_mask", lambda t: t.float()),
        ],
    )
    def test_a_refused_input_is_named(self, native, name, broken):
        x = draw_categorical(10, 4, masked=True)
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            fused(native, x._replace(**{name: broken(getattr(x, name))}), coefficients(), out=None)
        if hasattr(y := draw_gaussian(10, 4), name):
            with pytest.raises(ValueError, match=f"^{name}: expected"):
                fused(native, y._replace(**{name: broken(getattr(y, name)[:9])}), coefficients(), out=None)

    def test_refused_dimensions_coefficients_directions_and_buffers_are_named(self, native):
        x, y = draw_categorical(10, 4), draw_gaussian(10, 4)
        with pytest.raises(ValueError, match=r"^mean: expected shape \[B, D\] with D in 1\.\.384"):
            fused(native, draw_gaussian(2, 385), coefficients())
        for inputs, name in ((x, "logits"), (y, "mean")):
            with pytest.raises(ValueError, match=r"^kl_coef: expected"):
                fused(native, inputs, coefficients()._replace(kl_coef=torch.tensor(0.1, dtype=torch.float64)))
            with pytest.raises(ValueError, match=r"^kl_direction: expected"):
                fused(native, inputs, coefficients(), kl_direction="sideways")
            outputs, grads = fused(native, inputs, coefficients())
            with pytest.raises(ValueError, match=rf"^out\[1\]\.{name}: expected"):
                fused(native, inputs, coefficients(), out=(outputs, grads._replace(**{name: getattr(grads, name)[:9]})))
            with pytest.raises(ValueError, match=r"^out\[0\]\.value_loss: expected to lie behind"):
                fused(native, inputs, coefficients(), out=(outputs._replace(value_loss=torch.zeros(())), grads))


def both_kls(native, inputs, temperature, kl_direction):
    """Return KL and gradients of the kernels, of eager float32, and of float64."""
    kind = "categorical" if hasattr(inputs, "logits") else "gaussian"

    def by_autograd(x, tau):
        names = ("logits",) if kind == "categorical" else ("mean", "log_std")
        rows = len(x[0])
        leaves = {n: getattr(x, n).expand(rows, -1).clone().requires_grad_() for n in names}
        kl = getattr(prior_kl_reference, kind)(x._replace(**leaves), tau, kl_direction)
        return kl.detach(), *torch.autograd.grad(kl.sum(), list(leaves.values()))

    launch = getattr(prior_kl, f"launch_{kind}")
    kl, grads = launch(native, NO_STREAM, inputs, temperature, kl_direction, True)
    alone, nothing = launch(native, NO_STREAM, inputs, temperature, kl_direction, False)
    assert nothing is None
    assert torch.equal(alone, kl)
    truth = by_autograd(converted(inputs, torch.float64), temperature.double())
    return truth, by_autograd(inputs, temperature), (kl, *grads)


class TestPriorKl:
    @direction
    @pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
    @pytest.mark.parametrize(
        ("rows", "n_actions"), [(0, 3), (1, 2), (63, 3), (7, 4), (63, 18), (300, 40), (5, 257), (2, 32000)]
    )
    def test_categorical(self, native, rows, n_actions, dtype, kl_direction):
        x = converted(draw_categorical(rows, n_actions, masked=n_actions in (18, 40)), dtype)
        inputs = prior_kl_reference.CategoricalInputs(x.logits, x.prior_log_probs, x.action_mask)
        results = both_kls(native, inputs, torch.tensor(1.5), kl_direction)
        assert_close(("kl", "logits"), *results, rtol=3e-6)

    @direction
    @pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
    @pytest.mark.parametrize(("rows", "dims"), [(0, 3), (1, 1), (63, 3), (2049, 4), (63, 17), (5, 257)])
    def test_gaussian(self, native, rows, dims, dtype, kl_direction):
        x = converted(draw_gaussian(rows, dims, std_per_row=dims == 3, prior_per_row=dims != 17), dtype)
        inputs = prior_kl_reference.GaussianInputs(x.mean, x.log_std, x.prior_mean, x.prior_log_std)
        results = both_kls(native, inputs, torch.tensor(0.7), kl_direction)
        assert_close(("kl", "mean", "log_std"), *results, rtol=3e-6)

    @pytest.mark.parametrize("n_actions", [4, 1500])
    def test_equal_distributions_and_impossible_actions(self, native, n_actions):
        log_probs = torch.randn(3, n_actions)
        log_probs[:, 1] = -torch.inf
        inputs = prior_kl_reference.CategoricalInputs(log_probs, log_probs)
        for kl_direction in ("policy_prior", "prior_policy"):
            kl, grads = prior_kl.launch_categorical(native, NO_STREAM, inputs, torch.tensor(1.0), kl_direction, True)
            assert torch.equal(kl, torch.zeros(3))
            assert grads.logits.abs().max() < 1e-7
        shifted = inputs._replace(prior_log_probs=log_probs.roll(1, dims=1))
        kl, _ = prior_kl.launch_categorical(native, NO_STREAM, shifted, torch.tensor(1.0), "policy_prior", False)
        assert torch.equal(kl, torch.full((3,), torch.inf))

    def test_a_refused_input_is_named(self, native):
        x = draw_categorical(5, 3)
        inputs = prior_kl_reference.CategoricalInputs(x.logits, x.prior_log_probs[:4])
        with pytest.raises(ValueError, match=r"^prior_log_probs: expected shape \[5, 3\]"):
            prior_kl.launch_categorical(native, NO_STREAM, inputs, torch.tensor(1.0), "policy_prior", False)
        with pytest.raises(ValueError, match=r"^prior_temperature: expected"):
            prior_kl.launch_categorical(
                native, NO_STREAM, inputs._replace(prior_log_probs=x.logits), torch.ones(2), "policy_prior", False
            )


class TestSample:
    @direction
    @pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
    @pytest.mark.parametrize(
        ("rows", "n_actions"), [(0, 3), (1, 2), (63, 3), (2049, 4), (63, 18), (300, 40), (7, 257), (9, 32000)]
    )
    def test_categorical(self, native, rows, n_actions, dtype, kl_direction):
        x = converted(draw_categorical(rows, n_actions, masked=n_actions in (18, 40)), dtype)
        inputs = sample_reference.CategoricalInputs(x.logits, x.prior_log_probs, x.action_mask)
        temperature = torch.tensor(1.5)
        got = sample.launch_categorical(native, NO_STREAM, inputs, temperature, STATE, kl_direction)
        wide = converted(inputs, torch.float64)
        truth = sample_reference.categorical(wide, temperature.double(), STATE, kl_direction)
        masked = wide.logits if x.action_mask is None else wide.logits.masked_fill(~x.action_mask, -torch.inf)
        log_probs = masked.log_softmax(-1)
        # another action only where the uniform number is at an edge of the cumulative distribution
        row = torch.arange(rows)
        u = sample_reference.uniform(sample_reference.philox(row, 0 * row, STATE)[0], torch.float64)
        edges = log_probs.exp().cumsum(-1).gather(-1, torch.minimum(got.actions, truth.actions)[:, None]).squeeze(-1)
        assert ((got.actions == truth.actions) | ((u - edges).abs() < 1e-5)).all()
        chosen = log_probs.gather(-1, got.actions[:, None]).squeeze(-1)
        assert chosen.isfinite().all()
        for actual, expected in zip(got[1:], (chosen, truth.entropy, truth.prior_kl), strict=True):
            assert actual.dtype == torch.float32
            torch.testing.assert_close(actual.double(), expected, rtol=3e-6, atol=3e-6)

    @pytest.mark.parametrize("n_actions", [5, 40, 3000])
    def test_categorical_never_takes_an_impossible_action(self, native, n_actions):
        logits = torch.full((500 if n_actions < 100 else 20, n_actions), -torch.inf)
        logits[:, 1], logits[:, n_actions // 2] = 0.0, -90.0
        inputs = sample_reference.CategoricalInputs(logits)
        out = sample.launch_categorical(native, NO_STREAM, inputs, torch.tensor(1.0), STATE, "policy_prior")
        assert (out.actions == 1).all()
        assert out.prior_kl is None

    @direction
    @pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
    @pytest.mark.parametrize(("rows", "dims"), [(0, 3), (1, 1), (63, 3), (2049, 4), (63, 17), (5, 257)])
    def test_gaussian(self, native, rows, dims, dtype, kl_direction):
        x = converted(draw_gaussian(rows, dims, std_per_row=dims == 3, prior_per_row=dims != 17), dtype)
        inputs = sample_reference.GaussianInputs(x.mean, x.log_std, x.prior_mean, x.prior_log_std)
        temperature = torch.tensor(0.7)
        got = sample.launch_gaussian(native, NO_STREAM, inputs, temperature, STATE, kl_direction)
        wide = converted(inputs, torch.float64)
        for actual, expected in zip(
            got, sample_reference.gaussian(wide, temperature.double(), STATE, kl_direction), strict=True
        ):
            assert actual.dtype == torch.float32
            # sums of `dims` terms
            torch.testing.assert_close(actual.double(), expected, rtol=3e-6, atol=1e-6 * max(dims, 4))
        alone = inputs._replace(prior_mean=None, prior_log_std=None)
        again = sample.launch_gaussian(native, NO_STREAM, alone, temperature, STATE, kl_direction)
        assert again.prior_kl is None
        assert_same_bits([again[:3]], [got[:3]])

    @pytest.mark.parametrize(("seed", "step"), [(-1, -1), (0x299F31D0A4093822, 0x0370734413198A2E)])
    def test_every_bit_of_the_state_counts(self, native, seed, step):
        inputs = sample_reference.GaussianInputs(torch.zeros(64, 4), torch.zeros(4))
        state = torch.tensor([seed, step])
        got = sample.launch_gaussian(native, NO_STREAM, inputs, torch.tensor(1.0), state, "policy_prior")
        expected = sample_reference.normal(64, 4, state, torch.float64)
        torch.testing.assert_close(got.actions.double(), expected, rtol=1e-6, atol=1e-6)

    def test_a_refused_input_is_named(self, native):
        inputs = sample_reference.GaussianInputs(torch.zeros(3, 2), torch.zeros(2))
        with pytest.raises(ValueError, match=r"^state: expected"):
            sample.launch_gaussian(native, NO_STREAM, inputs, torch.tensor(1.0), torch.zeros(2), "policy_prior")
        half = inputs._replace(prior_mean=torch.zeros(3, 2))
        with pytest.raises(ValueError, match=r"^prior_log_std: expected"):
            sample.launch_gaussian(native, NO_STREAM, half, torch.tensor(1.0), STATE, "policy_prior")


class TestGae:
    @staticmethod
    def rollout(n_steps: int, n_envs: int) -> tuple[Tensor, ...]:
        ended, by_time = torch.rand(2, n_steps, n_envs) < 0.3
        valid = torch.rand(n_steps, n_envs) < 0.8
        return *torch.randn(3, n_steps, n_envs), ended & ~by_time, ended & by_time, valid

    @pytest.mark.parametrize("n_envs", [0, 1, 3, 64, 130])
    @pytest.mark.parametrize("n_steps", [0, 1, 2, 8, 65])
    def test_it_agrees_with_the_reference(self, native, n_steps, n_envs):
        arrays = self.rollout(n_steps, n_envs)
        if n_steps == 0:
            assert gae.launch(native, NO_STREAM, arrays, 0.99, 0.95).advantages.shape == (0, n_envs)
            return
        wide = [t.double() if t.is_floating_point() else t for t in arrays]
        truth = gae_reference.gae(*wide, 0.99, 0.95)
        for got, expected in zip(gae.launch(native, NO_STREAM, arrays, 0.99, 0.95), truth, strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)

    def test_what_an_invalid_row_holds_reaches_nobody(self, native):
        arrays = self.rollout(40, 9)
        clean = gae.launch(native, NO_STREAM, arrays, 0.99, 0.95)
        arrays[0][~arrays[5]] = float("nan")
        arrays[2][~arrays[5] | arrays[3]] = float("nan")
        assert_same_bits([gae.launch(native, NO_STREAM, arrays, 0.99, 0.95)], [clean])

    def test_a_refused_input_is_named(self, native):
        rewards, values, *rest = self.rollout(5, 4)
        with pytest.raises(ValueError, match=r"^values: expected"):
            gae.launch(native, NO_STREAM, (rewards, values[:4], *rest), 0.99, 0.95)
        with pytest.raises(ValueError, match=r"^rewards: expected"):
            gae.launch(native, NO_STREAM, (rewards.double(), values, *rest), 0.99, 0.95)


class TestBinding:
    def test_it_refuses_what_would_be_read_out_of_bounds(self, native):
        with pytest.raises(ValueError, match="rewards: null address"):
            native.gae([0] * 8, 2, 3, 0.99, 0.9, (0, 0))
        with pytest.raises(ValueError, match="n_envs"):
            native.gae([0] * 8, 2, -3, 0.99, 0.9, (0, 0))
        with pytest.raises(ValueError, match="rewards: misaligned"):
            native.gae([2] * 8, 2, 3, 0.99, 0.9, (0, 0))
        x = torch.zeros(100)
        with pytest.raises(ValueError, match="workspace: too small"):
            native.ppo_kl_categorical(
                [x.data_ptr()] * 5, 0, [(x.data_ptr(), 0)] * 8, [x.data_ptr()] * 6, x.data_ptr(), x.data_ptr(), 100,
                2, 2, False, True, (0, 0),
            )  # fmt: skip

    def test_what_cuda_reports_is_raised(self, native):
        x = torch.zeros(8)
        with pytest.raises(RuntimeError, match="CUDA: invalid value"):
            native.gae([x.data_ptr()] * 8, 1, 1, 0.99, 0.9, (5, 0))


@pytest.mark.skipif(importlib.util.find_spec("lago_fast._cuda") is not None, reason="_cuda is built here")
@pytest.mark.parametrize("op", ["gae", "ppo_kl_categorical", "ppo_kl_gaussian", "prior_kl", "sample"])
def test_without_the_module_the_remedy_is_named(op):
    with pytest.raises(ImplUnavailable, match=rf"impl='cuda': {op} needs lago_fast\._cuda.*LAGO_CUDA=ON"):
        ops.resolve(op, "cuda", "cuda")
