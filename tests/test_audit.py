"""An audit compares policy and prior on states of whole episodes, and its page needs nothing but itself."""

import base64
import re

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from lago_fast.algorithms.fast_kl_ppo import FastKLPPO
from lago_fast.audit import audit, in_words, play, policy_output, project, sample
from lago_fast.audit_page import draw_kl, draw_latents, page
from lago_fast.envs.sb3_adapter import SB3VecEnv
from lago_fast.envs.vec_env import ArrayReset, ArrayStep, ArrayVecEnv
from lago_fast.errors import PriorMismatch, UnsupportedArgument
from lago_fast.priors.base import PriorOutput

TEXTS = ["go left", "go right"]


class Line(ArrayVecEnv):
    """Four envs, two tasks; the state is (env, step); envs of task 0 end after 3 steps and solve it in the second."""

    num_envs, state_dim, tasks, instructions = 4, 2, ["left", "right"], TEXTS
    task_id = np.array([0, 0, 1, 1])
    observation_space = Box(-9, 9, (2,), np.float32)

    def __init__(self, action_space):
        self.action_space = action_space

    def _seen(self):
        return np.stack([np.arange(4), self.steps], axis=1).astype(np.float32)

    def reset(self):
        self.steps = np.zeros(4, int)
        return ArrayReset(self._seen(), self.task_id.copy())

    def reset_envs(self, ids):
        return ArrayReset(self._seen()[ids], self.task_id[ids])

    def send(self, actions):
        assert len(actions) == 4
        self.steps += 1

    def recv(self):
        ended = self.steps == np.array([3, 3, 5, 5])
        success = (self.task_id == 0) & (self.steps == 2)
        zeros = np.zeros(4, np.float32)
        return ArrayStep(
            self._seen(), zeros, zeros, np.zeros(4, bool), ended, np.ones(4, bool), success, self.task_id.copy()
        )

    def close(self):
        pass


class Fixed:
    """Answers by the state alone; its latents are the states."""

    state_dim, instructions, digest = 2, ["go right", "go left"], "fixed"

    def __init__(self, kind):
        self.kind = kind

    def query(self, state, instruction_id):
        self.ids = instruction_id
        if self.kind == "categorical":
            logits = torch.stack([state[:, 0], state[:, 1], 0 * state[:, 0]], dim=1)
            return PriorOutput(log_probs=logits.log_softmax(-1))
        return PriorOutput(
            mean=state / 10, log_std=torch.full_like(state, -1.0), latent=state, trust=torch.ones(len(state)) / 2
        )


SPACES = {"gaussian": Box(-1, 1, (2,), np.float32), "categorical": Discrete(3)}


def made(kind):
    env = Line(SPACES[kind])
    return FastKLPPO("MlpPolicy", SB3VecEnv(env), n_steps=4, batch_size=16, device="cpu"), env


def test_each_env_plays_one_episode():
    rows = play(*made("gaussian"))
    assert len(rows.state) == 3 + 3 + 5 + 5
    assert sorted(map(tuple, rows.state.astype(int))) == [(e, t) for e in range(4) for t in range(3 if e < 2 else 5)]
    assert np.array_equal(rows.step, rows.state[:, 1])
    assert np.array_equal(rows.task_id, rows.instruction_id)
    assert np.array_equal(rows.success, rows.task_id == 0), "of the whole episode, its first steps too"


def test_a_sample_is_even_over_the_tasks():
    rows = play(*made("gaussian"))
    assert np.bincount(sample(rows, 8, seed=0).task_id).tolist() == [4, 4]
    assert np.bincount(sample(rows, 999, seed=0).task_id).tolist() == [6, 10]
    assert np.array_equal(sample(rows, 5, seed=1).state, sample(rows, 5, seed=1).state)
    for few in (0, 1):
        with pytest.raises(UnsupportedArgument, match=f"states: {few}; sample at least one of each task, 2"):
            sample(rows, few, seed=0)
    model, env = made("gaussian")
    env.reset = None
    with pytest.raises(UnsupportedArgument, match="states: 1"):
        audit(model, Fixed("gaussian"), env, states=1, seed=0)


@pytest.mark.parametrize("direction", ["policy_prior", "prior_policy"])
@pytest.mark.parametrize("kind", list(SPACES))
def test_the_kl_is_torchs(kind, direction):
    model, env = made(kind)
    prior = Fixed(kind)
    found = audit(model, prior, env, states=12, seed=0, kl_direction=direction)
    state = torch.from_numpy(found.rows.state)
    said = prior.query(state, None)
    with torch.no_grad():
        policy = model.policy.get_distribution(state).distribution
    if kind == "categorical":
        exact = torch.distributions.Categorical(logits=said.log_probs)
    else:
        exact = torch.distributions.Normal(said.mean, said.log_std.exp())
    pair = (policy, exact) if direction == "policy_prior" else (exact, policy)
    expected = torch.distributions.kl_divergence(*pair)
    expected = expected if kind == "categorical" else expected.sum(-1)
    np.testing.assert_allclose(found.kl_nats, expected, rtol=1e-4, atol=1e-6)
    assert (found.places is None) == (found.trust is None) == (kind == "categorical")


def test_instructions_are_matched_by_their_text():
    model, env = made("gaussian")
    prior = Fixed("gaussian")
    rows = audit(model, prior, env, states=12, seed=0).rows
    assert [prior.instructions[i] for i in prior.ids] == [TEXTS[i] for i in rows.instruction_id]
    prior.instructions = ["go up"]
    with pytest.raises(PriorMismatch, match="go left"):
        audit(model, prior, env, states=12, seed=0)


def test_a_policy_without_a_form_is_refused():
    env = Line(SPACES["gaussian"])
    model = FastKLPPO("MlpPolicy", SB3VecEnv(env), n_steps=4, batch_size=16, use_sde=True, device="cpu")
    model.policy.action_dist.distribution = None
    model.policy.get_distribution = lambda _: type("Own", (), {"distribution": object()})
    with pytest.raises(UnsupportedArgument, match="its policy answers with object"):
        policy_output(model, np.zeros((1, 2), np.float32))


def test_a_plane_is_projected_onto_itself():
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(40, 2, generator=generator) * torch.tensor([3.0, 1.0])
    turned = flat @ torch.linalg.qr(torch.randn(5, 2, generator=generator)).Q.T
    places, others, explained = project(turned[:30], turned[30:])
    assert explained == pytest.approx(1)
    both = torch.from_numpy(np.concatenate([places, others]))
    torch.testing.assert_close(torch.cdist(both, both), torch.cdist(flat, flat), atol=1e-3, rtol=1e-3)
    assert both[:, 0].std() > both[:, 1].std()
    assert project(None, None) == (None, None, 0.0)
    assert project(torch.ones(1, 3), None)[0].tolist() == [[0, 0]]


def test_answers_in_words():
    odds = PriorOutput(log_probs=torch.tensor([[0.2, 0.5, 0.3]]).log())
    assert in_words(odds, ["wait", "push", "pull"], 2) == ["push 0.50, pull 0.30"]
    assert in_words(odds, (), 9) == ["1 0.50, 2 0.30, 0 0.20"]
    normal = PriorOutput(mean=torch.tensor([[0.5, -1.0]]), log_std=torch.tensor([[0.2, 1.0]]).log())
    assert in_words(normal, ("x", "grip"), 1) == ["x +0.50 ± 0.20, grip -1.00 ± 1.00"]


def test_the_page_needs_nothing_but_itself_and_trusts_no_text():
    task_id, success = np.array([0, 0, 1, 1]), np.array([True, False, True, True])
    kl, places = np.array([0.1, 2.0, 0.0, 50.0]), np.arange(8.0).reshape(4, 2)
    figures = [
        ("KL & more", draw_kl(np.arange(4), kl, np.array([0.1, 1, 0.5, 0]), task_id, ["a", "b"])),
        ("without trust", draw_kl(np.arange(4), kl, None, task_id, ["a", "b", "never seen"])),
        ("latents", draw_latents(places, places + 1, 0.9, task_id, ["a", "b"], success)),
        ("all solved", draw_latents(places, None, 0.9, task_id, ["a", "b"], np.ones(4, bool))),
    ]
    text = page("<title>", {"run": "a&b"}, figures, ["state"], [("<script>alert(1)</script>",), (0.12345,), (None,)])
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "a&amp;b" in text
    assert ">0.123<" in text
    assert "<td>-</td>" in text
    assert "http" not in text
    assert set(re.findall(r"(?:src|href)='([^;]*);", text)) == {"data:image/png"}
    pictures = re.findall(r"base64,([^']*)'", text)
    assert [base64.b64decode(content)[:4] for content in pictures] == 4 * [b"\x89PNG"]
