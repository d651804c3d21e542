"""Sampling in Triton against the reference; on a CPU by Triton's interpreter."""

import pytest
import torch
import triton
import triton.language as tl

from lago_fast import ops
from lago_fast.kernels.sample import reference, triton_fused
from lago_fast.kernels.sample.reference import CategoricalInputs, GaussianInputs
from lago_fast.kernels.sample.triton_fused import _philox

# the interpreter computes in numpy, which warns of what is then selected away
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

direction = pytest.mark.parametrize("direction", ["policy_prior", "prior_policy"])


@triton.jit
def words_kernel(row_ptr, block_ptr, state_ptr, words_ptr, N: tl.constexpr):
    o = tl.arange(0, N)
    words = _philox(tl.load(row_ptr + o), tl.load(block_ptr + o), state_ptr)
    for k in tl.static_range(4):
        tl.store(words_ptr + k * N + o, words[k].to(tl.int64))


@pytest.fixture(autouse=True)
def _small_grid(monkeypatch, device) -> None:
    """Make programs few and large under the interpreter, which takes one after the other."""
    if device.type == "cpu":
        monkeypatch.setattr(triton_fused, "FULL_GPU", 8)


@pytest.fixture
def temperature(device) -> torch.Tensor:
    return torch.tensor(1.7, device=device)


@pytest.fixture
def state(device) -> torch.Tensor:
    return torch.tensor([0x1234567890ABCDEF, 3], device=device)


def categorical_inputs(device: torch.device, rows: int, n_actions: int, *, masked: bool = False) -> CategoricalInputs:
    logits, prior = 2 * torch.randn(rows, n_actions), 2 * torch.randn(rows, n_actions) + 3
    mask = torch.rand(rows, n_actions) < 0.5 if masked else None
    if mask is not None:
        mask[:, n_actions // 2] = True
    return CategoricalInputs(logits.to(device), prior.to(device), None if mask is None else mask.to(device))


def gaussian_inputs(device: torch.device, rows: int, dims: int, *, std_per_row: bool = False) -> GaussianInputs:
    mean, prior_mean, prior_log_std, log_std = 0.5 * torch.randn(4, rows, dims)
    log_std = log_std if std_per_row else torch.linspace(-1, 0.5, dims)
    return GaussianInputs(*(t.to(device) for t in (mean, log_std, prior_mean, prior_log_std)))


@pytest.mark.parametrize("seed_and_step", [(0, 0), (-1, -1), (0x299F31D0A4093822, 0x0370734413198A2E), (7, -(2**40))])
def test_philox_gives_the_references_words(seed_and_step, device):
    state = torch.tensor(seed_and_step, device=device)
    row = torch.tensor([0, 0xFFFFFFFF, 0x243F6A88, 1, 2, 3, 2**31, 12345], device=device)
    block = torch.tensor([0, 0xFFFFFFFF, 0x85A308D3, 0, 1, 2**31, 5, 6], device=device)
    words = torch.empty(4, 8, dtype=torch.int64, device=device)
    words_kernel[(1,)](row, block, state, words, 8, enable_fp_fusion=True)
    assert torch.equal(words, torch.stack(reference.philox(row, block, state)))


@direction
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("rows", "n_actions"), [(1, 2), (7, 3), (63, 40), (2049, 4), (130, 18), (9, 257), (2, 4096), (2, 32_000)]
)
def test_categorical(rows, n_actions, masked, direction, temperature, state, device):
    x = categorical_inputs(device, rows, n_actions, masked=masked)
    out = triton_fused.categorical(x, temperature, state, direction)
    expected = reference.categorical(x, temperature, state, direction)
    assert out.actions.dtype == torch.int64
    if masked:
        assert x.action_mask.gather(1, out.actions[:, None]).all()
    # another action only where the uniform number is within rounding of an edge of the distribution
    log_probs = (x.logits if not masked else x.logits.masked_fill(~x.action_mask, -torch.inf)).log_softmax(-1)
    edges = log_probs.double().exp().cumsum(-1)
    row = torch.arange(rows, device=device)
    u = reference.uniform(reference.philox(row, torch.zeros_like(row), state)[0], torch.float64)
    near = (edges - u[:, None]).abs().amin(-1) < 1e-5
    assert torch.equal(out.actions[~near], expected.actions[~near])
    torch.testing.assert_close(out.log_prob, log_probs.gather(1, out.actions[:, None])[:, 0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(out.entropy, expected.entropy, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(out.prior_kl, expected.prior_kl, rtol=3e-6, atol=3e-6)


def test_an_action_of_probability_zero_is_never_drawn(temperature, device):
    logits = torch.full((500, 9), -torch.inf, device=device)
    logits[:, 3], logits[:, 6] = 0.0, -18.0
    state = torch.tensor([1, 2], device=device)
    actions = triton_fused.categorical(CategoricalInputs(logits), temperature, state, "policy_prior").actions
    assert ((actions == 3) | (actions == 6)).all()


@direction
@pytest.mark.parametrize("std_per_row", [False, True])
@pytest.mark.parametrize(("rows", "dims"), [(1, 1), (7, 3), (2049, 4), (63, 17)])
def test_gaussian(rows, dims, std_per_row, direction, temperature, state, device):
    x = gaussian_inputs(device, rows, dims, std_per_row=std_per_row)
    out = triton_fused.gaussian(x, temperature, state, direction)
    for got, expected in zip(out, reference.gaussian(x, temperature, state, direction), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype, temperature, state, device):
    x = categorical_inputs(device, 30, 9)
    x = x._replace(logits=x.logits.to(dtype), prior_log_probs=x.prior_log_probs.to(dtype))
    g = GaussianInputs(*(t.to(dtype) for t in gaussian_inputs(device, 30, 4)))
    for name, inputs in (("categorical", x), ("gaussian", g)):
        out = getattr(triton_fused, name)(inputs, temperature, state, "policy_prior")
        truth = getattr(reference, name)(inputs, temperature, state, "policy_prior")
        for got, expected in zip(out, truth, strict=True):
            assert got.dtype == expected.dtype
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_row_depends_on_seed_step_and_itself_alone(temperature, state, device):
    g, x = gaussian_inputs(device, 70, 5), categorical_inputs(device, 70, 9)
    part = GaussianInputs(g.mean[:4], g.log_std, g.prior_mean[:4], g.prior_log_std[:4])
    whole = triton_fused.gaussian(g, temperature, state, "policy_prior").actions
    assert torch.equal(whole[:4], triton_fused.gaussian(part, temperature, state, "policy_prior").actions)
    assert not torch.equal(whole, triton_fused.gaussian(g, temperature, state + 1, "policy_prior").actions)
    few = CategoricalInputs(x.logits[:4], x.prior_log_probs[:4])
    whole = triton_fused.categorical(x, temperature, state, "policy_prior").actions
    assert torch.equal(whole[:4], triton_fused.categorical(few, temperature, state, "policy_prior").actions)


def test_no_prior_and_no_rows(temperature, state, device):
    x, g = categorical_inputs(device, 5, 4, masked=True), gaussian_inputs(device, 5, 4)
    alone = triton_fused.categorical(x._replace(prior_log_probs=None), temperature, state, "policy_prior")
    both = triton_fused.categorical(x, temperature, state, "policy_prior")
    assert alone.prior_kl is None
    assert all(torch.equal(a, b) for a, b in zip(alone[:3], both[:3], strict=True))
    alone = triton_fused.gaussian(GaussianInputs(*g[:2]), temperature, state, "policy_prior")
    both = triton_fused.gaussian(g, temperature, state, "policy_prior")
    assert alone.prior_kl is None
    assert all(torch.equal(a, b) for a, b in zip(alone[:3], both[:3], strict=True))
    none = triton_fused.gaussian(gaussian_inputs(device, 0, 4), temperature, state, "policy_prior")
    assert none.actions.shape == (0, 4)
    none = triton_fused.categorical(categorical_inputs(device, 0, 4), temperature, state, "policy_prior")
    assert none.actions.shape == none.prior_kl.shape == (0,)


def test_a_refused_argument_is_named(monkeypatch, temperature, state, device):
    x, g = categorical_inputs(device, 10, 4, masked=True), gaussian_inputs(device, 10, 4)
    broken = {
        "logits": lambda: triton_fused.categorical(x._replace(logits=x.logits[0]), temperature, state, "policy_prior"),
        "prior_log_probs": lambda: triton_fused.categorical(
            x._replace(prior_log_probs=x.prior_log_probs.double()), temperature, state, "policy_prior"
        ),
        "action_mask": lambda: triton_fused.categorical(
            x._replace(action_mask=x.action_mask.float()), temperature, state, "policy_prior"
        ),
        "state": lambda: triton_fused.categorical(x, temperature, state.int(), "policy_prior"),
        "direction": lambda: triton_fused.categorical(x, temperature, state, "sideways"),
        "prior_temperature": lambda: triton_fused.gaussian(g, temperature.double(), state, "policy_prior"),
        "log_std": lambda: triton_fused.gaussian(g._replace(log_std=g.log_std[:2]), temperature, state, "policy_prior"),
        "prior_mean": lambda: triton_fused.gaussian(g._replace(prior_log_std=None), temperature, state, "policy_prior"),
    }
    for name, call in broken.items():
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            call()
    monkeypatch.setattr(triton_fused, "INTERPRETED", False)
    on_cpu = GaussianInputs(*(t.cpu() for t in g))
    with pytest.raises(ValueError, match=r"^mean: expected a CUDA tensor"):
        triton_fused.gaussian(on_cpu, temperature.cpu(), state.cpu(), "policy_prior")


def categorical_entry(device: torch.device, temperature: torch.Tensor, state: torch.Tensor):
    logits, prior, _ = categorical_inputs(device, 300, 9)
    return lambda: ops.sample_categorical(
        logits, state, prior_log_probs=prior, prior_temperature=temperature, impl="triton"
    )


def gaussian_entry(device: torch.device, temperature: torch.Tensor, state: torch.Tensor):
    mean, log_std, prior_mean, prior_log_std = gaussian_inputs(device, 300, 4)
    return lambda: ops.sample_gaussian(
        mean,
        log_std,
        state,
        prior_mean=prior_mean,
        prior_log_std=prior_log_std,
        prior_temperature=temperature,
        impl="triton",
    )


made = pytest.mark.parametrize("made", [categorical_entry, gaussian_entry])


@pytest.mark.gpu
@made
def test_the_host_never_waits(made, temperature, state, device):
    entry = made(device, temperature, state)
    entry()  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        entry()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@made
def test_a_captured_graph_follows_the_step_and_the_temperature(made, temperature, state, device):
    entry = made(device, temperature, state)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        entry()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = entry()
    graph.replay()
    before = [t.clone() for t in captured]
    state[1] += 1
    temperature.mul_(0.5)
    graph.replay()
    assert not torch.equal(before[0], captured.actions)
    assert not torch.equal(before[3], captured.prior_kl)
    assert all(torch.equal(a, b) for a, b in zip(entry(), captured, strict=True))
