"""The guard compares the returns of prior and policy; its weights fall and rise by that, and survive saving."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper

from lago_fast import FastKLPPO, errors
from lago_fast.algorithms.guard import Guard, GuardSettings, Returns, Rounds, guard_for, settings_of, settled
from lago_fast.algorithms.lanes import Episode
from lago_fast.buffers import RolloutBuffer
from tests.algorithms.point_env import DiscretePointEnv, PointEnv, ScriptedPrior
from tests.algorithms.test_fast_kl_ppo import SMALL, point_env

FEW = GuardSettings(episodes=8, window=8, probe_share=1.0)


def buffer_of(rows=64):
    return RolloutBuffer(rows, 8, np.zeros(2, np.float32), (2,), torch.float32, (2, 2), torch.device("cpu"))


def of_returns(prior, policy, **settings):
    """A guard of one group that has seen these returns."""
    guard = Guard(GuardSettings(**settings), ["all"], np.zeros(8, np.int64))
    for kept, values in ((guard.prior, prior), (guard.policy, policy)):
        for value in values:
            guard.note(kept, [Episode(0, value, 1, None)], np.zeros(8, np.int64))
    return guard


def test_returns_are_the_mean_and_the_variance():
    values = np.random.default_rng(0).normal(3, 2, 20)
    kept = Returns(2)
    for value in [*values, math.nan, math.inf]:
        kept.add(1, float(value))
    assert kept.count == [0, 20]
    assert kept.mean[1] == pytest.approx(values.mean())
    assert kept.squared_error(1) == pytest.approx(values.var(ddof=1) / 20)
    assert kept.squared_error(0) == math.inf


def test_old_returns_are_forgotten():
    kept = Returns(1, window=8)
    for value in [0.0] * 50 + [1.0] * 40:
        kept.add(0, value)
    assert kept.count == [8]
    assert kept.mean[0] == pytest.approx(1.0, abs=0.01)


def test_hand_computed_advantage():
    # means 4 and 1; variances 2 and 2 of two episodes each: 3 / sqrt(2 / 2 + 2 / 2)
    assert of_returns([3.0, 5.0], [0.0, 2.0]).advantage_of_prior(0) == pytest.approx(3 / math.sqrt(2))
    assert of_returns([3.0, 5.0], [1.0]).advantage_of_prior(0) == 0.0  # one episode says nothing
    assert of_returns([3.0, 3.0], [3.0, 3.0]).advantage_of_prior(0) == 0.0
    assert of_returns([3.0, 3.0], [4.0, 4.0]).advantage_of_prior(0) == -math.inf


@pytest.mark.parametrize(
    ("prior", "policy", "before", "after"),
    [
        ([2.0, 4.0], [0.0, 2.0], 0.1, 0.1 * math.exp(0.5 * (2 / math.sqrt(2) - 1))),  # the prior is better
        ([3.0, 5.0], [0.0, 2.0], 0.1, 1.0),  # surely so
        ([0.0, 2.0], [3.0, 5.0], 0.1, 0.1 * math.exp(-0.5 * (3 / math.sqrt(2) - 1))),
        ([0.0, 2.0], [0.0, 2.0], 0.9, 0.9 * math.exp(-0.3)),  # neither
        ([0.0, 2.0], [0.0, 2.0], 0.25, 0.2),  # neither: the anchor holds
        ([0.0, 2.0], [0.0, 2.0], 0.01, 0.01),  # what was never earned is not given
        ([3.0, 5.0], [0.0], 0.9, 0.9 * math.exp(-0.3)),  # nothing is known of the policy
        ([9.0, 9.0], [0.0, 0.0], 0.001, 1.0),  # as clear as can be
        ([0.0, 0.0], [9.0, 9.0], 1.0, 0.001),
    ],
)
def test_a_weight_moves_by_who_is_better(prior, policy, before, after):
    guard = of_returns(prior, policy, step=0.5, burden=0.3, anchor=0.2)
    guard.weights = [before]
    buffer = buffer_of()
    guard.weigh(buffer, configure(None, []))
    assert guard.weights == pytest.approx([after])
    assert buffer.kl_weight.unique().tolist() == pytest.approx([after])


def test_a_prior_that_once_counted_fully_keeps_the_floor_and_no_other_does():
    guard = of_returns([9.0, 9.0], [0.0, 0.0], floor=0.3)
    weights = []
    for value in (None, 20.0, 30.0):
        for _ in range(0 if value is None else 40):
            guard.policy.add(0, value)
        guard.weigh(buffer_of(), configure(None, []))
        weights.append(guard.weights[0])
    assert weights == pytest.approx([1.0, 0.3, 0.3])
    assert Guard(guard.settings, ["all"], np.zeros(8, np.int64), guard.state).counted == [1.0]
    never = of_returns([0.0, 0.0], [9.0, 9.0], floor=0.3)
    never.weigh(buffer_of(), configure(None, []))
    assert never.weights == [never.settings.least]


def test_a_settled_guard_lets_no_prior_play_and_counts_it_fully():
    settings = GuardSettings(floor=1.0)
    prior = ScriptedPrior()
    model = FastKLPPO("MlpPolicy", point_env(), **SMALL, prior=prior, guard=settings)
    model.guard_state = settled(settings, 1)
    model.learn(512)
    assert prior.queried == 512
    assert (model.rollout_buffer.kl_weight == 1).all()


def test_groups_are_weighed_apart():
    settings = GuardSettings(anchor=0.5, least=0.5)
    tasks = Guard(settings, ["a", "b"], np.array([0, 0, 0, 0, 1, 1, 1, 1]))
    tasks.weights = [0.6, 1.0]
    buffer = buffer_of()
    buffer.instruction_id[:] = 1
    tasks.weigh(buffer, configure(None, []))
    kept = [0.6 * math.exp(-settings.burden), math.exp(-settings.burden)]
    assert buffer.kl_weight[5].tolist() == pytest.approx(np.repeat(np.clip(kept, 0.5, 1), 4).tolist())
    words = Guard(settings, ["a", "b"], None)
    words.note(words.prior, [Episode(3, 2.0, 1, None)], np.array([0, 0, 0, 1, 0, 0, 0, 0]))
    assert words.prior.count == [0, 1]
    words.weights = [0.5, 1.0]
    words.weigh(buffer, configure(None, []))
    assert buffer.kl_weight.unique().tolist() == pytest.approx([math.exp(-settings.burden)])


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"episodes": 1}, "episodes"),
        ({"most_episodes": 15}, "most_episodes"),
        ({"sure": 0.9}, "sure"),
        ({"probe_share": 0.0}, "probe_share"),
        ({"window": 1}, "window"),
        ({"doubt": -0.1}, "doubt"),
        ({"step": 0.0}, "step"),
        ({"burden": float("nan")}, "burden"),
        ({"anchor": 0.0}, "anchor"),
        ({"least": 0.0, "anchor": 0.5}, "least"),
        ({"floor": 1.5}, "floor"),
    ],
)
def test_settings_out_of_range_are_refused(changed, named):
    with pytest.raises(errors.UnsupportedArgument, match=f"guard: {named}"):
        GuardSettings(**changed)


def test_what_a_guard_may_be():
    assert settings_of(None) is None
    assert settings_of(False) is None
    assert settings_of(True) == GuardSettings()
    assert settings_of(FEW) is FEW
    for wrong in ("yes", 1, {"doubt": 2.0}):
        with pytest.raises(errors.UnsupportedArgument, match="guard="):
            settings_of(wrong)


class Named(VecEnvWrapper):
    """An env that names what it has."""

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        return self.venv.step_wait()


def test_groups_are_tasks_or_instructions_or_one():
    env = Named(point_env())
    assert guard_for(None, env, buffer_of(), None) is None
    assert guard_for(FEW, env, buffer_of(), None).names == ["all"]
    env.instructions = ["left", "right"]
    assert guard_for(FEW, env, buffer_of(), None).names == ["left", "right"]
    assert guard_for(FEW, env, buffer_of(8), None).names == ["all"]  # 64 rows tell nothing of two
    env.tasks, env.task_id = ["near", "far"], np.array([0, 0, 0, 0, 1, 1, 1, 1])
    guard = guard_for(FEW, env, buffer_of(), None)
    assert guard.names == ["near", "far"]
    guard.weights = [0.5, 1.0]
    guard.note(guard.policy, [Episode(7, 3.0, 1, None)], np.zeros(8, np.int64))
    assert guard_for(FEW, env, buffer_of(), guard.state).state == guard.state
    assert guard_for(FEW, Named(point_env()), buffer_of(), guard.state).weights == [FEW.least]


def trained(kind, sign, rollouts):
    """Train with a guard, and return the model and the weight of the KL after each rollout."""
    prior = ScriptedPrior(kind, sign=sign)
    model = FastKLPPO("MlpPolicy", point_env(kind), **SMALL, prior=prior, kl_coef=0.1, guard=FEW)
    model.set_logger(configure(None, []))
    weights = []
    for _ in range(rollouts):
        model.learn(256, log_interval=1000, reset_num_timesteps=False)
        weights.append(model.logger.name_to_value["prior/guard_weight"])
        assert model.logger.name_to_value["prior/guard_weight_all"] == pytest.approx(weights[-1])
    return model, weights


@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
def test_a_prior_that_steers_away_never_counts_and_one_that_helps_does_at_once(kind):
    assert max(trained(kind, -1.0, 5)[1]) < 0.002
    model, weights = trained(kind, 1.0, 5)
    assert max(weights) > 0.3
    prior, policy = model.guard_state["prior_mean"][0], model.guard_state["policy_mean"][0]
    assert -10 < policy < 0
    assert prior > -10


def test_it_lets_go_of_a_prior_that_the_policy_has_passed():
    model, weights = trained("categorical", 1.0, 40)
    assert max(weights) > 0.3
    assert weights[-1] < 0.01
    assert model.guard_state["policy_mean"][0] > model.guard_state["prior_mean"][0]


def test_the_episodes_of_the_prior_are_env_steps_and_come_once():
    prior = ScriptedPrior()
    model = FastKLPPO("MlpPolicy", point_env(), **SMALL, prior=prior, guard=FEW)
    model.learn(1280)
    # after the first rollout, of 256 steps as all are, 8 envs play one episode of 16 steps each
    assert model.guard_state["prior_count"] == [8]
    assert model.guard_state["prior_steps"] == [128]
    assert model.num_timesteps == 128 + 5 * 256
    assert prior.queried == 128 + 5 * 256
    model.learn(256, reset_num_timesteps=False)
    assert model.num_timesteps == 128 + 6 * 256


def test_the_prior_takes_its_share_and_goes_on_in_the_next_training():
    guard = GuardSettings(episodes=20, probe_share=0.1)
    model = FastKLPPO("MlpPolicy", point_env(), **SMALL, prior=ScriptedPrior(), guard=guard)
    model.learn(1280)
    assert model.num_timesteps == 128 + 5 * 256  # a tenth, and no more
    assert model.guard_state["prior_count"] == [8]
    model.learn(2560, reset_num_timesteps=False)
    assert model.guard_state["prior_count"] == [24]


@pytest.mark.parametrize(("share", "played"), [(1.0, 24), (0.4, 16)])
def test_the_prior_plays_on_where_it_is_open_which_is_the_better(share, played):
    like_the_policy = ScriptedPrior(sign=0.0)
    guard = GuardSettings(episodes=8, most_episodes=24, probe_share=share)
    model = FastKLPPO("MlpPolicy", point_env(), **SMALL, prior=like_the_policy, guard=guard)
    model.learn(1280)
    assert model.guard_state["prior_count"] == [played]
    assert model.guard_state["prior_steps"] == [16 * played]  # 16 steps an episode: whole rounds, and no step beyond
    model.learn(512, reset_num_timesteps=False)
    assert model.guard_state["prior_count"] == [played]


def test_a_rollout_is_not_cut_by_the_episodes_of_the_prior():
    model = FastKLPPO("MlpPolicy", point_env(), **SMALL, prior=ScriptedPrior(), guard=FEW)
    model.learn(256)
    buffer = model.rollout_buffer
    assert model.num_timesteps == 256 + 128
    # episodes of the policy's own, of 16 steps, and at the start of new ones after those of the prior
    assert buffer.truncated.sum() == 256 // 16
    assert model._last_episode_starts.all()
    assert np.array_equal(model._last_obs[:, :2], model.env.get_attr("position"))


def imitation(sign, updates, guard=FEW):
    """Return the KL of the policy to the prior in states of the prior's episodes, before and after its first update."""
    prior = ScriptedPrior(sign=sign)
    model = FastKLPPO("MlpPolicy", point_env(), **{**SMALL, "n_epochs": updates}, prior=prior, kl_coef=0.0, guard=guard)
    model.set_logger(configure(None, []))
    states = torch.rand(64, 2) * 2 - 1
    said = prior.query(states, torch.zeros(64, dtype=torch.int64))

    def kl():
        with torch.no_grad():
            outputs, _ = model._head.forward(states)
            return model._head.prior_kl(outputs, model._head.prior_outputs(said)).mean().item()

    before = kl()
    model.learn(256, log_interval=1000)
    return before, kl(), model.logger.name_to_value.get("prior/imitation_kl")


def test_the_policy_imitates_a_prior_that_is_better_and_no_other():
    before, after, logged = imitation(1.0, 30)
    assert after < 0.3 * before
    assert logged < 0.3 * before
    for sign, guard in ((-1.0, FEW), (1.0, replace(FEW, imitate=False))):
        before, after, logged = imitation(sign, 30, guard)
        assert after > 0.7 * before  # of its own accord it comes a little nearer to a good one
        assert logged is None


def test_rows_to_imitate_wait_for_no_later_update():
    model = FastKLPPO("MlpPolicy", point_env(), **SMALL, prior=ScriptedPrior(), guard=FEW)
    model.learn(256)
    assert model._played is None
    model._played, model._dropped = model._new_buffer(4), True
    model.train()
    assert model._played is None


def test_rows_of_groups_whose_prior_is_better_are_imitated():
    guard = Guard(GuardSettings(), ["a", "b"], np.array([0, 0, 1]))
    for kept, values in ((guard.prior, ([3.0, 5.0], [0.0, 2.0])), (guard.policy, ([0.0, 2.0], [3.0, 5.0]))):
        for group, returns in enumerate(values):
            for value in returns:
                kept.add(group, value)
    assert guard.rows_to_imitate(torch.zeros(2, 3, dtype=torch.int64)).tolist() == [[True, True, False]] * 2
    guard.env_group = None
    assert guard.rows_to_imitate(torch.tensor([[0, 1, 1], [1, 0, 1]])).tolist() == [
        [True, False, False],
        [False, True, False],
    ]


def test_an_episode_counts_once_every_env_has_played_as_many():
    rounds = Rounds(2)
    rounds.add([(0, 3, 5.0)])
    assert rounds.complete() == []  # the short ones end first, and are the good ones where a success ends them
    rounds.add([(0, 3, 7.0), (1, 4, 1.0)])
    assert rounds.complete() == [(3, 5.0), (4, 1.0)]
    rounds.add([(1, 4, 2.0), (1, 4, 9.0)])
    assert rounds.complete() == [(3, 7.0), (4, 2.0)]
    assert rounds.complete() == []


def test_a_share_too_small_to_judge_is_said():
    model = FastKLPPO("MlpPolicy", point_env(), **SMALL, prior=ScriptedPrior(), guard=True)
    with pytest.warns(UserWarning, match="raise probe_share"):
        model.learn(256)


def test_the_same_seed_gives_the_same_weights():
    first, second = (
        FastKLPPO("MlpPolicy", point_env(), **SMALL, prior=ScriptedPrior(), guard=FEW).learn(1024) for _ in range(2)
    )
    assert first.guard_state == second.guard_state
    for a, b in zip(first.policy.parameters(), second.policy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_weight_of_nothing_is_no_prior_and_the_priors_trust_multiplies_it():
    class Doubtful(ScriptedPrior):
        def query(self, state, instruction_id):
            # of a step of its own episodes it is sure, of whole rollouts it is not
            trust = torch.full((len(state),), float(len(state) < SMALL["n_steps"]))
            return super().query(state, instruction_id)._replace(trust=trust)

    unsure = replace(FEW, sure=1e9, step=1e-3)
    model = FastKLPPO("MlpPolicy", point_env(), **SMALL, prior=Doubtful(), kl_coef=0.5, guard=unsure)
    model.set_logger(configure(None, []))
    model.learn(1024, log_interval=1000)
    assert unsure.least < model.guard_state["weights"][0] < 1
    assert model.logger.name_to_value["prior/trust"] < 1e-9
    assert model.logger.name_to_value["prior/guard_weight"] < 1e-9
    assert model.rollout_buffer.kl_weight.max() < 1e-9


def test_returns_that_are_sure_of_a_prior_outweigh_its_trust():
    guard = Guard(FEW, ["a", "b"], np.array([0, 1]))
    for group, returns in enumerate(([9.0, 9.1, 9.2, 9.3], [1.0, 5.0])):
        for value in returns:
            guard.prior.add(group, value)
    for group in (0, 1):
        for value in (1.0, 2.0):
            guard.policy.add(group, value)
    buffer = RolloutBuffer(1, 2, np.zeros(3, np.float32), (2,), torch.float32, (2, 2), torch.device("cpu"))
    buffer.trust, buffer.valid = torch.tensor([[0.5, 0.5]]), torch.ones(1, 2, dtype=torch.bool)
    guard.weigh(buffer, configure(None, []))
    assert guard.counted == [1.0, 0.0]
    assert buffer.kl_weight.tolist() == [[1.0, pytest.approx(0.5 * guard.weights[1])]]


def test_trust_is_measured_from_what_the_priors_own_episodes_reach():
    guard = Guard(FEW, ["a", "b", "c"], None)
    # squared distances 1 to 10 in the first group, of which 9 are nine tenths; only near ones in the second
    squared = torch.arange(1.0, 11.0)
    trust = torch.stack([((1 - squared) / 2).exp(), torch.ones(10), torch.zeros(10)], dim=1)
    ids = torch.tensor([0, 1, 2]).expand(10, 3)
    guard.learn_reach(trust, ids, torch.ones(10, 3, dtype=torch.bool))
    assert guard.reach == pytest.approx([9.0, 1.0, 150.0])
    asked = torch.tensor([[1.0, ((1 - 9.0) / 2), ((1 - 18.0) / 2)]]).exp().clamp(max=1)
    found = guard.trust_in(asked, torch.zeros(1, 3, dtype=torch.int64))
    torch.testing.assert_close(found, torch.tensor([[1.0, 1.0, math.exp(-0.5)]]))
    assert guard.trust_in(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64)).item() < 1e-3
    unseen = torch.tensor([[0.5]])
    torch.testing.assert_close(guard.trust_in(unseen, torch.tensor([[1]])), unseen)
    again = Guard(FEW, ["a", "b", "c"], None, guard.state)
    assert again.reach == guard.reach
    before = {name: column for name, column in guard.state.items() if name != "reach"}
    assert Guard(FEW, ["a", "b", "c"], None, before).reach == [1.0] * 3


def test_rows_that_did_not_happen_tell_nothing_of_the_reach():
    guard = Guard(FEW, ["a"], np.zeros(2, dtype=np.int64))
    trust, ids = torch.tensor([[0.1, 1.0]]), torch.zeros(1, 2, dtype=torch.int64)
    guard.learn_reach(trust, ids, torch.tensor([[False, True]]))
    assert guard.reach == [1.0]


def test_a_prior_is_trusted_where_its_own_episodes_lead():
    class Doubtful(ScriptedPrior):
        def query(self, state, instruction_id):
            return super().query(state, instruction_id)._replace(trust=torch.full((len(state),), 0.3))

    model = FastKLPPO("MlpPolicy", point_env(), **SMALL, prior=Doubtful(), kl_coef=0.5, guard=FEW)
    model.set_logger(configure(None, []))
    model.learn(1024, log_interval=1000)
    assert model.guard_state["reach"] == pytest.approx([1 - 2 * math.log(0.3)])
    assert model.logger.name_to_value["prior/trust"] == pytest.approx(1.0)
    assert model.logger.name_to_value["prior/guard_weight"] == pytest.approx(model.guard_state["weights"][0])


def test_without_a_guard_no_row_is_weighed():
    model = FastKLPPO("MlpPolicy", point_env(), **SMALL, prior=ScriptedPrior(), guard=False)
    model.learn(256)
    assert model.guard is None
    assert model.guard_state is None
    assert model.rollout_buffer.kl_weight is None
    assert next(model.rollout_buffer.get(64)).kl_weight is None


def test_minibatches_hold_the_weights_of_their_rows():
    buffer = buffer_of()
    buffer.kl_weight = torch.arange(64 * 8.0).reshape(64, 8)
    buffer.values[:] = buffer.kl_weight
    buffer.prior_outputs[1][:] = 7.0
    for reuse in (False, True):
        for batch in buffer.get(100, reuse=reuse):
            assert torch.equal(batch.kl_weight, batch.old_values)
            assert (batch.prior[1] == 7.0).all()


def test_it_survives_saving(tmp_path):
    prior = ScriptedPrior()
    model = FastKLPPO("MlpPolicy", point_env(), **SMALL, prior=prior, kl_coef=0.1, guard=FEW)
    model.learn(4 * 256)
    model.save(tmp_path / "model.zip")
    loaded = FastKLPPO.load(tmp_path / "model.zip", env=point_env(), device="cpu", prior=prior)
    assert settings_of(loaded.guard) == FEW
    assert loaded.guard_state == model.guard_state
    queried = prior.queried
    loaded.learn(256, reset_num_timesteps=False)
    assert prior.queried == queried + 256  # the prior does not play again
    assert loaded.guard_state["prior_mean"] == model.guard_state["prior_mean"]


@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
def test_an_env_without_returns_is_refused(kind):
    bare = PointEnv if kind == "gaussian" else DiscretePointEnv
    env = Named(DummyVecEnv([bare] * 2))
    model = FastKLPPO("MlpPolicy", env, **SMALL, prior=ScriptedPrior(kind), guard=FEW)
    with pytest.raises(errors.UnsupportedArgument, match="VecMonitor"):
        model.learn(1024)
    assert make_vec_env(bare, 2) is not None


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
