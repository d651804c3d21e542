"""Every op x implementation x dtype once, against float64 autograd of the definition; the suite prints the table.

Shapes, extremes and refusals are the business of each implementation's own file.
"""

import importlib

import pytest
import torch

from lago_fast import ops
from lago_fast.kernels.adam.reference import Block, Settings
from lago_fast.kernels.gae import reference as gae_reference
from lago_fast.kernels.mlp.reference import Layer
from lago_fast.kernels.prior_kl import reference as kl_reference
from lago_fast.kernels.sample import reference as sample_reference
from tests.kernels.cuda_cases import coefficients, converted, draw_categorical, draw_gaussian, eager_of, poisoned
from tests.kernels.test_cuda_emulated import native  # noqa: F401 - a fixture
from tests.kernels.test_mlp import draw as draw_layers

B, STATE = 23, torch.tensor([7, 3])
OPS = ("adam", "gae", "mlp", "ppo_kl_categorical", "ppo_kl_gaussian", "prior_kl", "sample", "take_rows")
OF_THE_UPDATE = ("adam", "mlp", "take_rows")  # on a GPU they are PyTorch's own
IMPLS = ("reference", "inductor", "cpp", "triton", "cuda")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ON_GPU = torch.cuda.is_available()
HOW = {"triton": "ok on GPU" if ON_GPU else "ok interpreted", "cuda": "ok emulated"}
# relative to the largest entry: of statistics, and of gradients that are rounded to the dtype
TOLERANCE = {"float32": (1e-5, 1e-5), "bfloat16": (1e-4, 8e-3), "float16": (1e-4, 1e-3)}


def gae_inputs():
    rewards, values, next_values = torch.randn(3, 9, 5)
    terminated, truncated = torch.rand(2, 9, 5) < 0.15
    return rewards, values, next_values, terminated, truncated & ~terminated, torch.rand(9, 5) > 0.1


def kl_inputs(op: str):
    """Return (inputs for `prior_kl` or `sample`, of either kind), from the losses' batches."""
    c, g = draw_categorical(B, 5, masked=True), draw_gaussian(B, 4)
    if op == "prior_kl":
        gaussian = kl_reference.GaussianInputs(g.mean, g.log_std, g.prior_mean, g.prior_log_std)
        return kl_reference.CategoricalInputs(c.logits, c.prior_log_probs, c.action_mask), gaussian
    gaussian = sample_reference.GaussianInputs(g.mean, g.log_std, g.prior_mean, g.prior_log_std)
    return sample_reference.CategoricalInputs(c.logits, c.prior_log_probs, c.action_mask), gaussian


def loss(module, impl, x, emulator):
    """Return the outputs and the gradients of a loss."""
    c = coefficients(0.2, 0.01, 0.5, 0.3, 1.5, 0.3)
    if impl == "cuda":
        return module.launch(emulator, 0, x, c, "policy_prior", True, poisoned(x))
    return module.loss_and_grads(x, c)


def kl(module, impl, kind, x, emulator):
    """Return the KL of each row and its gradients."""
    temperature = torch.tensor(1.5)
    if impl == "cuda":
        return getattr(module, f"launch_{kind}")(emulator, 0, x, temperature, "policy_prior", True)
    if impl in ops.BY_AUTOGRAD:
        return by_autograd(getattr(module, kind), x, temperature)
    return getattr(module, kind)(x, temperature, direction="policy_prior", needs_grad=True)


def by_autograd(definition, x, temperature):
    names = ["logits"] if "logits" in x._fields else ["mean", "log_std"]
    leaves = {name: getattr(x, name).clone().requires_grad_() for name in names}
    if "log_std" in leaves:
        leaves["log_std"] = x.log_std.expand_as(x.mean).clone().requires_grad_()
    rows = definition(x._replace(**leaves), temperature, "policy_prior")
    return rows.detach(), torch.autograd.grad(rows.sum(), list(leaves.values()))


def sampled(module, impl, kind, x, emulator):
    """Return the actions and their figures."""
    temperature = torch.tensor(1.5, dtype=x[0].dtype if x[0].dtype is torch.float64 else torch.float32)
    if impl == "cuda":
        return getattr(module, f"launch_{kind}")(emulator, 0, x, temperature, STATE, "policy_prior")
    return getattr(module, kind)(x, temperature, STATE, "policy_prior")


def assert_near(got, expected, tolerance: float) -> None:
    scale = expected.abs().max().clamp(min=1e-3)
    assert (got.double() - expected.double()).abs().max() <= tolerance * scale


def of_update(op: str, module, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return all that an op of the update computes."""
    torch.manual_seed(0)
    layers, x = draw_layers((5, 16, 3)), torch.randn(B, 5)
    if op == "mlp":
        layers = [Layer(*(t.to(dtype) for t in layer)) for layer in layers]
        networks = module.Networks([layers], "tanh")
        outputs = networks.forward(x.to(dtype))
        networks.backward([torch.ones(B, 3, dtype=dtype)])
        return [*outputs, *(t for layer in layers for t in layer[2:])]
    if op == "adam":
        block = Block(*(t.to(dtype) for t in (*torch.rand(4, 99), torch.tensor(2.0))))
        module.clipped_step(block, Settings(1e-2, 0.9, 0.999, 1e-5), 0.5)
        return list(block)
    return module.Columns([x.to(dtype)]).take(torch.tensor([3, 0, 3]))


def prove(op: str, impl: str, dtype: str, emulator) -> None:
    """Compare one implementation with the definition in float64, on inputs rounded to `dtype`."""
    module = importlib.import_module(f"lago_fast.kernels.{ops.IMPLEMENTATIONS[op][impl]}")
    of_outputs, of_grads = TOLERANCE[dtype]
    if op in OF_THE_UPDATE:
        definition = importlib.import_module(f"lago_fast.kernels.{op}.reference")
        found, truth = of_update(op, module, DTYPES[dtype]), of_update(op, definition, torch.float64)
        for mine, expected in zip(found, truth, strict=True):
            assert_near(mine, expected, of_grads)
        return
    if op == "gae":
        inputs = gae_inputs()
        args = (inputs, 0.99, 0.95)
        got = module.launch(emulator, 0, *args) if impl == "cuda" else module.gae(*inputs, 0.99, 0.95)
        wide = tuple(t.double() if t.is_floating_point() else t for t in inputs)
        for mine, truth in zip(got, gae_reference.gae(*wide, 0.99, 0.95), strict=True):
            assert_near(mine, truth, of_outputs)
        return
    if op.startswith("ppo"):
        categorical = op.endswith("categorical")
        x = (
            draw_categorical(B, 5, masked=True, kl_weighted=True)
            if categorical
            else draw_gaussian(B, 4, kl_weighted=True)
        )
        x = converted(x, DTYPES[dtype])
        truth = eager_of(x).loss_and_grads(
            converted(x, torch.float64), converted(coefficients(0.2, 0.01, 0.5, 0.3, 1.5, 0.3), torch.float64)
        )
        got = loss(module, impl, x, emulator)
        for part, expected, tolerance in zip(got, truth, (of_outputs, of_grads), strict=True):
            for mine, wide in zip(part, expected, strict=True):
                assert_near(mine, wide, tolerance)
        return
    for kind, x in zip(("categorical", "gaussian"), kl_inputs(op), strict=True):
        x = converted(x, DTYPES[dtype])
        wide = converted(x, torch.float64)
        if op == "prior_kl":
            rows, grads = kl(module, impl, kind, x, emulator)
            truth, true_grads = by_autograd(getattr(kl_reference, kind), wide, torch.tensor(1.5).double())
            assert_near(rows, truth, of_outputs)
            for mine, expected in zip(grads, true_grads, strict=True):
                assert_near(mine, expected, of_grads)
        else:
            expected = sampled(sample_reference, "reference", kind, wide, emulator)
            for mine, truth in zip(sampled(module, impl, kind, x, emulator), expected, strict=True):
                assert_near(mine, truth, of_outputs)


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning")  # numpy's
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile's own
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", OPS)
def test_every_op_implementation_and_dtype(op, impl, dtype, note, request):
    missing = None
    if op in OF_THE_UPDATE and (impl not in ops.IMPLEMENTATIONS[op] or dtype != "float32"):
        missing = "not written: parameters are float32, and on a GPU PyTorch's own code does it"
    elif impl not in ops.IMPLEMENTATIONS[op]:
        missing = "not written: it has no arithmetic to fuse for the compiler"
    elif op == "gae" and dtype != "float32":
        missing = "not written: rollouts are stored in float32"
    elif impl == "inductor" and dtype != "float32":
        missing = "not run: compiling takes long, and the definition converts to float32 first"
    if missing is not None:
        note(op, impl, dtype, "-")
        pytest.skip(missing)
    note(op, impl, dtype, "FAILED")
    prove(op, impl, dtype, request.getfixturevalue("native") if impl == "cuda" else None)
    note(op, impl, dtype, HOW.get(impl, "ok"))
