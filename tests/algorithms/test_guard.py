"""The guard's slope is the derivative that it claims to be; its weights fall and recover; they survive saving."""

import math

import numpy as np
import pytest
import torch
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecEnvWrapper

from lago_fast import FastKLPPO, errors
from lago_fast.algorithms.guard import Guard, GuardSettings, guard_for, settings_of, slope_of_return
from lago_fast.algorithms.heads import CategoricalHead, GaussianHead
from lago_fast.buffers import RolloutBuffer
from tests.algorithms.point_env import ScriptedPrior
from tests.algorithms.test_fast_kl_ppo import SMALL, point_env

ONE = torch.zeros(4, 2, dtype=torch.int64)  # one group


def slope(advantages, towards, valid=None, group=ONE, groups=1, block_steps=2):
    valid = torch.ones(4, 2, dtype=torch.bool) if valid is None else valid
    return slope_of_return(torch.tensor(advantages), torch.tensor(towards), valid, group, groups, block_steps)


def test_hand_computed_slope():
    advantages = [[2.0, 0.0], [0.0, 0.0], [0.0, -2.0], [0.0, 0.0]]  # their mean is 0
    towards = [[3.0, 9.0], [9.0, 9.0], [9.0, 1.0], [9.0, 9.0]]
    # blocks of two steps of one env: 6, 0, 0 and -2; their sum over the root of their squares
    assert slope(advantages, towards).tolist() == pytest.approx([4 / math.sqrt(40)])
    # whole columns: 6 and -2
    assert slope(advantages, towards, block_steps=4).tolist() == pytest.approx([4 / math.sqrt(40)])
    # a constant added to all advantages changes nothing
    shifted = [[a + 5 for a in row] for row in advantages]
    assert slope(shifted, towards).tolist() == pytest.approx([4 / math.sqrt(40)], abs=1e-6)


def test_slope_of_each_group_and_of_valid_rows():
    group = torch.tensor([[0, 1]] * 4)
    advantages = [[1.0, 1.0], [-1.0, -1.0], [float("nan"), 7.0], [float("nan"), 7.0]]
    towards = [[1.0, -1.0], [-1.0, 1.0], [5.0, 5.0], [5.0, float("inf")]]
    valid = torch.tensor([[True, True], [True, True], [False, False], [False, False]])
    got = slope(advantages, towards, valid, group, 3, block_steps=1)
    # two blocks each: 1 and 1; -1 and -1; a group without rows has no slope
    assert got.tolist() == pytest.approx([math.sqrt(2), -math.sqrt(2), 0.0])


def test_slope_of_noise_has_variance_one():
    torch.manual_seed(0)
    valid, group = torch.ones(64, 16, dtype=torch.bool), torch.zeros(64, 16, dtype=torch.int64)
    found = torch.cat(
        [slope_of_return(torch.randn(64, 16), torch.randn(64, 16) ** 3, valid, group, 1, 8) for _ in range(400)]
    )
    assert abs(found.mean()) < 0.15
    assert found.std() == pytest.approx(1.0, abs=0.12)


def state(kind, rows):
    """Return what a policy and a prior say in one state, [rows, ...] each, and actions of the policy."""
    torch.manual_seed(0)
    if kind == "categorical":
        log_probs = torch.tensor([0.2, 0.5, 0.3]).log().expand(rows, 3)
        prior = torch.tensor([0.6, 0.1, 0.3]).log().expand(rows, 3)
        return (log_probs,), (prior,), torch.multinomial(log_probs.exp(), 1).squeeze(1)
    outputs = torch.tensor([0.1, -0.2]).expand(rows, 2), torch.tensor([-0.5, 0.0]).expand(rows, 2)
    prior = torch.tensor([0.4, -0.2]).expand(rows, 2), torch.tensor([-1.0, -0.3]).expand(rows, 2)
    return outputs, prior, torch.distributions.Normal(outputs[0], outputs[1].exp()).sample()


def towards(kind, outputs, prior, actions, temperature=1.0):
    head = object.__new__(CategoricalHead if kind == "categorical" else GaussianHead)
    return head.towards_prior(outputs, prior, actions, temperature)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
def test_both_parts_have_mean_zero_in_a_state_and_are_uncorrelated_there(kind, temperature):
    direction, spread = towards(kind, *state(kind, 40_000), temperature)
    for part in (direction, spread, direction * spread):
        assert part.std() > 0.01
        assert abs(part.mean()) < 4 * part.std() / math.sqrt(len(part))


def test_the_parts_of_a_gaussian_are_log_p_minus_log_pi_plus_the_kl():
    outputs, prior, actions = state("gaussian", 50)
    policy, other = (torch.distributions.Normal(mean, log_std.exp()) for mean, log_std in (outputs, prior))
    kl = torch.distributions.kl_divergence(policy, other)
    expected = (other.log_prob(actions) - policy.log_prob(actions) + kl).sum(-1)
    torch.testing.assert_close(sum(towards("gaussian", outputs, prior, actions)), expected, rtol=1e-4, atol=1e-5)


def test_the_parts_of_a_categorical_are_the_derivative_of_the_return():
    policy, prior = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.6, 0.1, 0.3])
    rows = policy.log().expand(3, 3), prior.log().expand(3, 3)
    advantages = torch.tensor([1.0, -2.0, 3.0])
    direction, spread = towards("categorical", rows[:1], rows[1:], torch.arange(3))
    moved = (policy.log() + 1e-3 * (prior.log() - policy.log())).softmax(0)
    found = (policy * advantages * (direction + spread)).sum()
    assert found.item() == pytest.approx((((moved - policy) * advantages).sum() / 1e-3).item(), rel=1e-2)
    # a prior that is the policy's own power has no direction
    sharp = (3 * policy.log()).expand(3, 3)
    direction, spread = towards("categorical", rows[:1], (sharp,), torch.arange(3))
    assert direction.abs().max() < 1e-5
    assert spread.abs().max() > 0.1


def test_an_excluded_action_is_finite():
    outputs, (prior,), _ = state("categorical", 3)
    excluded = prior.clone()
    excluded[:, 1] = -torch.inf
    for part in towards("categorical", outputs, (excluded,), torch.arange(3)):
        assert part.isfinite().all()


def test_weights_fall_with_evidence_against_the_prior_and_recover():
    settings = GuardSettings(start=1.0, burden=0.0)
    guard = Guard(settings, ["against", "for", "nothing", "too wide"])
    for _ in range(20):
        guard.observe(torch.tensor([-3.0, 3.0, float("nan"), 0.5]), torch.tensor([3.0, 0.0, 0.0, -3.0]))
    assert guard.weights == [settings.least, 1.0, 1.0, settings.least]
    assert guard.direction[2] == 0.0
    # what has earned the benefit of the doubt keeps its weight without further evidence
    for _ in range(60):
        guard.observe(torch.tensor([4.0, 0.1, 0.0, 0.1]), torch.tensor([0.1, 0.1, 0.0, 0.1]))
    assert guard.weights[:2] == [1.0, 1.0]
    assert guard.weights[3] < 0.01  # not against it any more, and not for it


def test_a_prior_without_evidence_loses_its_weight():
    guard = Guard(GuardSettings(burden=0.5, start=1.0), ["all"])
    guard.observe(torch.tensor([0.1]), torch.tensor([0.1]))
    assert guard.weights == pytest.approx([math.exp(-0.5)])


def test_evidence_keeps_its_variance():
    torch.manual_seed(0)
    guard = Guard(GuardSettings(), [str(i) for i in range(500)])
    for _ in range(40):
        guard.observe(torch.randn(500), torch.randn(500))
    assert np.std(guard.direction) == pytest.approx(1.0, abs=0.12)
    assert np.std(guard.spread) == pytest.approx(1.0, abs=0.12)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"memory": 1.0}, "memory"),
        ({"proof": 0.0}, "proof"),
        ({"burden": -0.1}, "burden"),
        ({"doubt": -0.1}, "doubt"),
        ({"step": 0.0}, "step"),
        ({"recovery": float("nan")}, "recovery"),
        ({"least": 0.0}, "least"),
        ({"start": 1.1}, "start"),
        ({"block_steps": 0}, "block_steps"),
    ],
)
def test_settings_out_of_range_are_refused(changed, named):
    with pytest.raises(errors.UnsupportedArgument, match=f"guard: {named}"):
        GuardSettings(**changed)


def test_what_a_guard_may_be():
    assert settings_of(None) is None
    assert settings_of(False) is None
    assert settings_of(True) == GuardSettings()
    own = GuardSettings(doubt=2.0)
    assert settings_of(own) is own
    for wrong in ("yes", 1, {"doubt": 2.0}):
        with pytest.raises(errors.UnsupportedArgument, match="guard="):
            settings_of(wrong)


class Named(VecEnvWrapper):
    """An env that names what it has."""

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        return self.venv.step_wait()


def buffer_of(rows=64):
    return RolloutBuffer(rows, 8, np.zeros(2, np.float32), (2,), torch.float32, (2, 2), torch.device("cpu"))


def test_groups_are_tasks_or_instructions_or_one():
    env = Named(point_env())
    settings = GuardSettings()
    assert guard_for(None, env, buffer_of(), None) is None
    assert guard_for(settings, env, buffer_of(), None).names == ["all"]
    env.instructions = ["left", "right"]
    assert guard_for(settings, env, buffer_of(), None).names == ["left", "right"]
    assert guard_for(settings, env, buffer_of(8), None).names == ["all"]  # 64 rows tell nothing of two
    env.tasks, env.task_id = ["near", "far"], np.array([0, 0, 0, 0, 1, 1, 1, 1])
    before = {"weights": [0.5, 1.0], "earned": [0.0, 1.0], "direction": [-2.0, 1.0], "spread": [0.0, 3.0]}
    guard = guard_for(settings, env, buffer_of(), before)
    assert guard.names == ["near", "far"]
    assert guard.group.shape == (64, 8)
    assert guard.group[3].tolist() == env.task_id.tolist()
    assert guard.state == before
    others = {name: column[:1] for name, column in before.items()}
    assert guard_for(settings, env, buffer_of(), others).weights == [settings.start] * 2


def guarded(kind, sign, rollouts):
    """Train with a guard, and return the model and the weight of the KL after each rollout."""
    prior = ScriptedPrior(kind, sign=sign)
    model = FastKLPPO("MlpPolicy", point_env(kind), **SMALL, prior=prior, kl_coef=0.1, guard=True)
    model.set_logger(configure(None, []))
    weights = []
    for _ in range(rollouts):
        model.learn(256, log_interval=1000, reset_num_timesteps=False)
        weights.append(model.logger.name_to_value["prior/guard_weight"])
        assert model.logger.name_to_value["prior/guard_weight_all"] == pytest.approx(weights[-1])
        assert model.rollout_buffer.kl_weight.unique().tolist() == pytest.approx([weights[-1]])
    return model, weights


def test_it_lets_go_of_a_prior_that_steers_away_and_keeps_one_that_helps():
    assert min(guarded("gaussian", 1.0, 10)[1][4:]) == 1.0
    for kind in ("gaussian", "categorical"):
        _, weights = guarded(kind, -1.0, 8)
        assert weights[-1] == pytest.approx(GuardSettings().least)
        assert max(weights) < 0.02


def test_a_weight_of_nothing_is_no_prior_and_the_priors_trust_multiplies_it():
    class Doubtful(ScriptedPrior):
        def query(self, state, instruction_id):
            return super().query(state, instruction_id)._replace(trust=torch.zeros(len(state)))

    models = []
    for arguments in ({"prior": None}, {"prior": Doubtful(), "kl_coef": 0.5, "guard": True}):
        model = FastKLPPO("MlpPolicy", point_env(), **SMALL, **arguments)
        model.set_logger(configure(None, []))
        models.append(model.learn(256, log_interval=1000))
    assert models[1].logger.name_to_value["prior/trust"] == 0.0
    for mine, plain in zip(models[1].policy.parameters(), models[0].policy.parameters(), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)


def test_without_a_guard_no_row_is_weighed():
    model = FastKLPPO("MlpPolicy", point_env(), **SMALL, prior=ScriptedPrior(), guard=False)
    model.learn(256)
    assert model.guard is None
    assert model.rollout_buffer.kl_weight is None
    assert next(model.rollout_buffer.get(64)).kl_weight is None


def test_it_survives_saving(tmp_path):
    prior = ScriptedPrior(sign=-1.0)
    settings = GuardSettings(doubt=0.5)
    model = FastKLPPO("MlpPolicy", point_env(), **SMALL, prior=prior, kl_coef=0.1, guard=settings)
    model.learn(6 * 256)
    assert model.guard_state["weights"][0] < 1
    model.save(tmp_path / "model.zip")
    loaded = FastKLPPO.load(tmp_path / "model.zip", env=point_env(), device="cpu", prior=prior)
    assert settings_of(loaded.guard) == settings
    assert loaded.guard_state == model.guard_state
    loaded.learn(256, reset_num_timesteps=False)
    assert loaded._guard.settings == settings
    assert 0 < loaded.guard_state["weights"][0] < 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"guard": True},
        {"guard": True, "prior": ScriptedPrior(), "kl_placement": "reward"},
        {"guard": True, "prior": ScriptedPrior(), "kl_coef": "auto", "target_prior_kl": 0.1},
        {"guard": "always", "prior": ScriptedPrior()},
    ],
)
def test_what_cannot_be_guarded_is_refused_by_name(arguments):
    with pytest.raises(errors.UnsupportedArgument, match="guard"):
        FastKLPPO("MlpPolicy", point_env(), **SMALL, **arguments)
