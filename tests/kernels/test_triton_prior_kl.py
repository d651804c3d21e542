"""The KL of each state in Triton against float64 autograd of the reference; on a CPU by Triton's interpreter."""

import pytest
import torch

from lago_fast import ops
from lago_fast.kernels.prior_kl import reference, triton_fused
from lago_fast.kernels.prior_kl.reference import CategoricalInputs, GaussianInputs

# the interpreter computes in numpy, which warns of what is then selected away
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

direction = pytest.mark.parametrize("direction", ["policy_prior", "prior_policy"])
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _small_grid(monkeypatch, device) -> None:
    """Make programs few and large under the interpreter, which takes one after the other."""
    if device.type == "cpu":
        monkeypatch.setattr(triton_fused, "FULL_GPU", 8)


@pytest.fixture
def temperature(device) -> torch.Tensor:
    return torch.tensor(1.7, device=device)


def categorical_inputs(device: torch.device, rows: int, n_actions: int, *, masked: bool = False) -> CategoricalInputs:
    logits, prior = 2 * torch.randn(rows, n_actions), 2 * torch.randn(rows, n_actions) + 3
    mask = torch.rand(rows, n_actions) < 0.7 if masked else None
    if mask is not None:
        mask[:, n_actions // 2] = True
    return CategoricalInputs(logits.to(device), prior.to(device), None if mask is None else mask.to(device))


def gaussian_inputs(
    device: torch.device, rows: int, dims: int, *, std_per_row: bool = False, prior_std_per_row: bool = True
) -> GaussianInputs:
    def stds(per_row: bool) -> torch.Tensor:
        return 0.3 * torch.randn(*((rows, dims) if per_row else (dims,))) - 0.7

    mean, prior_mean = torch.randn(2, rows, dims)
    return GaussianInputs(*(t.to(device) for t in (mean, stds(std_per_row), prior_mean, stds(prior_std_per_row))))


def by_autograd(inputs, temperature, direction, dtype):
    """Return the KL and each row's gradients in `dtype`, a shared log std repeated for each row."""
    x = type(inputs)(*(t.to(dtype) if t is not None and t.is_floating_point() else t for t in inputs))
    if isinstance(inputs, GaussianInputs):
        x = x._replace(log_std=x.log_std.expand_as(x.mean))
    leaves = [t.detach().requires_grad_() for t in (x[:2] if isinstance(inputs, GaussianInputs) else x[:1])]
    compute = reference.gaussian if isinstance(inputs, GaussianInputs) else reference.categorical
    kl = compute(type(inputs)(*leaves, *x[len(leaves) :]), temperature.to(dtype), direction)
    return kl.detach(), *torch.autograd.grad(kl.sum(), leaves)


def assert_no_worse_than_eager(inputs, temperature, direction, rtol: float = 3e-6) -> None:
    compute = triton_fused.gaussian if isinstance(inputs, GaussianInputs) else triton_fused.categorical
    kl, grads = compute(inputs, temperature, direction=direction, needs_grad=True)
    truth = by_autograd(inputs, temperature, direction, torch.float64)
    plain = by_autograd(inputs, temperature, direction, torch.float32)
    for expected, other, got in zip(truth, plain, (kl, *grads), strict=True):
        assert got.shape == expected.shape
        allowed = 2 * (other - expected).abs().max() + rtol * expected.abs().max()
        assert (got - expected).abs().max() <= allowed
    alone, none = compute(inputs, temperature, direction=direction, needs_grad=False)
    assert torch.equal(alone, kl)
    assert none is None


@direction
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("rows", "n_actions"), [(1, 2), (7, 3), (63, 40), (2049, 4), (130, 18), (9, 257), (2, 4096), (3, 32_000)]
)
def test_categorical(rows, n_actions, masked, direction, temperature, device):
    inputs = categorical_inputs(device, rows, n_actions, masked=masked)
    assert_no_worse_than_eager(inputs, temperature, direction)


@direction
@pytest.mark.parametrize("std_per_row", [False, True])
@pytest.mark.parametrize("prior_std_per_row", [False, True])
@pytest.mark.parametrize(("rows", "dims"), [(1, 1), (7, 3), (2049, 4), (63, 17)])
def test_gaussian(rows, dims, std_per_row, prior_std_per_row, direction, temperature, device):
    inputs = gaussian_inputs(device, rows, dims, std_per_row=std_per_row, prior_std_per_row=prior_std_per_row)
    assert_no_worse_than_eager(inputs, temperature, direction)


@direction
@pytest.mark.parametrize("max_block", [4096, 4])
def test_probabilities_of_zero(direction, max_block, monkeypatch, temperature, device):
    monkeypatch.setattr(triton_fused, "MAX_BLOCK_A", max_block)
    x = categorical_inputs(device, 70, 9)
    for t in (x.logits, x.prior_log_probs):
        t[:, :4] = t[:, 8] = -torch.inf
    left, right = x[:2] if direction == "policy_prior" else x[1::-1]
    left[:, 5] = -torch.inf
    assert_no_worse_than_eager(x, temperature, direction)
    right[2, 6] = -torch.inf
    kl = triton_fused.categorical(x, temperature, direction=direction, needs_grad=False)[0]
    assert kl[2] == torch.inf
    assert torch.cat([kl[:2], kl[3:]]).isfinite().all()


@pytest.mark.parametrize("dtype", HALVES)
def test_half_types_are_computed_in_float32(dtype, temperature, device):
    x = categorical_inputs(device, 30, 9)
    x = x._replace(logits=x.logits.to(dtype), prior_log_probs=x.prior_log_probs.to(dtype))
    g = GaussianInputs(*(t.to(dtype) for t in gaussian_inputs(device, 30, 4)))
    for inputs, compute in ((x, triton_fused.categorical), (g, triton_fused.gaussian)):
        kl, grads = compute(inputs, temperature, direction="policy_prior", needs_grad=True)
        truth = by_autograd(inputs, temperature, "policy_prior", torch.float64)
        torch.testing.assert_close(kl.double(), truth[0], rtol=1e-5, atol=1e-5)
        for got, expected in zip(grads, truth[1:], strict=True):
            assert got.dtype == dtype
            torch.testing.assert_close(got.double(), expected, rtol=1e-2, atol=1e-3)


def test_views_are_read_as_what_they_show(temperature, device):
    x, g = categorical_inputs(device, 30, 5), gaussian_inputs(device, 30, 5)
    for inputs, compute in ((x, triton_fused.categorical), (g, triton_fused.gaussian)):
        strided = inputs._replace(**{inputs._fields[0]: inputs[0].T.contiguous().T})
        first = compute(inputs, temperature, direction="policy_prior", needs_grad=True)
        again = compute(strided, temperature, direction="policy_prior", needs_grad=True)
        assert torch.equal(first[0], again[0])
        assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


def test_no_rows(temperature, device):
    x, g = categorical_inputs(device, 0, 5), gaussian_inputs(device, 0, 5)
    kl, grads = triton_fused.categorical(x, temperature, direction="policy_prior", needs_grad=True)
    assert kl.shape == (0,)
    assert grads.logits.shape == (0, 5)
    kl, grads = triton_fused.gaussian(g, temperature, direction="policy_prior", needs_grad=True)
    assert kl.shape == (0,)
    assert grads.log_std.shape == (0, 5)


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("logits", lambda t: t[0]),
        ("logits", lambda t: t.double()),
        ("prior_log_probs", lambda t: t[:, :2]),
        ("action_mask", lambda t: t.float()),
    ],
)
def test_a_refused_categorical_input_is_named(name, broken, temperature, device):
    x = categorical_inputs(device, 10, 4, masked=True)
    x = x._replace(**{name: broken(getattr(x, name))})
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        triton_fused.categorical(x, temperature, direction="policy_prior", needs_grad=True)


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("mean", lambda t: t[0]),
        ("log_std", lambda t: t[:2]),
        ("prior_mean", lambda t: t.to("meta")),
        ("prior_log_std", lambda t: t.long()),
    ],
)
def test_a_refused_gaussian_input_is_named(name, broken, temperature, device):
    x = gaussian_inputs(device, 10, 4)
    x = x._replace(**{name: broken(getattr(x, name))})
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        triton_fused.gaussian(x, temperature, direction="policy_prior", needs_grad=True)


def test_a_refused_temperature_direction_and_device_are_named(monkeypatch, temperature, device):
    x = gaussian_inputs(device, 10, 4)
    with pytest.raises(ValueError, match=r"^prior_temperature: expected"):
        triton_fused.gaussian(x, temperature.double(), direction="policy_prior", needs_grad=True)
    with pytest.raises(ValueError, match=r"^direction: expected"):
        triton_fused.gaussian(x, temperature, direction="sideways", needs_grad=True)
    monkeypatch.setattr(triton_fused, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"^mean: expected a CUDA tensor"):
        triton_fused.gaussian(
            GaussianInputs(*(t.cpu() for t in x)), temperature, direction="policy_prior", needs_grad=True
        )


def categorical_entry(device: torch.device, temperature: torch.Tensor) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    x = categorical_inputs(torch.device("cpu"), 300, 9)
    logits, prior = x.logits.to(device).requires_grad_(), x.prior_log_probs.to(device)

    def entry():
        kl = ops.prior_kl_categorical(logits, prior, prior_temperature=temperature, impl="triton")
        return kl, *torch.autograd.grad(kl.sum(), logits)

    return entry


def gaussian_entry(device: torch.device, temperature: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x = [t.to(device) for t in gaussian_inputs(torch.device("cpu"), 300, 4)]
    leaves = [t.requires_grad_() for t in x[:2]]

    def entry():
        kl = ops.prior_kl_gaussian(*leaves, *x[2:], prior_temperature=temperature, impl="triton")
        return kl, *torch.autograd.grad(kl.sum(), leaves)

    return entry


made = pytest.mark.parametrize("made", [categorical_entry, gaussian_entry])


@pytest.mark.gpu
@made
def test_the_host_never_waits(made, temperature, device):
    entry = made(device, temperature)
    entry()  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        entry()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@made
def test_a_captured_graph_follows_the_temperature(made, temperature, device):
    entry = made(device, temperature)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        entry()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = entry()
    graph.replay()
    before = [t.clone() for t in captured]
    temperature.mul_(0.5)
    graph.replay()
    assert not any(torch.equal(a, b) for a, b in zip(before[:1], captured[:1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(entry(), captured, strict=True))
