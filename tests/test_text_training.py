"""Tests of lago_fast.text_training."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lago_fast import ops
from lago_fast.algorithms.checkpoint_every import CheckpointEvery
from lago_fast.algorithms.fast_kl_ppo import FastKLPPO
from lago_fast.algorithms.text_policy import TextActionPolicy
from lago_fast.errors import EncoderMismatch, PriorMismatch, TrainablePrior, UnsupportedArgument
from lago_fast.text_training import evaluate_text, load_text_ppo, make_text_ppo
from tests.algorithms.text_fakes import GAMMA, FakeEncoder, FakePrior, TableGame, state_of

# knows the way, and finds shouting in the tower likely
WAY = {"go right": 6.0, "climb": 3.0, "shout": 2.0, "take the treasure": 6.0}
FAST = {"n_steps": 16, "batch_size": 64, "n_epochs": 4, "learning_rate": 3e-3, "gamma": GAMMA, "device": "cpu"}
# cellar: two actions; all others are masked there
MIXED = ["hall", "cellar", "tower", "roof"]


def way():
    return FakePrior(lambda _, action: WAY.get(action, 1.0))


def make(prior=None, *, starts=("hall",), envs=8, **options):
    return make_text_ppo(TableGame(envs, starts=starts), prior, FakeEncoder(), **{**FAST, "seed": 0, **options})


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.policy.parameters()])


def masked_log_softmax(logits, mask):
    return torch.where(mask, logits, -torch.inf).log_softmax(dim=-1)


@pytest.mark.parametrize("direction", ["policy_prior", "prior_policy"])
def test_one_update_by_hand(direction):
    """The gradient of the first minibatch, from the formulas and PyTorch alone."""
    model = make(way(), starts=MIXED, n_epochs=1, batch_size=128, kl_coef=0.3, kl_direction=direction)
    model.learn(1)  # one rollout, which leaves the zeros of the start
    taken = {}
    plain = model._optimize

    def optimize(given):
        taken.setdefault("grads", [p.grad.clone() for p in given])
        taken.setdefault("before", [p.detach().clone() for p in given])
        plain(given)

    model._optimize = optimize
    model.learn(1, reset_num_timesteps=False)
    policy, buffer = model.policy, model._buffer
    with torch.no_grad():
        for parameter, before in zip(policy.parameters(), taken["before"], strict=True):
            parameter.copy_(before)
    rows = buffer.observations.flatten(0, 1)
    mask, weight = rows[:, 2:] >= 0, buffer.valid.flatten().float()
    mask[:, 0] |= ~mask.any(1)
    assert int((mask.sum(1) == 2).sum()) > 5  # the cellar, whose third column is padding
    assert 0 < int((weight == 0).sum()) < 40
    logits, values = policy.logits_and_values(rows)
    log_probs, prior = masked_log_softmax(logits, mask), buffer.prior_outputs[0].flatten(0, 1)
    prior = prior.masked_fill(~mask, -torch.inf)
    n = weight.sum()
    advantages = buffer.advantages.flatten()
    centred = advantages - (advantages * weight).sum() / n
    advantages = centred / (((centred**2 * weight).sum() / (n - 1)).sqrt() + 1e-8)
    ratio = (log_probs.gather(1, buffer.actions.flatten()[:, None])[:, 0] - buffer.log_probs.flatten()).exp()
    assert torch.allclose(ratio, torch.ones_like(ratio), atol=1e-5)
    finite = [column.masked_fill(~mask, 0) for column in (log_probs, prior)]
    left, right = finite if direction == "policy_prior" else finite[::-1]
    kl = (left.exp() * (left - right)).sum(dim=1)
    surrogate = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    loss = ((-surrogate + 0.5 * (buffer.returns.flatten() - values) ** 2 + 0.3 * kl) * weight).sum() / n
    expected = torch.autograd.grad(loss, list(policy.parameters()))
    for own, found in zip(expected, taken["grads"], strict=True):
        assert torch.allclose(own, found, atol=2e-6, rtol=1e-4)


def test_masked_actions_are_never_taken_and_have_no_gradient():
    model = make(way(), starts=MIXED, kl_coef=0.3)
    model.learn(512)
    buffer = model._buffer
    rows, actions = buffer.observations.flatten(0, 1), buffer.actions.flatten()
    allowed = model.policy.action_mask(rows)
    assert bool(allowed.gather(1, actions[:, None]).all())
    assert bool((~allowed).any())
    batch = next(buffer.get(128, impl="reference"))
    outputs, values = model._head.evaluate(batch)
    coefficients = ops.coefficients_on(model.device, **model._coefficients())
    options = {"kl_direction": "policy_prior", "normalize_advantage": True, "impl": "auto"}
    _, grads = model._head.loss_and_grads(outputs, values, batch, coefficients, **options)
    mask = model.policy.action_mask(batch.observations)
    assert bool((grads[0][~mask] == 0).all())
    assert bool((grads[0][mask] != 0).any())


@pytest.mark.parametrize("placement", ["loss", "reward", "both"])
def test_native_code_learns_what_the_definition_learns(placement):
    found, start = {}, None
    for impl in ("reference", "auto"):
        # Adam makes a whole step of a gradient that is nothing but rounding
        sgd = {"optimizer_class": torch.optim.SGD}
        model = make(way(), starts=MIXED, kl_placement=placement, kl_coef=0.2, impl=impl, policy_kwargs=sgd)
        start = parameters(model)
        model.learn(256)
        found[impl] = parameters(model)
    assert model.impls["ppo_kl_categorical"] == "cpp"
    assert (found["auto"] - start).norm() > 1e-3
    assert torch.allclose(found["reference"], found["auto"], atol=1e-6)


def test_reward_placement_charges_the_divergence_by_hand():
    prior = way()
    model = make(prior, starts=MIXED, kl_placement="reward", kl_coef=0.3, prior_floor=0.1)
    rewards = []
    step = model.env.array_lane.step

    def noted(actions):
        found = step(actions)
        rewards.append(torch.from_numpy(found.raw_reward.copy()))
        return found

    model.env.array_lane.step = noted
    model.learn(1)
    buffer = model._buffer
    charged = torch.stack(rewards) - buffer.rewards
    rows, checked = buffer.observations, 0
    for t, env in zip(*np.nonzero(buffer.valid.numpy()), strict=True):
        places = model.env.array_lane.texts.read(rows[t, env][None]).observation
        (actions,) = state_of(places).admissible
        weights = torch.tensor([WAY.get(action, 1.0) for action in actions])
        p = 0.9 * weights / weights.sum() + 0.1 / len(actions)
        uniform = torch.full((len(actions),), 1 / len(actions))  # the policy of the first rollout
        assert float(charged[t, env]) == pytest.approx(0.3 * float((uniform * (uniform / p).log()).sum()), abs=1e-5)
        checked += 1
    assert checked > 60


def test_without_a_prior_it_is_ppo():
    """A KL of weight 0 changes nothing but what is logged."""
    plain = make(starts=MIXED).learn(256)
    asked = make(way(), starts=MIXED, kl_coef=0.0).learn(256)
    assert torch.equal(parameters(plain), parameters(asked))


@pytest.mark.parametrize(
    "options",
    [
        {"prior": None},
        {"prior": way(), "kl_placement": "loss", "kl_coef": 0.05},
        {"prior": way(), "kl_placement": "reward", "kl_coef": 0.05},
        {"prior": way(), "kl_placement": "both", "kl_coef": 0.05},
    ],
    ids=["ppo", "loss", "reward", "both"],
)
def test_learns_a_small_game(options):
    model = make(**options)
    before = evaluate_text(model, TableGame(4), 40, deterministic=False)
    assert before.success.mean() < 0.5
    model.learn(4096)
    scores = evaluate_text(model, TableGame(4), 8)
    assert scores.success.all()
    assert scores.length.tolist() == [3] * 8
    assert scores.total_reward == pytest.approx(np.ones(8))


@pytest.mark.parametrize("placement", ["loss", "both"])
def test_variational_optimum_of_a_heavy_prior(placement):
    """A KL that weighs more than any reward leaves the prior: in the tower it shouts as often as the prior says."""
    model = make(way(), kl_coef=20.0, kl_placement=placement, prior_floor=0.0, starts=MIXED, envs=16)
    model.learn(8192)
    said = model.policy.get_distribution(torch.from_numpy(model.env.array_lane.texts.number(state_of(["tower"]))))
    assert said.distribution.probs[0].tolist() == pytest.approx([2 / 6, 3 / 6, 1 / 6], abs=0.05)


def test_warm_start_fits_the_policy_to_the_prior():
    model = make(way(), warm_start=True, starts=MIXED, envs=32, n_epochs=40, kl_coef=0.1)
    model.learn(512)
    assert model.logger.name_to_value["train/prior_kl"] < 0.1


def test_save_and_load(tmp_path):
    prior, encoder = way(), FakeEncoder()
    model = make_text_ppo(TableGame(8, starts=MIXED), prior, encoder, seed=0, kl_coef=0.1, **FAST)
    model.learn(512)
    model.save(tmp_path / "model")
    fresh = FakeEncoder()
    fresh.ids(["something else"])  # its numbers are others
    loaded = load_text_ppo(tmp_path / "model", fresh)
    choices = [which.predict(state_of(MIXED), deterministic=True)[0].tolist() for which in (loaded, model)]
    assert choices[0] == choices[1]
    again = load_text_ppo(tmp_path / "model", FakeEncoder(), prior=way(), env=TableGame(8, starts=MIXED))
    assert torch.equal(parameters(again), parameters(model))
    again.learn(128, reset_num_timesteps=False)
    assert again.num_timesteps > model.num_timesteps
    with pytest.raises(EncoderMismatch):
        load_text_ppo(tmp_path / "model", FakeEncoder("other"))
    with pytest.raises(PriorMismatch):
        load_text_ppo(tmp_path / "model", FakeEncoder(), prior=FakePrior(lambda *_: 1.0, "b"), env=TableGame(8))
    with pytest.raises(PriorMismatch):
        load_text_ppo(tmp_path / "model", FakeEncoder(), prior=way(), env=TableGame(8), prior_floor=0.2)
    with pytest.raises(UnsupportedArgument, match="prior: it is needed"):
        load_text_ppo(tmp_path / "model", FakeEncoder(), prior=way())


def test_resumes_from_a_checkpoint(tmp_path):
    model = make(way(), starts=MIXED)
    model.learn(512, callback=CheckpointEvery(tmp_path, 1))
    other = make(way(), starts=MIXED)
    resumed = FastKLPPO.resume(
        tmp_path, other.env, prior=other.prior, policy=TextActionPolicy, policy_kwargs={"width": FakeEncoder.width}
    )
    assert resumed.num_timesteps > 128
    resumed.learn(128, reset_num_timesteps=False)


def test_refusals():
    game = TableGame(8, known_width=False)
    with pytest.raises(UnsupportedArgument, match="max_actions"):
        make_text_ppo(game, None, FakeEncoder())
    assert make_text_ppo(game, None, FakeEncoder(), max_actions=5, **FAST).action_space.n == 5
    with pytest.raises(TrainablePrior):
        make(FakePrior(lambda *_: 1.0, parameters=[torch.nn.Parameter(torch.ones(1))]))
    with pytest.raises(UnsupportedArgument, match="episodes"):
        evaluate_text(make(), TableGame(2), 0)


def test_evaluation_counts_whole_episodes_of_every_env():
    class First:
        def predict(self, observation, deterministic=False):
            assert deterministic
            return np.zeros(len(observation.observation), dtype=np.int64), None

    scores = evaluate_text(First(), TableGame(3), 7)
    assert len(scores.success) == 9
    assert scores.length.tolist() == [2] * 9
    assert scores.total_reward == pytest.approx(np.full(9, 0.3))
    assert not scores.success.any()


def test_the_page_of_text_priors_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).resolve().parents[1] / "docs" / "text_priors.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(compile(page.split("```python\n")[1].split("```")[0], "text_priors.md", "exec"), {"__name__": "page"})
    assert capsys.readouterr().out.startswith("success 1.00 in 3.0 steps")


def test_an_overlapped_update_is_refused():
    with pytest.raises(UnsupportedArgument, match=r"overlap='update'.*encoder"):
        make(overlap="update")
