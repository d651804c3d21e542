"""The Gaussian loss in Triton against float64 autograd of the reference; on a CPU by Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from lago_fast import ops
from lago_fast.kernels.ppo_kl_gaussian import eager, triton_fused
from lago_fast.kernels.ppo_kl_gaussian.reference import Coefficients, Inputs
from tests.kernels.cuda_cases import poisoned

# the interpreter computes in numpy, which warns of what is then selected away
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

NAMES = ("clip_range", "ent_coef", "vf_coef", "kl_coef", "prior_temperature", "clip_range_vf")
direction = pytest.mark.parametrize("kl_direction", ["policy_prior", "prior_policy"])


@pytest.fixture(autouse=True)
def _small_grid(monkeypatch, device) -> None:
    """Make programs few and large under the interpreter, which takes one after the other."""
    if device.type == "cpu":
        monkeypatch.setattr(triton_fused, "FULL_GPU", 8)
        monkeypatch.setattr(triton_fused, "MOMENT_PROGRAMS", 4)


def coefficients(device: torch.device, *values: float | None) -> Coefficients:
    """Build the coefficients in the order of NAMES; what is left out has its default here."""
    defaults = (0.2, 0.01, 0.5, 0.3, 1.5, None)
    chosen = (*values, *defaults[len(values) :])
    return Coefficients(*(None if v is None else torch.tensor(v, device=device) for v in chosen))


def draw(
    device: torch.device, rows: int, dims: int, *, policy_std_per_row: bool = False, prior_std_per_row: bool = True
) -> Inputs:
    """Draw a batch in float32 with ratios on both sides of the clip and every fifth row invalid."""

    def stds(per_row: bool) -> Tensor:
        return 0.3 * torch.randn(*((rows, dims) if per_row else (dims,))) - 0.7

    mean, log_std = torch.randn(rows, dims), stds(policy_std_per_row)
    actions = mean + log_std.exp() * torch.randn(rows, dims)
    log_prob = torch.distributions.Normal(mean, log_std.exp()).log_prob(actions).sum(-1)
    x = Inputs(
        mean=mean,
        log_std=log_std,
        values=torch.randn(rows),
        actions=actions,
        old_log_prob=log_prob + 0.3 * torch.randn(rows),
        advantages=3 * torch.randn(rows) + 1,
        returns=torch.randn(rows),
        old_values=torch.randn(rows),
        weight=(torch.arange(rows) % 5 != 4).float(),
        prior_mean=torch.randn(rows, dims),
        prior_log_std=stds(prior_std_per_row),
    )
    return Inputs(*(None if t is None else t.to(device) for t in x))


def widened(inputs):
    """Widen to float64, in which the reference is the truth."""
    return type(inputs)(*(None if t is None else t.double() for t in inputs))


def assert_no_worse_than_eager(x: Inputs, c: Coefficients, *, rtol: float = 3e-6, **options) -> None:
    """Compare every output and gradient with float64, beside eager float32.

    A gradient's tolerance is relative to its largest entry. The outputs are means of terms that may cancel,
    hence an absolute part for them.
    """
    truth = [t for part in eager.loss_and_grads(widened(x), widened(c), **options) for t in part]
    plain = [t for part in eager.loss_and_grads(x, c, **options) for t in part]
    fused = [t for part in triton_fused.loss_and_grads(x, c, out=poisoned(x), **options) for t in part]
    names = (*eager.Outputs._fields, *eager.Grads._fields)
    for name, expected, other, got in zip(names, truth, plain, fused, strict=True):
        scale = expected.abs().max() if expected.dim() else expected.abs() + 1
        allowed = 2 * (other - expected).abs().max() + rtol * scale
        assert (got - expected).abs().max() <= allowed, name
        assert got.dtype == torch.float32


def assert_same(first: tuple, second: tuple) -> None:
    for part, again in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part, again, strict=True))


@direction
@pytest.mark.parametrize(("rows", "dims"), [(1, 1), (7, 3), (63, 4), (65, 17), (2049, 4), (2049, 1), (700, 17)])
def test_shapes(rows, dims, kl_direction, device):
    assert_no_worse_than_eager(draw(device, rows, dims), coefficients(device), kl_direction=kl_direction)


@direction
@pytest.mark.parametrize("policy_std_per_row", [False, True])
@pytest.mark.parametrize("prior_std_per_row", [False, True])
@pytest.mark.parametrize(("rows", "dims"), [(77, 2), (700, 6)])
def test_stds_of_the_state_and_not(policy_std_per_row, prior_std_per_row, rows, dims, kl_direction, device):
    x = draw(device, rows, dims, policy_std_per_row=policy_std_per_row, prior_std_per_row=prior_std_per_row)
    assert_no_worse_than_eager(x, coefficients(device), kl_direction=kl_direction)


@direction
def test_loops_over_tiles_and_dims(kl_direction, monkeypatch, device):
    for name, small in (("MAX_PROGRAMS", 4), ("GRAD_DIMS", 2), ("MOMENT_PROGRAMS", 2), ("MOMENT_ROWS", 16)):
        monkeypatch.setattr(triton_fused, name, small)
    assert_no_worse_than_eager(draw(device, 1500, 5), coefficients(device), kl_direction=kl_direction)


@pytest.mark.parametrize("rows", [40, 1100])
@pytest.mark.parametrize("clip_range_vf", [None, 0.05, 0.7])
@pytest.mark.parametrize("normalize_advantage", [False, True])
def test_value_clipping_and_advantages_as_they_are(rows, clip_range_vf, normalize_advantage, device):
    c = coefficients(device, 0.1, 0.02, 0.7, 0.5, 0.6, clip_range_vf)
    assert_no_worse_than_eager(draw(device, rows, 4), c, normalize_advantage=normalize_advantage)


def test_advantages_far_from_zero(device):
    x = draw(device, 1500, 4)
    assert_no_worse_than_eager(x._replace(advantages=x.advantages + 1000), coefficients(device))


@direction
@pytest.mark.parametrize("log_std", [-20.0, -8.0, 2.0])
def test_log_std_at_its_bounds(log_std, kl_direction, device):
    x = draw(device, 40, 3)
    std = torch.tensor(log_std).exp().to(device)
    noise = torch.randn(40, 3).to(device)
    x = x._replace(log_std=torch.full((3,), log_std, device=device), actions=x.mean + noise * std)
    old = torch.distributions.Normal(x.mean.double(), x.log_std.double().exp()).log_prob(x.actions.double())
    x = x._replace(old_log_prob=old.sum(-1).float())
    # A log-probability of about 60 carries a rounding error of 4e-6, which its ratio multiplies.
    assert_no_worse_than_eager(x, coefficients(device), rtol=2e-5, kl_direction=kl_direction)


def test_ratio_at_the_edge_of_the_clip(device):
    x = draw(device, 16, 1)
    at_mean = x._replace(actions=x.mean, log_std=torch.zeros(1, device=device), weight=torch.ones(16, device=device))
    log_prob = torch.distributions.Normal(at_mean.mean, 1.0).log_prob(at_mean.actions).sum(-1)
    ratios = torch.tensor([0.5, 1.5, 0.49, 1.51], device=device).repeat(4)
    assert_no_worse_than_eager(at_mean._replace(old_log_prob=log_prob - ratios.log()), coefficients(device, 0.5))


@pytest.mark.parametrize("rows", [11, 1100])
@pytest.mark.parametrize("valid_rows", [[], [3]])
def test_no_valid_row_and_one(rows, valid_rows, device):
    weight = torch.zeros(rows, device=device)
    weight[valid_rows] = 1
    x = draw(device, rows, 4)._replace(weight=weight)
    assert_no_worse_than_eager(x, coefficients(device))
    outputs, grads = triton_fused.loss_and_grads(x, coefficients(device), out=poisoned(x))
    if not valid_rows:
        assert not any(t.any() for t in (*outputs, *grads))


@pytest.mark.parametrize("rows", [20, 1100])
def test_an_invalid_row_adds_nothing_whatever_it_holds(rows, device):
    x = draw(device, rows, 4)
    expected = triton_fused.loss_and_grads(x, coefficients(device))
    invalid = x.weight == 0
    x.old_log_prob[invalid] = -1e4
    x.prior_log_std[invalid] = -1e4
    x.advantages[invalid] = torch.nan
    assert_same(expected, triton_fused.loss_and_grads(x, coefficients(device)))
    assert not expected[1].mean[invalid].any()


def test_no_rows(device):
    x = draw(device, 0, 4)
    outputs, grads = triton_fused.loss_and_grads(x, coefficients(device), out=poisoned(x))
    assert not any(t.any() for t in outputs)
    assert torch.equal(grads.log_std, torch.zeros(4, device=device))
    assert grads.mean.shape == (0, 4)


@pytest.mark.parametrize("rows", [20, 1100])
@pytest.mark.parametrize("name", ["mean", "values", "actions", "old_log_prob", "advantages", "returns", "prior_mean"])
def test_a_nan_in_a_valid_row_shows_in_the_loss(name, rows, device):
    x = draw(device, rows, 4)
    getattr(x, name)[2] = torch.nan
    assert triton_fused.loss_and_grads(x, coefficients(device))[0].loss.isnan()


def test_same_input_same_bits(device):
    x = draw(device, 1100, 4)
    first = triton_fused.loss_and_grads(x, coefficients(device))
    assert_same(first, triton_fused.loss_and_grads(x, coefficients(device), out=poisoned(x)))


def test_views_are_read_as_what_they_show(device):
    x = draw(device, 30, 5)
    expected = triton_fused.loss_and_grads(x, coefficients(device))
    shifted = torch.cat([torch.zeros(1, device=device), x.actions.flatten()])[1:].view(30, 5)
    strided = x._replace(mean=x.mean.T.contiguous().T, values=x.values.repeat_interleave(2)[::2], actions=shifted)
    assert_same(expected, triton_fused.loss_and_grads(strided, coefficients(device)))


@pytest.mark.parametrize("rows", [50, 1100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(rows, dtype, device):
    x = Inputs(*(None if t is None else t.to(dtype) for t in draw(device, rows, 4)))
    outputs, grads = triton_fused.loss_and_grads(x, coefficients(device), out=poisoned(x))
    truth, true_grads = eager.loss_and_grads(widened(x), widened(coefficients(device)))
    for got, expected in zip(outputs, truth, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    for got, expected in zip(grads, true_grads, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("mean", lambda t: t[0]),
        ("log_std", lambda t: t[:2]),
        ("values", lambda t: t.unsqueeze(1)),
        ("actions", lambda t: t[:, :3]),
        ("weight", lambda t: t.bool()),
        ("advantages", lambda t: t.double()),
        ("prior_mean", lambda t: t.to("meta")),
    ],
)
def test_a_refused_input_is_named(name, broken, device):
    x = draw(device, 10, 4)
    x = x._replace(**{name: broken(getattr(x, name))})
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        triton_fused.loss_and_grads(x, coefficients(device))


@pytest.mark.parametrize("name", NAMES)
def test_a_refused_coefficient_is_named(name, device):
    c = coefficients(device)._replace(**{name: torch.tensor(0.1, dtype=torch.float64, device=device)})
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        triton_fused.loss_and_grads(draw(device, 10, 4), c)


def test_a_refused_direction_buffer_and_device_are_named(monkeypatch, device):
    x = draw(device, 10, 4)
    with pytest.raises(ValueError, match=r"^kl_direction: expected"):
        triton_fused.loss_and_grads(x, coefficients(device), kl_direction="sideways")
    with pytest.raises(ValueError, match=r"^out\[1\]\.mean: expected"):
        triton_fused.loss_and_grads(x, coefficients(device), out=poisoned(draw(device, 9, 4)))
    monkeypatch.setattr(triton_fused, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"^mean: expected a CUDA tensor"):
        triton_fused.loss_and_grads(Inputs(*(None if t is None else t.cpu() for t in x)), coefficients(device))


def through_autograd(x: Inputs, c: Coefficients) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in x[:3]]
    outputs = ops.ppo_kl_gaussian(Inputs(*leaves, *x[3:]), c, impl="triton")
    return (*outputs, *torch.autograd.grad(outputs.loss, leaves))


def through_buffers(x: Inputs, c: Coefficients) -> tuple[Tensor, ...]:
    outputs, grads = ops.ppo_kl_gaussian_loss_and_grads(x, c, impl="triton")
    return *outputs, *grads


entry = pytest.mark.parametrize("entry", [through_autograd, through_buffers])


@pytest.mark.gpu
@entry
@pytest.mark.parametrize("rows", [50, 3000])
def test_the_host_never_waits(entry, rows, device):
    x, c = draw(device, rows, 4), coefficients(device)
    entry(x, c)  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        entry(x, c)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@entry
@pytest.mark.parametrize("rows", [50, 3000])
def test_a_captured_graph_follows_the_coefficients(entry, rows, device):
    x, c = draw(device, rows, 4), coefficients(device, 0.2, 0.01, 0.5, 0.3, 1.5, 0.7)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        entry(x, c)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = entry(x, c)
    for coefficient in c:
        graph.replay()
        before = [t.clone() for t in captured]
        coefficient.mul_(0.3)
        graph.replay()
        assert not all(torch.equal(a, b) for a, b in zip(before, captured, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(entry(x, c), captured, strict=True))


@direction
@pytest.mark.parametrize(("rows", "dims"), [(7, 3), (63, 4), (700, 17)])
def test_a_weight_of_each_rows_kl(rows, dims, kl_direction, device):
    x = draw(device, rows, dims)._replace(kl_weight=2 * torch.rand(rows).to(device))
    assert_no_worse_than_eager(x, coefficients(device), kl_direction=kl_direction)
