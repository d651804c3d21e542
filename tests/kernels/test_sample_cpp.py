"""Native sampling against the reference: the same words, the same numbers, the same actions but for rounding."""

import pytest
import torch
from torch import Tensor

from lago_fast import _C
from lago_fast.kernels.sample import cpp_fused, reference
from lago_fast.kernels.sample.reference import CategoricalInputs, GaussianInputs

STATE = torch.tensor([-(2**40) + 7, 2**33 + 3])
TEMPERATURE = torch.tensor(1.5)

both_directions = pytest.mark.parametrize("direction", ["policy_prior", "prior_policy"])


@pytest.mark.parametrize(
    ("row", "block", "step", "seed", "expected"),
    [
        (0, 0, 0, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (0xFFFFFFFF, 0xFFFFFFFF, -1, -1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (0x243F6A88, 0x85A308D3, 0x0370734413198A2E, 0x299F31D0A4093822, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_words(row, block, step, seed, expected):
    # Random123's known answers
    assert " ".join(f"{word:08x}" for word in _C.philox(row, block, seed, step)) == expected


def test_philox_gives_the_words_of_the_reference():
    rows, blocks = torch.arange(50), torch.arange(3)
    words = torch.stack(reference.philox(rows[:, None], blocks, STATE), dim=-1)
    seed, step = STATE.tolist()
    for row in range(50):
        for block in range(3):
            assert _C.philox(row, block, seed, step) == words[row, block].tolist()


def assert_same_figures(got, expected) -> None:
    for name, a, b in zip(got._fields, got, expected, strict=True):
        if name != "actions":
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@both_directions
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("rows", "n_actions"), [(0, 4), (1, 1), (7, 2), (63, 3), (2049, 4), (300, 18), (40, 257)])
def test_categorical(rows, n_actions, masked, direction):
    logits, prior = torch.randn(2, rows, n_actions)
    mask = (torch.rand(rows, n_actions) < 0.6).index_fill(1, torch.tensor([n_actions - 1]), True) if masked else None
    x = CategoricalInputs(logits, prior, mask)
    got = cpp_fused.categorical(x, TEMPERATURE, STATE, direction)
    wide = CategoricalInputs(logits.double(), prior.double(), mask)
    expected = reference.categorical(wide, TEMPERATURE.double(), STATE, direction)
    differs = got.actions != expected.actions
    if differs.any():
        assert_only_at_edges(wide, got.actions, differs)
    kept = torch.where(differs, got.log_prob.double(), expected.log_prob)
    assert_same_figures(got, expected._replace(log_prob=kept))
    assert mask is None or mask.gather(1, got.actions[:, None]).all()


def assert_only_at_edges(x: CategoricalInputs, actions: Tensor, differs: Tensor) -> None:
    """Where the actions differ, the uniform number is within rounding of an edge between the two."""
    logits = x.logits if x.action_mask is None else x.logits.masked_fill(~x.action_mask, -torch.inf)
    edges = logits.softmax(-1).cumsum(-1)
    row = torch.arange(len(logits))
    u = reference.uniform(reference.philox(row, torch.zeros_like(row), STATE)[0], torch.float64)
    nearest = (edges - u[:, None]).abs().min(-1).values
    assert (nearest[differs] < 1e-5).all()
    below = torch.where(actions > 0, edges.gather(1, (actions - 1).clamp(min=0)[:, None]).squeeze(1), 0.0)
    above = edges.gather(1, actions[:, None]).squeeze(1)
    assert ((below - 1e-5 < u) & (u < above + 1e-5)).all()


def test_many_actions():
    x = CategoricalInputs(torch.randn(3, 32000))
    got = cpp_fused.categorical(x, TEMPERATURE, STATE, "policy_prior")
    assert_only_at_edges(CategoricalInputs(x.logits.double()), got.actions, torch.zeros(3, dtype=torch.bool))
    expected = x.logits.double().log_softmax(-1).gather(1, got.actions[:, None]).squeeze(1)
    torch.testing.assert_close(got.log_prob.double(), expected, rtol=1e-5, atol=1e-5)


@both_directions
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(("rows", "dims"), [(0, 3), (1, 1), (7, 3), (63, 4), (2049, 17)])
def test_gaussian(rows, dims, per_row, direction):
    def log_std() -> Tensor:
        return 0.5 * torch.randn(*((rows, dims) if per_row else (dims,))) - 0.7

    x = GaussianInputs(torch.randn(rows, dims), log_std(), torch.randn(rows, dims), log_std())
    got = cpp_fused.gaussian(x, TEMPERATURE, STATE, direction)
    wide = GaussianInputs(*(t.double() for t in x))
    expected = reference.gaussian(wide, TEMPERATURE.double(), STATE, direction)
    torch.testing.assert_close(got.actions, expected.actions.float(), rtol=1e-6, atol=1e-6)
    assert_same_figures(got, expected)


def test_an_excluded_action_is_never_drawn():
    logits = torch.zeros(4000, 5)
    logits[:, [0, 4]] = -torch.inf
    out = cpp_fused.categorical(CategoricalInputs(logits), TEMPERATURE, STATE, "policy_prior")
    assert set(out.actions.unique().tolist()) == {1, 2, 3}
    torch.testing.assert_close(out.entropy, torch.full((4000,), 3.0).log())


def test_an_infinite_kl_is_infinite():
    prior = torch.tensor([[0.0, -torch.inf]])
    x = CategoricalInputs(torch.zeros(1, 2), prior)
    assert cpp_fused.categorical(x, TEMPERATURE, STATE, "policy_prior").prior_kl == torch.inf
    assert cpp_fused.categorical(x, TEMPERATURE, STATE, "prior_policy").prior_kl.isfinite()


def test_without_a_prior_there_is_no_kl():
    assert cpp_fused.categorical(CategoricalInputs(torch.zeros(2, 3)), TEMPERATURE, STATE, "policy_prior")[3] is None
    x = GaussianInputs(torch.zeros(2, 3), torch.zeros(3))
    assert cpp_fused.gaussian(x, TEMPERATURE, STATE, "policy_prior").prior_kl is None


def test_the_state_alone_changes_the_draws():
    x = CategoricalInputs(torch.zeros(64, 40).T.contiguous().T)
    state = STATE.clone()
    first = cpp_fused.categorical(x, TEMPERATURE, state, "policy_prior").actions
    assert torch.equal(first, cpp_fused.categorical(x, TEMPERATURE, state, "policy_prior").actions)
    part = CategoricalInputs(x.logits[:9])
    assert torch.equal(first[:9], cpp_fused.categorical(part, TEMPERATURE, state, "policy_prior").actions)
    state[1] += 1
    assert not torch.equal(first, cpp_fused.categorical(x, TEMPERATURE, state, "policy_prior").actions)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype):
    logits = torch.randn(30, 9).to(dtype)
    got = cpp_fused.categorical(CategoricalInputs(logits), TEMPERATURE, STATE, "policy_prior")
    same = cpp_fused.categorical(CategoricalInputs(logits.float()), TEMPERATURE, STATE, "policy_prior")
    assert all(torch.equal(a, b) for a, b in zip(got[:3], same[:3], strict=True))
    assert got.log_prob.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("logits", lambda t: t[0]),
        ("logits", lambda t: t.double()),
        ("prior_log_probs", lambda t: t[:, :2]),
        ("action_mask", lambda t: t.to("meta")),
    ],
)
def test_a_refused_categorical_input_is_named(name, broken):
    x = CategoricalInputs(torch.randn(4, 3), torch.randn(4, 3), torch.ones(4, 3, dtype=torch.bool))
    x = x._replace(**{name: broken(getattr(x, name))})
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        cpp_fused.categorical(x, TEMPERATURE, STATE, "policy_prior")


@pytest.mark.parametrize("name", GaussianInputs._fields)
def test_a_refused_gaussian_input_is_named(name):
    x = GaussianInputs(torch.randn(4, 3), torch.randn(3), torch.randn(4, 3), torch.randn(4, 3))
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        cpp_fused.gaussian(x._replace(**{name: torch.randn(2)}), TEMPERATURE, STATE, "policy_prior")


def test_a_refused_state_temperature_and_direction_are_named():
    x = CategoricalInputs(torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"^state: expected"):
        cpp_fused.categorical(x, TEMPERATURE, STATE.float(), "policy_prior")
    with pytest.raises(ValueError, match=r"^prior_temperature: expected"):
        cpp_fused.categorical(x, TEMPERATURE.double(), STATE, "policy_prior")
    with pytest.raises(ValueError, match=r"^direction: expected"):
        cpp_fused.categorical(x, TEMPERATURE, STATE, "sideways")
