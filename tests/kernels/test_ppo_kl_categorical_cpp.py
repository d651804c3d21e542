"""The native categorical loss against float64 autograd of the reference, with every instruction set that is here."""

import os
import signal
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lago_fast.kernels.ppo_kl_categorical import cpp_fused, eager
from lago_fast.kernels.ppo_kl_categorical.reference import Coefficients, Inputs
from tests.kernels.cuda_cases import poisoned

NAMES = ("clip_range", "ent_coef", "vf_coef", "kl_coef", "prior_temperature", "clip_range_vf")
THREADED_ROWS = 9000  # with 40 actions enough for several threads


def coefficients(*values: float | None) -> Coefficients:
    """Build the coefficients in the order of NAMES; what is left out has its default here."""
    defaults = (0.2, 0.01, 0.5, 0.3, 1.5, None)
    chosen = (*values, *defaults[len(values) :])
    return Coefficients(*(None if v is None else torch.tensor(v) for v in chosen))


def taken_log_prob(logits: Tensor, actions: Tensor, mask: Tensor | None) -> Tensor:
    restricted = logits if mask is None else logits.masked_fill(~mask, -torch.inf)
    return restricted.log_softmax(-1).gather(1, actions[:, None]).squeeze(1)


def draw(rows: int, n_actions: int, *, masked: bool = False) -> Inputs:
    """Draw a batch in float32 with ratios on both sides of the clip and every fifth row invalid."""
    logits, prior = 2 * torch.randn(rows, n_actions) + 3, torch.randn(rows, n_actions) - 5
    actions = torch.randint(n_actions, (rows,))
    mask = (torch.rand(rows, n_actions) < 0.6).scatter(1, actions[:, None], True) if masked else None
    return Inputs(
        logits=logits,
        values=torch.randn(rows),
        actions=actions,
        old_log_prob=taken_log_prob(logits, actions, mask) + 0.3 * torch.randn(rows),
        advantages=3 * torch.randn(rows) + 1,
        returns=torch.randn(rows),
        old_values=torch.randn(rows),
        weight=(torch.arange(rows) % 5 != 4).float(),
        prior_log_probs=prior,
        action_mask=mask,
    )


def widened(inputs):
    """Widen to float64, in which the reference is the truth."""
    return type(inputs)(*(t.double() if t is not None and t.is_floating_point() else t for t in inputs))


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
        if expected.dim() == 0 and not expected.isfinite():
            assert got == expected, name
            continue
        scale = expected.abs().max() if expected.dim() else expected.abs() + 1
        allowed = 2 * (other - expected).abs().max() + rtol * scale
        assert (got - expected).abs().max() <= allowed, name
        assert got.dtype == torch.float32


def assert_same_bits(first, second) -> None:
    for part, again in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part, again, strict=True))


all_lanes = pytest.mark.parametrize("lanes", [4, 8, 16])
direction = pytest.mark.parametrize("kl_direction", ["policy_prior", "prior_policy"])


@all_lanes
@direction
@pytest.mark.parametrize("n_actions", [2, 3, 4, 8, 18, 40, 64, 65, 257])
@pytest.mark.parametrize("rows", [1, 7, 63, 64, 65])
def test_shapes(rows, n_actions, kl_direction, lanes):
    assert_no_worse_than_eager(draw(rows, n_actions), coefficients(), lanes=lanes, kl_direction=kl_direction)


@all_lanes
@direction
@pytest.mark.parametrize(("rows", "n_actions"), [(2049, 4), (2049, 40), (5, 32000)])
def test_large_shapes(rows, n_actions, kl_direction, lanes):
    assert_no_worse_than_eager(draw(rows, n_actions), coefficients(), lanes=lanes, kl_direction=kl_direction)


@all_lanes
@direction
def test_one_action_leaves_nothing_to_choose(kl_direction, lanes):
    outputs, grads = cpp_fused.loss_and_grads(draw(9, 1), coefficients(), lanes=lanes, kl_direction=kl_direction)
    assert outputs.entropy == outputs.prior_kl == 0
    torch.testing.assert_close(grads.logits, torch.zeros(9, 1), rtol=0, atol=1e-7)


@all_lanes
@direction
@pytest.mark.parametrize("n_actions", [2, 5, 8, 41, 1000])
def test_action_masks(n_actions, kl_direction, lanes):
    x = draw(70, n_actions, masked=True)
    assert_no_worse_than_eager(x, coefficients(), lanes=lanes, kl_direction=kl_direction)
    _, grads = cpp_fused.loss_and_grads(x, coefficients(), lanes=lanes, kl_direction=kl_direction)
    assert not grads.logits[~x.action_mask].any()


@all_lanes
@direction
def test_excluded_actions_are_those_of_a_mask(kl_direction, lanes):
    x = draw(50, 21, masked=True)
    minus_inf = x._replace(
        logits=x.logits.masked_fill(~x.action_mask, -torch.inf),
        prior_log_probs=x.prior_log_probs.masked_fill(~x.action_mask, -torch.inf),
        action_mask=None,
    )
    options = {"kl_direction": kl_direction, "lanes": lanes}
    first = cpp_fused.loss_and_grads(x, coefficients(), **options)
    assert_same_bits(first, cpp_fused.loss_and_grads(minus_inf, coefficients(), **options))
    assert all(t.isfinite().all() for part in first for t in part)


@all_lanes
def test_zero_probability_on_the_left_adds_nothing(lanes):
    x = draw(20, 6)
    x.logits[:, 2] = -torch.inf
    x = x._replace(actions=torch.zeros(20, dtype=torch.int64))
    x = x._replace(old_log_prob=taken_log_prob(x.logits, x.actions, None) - 0.1)
    assert_no_worse_than_eager(x, coefficients(), lanes=lanes)

    y = draw(20, 6)
    y.prior_log_probs[:, 2] = -torch.inf
    assert_no_worse_than_eager(y, coefficients(), lanes=lanes, kl_direction="prior_policy")


@all_lanes
def test_zero_probability_on_the_right_alone_is_infinite(lanes):
    x = draw(20, 6)
    x.prior_log_probs[3, 2] = -torch.inf
    outputs, grads = cpp_fused.loss_and_grads(x, coefficients(), lanes=lanes)
    assert outputs.prior_kl == torch.inf
    assert outputs.loss == torch.inf
    others = torch.arange(20) != 3
    expected = eager.loss_and_grads(x, coefficients())[1].logits
    torch.testing.assert_close(grads.logits[others], expected[others], rtol=1e-4, atol=1e-6)

    y = draw(20, 6)
    y.logits[3, (y.actions[3] + 1) % 6] = -torch.inf
    outputs, _ = cpp_fused.loss_and_grads(y, coefficients(), lanes=lanes, kl_direction="prior_policy")
    assert outputs.prior_kl == torch.inf


@all_lanes
@pytest.mark.parametrize("clip_range_vf", [None, 0.05, 0.7])
@pytest.mark.parametrize("normalize_advantage", [False, True])
def test_value_clipping_and_advantages_as_they_are(clip_range_vf, normalize_advantage, lanes):
    c = coefficients(0.1, 0.02, 0.7, 0.5, 0.6, clip_range_vf)
    assert_no_worse_than_eager(draw(100, 4), c, lanes=lanes, normalize_advantage=normalize_advantage)


@all_lanes
def test_ratio_at_the_edge_of_the_clip(lanes):
    x = draw(16, 2)
    ratios = torch.tensor([0.5, 1.5, 0.49, 1.51]).repeat(4)
    x = x._replace(logits=torch.zeros(16, 2), weight=torch.ones(16), old_log_prob=-(2 * ratios).log())
    assert_no_worse_than_eager(x, coefficients(0.5), lanes=lanes)


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
@direction
def test_an_invalid_row_adds_nothing_whatever_stands_in_it(kl_direction, lanes):
    x = draw(20, 5)
    options = {"lanes": lanes, "kl_direction": kl_direction}
    expected = cpp_fused.loss_and_grads(x, coefficients(), **options)
    invalid = x.weight == 0
    x.old_log_prob[invalid] = -1e4
    assert_same_bits(expected, cpp_fused.loss_and_grads(x, coefficients(), **options))
    x.prior_log_probs[invalid, 0] = -torch.inf
    x.logits[invalid, 1] = -torch.inf
    assert_same_bits(expected, cpp_fused.loss_and_grads(x, coefficients(), **options))


@all_lanes
def test_no_rows(lanes):
    outputs, grads = cpp_fused.loss_and_grads(draw(0, 4), coefficients(), lanes=lanes)
    assert not any(t.any() for t in outputs)
    assert grads.logits.shape == (0, 4)


@all_lanes
@pytest.mark.parametrize(
    "name", ["logits", "values", "old_log_prob", "advantages", "returns", "prior_log_probs", "weight"]
)
def test_a_nan_in_a_valid_row_shows_in_the_loss(name, lanes):
    x = draw(20, 9)
    broken = getattr(x, name)
    broken[(2, 8) if broken.dim() == 2 else 2] = float("nan")
    assert cpp_fused.loss_and_grads(x, coefficients(), lanes=lanes)[0].loss.isnan()


@all_lanes
@direction
def test_same_input_same_bits(kl_direction, lanes):
    x = draw(1000, 18)
    options = {"lanes": lanes, "kl_direction": kl_direction}
    first = cpp_fused.loss_and_grads(x, coefficients(), **options)
    assert_same_bits(first, cpp_fused.loss_and_grads(x, coefficients(), out=poisoned(x), **options))


@pytest.fixture
def _threads_restored():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@all_lanes
@direction
@pytest.mark.parametrize(("rows", "n_actions"), [(THREADED_ROWS, 40), (9, 32000)])
@pytest.mark.usefixtures("_threads_restored")
def test_threads_do_not_change_a_bit(rows, n_actions, kl_direction, lanes):
    x = draw(rows, n_actions, masked=True)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        options = {"kl_direction": kl_direction, "lanes": lanes}
        results.append(cpp_fused.loss_and_grads(x, coefficients(), out=poisoned(x), **options))
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@pytest.mark.usefixtures("_threads_restored")
def test_calls_side_by_side_give_what_each_gives_alone():
    torch.set_num_threads(2)
    x = draw(THREADED_ROWS, 40)
    expected = cpp_fused.loss_and_grads(x, coefficients())
    results = []

    def call() -> None:
        results.extend(cpp_fused.loss_and_grads(x, coefficients(), out=poisoned(x)) for _ in range(5))

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 15
    for result in results:
        assert_same_bits(expected, result)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.usefixtures("_threads_restored")
def test_threads_start_again_after_a_fork():
    torch.set_num_threads(2)
    x = draw(THREADED_ROWS, 40)
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


def test_views_are_read_as_what_they_show():
    x = draw(30, 7, masked=True)
    expected = cpp_fused.loss_and_grads(x, coefficients())
    strided = x._replace(
        logits=x.logits.T.contiguous().T,
        values=x.values.repeat_interleave(2)[::2],
        actions=x.actions.repeat_interleave(3)[::3],
        action_mask=x.action_mask.T.contiguous().T,
    )
    assert_same_bits(expected, cpp_fused.loss_and_grads(strided, coefficients()))
    # one float past what a vector likes
    shifted = x._replace(logits=torch.cat([torch.zeros(1), x.logits.flatten()])[1:].view(30, 7))
    assert_same_bits(expected, cpp_fused.loss_and_grads(shifted, coefficients()))


def test_torch_without_a_quick_reader_gives_the_same(monkeypatch):
    x = draw(50, 9)
    expected = cpp_fused.loss_and_grads(x, coefficients())
    monkeypatch.setattr(cpp_fused._C, "addresses", lambda *_: None)
    again = cpp_fused.loss_and_grads(x, coefficients(), out=poisoned(x))
    for part, same in zip(expected, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part, same, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype):
    x = Inputs(*(t.to(dtype) if t is not None and t.is_floating_point() else t for t in draw(50, 9, masked=True)))
    outputs, grads = cpp_fused.loss_and_grads(x, coefficients())
    truth, true_grads = eager.loss_and_grads(widened(x), widened(coefficients()))
    for got, expected in zip(outputs, truth, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    for got, expected in zip(grads, true_grads, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=1e-2, atol=1e-4)
    buffers = poisoned(x)
    assert_same_bits((outputs, grads), cpp_fused.loss_and_grads(x, coefficients(), out=buffers))
    assert_same_bits((outputs, grads), buffers)


def extreme(rows: int, n_actions: int, seed: int, masked: bool) -> Inputs:
    """Rows whose action is possible, of which some are masked, excluded by the policy, or excluded by the prior."""
    generator = torch.Generator().manual_seed(seed)

    def choose(values: list[float], *shape: int) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), shape, generator=generator)]

    actions = torch.randint(n_actions, (rows,), generator=generator)
    numbers = [0.0, 0.0, 1.0, -3.5, 20.0, -60.0, -100.0, -300.0, 80.0, -torch.inf]
    logits, prior = (
        t.scatter(1, actions[:, None], t.gather(1, actions[:, None]).clamp(min=-20))
        for t in (choose(numbers, rows, n_actions), choose(numbers, rows, n_actions))
    )
    mask = choose([0, 1, 1], rows, n_actions).bool().scatter(1, actions[:, None], True) if masked else None
    ratio = choose([0.8, 1.2, 1.0, 0.5, 3.0], rows)
    old = taken_log_prob(logits, actions, mask) - ratio.log()
    columns = [choose([0.0, -10.0, 1e-3, 7.5], rows) for _ in range(4)]
    return Inputs(logits, columns[0], actions, old, *columns[1:], choose([0.0, 1.0, 1.0], rows), prior, mask)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 19)),
    seed=st.integers(0, 2**31),
    masked=st.booleans(),
    lanes=st.sampled_from([4, 8, 16]),
    kl_direction=st.sampled_from(["policy_prior", "prior_policy"]),
)
def test_extremes(shape, seed, masked, lanes, kl_direction):
    x = extreme(*shape, seed, masked)
    outputs, grads = cpp_fused.loss_and_grads(
        x, coefficients(), out=poisoned(x), lanes=lanes, kl_direction=kl_direction
    )
    counts = x.weight != 0
    assert not grads.logits[~counts].any()
    assert not grads.values[~counts].any()
    # the definition wants finite numbers in invalid rows, the KL among them
    x = Inputs(*(t if t is None else t[counts] for t in x))
    truth, true_grads = eager.loss_and_grads(widened(x), widened(coefficients()), kl_direction=kl_direction)
    for name, got, expected in zip(eager.Outputs._fields, outputs, truth, strict=True):
        if name != "clip_fraction":  # which jumps at the edge
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    # at the edge of the clip the surrogate has two derivatives, and beside an infinite KL there is none
    at_edge = ((truth_ratio(x) - 1).abs() - 0.2).abs() < 1e-3
    kept = true_grads.logits.isfinite().all(-1) & ~at_edge
    torch.testing.assert_close(grads.logits[counts][kept].double(), true_grads.logits[kept], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(grads.values[counts].double(), true_grads.values, rtol=1e-4, atol=1e-5)


def truth_ratio(x: Inputs) -> Tensor:
    return (taken_log_prob(x.logits.double(), x.actions, x.action_mask) - x.old_log_prob.double()).exp()


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("logits", lambda t: t[0]),
        ("logits", lambda t: t[:, :0]),
        ("values", lambda t: t.unsqueeze(1)),
        ("actions", lambda t: t.int()),
        ("weight", lambda t: t.bool()),
        ("advantages", lambda t: t.double()),
        ("prior_log_probs", lambda t: t[:, :3]),
        ("prior_log_probs", lambda t: t.to("meta")),
        ("action_mask", lambda t: t.float()),
        ("action_mask", lambda t: t[:5]),
    ],
)
def test_a_refused_input_is_named(name, broken):
    x = draw(10, 4, masked=True)
    x = x._replace(**{name: broken(getattr(x, name))})
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        cpp_fused.loss_and_grads(x, coefficients())


@all_lanes
@pytest.mark.parametrize("action", [-1, 4, 2**40])
def test_an_action_that_is_none_is_refused(action, lanes):
    x = draw(10, 4)
    x.actions[7] = action
    with pytest.raises(ValueError, match=r"^actions: expected numbers from 0 to 3"):
        cpp_fused.loss_and_grads(x, coefficients(), lanes=lanes)


@pytest.mark.parametrize("name", NAMES)
def test_a_refused_coefficient_is_named(name):
    c = coefficients()._replace(**{name: torch.tensor(0.1, dtype=torch.float64)})
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        cpp_fused.loss_and_grads(draw(10, 4), c)


def test_a_refused_direction_and_buffer_are_named():
    x = draw(10, 4)
    with pytest.raises(ValueError, match=r"^kl_direction: expected"):
        cpp_fused.loss_and_grads(x, coefficients(), kl_direction="sideways")
    with pytest.raises(ValueError, match=r"^out\[1\]\.logits: expected"):
        cpp_fused.loss_and_grads(x, coefficients(), out=poisoned(draw(9, 4)))
    outputs, grads = poisoned(x)
    with pytest.raises(ValueError, match=r"^out\[1\]\.values: expected"):
        cpp_fused.loss_and_grads(x, coefficients(), out=(outputs, grads._replace(values=x.values.half())))
    with pytest.raises(ValueError, match=r"^out\[0\]\.entropy: expected"):
        cpp_fused.loss_and_grads(x, coefficients(), out=(outputs._replace(entropy=torch.zeros(1)), grads))


def test_outputs_need_not_lie_in_a_row():
    x = draw(10, 4)
    outputs, grads = poisoned(x)
    apart = eager.Outputs(*(t.clone() for t in outputs))
    assert_same_bits(
        cpp_fused.loss_and_grads(x, coefficients()), cpp_fused.loss_and_grads(x, coefficients(), out=(apart, grads))
    )


@all_lanes
@direction
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("rows", "n_actions"), [(1, 2), (7, 3), (65, 40), (100, 18), (2049, 4)])
def test_a_weight_of_each_rows_kl(rows, n_actions, masked, kl_direction, lanes):
    x = draw(rows, n_actions, masked=masked)._replace(kl_weight=2 * torch.rand(rows))
    assert_no_worse_than_eager(x, coefficients(), lanes=lanes, kl_direction=kl_direction)


@all_lanes
def test_a_weight_of_one_is_none(lanes):
    x = draw(77, 9)
    plain = cpp_fused.loss_and_grads(x, coefficients(), lanes=lanes)
    weighed = cpp_fused.loss_and_grads(x._replace(kl_weight=torch.ones(77)), coefficients(), lanes=lanes)
    for part, other in zip(plain, weighed, strict=True):
        for a, b in zip(part, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
