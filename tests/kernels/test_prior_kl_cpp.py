"""The native KL of each row against float64 autograd of the reference, with every instruction set that is here."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lago_fast.kernels.prior_kl import cpp_fused, reference
from lago_fast.kernels.prior_kl.reference import CategoricalInputs, GaussianInputs

TEMPERATURE = torch.tensor(1.5)

all_lanes = pytest.mark.parametrize("lanes", [4, 8, 16])
both_directions = pytest.mark.parametrize("direction", ["policy_prior", "prior_policy"])


def widened(inputs):
    """Widen to float64, in which the reference is the truth."""
    return type(inputs)(*(t.double() if t is not None and t.is_floating_point() else t for t in inputs))


def by_autograd(kind: str, inputs, direction: str) -> tuple[Tensor, list[Tensor]]:
    """Return the reference's KL and each row's own gradients, log_std's as [B, D]."""
    if kind == "categorical":
        leaves = [inputs.logits.detach().requires_grad_()]
        inputs = inputs._replace(logits=leaves[0])
    else:
        leaves = [inputs.mean.detach().requires_grad_(), inputs.log_std.expand_as(inputs.mean).detach().clone()]
        leaves[1].requires_grad_()
        inputs = inputs._replace(mean=leaves[0], log_std=leaves[1])
    kl = getattr(reference, kind)(inputs, TEMPERATURE.to(leaves[0].dtype), direction)
    return kl.detach(), list(torch.autograd.grad(kl.sum(), leaves))


def assert_no_worse_than_eager(kind: str, x, *, direction: str, lanes: int) -> None:
    """Compare KL and gradients with float64, beside eager float32; relative to the largest, and at least to 1."""
    truth, true_grads = by_autograd(kind, widened(x), direction)
    plain, plain_grads = by_autograd(kind, x, direction)
    fused = getattr(cpp_fused, kind)
    kl, grads = fused(x, TEMPERATURE, direction=direction, needs_grad=True, lanes=lanes)
    alone, none = fused(x, TEMPERATURE, direction=direction, needs_grad=False, lanes=lanes)
    assert none is None
    assert torch.equal(kl, alone)
    for expected, other, got in zip((truth, *true_grads), (plain, *plain_grads), (kl, *grads), strict=True):
        assert got.shape == expected.shape
        if expected.numel() == 0:
            continue
        allowed = 2 * (other - expected).abs().max() + 2e-6 * expected.abs().max().clamp(min=1)
        assert (got - expected).abs().max() <= allowed


@all_lanes
@both_directions
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n_actions", [2, 3, 4, 18, 40, 257, 32000])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_categorical(rows, n_actions, masked, direction, lanes):
    logits, prior = torch.randn(2, rows, n_actions)
    mask = (torch.rand(rows, n_actions) < 0.6).index_fill(1, torch.tensor([1]), True) if masked else None
    x = CategoricalInputs(logits + 2, prior - 7, mask)
    assert_no_worse_than_eager("categorical", x, direction=direction, lanes=lanes)


@all_lanes
@both_directions
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("dims", [1, 3, 4, 17])
@pytest.mark.parametrize("rows", [0, 1, 7, 63])
def test_gaussian(rows, dims, per_row, direction, lanes):
    def log_std() -> Tensor:
        return 0.5 * torch.randn(*((rows, dims) if per_row else (dims,))) - 0.7

    x = GaussianInputs(torch.randn(rows, dims), log_std(), torch.randn(rows, dims), log_std())
    assert_no_worse_than_eager("gaussian", x, direction=direction, lanes=lanes)


@all_lanes
@both_directions
@pytest.mark.parametrize("log_std", [-20.0, -8.0, 2.0])
def test_log_std_at_its_bounds(log_std, direction, lanes):
    # means near 0, where float32 tells apart what is as small as these stds
    prior_mean = torch.tensor(log_std).exp() * torch.randn(9, 3)
    x = GaussianInputs(torch.zeros(9, 3), torch.full((3,), log_std), prior_mean, torch.full((3,), log_std + 1))
    assert_no_worse_than_eager("gaussian", x, direction=direction, lanes=lanes)


@all_lanes
@both_directions
def test_equal_distributions_have_zero_kl(direction, lanes):
    x = torch.randn(5, 19)
    options = {"direction": direction, "needs_grad": False, "lanes": lanes}
    one = torch.tensor(1.0)
    assert torch.equal(cpp_fused.categorical(CategoricalInputs(x, x), one, **options)[0], torch.zeros(5))
    assert torch.equal(cpp_fused.gaussian(GaussianInputs(x, x, x, x), one, **options)[0], torch.zeros(5))


@all_lanes
def test_zero_probabilities(lanes):
    excluded = torch.tensor([[0.0, 1.0, -torch.inf], [0.0, 1.0, -torch.inf]])
    other = torch.tensor([[0.5, 0.0, -torch.inf], [0.5, 0.0, 2.0]])
    options = {"needs_grad": True, "lanes": lanes}
    for direction, x in (
        ("policy_prior", CategoricalInputs(excluded, other)),
        ("prior_policy", CategoricalInputs(other, excluded)),
    ):
        kl, grads = cpp_fused.categorical(x, TEMPERATURE, direction=direction, **options)
        expected, true_grads = by_autograd("categorical", x, direction)
        torch.testing.assert_close(kl, expected)
        torch.testing.assert_close(grads.logits, true_grads[0])
        # the other way round the second row has something where there is nothing
        x = CategoricalInputs(x.prior_log_probs, x.logits)
        kl, _ = cpp_fused.categorical(x, TEMPERATURE, direction=direction, **options)
        assert kl[0].isfinite()
        assert kl[1] == torch.inf


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 19)),
    seed=st.integers(0, 2**31),
    direction=st.sampled_from(["policy_prior", "prior_policy"]),
    lanes=st.sampled_from([4, 8, 16]),
)
def test_extremes(shape, seed, direction, lanes):
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([0.0, 0.0, 1.0, -3.5, 20.0, -60.0, -100.0, -300.0, 80.0, -torch.inf])
    logits, prior = values[torch.randint(10, (2, *shape), generator=generator)]
    kept = torch.randint(shape[1], (shape[0], 1), generator=generator)
    logits, prior = (t.scatter(1, kept, 0.0) for t in (logits, prior))
    x = CategoricalInputs(logits, prior)
    kl, grads = cpp_fused.categorical(x, TEMPERATURE, direction=direction, needs_grad=True, lanes=lanes)
    expected, true_grads = by_autograd("categorical", widened(x), direction)
    torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=1e-5)
    finite = expected.isfinite()
    torch.testing.assert_close(grads.logits[finite].double(), true_grads[0][finite], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype):
    logits, prior = torch.randn(2, 5, 9).to(dtype)
    x = CategoricalInputs(logits, prior)
    kl, grads = cpp_fused.categorical(x, TEMPERATURE, direction="policy_prior", needs_grad=True)
    expected, true_grads = by_autograd("categorical", widened(x), "policy_prior")
    assert (kl.dtype, grads.logits.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads.logits.double(), true_grads[0], rtol=1e-2, atol=1e-3)
    y = GaussianInputs(logits, prior[0], prior, logits[0])
    kl, grads = cpp_fused.gaussian(y, TEMPERATURE, direction="policy_prior", needs_grad=True)
    assert (kl.dtype, grads.mean.dtype, grads.log_std.dtype) == (torch.float32, dtype, dtype)
    torch.testing.assert_close(
        kl.double(), by_autograd("gaussian", widened(y), "policy_prior")[0], rtol=1e-5, atol=1e-5
    )


def test_views_are_read_as_what_they_show():
    logits, prior = torch.randn(2, 6, 7)
    options = {"direction": "policy_prior", "needs_grad": False}
    expected = cpp_fused.categorical(CategoricalInputs(logits, prior), TEMPERATURE, **options)[0]
    strided = CategoricalInputs(logits.T.contiguous().T, prior.repeat_interleave(2, dim=1)[:, ::2])
    assert torch.equal(cpp_fused.categorical(strided, TEMPERATURE, **options)[0], expected)


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("logits", lambda t: t[0]),
        ("prior_log_probs", lambda t: t[:, :2]),
        ("prior_log_probs", lambda t: t.double()),
        ("logits", lambda t: t.to("meta")),
        ("action_mask", lambda t: t.float()),
    ],
)
def test_a_refused_categorical_input_is_named(name, broken):
    x = CategoricalInputs(torch.randn(4, 3), torch.randn(4, 3), torch.ones(4, 3, dtype=torch.bool))
    x = x._replace(**{name: broken(getattr(x, name))})
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        cpp_fused.categorical(x, TEMPERATURE, direction="policy_prior", needs_grad=True)


@pytest.mark.parametrize("name", GaussianInputs._fields)
def test_a_refused_gaussian_input_is_named(name):
    x = GaussianInputs(torch.randn(4, 3), torch.randn(3), torch.randn(4, 3), torch.randn(4, 3))
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        cpp_fused.gaussian(x._replace(**{name: torch.randn(2)}), TEMPERATURE, direction="policy_prior", needs_grad=True)


def test_a_refused_temperature_and_direction_are_named():
    x = CategoricalInputs(torch.randn(4, 3), torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"^prior_temperature: expected"):
        cpp_fused.categorical(x, TEMPERATURE.double(), direction="policy_prior", needs_grad=True)
    with pytest.raises(ValueError, match=r"^direction: expected"):
        cpp_fused.categorical(x, TEMPERATURE, direction="sideways", needs_grad=True)
