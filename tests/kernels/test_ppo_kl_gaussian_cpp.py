"""The native Gaussian loss against float64 autograd of the reference, with every instruction set that is here."""

import os
import signal
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lago_fast.kernels.ppo_kl_gaussian import cpp_fused, eager
from lago_fast.kernels.ppo_kl_gaussian.reference import Coefficients, Inputs
from tests.kernels.cuda_cases import poisoned

NAMES = ("clip_range", "ent_coef", "vf_coef", "kl_coef", "prior_temperature", "clip_range_vf")


def coefficients(*values: float | None) -> Coefficients:
    """Build the coefficients in the order of NAMES; what is left out has its default here."""
    defaults = (0.2, 0.01, 0.5, 0.3, 1.5, None)
    chosen = (*values, *defaults[len(values) :])
    return Coefficients(*(None if v is None else torch.tensor(v) for v in chosen))


def draw(rows: int, dims: int, *, policy_std_per_row: bool = False, prior_std_per_row: bool = True) -> Inputs:
    """Draw a batch in float32 with ratios on both sides of the clip and every fifth row invalid."""

    def stds(per_row: bool) -> Tensor:
        return 0.3 * torch.randn(*((rows, dims) if per_row else (dims,))) - 0.7

    mean, log_std = torch.randn(rows, dims), stds(policy_std_per_row)
    actions = mean + log_std.exp() * torch.randn(rows, dims)
    log_prob = torch.distributions.Normal(mean, log_std.exp()).log_prob(actions).sum(-1)
    return Inputs(
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


def widened(inputs):
    """Widen to float64, in which the reference is the truth."""
    return type(inputs)(*(None if t is None else t.double() for t in inputs))


def assert_no_worse_than_eager(x: Inputs, c: Coefficients, *, lanes: int, rtol: float = 2e-6, **options) -> None:
    """Compare every output and gradient with float64, beside eager float32.

    A gradient's tolerance is relative to its largest entry. The outputs are means of terms that may cancel,
    hence an absolute part for them.
    """
    truth = [t for part in eager.loss_and_grads(widened(x), widened(c), **options) for t in part]
    plain = [t for part in eager.loss_and_grads(x, c, **options) for t in part]
    fused = [t for part in cpp_fused.loss_and_grads(x, c, out=poisoned(x), lanes=lanes, **options) for t in part]
    names = (*eager.Outputs._fields, *eager.Grads._fields)
    for name, expected, other, got in zip(names, truth, plain, fused, strict=True):
        if expected.numel() == 0:
            continue
        scale = expected.abs().max() if expected.dim() else expected.abs() + 1
        allowed = 2 * (other - expected).abs().max() + rtol * scale
        assert (got - expected).abs().max() <= allowed, name
        assert got.dtype == torch.float32


all_lanes = pytest.mark.parametrize("lanes", [4, 8, 16])
direction = pytest.mark.parametrize("kl_direction", ["policy_prior", "prior_policy"])


@all_lanes
@direction
@pytest.mark.parametrize("dims", [1, 3, 4, 17])
@pytest.mark.parametrize("rows", [1, 7, 8, 63, 64, 65, 2049])
def test_shapes(rows, dims, kl_direction, lanes):
    assert_no_worse_than_eager(draw(rows, dims), coefficients(), lanes=lanes, kl_direction=kl_direction)


@all_lanes
@direction
@pytest.mark.parametrize("policy_std_per_row", [False, True])
@pytest.mark.parametrize("prior_std_per_row", [False, True])
@pytest.mark.parametrize("dims", [2, 6, 8])
def test_stds_of_the_state_and_not(policy_std_per_row, prior_std_per_row, dims, kl_direction, lanes):
    x = draw(77, dims, policy_std_per_row=policy_std_per_row, prior_std_per_row=prior_std_per_row)
    assert_no_worse_than_eager(x, coefficients(), lanes=lanes, kl_direction=kl_direction)


@all_lanes
@pytest.mark.parametrize("clip_range_vf", [None, 0.05, 0.7])
@pytest.mark.parametrize("normalize_advantage", [False, True])
def test_value_clipping_and_advantages_as_they_are(clip_range_vf, normalize_advantage, lanes):
    c = coefficients(0.1, 0.02, 0.7, 0.5, 0.6, clip_range_vf)
    assert_no_worse_than_eager(draw(100, 4), c, lanes=lanes, normalize_advantage=normalize_advantage)


@all_lanes
def test_many_rows(lanes):
    assert_no_worse_than_eager(draw(65537, 4), coefficients(), lanes=lanes)


@all_lanes
@pytest.mark.parametrize("log_std", [-20.0, -8.0, 2.0])
def test_log_std_at_its_bounds(log_std, lanes):
    x = draw(40, 3)
    std = torch.tensor(log_std).exp()
    x = x._replace(log_std=torch.full((3,), log_std), actions=x.mean + torch.randn(40, 3) * std)
    old = torch.distributions.Normal(x.mean.double(), x.log_std.double().exp()).log_prob(x.actions.double())
    x = x._replace(old_log_prob=old.sum(-1).float())
    # A log-probability of about 60 carries a rounding error of 4e-6, which its ratio multiplies.
    assert_no_worse_than_eager(x, coefficients(), lanes=lanes, rtol=2e-5)


@all_lanes
def test_ratio_at_the_edge_of_the_clip(lanes):
    x = draw(16, 1)
    at_mean = x._replace(actions=x.mean, log_std=torch.zeros(1), weight=torch.ones(16))
    log_prob = torch.distributions.Normal(at_mean.mean, 1.0).log_prob(at_mean.actions).sum(-1)
    ratios = torch.tensor([0.5, 1.5, 0.49, 1.51]).repeat(4)
    at_mean = at_mean._replace(old_log_prob=log_prob - ratios.log())
    assert_no_worse_than_eager(at_mean, coefficients(0.5), lanes=lanes)


@all_lanes
def test_ratios_next_to_the_largest_float_and_to_none(lanes):
    x = draw(16, 1)
    log_ratios = torch.tensor([88.3, 88.5, 88.7, -86.0]).repeat(4)
    log_prob = torch.distributions.Normal(x.mean.double(), x.log_std.double().exp()).log_prob(x.actions.double())
    x = x._replace(
        old_log_prob=log_prob.sum(-1).float() - log_ratios, advantages=torch.full((16,), -1e-6), weight=torch.ones(16)
    )
    # an error of the log ratio, of which the last bit is 8e-6 here, is a relative one of the ratio
    assert_no_worse_than_eager(x, coefficients(0.2), lanes=lanes, rtol=3e-5, normalize_advantage=False)


@all_lanes
@pytest.mark.parametrize("valid_rows", [[], [3]])
def test_no_valid_row_and_one(valid_rows, lanes):
    weight = torch.zeros(11)
    weight[valid_rows] = 1
    x = draw(11, 4)._replace(weight=weight)
    assert_no_worse_than_eager(x, coefficients(), lanes=lanes)
    outputs, grads = cpp_fused.loss_and_grads(x, coefficients(), lanes=lanes)
    if not valid_rows:
        assert not any(t.any() for t in (*outputs, *grads))


@all_lanes
def test_an_invalid_row_adds_nothing_even_with_an_infinite_ratio(lanes):
    x = draw(20, 4)
    expected = cpp_fused.loss_and_grads(x, coefficients(), lanes=lanes)
    x.old_log_prob[x.weight == 0] = -1e4
    for part, again in zip(expected, cpp_fused.loss_and_grads(x, coefficients(), lanes=lanes), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part, again, strict=True))


@all_lanes
def test_no_rows(lanes):
    outputs, grads = cpp_fused.loss_and_grads(draw(0, 4), coefficients(), lanes=lanes)
    assert not any(t.any() for t in outputs)
    assert torch.equal(grads.log_std, torch.zeros(4))
    assert grads.mean.shape == (0, 4)


@all_lanes
@pytest.mark.parametrize("name", ["mean", "values", "actions", "old_log_prob", "advantages", "returns"])
def test_a_nan_in_a_valid_row_shows_in_the_loss(name, lanes):
    x = draw(20, 4)
    getattr(x, name)[2] = float("nan")
    assert cpp_fused.loss_and_grads(x, coefficients(), lanes=lanes)[0].loss.isnan()


@all_lanes
def test_same_input_same_bits(lanes):
    x = draw(1000, 4)
    first = cpp_fused.loss_and_grads(x, coefficients(), lanes=lanes)
    again = cpp_fused.loss_and_grads(x, coefficients(), out=poisoned(x), lanes=lanes)
    for part, same in zip(first, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part, same, strict=True))


@pytest.fixture
def _threads_restored():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@all_lanes
@pytest.mark.parametrize("policy_std_per_row", [False, True])
@pytest.mark.parametrize(("rows", "dims"), [(20_003, 4), (40_001, 1), (5000, 17)])
@pytest.mark.usefixtures("_threads_restored")
def test_threads_do_not_change_a_bit(rows, dims, policy_std_per_row, lanes):
    x = draw(rows, dims, policy_std_per_row=policy_std_per_row)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        outputs, grads = cpp_fused.loss_and_grads(x, coefficients(), out=poisoned(x), lanes=lanes)
        results.append((*outputs, *grads))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.usefixtures("_threads_restored")
def test_torchs_threads_and_the_own_ones_give_the_same_bits():
    torch.set_num_threads(2)
    x = draw(20_000, 4)
    expected = [t for part in cpp_fused.loss_and_grads(x, coefficients()) for t in part]
    for asleep in (True, False):
        if asleep:
            time.sleep(0.1)  # longer than OpenMP's threads spin
        else:
            torch.randn(1_000_000).exp_()  # wakes them
        got = [t for part in cpp_fused.loss_and_grads(x, coefficients(), out=poisoned(x)) for t in part]
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_threads_start_again_after_a_fork():
    torch.set_num_threads(2)
    x = draw(20_000, 4)
    expected = cpp_fused.loss_and_grads(x, coefficients())
    buffers = poisoned(x)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        again = cpp_fused.loss_and_grads(x, coefficients(), out=buffers)
        torch.set_num_threads(1)  # OpenMP's threads, unlike ours, do not start again
        same = all(
            torch.equal(a, b) for parts in zip(expected, again, strict=True) for a, b in zip(*parts, strict=True)
        )
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


def extreme(rows: int, dims: int, seed: int, policy_std_per_row: bool) -> Inputs:
    """Rows whose ratio is at the clip edge or far from it, with stds at their bounds."""
    generator = torch.Generator().manual_seed(seed)

    def choose(values: list[float], *shape: int) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), shape, generator=generator)]

    mean, prior_mean = (choose([0.0, 1.0, -1.0, 30.0], rows, dims) for _ in range(2))
    log_std = choose([0.0, -8.0, 2.0, -1.0], *((rows, dims) if policy_std_per_row else (dims,)))
    actions = mean + log_std.exp() * choose([0.0, 1.0, -4.0], rows, dims)
    log_prob = torch.distributions.Normal(mean.double(), log_std.double().exp()).log_prob(actions.double()).sum(-1)
    old = (log_prob - choose([0.8, 1.2, 1.0, 0.5, 3.0], rows).log()).float()
    columns = [choose([0.0, -10.0, 1e-3, 7.5], rows) for _ in range(4)]
    weight = choose([0.0, 1.0, 1.0], rows)
    prior_log_std = choose([0.0, -1.6, 1.0], rows, dims)
    return Inputs(mean, log_std, columns[0], actions, old, *columns[1:], weight, prior_mean, prior_log_std)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 9)),
    seed=st.integers(0, 2**31),
    policy_std_per_row=st.booleans(),
    lanes=st.sampled_from([4, 8, 16]),
)
def test_extremes(shape, seed, policy_std_per_row, lanes):
    x = extreme(*shape, seed, policy_std_per_row)
    outputs, grads = cpp_fused.loss_and_grads(x, coefficients(), out=poisoned(x), lanes=lanes)
    truth, true_grads = eager.loss_and_grads(widened(x), widened(coefficients()))
    counts = x.weight != 0
    assert not grads.mean[~counts].any()
    assert not grads.values[~counts].any()
    for name, got, expected in zip(eager.Outputs._fields, outputs, truth, strict=True):
        if name != "clip_fraction":  # which jumps at the edge
            torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(grads.values.double(), true_grads.values, rtol=1e-4, atol=1e-5)
    # at the edge of the clip the surrogate has two derivatives
    z = (x.actions.double() - x.mean.double()) * (-x.log_std.double()).exp()
    log_prob = (-0.5 * z.square() - x.log_std.double() - 0.91893853320467274).sum(-1)
    kept = (((log_prob - x.old_log_prob.double()).exp() - 1).abs() - 0.2).abs() > 1e-2
    scale = true_grads.mean.abs().max() + 1e-30
    torch.testing.assert_close(grads.mean[kept].double() / scale, true_grads.mean[kept] / scale, rtol=1e-2, atol=1e-3)


def test_views_are_read_as_what_they_show():
    x = draw(30, 4)
    expected = cpp_fused.loss_and_grads(x, coefficients())
    strided = x._replace(mean=x.mean.T.contiguous().T, values=x.values.repeat_interleave(2)[::2])
    for part, same in zip(expected, cpp_fused.loss_and_grads(strided, coefficients()), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part, same, strict=True))


def test_torch_without_a_quick_reader_gives_the_same(monkeypatch):
    x = draw(50, 9)
    expected = cpp_fused.loss_and_grads(x, coefficients())
    monkeypatch.setattr(cpp_fused._C, "addresses", lambda *_: None)
    again = cpp_fused.loss_and_grads(x, coefficients(), out=poisoned(x))
    for part, same in zip(expected, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part, same, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype):
    x = Inputs(*(None if t is None else t.to(dtype) for t in draw(50, 4)))
    outputs, grads = cpp_fused.loss_and_grads(x, coefficients())
    truth, true_grads = eager.loss_and_grads(widened(x), widened(coefficients()))
    for got, expected in zip(outputs, truth, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    for got, expected in zip(grads, true_grads, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=1e-2, atol=1e-4)
    buffers = poisoned(x)
    assert cpp_fused.loss_and_grads(x, coefficients(), out=buffers)[1] is buffers[1]
    assert all(torch.equal(a, b) for a, b in zip((*buffers[0], *buffers[1]), (*outputs, *grads), strict=True))


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
def test_a_refused_input_is_named(name, broken):
    x = draw(10, 4)
    x = x._replace(**{name: broken(getattr(x, name))})
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        cpp_fused.loss_and_grads(x, coefficients())


@pytest.mark.parametrize("name", NAMES)
def test_a_refused_coefficient_is_named(name):
    c = coefficients()._replace(**{name: torch.tensor(0.1, dtype=torch.float64)})
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        cpp_fused.loss_and_grads(draw(10, 4), c)


def test_a_refused_direction_and_buffer_are_named():
    x = draw(10, 4)
    with pytest.raises(ValueError, match=r"^kl_direction: expected"):
        cpp_fused.loss_and_grads(x, coefficients(), kl_direction="sideways")
    with pytest.raises(ValueError, match=r"^out\[1\]\.mean: expected"):
        cpp_fused.loss_and_grads(x, coefficients(), out=poisoned(draw(9, 4)))
    outputs, grads = poisoned(x)
    with pytest.raises(ValueError, match=r"^out\[0\]\.entropy: expected"):
        cpp_fused.loss_and_grads(x, coefficients(), out=(outputs._replace(entropy=torch.zeros(1)), grads))


@all_lanes
@direction
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(("rows", "dims"), [(1, 1), (7, 3), (65, 4), (100, 17), (2049, 4)])
def test_a_weight_of_each_rows_kl(rows, dims, per_row, kl_direction, lanes):
    x = draw(rows, dims, policy_std_per_row=per_row, prior_std_per_row=per_row)._replace(kl_weight=2 * torch.rand(rows))
    assert_no_worse_than_eager(x, coefficients(), lanes=lanes, kl_direction=kl_direction)


@all_lanes
def test_a_weight_of_one_is_none(lanes):
    x = draw(77, 4)
    plain = cpp_fused.loss_and_grads(x, coefficients(), lanes=lanes)
    weighed = cpp_fused.loss_and_grads(x._replace(kl_weight=torch.ones(77)), coefficients(), lanes=lanes)
    for part, other in zip(plain, weighed, strict=True):
        for a, b in zip(part, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@all_lanes
@direction
@pytest.mark.parametrize("kl_weighted", [False, True])
@pytest.mark.parametrize("prior_std_per_row", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3, 4, 8])
def test_rows_that_all_count(dims, prior_std_per_row, kl_weighted, kl_direction, lanes):
    x = draw(2049, dims, prior_std_per_row=prior_std_per_row)._replace(weight=torch.ones(2049))
    if kl_weighted:
        x = x._replace(kl_weight=2 * torch.rand(2049))
    assert_no_worse_than_eager(x, coefficients(), lanes=lanes, kl_direction=kl_direction)


@all_lanes
@pytest.mark.parametrize("rows", [2048, 40_000])
def test_rows_that_do_not_count_change_nothing(rows, lanes):
    x = draw(rows, 4)._replace(weight=torch.ones(rows))
    half = Inputs(*(t[: rows // 2] if t is not None and len(t) == rows else t for t in x))
    x.weight[rows // 2 :] = 0
    outputs, grads = cpp_fused.loss_and_grads(x, coefficients(), lanes=lanes)
    expected, expected_grads = cpp_fused.loss_and_grads(half, coefficients(), lanes=lanes)
    torch.testing.assert_close(torch.stack(outputs), torch.stack(expected), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grads.log_std, expected_grads.log_std, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads.mean[: rows // 2], expected_grads.mean, rtol=1e-5, atol=1e-9)
    assert not grads.mean[rows // 2 :].any()


@all_lanes
@direction
@pytest.mark.parametrize("dims", [1, 2, 3, 4, 8])
def test_a_prior_that_is_the_policy_pulls_nowhere(dims, kl_direction, lanes):
    x = draw(1000, dims)
    x = x._replace(prior_mean=x.mean, prior_log_std=x.log_std.expand(1000, dims).contiguous())
    no_kl, some_kl = (coefficients(0.2, 0.01, 0.5, kl_coef, 1.0) for kl_coef in (0.0, 5.0))
    outputs, grads = cpp_fused.loss_and_grads(x, some_kl, lanes=lanes, kl_direction=kl_direction)
    _, expected = cpp_fused.loss_and_grads(x, no_kl, lanes=lanes, kl_direction=kl_direction)
    assert outputs.prior_kl == 0
    assert torch.equal(grads.mean, expected.mean)
    torch.testing.assert_close(grads.log_std, expected.log_std, rtol=0, atol=1e-7)


@all_lanes
def test_the_prior_may_be_much_wider_and_much_narrower(lanes):
    x = draw(640, 4)
    x.prior_log_std[:] = torch.linspace(-20, 8, 640)[:, None] + x.log_std
    x = x._replace(prior_mean=x.mean + x.prior_log_std.exp() * torch.randn(640, 4))
    assert_no_worse_than_eager(x, coefficients(), lanes=lanes)
