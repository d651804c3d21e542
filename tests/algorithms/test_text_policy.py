"""Tests of lago_fast.algorithms.text_policy."""

import numpy as np
import pytest
import torch
from gymnasium import spaces

from lago_fast.algorithms.text_policy import TextActionPolicy, numbered
from lago_fast.errors import EncoderMismatch, UnsupportedArgument
from tests.algorithms.text_fakes import FakeEncoder, state_of

PLACES = ["hall", "cellar", "tower", "roof"]


def make_policy(encoder=None, width=FakeEncoder.width, **options):
    torch.manual_seed(0)
    space = spaces.Box(-1, 2**31 - 1, (5,), np.int64)
    policy = TextActionPolicy(space, spaces.Discrete(3), lambda _: 1e-3, width=width, **options)
    if encoder is not None:
        policy.attach(encoder)
    return policy


def shaken(policy):
    """Leave the zeros of the start."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return policy


def test_starts_uniform_whatever_the_inputs_are_scaled_by():
    encoder = FakeEncoder()
    policy, seen = make_policy(encoder), numbered(encoder, state_of(PLACES), np.arange(4))
    before = policy.evaluate_actions(seen, torch.zeros(4, dtype=torch.int64))
    policy.fit_inputs(seen)
    after = policy.evaluate_actions(seen, torch.zeros(4, dtype=torch.int64))
    assert torch.allclose(before[1].exp(), torch.tensor([1 / 3, 1 / 2, 1 / 3, 1 / 2]))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    kept = policy.actor.get_buffer("state_mean").clone()
    policy.fit_inputs(seen[:1])
    assert torch.equal(kept, policy.actor.get_buffer("state_mean"))


def test_logits_are_a_function_of_the_two_texts_alone():
    encoder = FakeEncoder()
    policy = shaken(make_policy(encoder))
    forth, values = policy.logits_and_values(numbered(encoder, state_of(["hall"]), np.arange(1)))
    state = state_of(["hall"])
    turned = state._replace(admissible=[state.admissible[0][::-1]])
    back, same = policy.logits_and_values(numbered(encoder, turned, np.arange(1)))
    assert torch.allclose(forth, back.flip(1))
    assert forth.unique().numel() == 3
    assert torch.allclose(values, same)


def test_padding_is_masked_and_an_ended_row_has_its_first_column():
    encoder = FakeEncoder()
    rows = numbered(encoder, state_of(["hall", "cellar", ""]), np.arange(2))
    assert make_policy(encoder).action_mask(rows).tolist() == [
        [True, True, True],
        [True, True, False],
        [True, False, False],
    ]


def test_masked_actions_are_never_taken():
    encoder = FakeEncoder()
    policy = shaken(make_policy(encoder))
    rows = numbered(encoder, state_of(["cellar"]), np.arange(1)).expand(2000, -1)
    rows = torch.nn.functional.pad(rows, (0, 1), value=-1)
    actions, _, log_prob = policy(rows)
    assert set(actions.tolist()) == {0, 1}
    assert bool(torch.isfinite(log_prob).all())


def test_predicts_texts_of_any_number_of_actions():
    encoder = FakeEncoder()
    policy = shaken(make_policy(encoder))
    choice, _ = policy.predict(state_of(["roof", "", "tower"]), deterministic=True)
    alone, _ = policy.predict(state_of(["tower"]), deterministic=True)
    assert choice[1] == 0
    assert choice[2] == alone[0]
    wide = state_of(["roof"])._replace(admissible=[tuple(f"take number {i}" for i in range(40))])
    drawn = {int(policy.predict(wide)[0][0]) for _ in range(200)}
    assert len(drawn) > 5


def test_predicts_rows_of_numbers_as_stable_baselines_passes_them():
    encoder = FakeEncoder()
    policy = shaken(make_policy(encoder))
    rows = numbered(encoder, state_of(PLACES), np.arange(4))
    numbers, _ = policy.predict(rows.numpy(), deterministic=True)
    texts, _ = policy.predict(state_of(PLACES), deterministic=True)
    assert numbers.tolist() == texts.tolist()


def test_another_encoder_is_refused():
    policy = make_policy(FakeEncoder())
    with pytest.raises(EncoderMismatch, match="another one"):
        policy.attach(FakeEncoder("other"))
    with pytest.raises(EncoderMismatch, match="24 numbers"):
        make_policy(FakeEncoder(), width=25)


@pytest.mark.parametrize(
    ("options", "word"),
    [({"use_sde": True}, "use_sde"), ({"activation": "gelu"}, "activation"), ({"net_arch": ()}, "net_arch")],
)
def test_bad_arguments(options, word):
    with pytest.raises(UnsupportedArgument, match=word):
        make_policy(**options)


def test_without_an_encoder_it_says_how_to_get_one():
    with pytest.raises(UnsupportedArgument, match="load_text_ppo"):
        make_policy().predict(state_of(["hall"]))


def test_fits_its_own_constructor():
    policy = shaken(make_policy(FakeEncoder(), net_arch=(8,), activation="tanh"))
    twin = TextActionPolicy(**policy._get_constructor_parameters())
    twin.load_state_dict(policy.state_dict())
    twin.attach(FakeEncoder())
    with pytest.raises(EncoderMismatch):
        twin.attach(FakeEncoder("other"))
