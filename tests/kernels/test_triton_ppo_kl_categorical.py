"""The categorical loss in Triton against float64 autograd of the reference; on a CPU by Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from lago_fast import ops
from lago_fast.kernels.ppo_kl_categorical import eager, triton_fused
from lago_fast.kernels.ppo_kl_categorical.reference import Coefficients, Inputs
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


def draw(device: torch.device, rows: int, n_actions: int, *, masked: bool = False) -> Inputs:
    """Draw a batch in float32 with ratios on both sides of the clip and every fifth row invalid."""
    logits, prior = 2 * torch.randn(rows, n_actions), 2 * torch.randn(rows, n_actions) + 3
    mask = torch.rand(rows, n_actions) < 0.7 if masked else None
    actions = torch.randint(n_actions, (rows,))
    if mask is not None:
        mask.scatter_(1, actions[:, None], True)
    seen = logits if mask is None else logits.masked_fill(~mask, -torch.inf)
    log_prob = seen.log_softmax(-1).gather(1, actions[:, None]).squeeze(1)
    x = Inputs(
        logits=logits,
        values=torch.randn(rows),
        actions=actions,
        old_log_prob=log_prob + 0.3 * torch.randn(rows),
        advantages=3 * torch.randn(rows) + 1,
        returns=torch.randn(rows),
        old_values=torch.randn(rows),
        weight=(torch.arange(rows) % 5 != 4).float(),
        prior_log_probs=prior,
        action_mask=mask,
    )
    return Inputs(*(None if t is None else t.to(device) for t in x))


def widened(inputs):
    """Widen to float64, in which the reference is the truth."""
    return type(inputs)(*(t.double() if t is not None and t.is_floating_point() else t for t in inputs))


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
@pytest.mark.parametrize(
    ("rows", "n_actions"), [(1, 2), (7, 3), (63, 40), (65, 18), (2049, 4), (130, 40), (9, 257), (2, 4096), (3, 32_000)]
)
def test_shapes(rows, n_actions, kl_direction, device):
    assert_no_worse_than_eager(draw(device, rows, n_actions), coefficients(device), kl_direction=kl_direction)


@direction
@pytest.mark.parametrize(("rows", "n_actions"), [(7, 3), (300, 18), (2, 5000)])
def test_action_masks(rows, n_actions, kl_direction, device):
    x = draw(device, rows, n_actions, masked=True)
    assert_no_worse_than_eager(x, coefficients(device), kl_direction=kl_direction)
    grads = triton_fused.loss_and_grads(x, coefficients(device), kl_direction=kl_direction)[1]
    assert not grads.logits[~x.action_mask].any()


@direction
@pytest.mark.parametrize("masked", [False, True])
def test_loops_over_tiles_and_actions(kl_direction, masked, monkeypatch, device):
    for name, small in (("MAX_PROGRAMS", 4), ("MAX_BLOCK_A", 16), ("MOMENT_PROGRAMS", 2), ("MOMENT_ROWS", 16)):
        monkeypatch.setattr(triton_fused, name, small)
    x = draw(device, 515, 37, masked=masked)
    assert_no_worse_than_eager(x, coefficients(device), kl_direction=kl_direction)


@pytest.mark.parametrize("rows", [40, 300])
@pytest.mark.parametrize("clip_range_vf", [None, 0.05, 0.7])
@pytest.mark.parametrize("normalize_advantage", [False, True])
def test_value_clipping_and_advantages_as_they_are(rows, clip_range_vf, normalize_advantage, device):
    c = coefficients(device, 0.1, 0.02, 0.7, 0.5, 0.6, clip_range_vf)
    assert_no_worse_than_eager(draw(device, rows, 18), c, normalize_advantage=normalize_advantage)


@direction
def test_advantages_far_from_zero(kl_direction, device):
    x = draw(device, 1500, 4)
    x = x._replace(advantages=x.advantages + 1000)
    assert_no_worse_than_eager(x, coefficients(device), kl_direction=kl_direction)


@direction
@pytest.mark.parametrize("max_block", [4096, 4])
def test_probabilities_of_zero(kl_direction, max_block, monkeypatch, device):
    monkeypatch.setattr(triton_fused, "MAX_BLOCK_A", max_block)
    x = draw(device, 600, 9)
    # neither side knows the first block of four, nor the last action; the left side lacks one action more
    for t in (x.logits, x.prior_log_probs):
        t[:, :4] = t[:, 8] = -torch.inf
    left = x.logits if kl_direction == "policy_prior" else x.prior_log_probs
    left[:, 5] = -torch.inf
    x = x._replace(actions=torch.full_like(x.actions, 6))
    x = x._replace(old_log_prob=x.logits.log_softmax(-1)[:, 6] + 0.1)
    assert_no_worse_than_eager(x, coefficients(device), kl_direction=kl_direction)


@direction
@pytest.mark.parametrize("rows", [20, 300])
def test_an_infinite_kl_is_infinite(rows, kl_direction, device):
    x = draw(device, rows, 9)
    right = x.prior_log_probs if kl_direction == "policy_prior" else x.logits
    right[2, 3] = -torch.inf
    outputs, grads = triton_fused.loss_and_grads(x, coefficients(device), kl_direction=kl_direction)
    assert outputs.prior_kl == torch.inf
    assert outputs.loss == torch.inf
    assert torch.cat([grads.logits[:2], grads.logits[3:]]).isfinite().all()


def test_large_logits_and_a_sharp_prior(device):
    x = draw(device, 300, 40)
    c = coefficients(device, 0.2, 0.01, 0.5, 0.3, 0.05)
    large = x._replace(logits=10 * x.logits + 500, prior_log_probs=x.prior_log_probs - 80)
    log_prob = large.logits.double().log_softmax(-1).gather(1, x.actions[:, None]).squeeze(1)
    assert_no_worse_than_eager(large._replace(old_log_prob=log_prob.float()), c, rtol=1e-5)


def test_ratio_at_the_edge_of_the_clip(device):
    x = draw(device, 16, 2)._replace(logits=torch.zeros(16, 2, device=device), weight=torch.ones(16, device=device))
    ratios = torch.tensor([0.5, 1.5, 0.49, 1.51], device=device).repeat(4)
    at_edge = x._replace(old_log_prob=torch.tensor(0.5, device=device).log() - ratios.log())
    assert_no_worse_than_eager(at_edge, coefficients(device, 0.5))


@pytest.mark.parametrize("rows", [11, 300])
@pytest.mark.parametrize("valid_rows", [[], [3]])
def test_no_valid_row_and_one(rows, valid_rows, device):
    weight = torch.zeros(rows, device=device)
    weight[valid_rows] = 1
    x = draw(device, rows, 9)._replace(weight=weight)
    assert_no_worse_than_eager(x, coefficients(device))
    outputs, grads = triton_fused.loss_and_grads(x, coefficients(device), out=poisoned(x))
    if not valid_rows:
        assert not any(t.any() for t in (*outputs, *grads))


@direction
@pytest.mark.parametrize("rows", [20, 300])
def test_an_invalid_row_adds_nothing_whatever_it_holds(rows, kl_direction, device):
    x = draw(device, rows, 9)
    expected = triton_fused.loss_and_grads(x, coefficients(device), kl_direction=kl_direction)
    invalid = x.weight == 0
    x.old_log_prob[invalid] = -1e4
    x.prior_log_probs[invalid, 0] = x.logits[invalid, 1] = -torch.inf
    x.advantages[invalid] = torch.nan
    assert_same(expected, triton_fused.loss_and_grads(x, coefficients(device), kl_direction=kl_direction))
    assert not expected[1].logits[invalid].any()


def test_no_rows(device):
    x = draw(device, 0, 4)
    outputs, grads = triton_fused.loss_and_grads(x, coefficients(device))
    assert not any(t.any() for t in outputs)
    assert grads.logits.shape == (0, 4)


@pytest.mark.parametrize("rows", [20, 300])
@pytest.mark.parametrize("name", ["logits", "values", "old_log_prob", "advantages", "returns", "prior_log_probs"])
def test_a_nan_in_a_valid_row_shows_in_the_loss(name, rows, device):
    x = draw(device, rows, 9)
    getattr(x, name)[2] = torch.nan
    assert triton_fused.loss_and_grads(x, coefficients(device))[0].loss.isnan()


def test_an_action_that_does_not_exist_shows_in_the_loss(device):
    x = draw(device, 20, 4)
    x.actions[2] = 4
    assert triton_fused.loss_and_grads(x, coefficients(device))[0].loss.isnan()


def test_same_input_same_bits(device):
    x = draw(device, 700, 9)
    first = triton_fused.loss_and_grads(x, coefficients(device))
    assert_same(first, triton_fused.loss_and_grads(x, coefficients(device), out=poisoned(x)))


def test_views_are_read_as_what_they_show(device):
    x = draw(device, 30, 5)
    expected = triton_fused.loss_and_grads(x, coefficients(device))
    shifted = torch.cat([torch.zeros(1, device=device), x.logits.flatten()])[1:].view(30, 5)
    strided = x._replace(prior_log_probs=x.prior_log_probs.T.contiguous().T, values=x.values.repeat_interleave(2)[::2])
    assert_same(expected, triton_fused.loss_and_grads(strided._replace(logits=shifted), coefficients(device)))


@pytest.mark.parametrize("rows", [50, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(rows, dtype, device):
    x = Inputs(*(t.to(dtype) if t is not None and t.is_floating_point() else t for t in draw(device, rows, 18)))
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
        ("logits", lambda t: t[0]),
        ("values", lambda t: t.unsqueeze(1)),
        ("actions", lambda t: t.int()),
        ("weight", lambda t: t.bool()),
        ("advantages", lambda t: t.double()),
        ("prior_log_probs", lambda t: t.to("meta")),
        ("action_mask", lambda t: t.float()),
    ],
)
def test_a_refused_input_is_named(name, broken, device):
    x = draw(device, 10, 4, masked=True)
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
    with pytest.raises(ValueError, match=r"^out\[1\]\.logits: expected"):
        triton_fused.loss_and_grads(x, coefficients(device), out=poisoned(draw(device, 9, 4)))
    monkeypatch.setattr(triton_fused, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"^logits: expected a CUDA tensor"):
        triton_fused.loss_and_grads(Inputs(*(None if t is None else t.cpu() for t in x)), coefficients(device))


def through_autograd(x: Inputs, c: Coefficients) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in x[:2]]
    outputs = ops.ppo_kl_categorical(x._replace(logits=leaves[0], values=leaves[1]), c, impl="triton")
    return (*outputs, *torch.autograd.grad(outputs.loss, leaves))


def through_buffers(x: Inputs, c: Coefficients) -> tuple[Tensor, ...]:
    outputs, grads = ops.ppo_kl_categorical_loss_and_grads(x, c, impl="triton")
    return *outputs, *grads


entry = pytest.mark.parametrize("entry", [through_autograd, through_buffers])


@pytest.mark.gpu
@entry
@pytest.mark.parametrize("rows", [50, 3000])
def test_the_host_never_waits(entry, rows, device):
    x, c = draw(device, rows, 9), coefficients(device)
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
    x, c = draw(device, rows, 9), coefficients(device, 0.2, 0.01, 0.5, 0.3, 1.5, 0.7)
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
@pytest.mark.parametrize(("rows", "n_actions"), [(7, 3), (300, 18), (2, 5000)])
def test_a_weight_of_each_rows_kl(rows, n_actions, kl_direction, device):
    x = draw(device, rows, n_actions)._replace(kl_weight=2 * torch.rand(rows).to(device))
    assert_no_worse_than_eager(x, coefficients(device), kl_direction=kl_direction)
