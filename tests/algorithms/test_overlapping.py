"""The next rollout is collected while the policy is updated: by the policy of before, whole, the same every time."""

import threading

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecNormalize

from lago_fast import FastKLPPO, errors, make_metaworld
from lago_fast.algorithms.checkpoint import newest, paths_in
from lago_fast.algorithms.checkpoint_every import CheckpointEvery
from lago_fast.algorithms.guard import GuardSettings
from lago_fast.algorithms.kl_coefficient import LinearSchedule
from lago_fast.algorithms.overlapping import THREAD
from lago_fast.envs.sb3_adapter import SB3VecEnv
from tests.algorithms.array_points import ArrayPoints
from tests.algorithms.point_env import PointEnv, ScriptedPrior
from tests.algorithms.test_fast_kl_ppo import mean_return
from tests.algorithms.test_resume import Restart, assert_equal

OPTIONS = {"n_steps": 16, "batch_size": 32, "n_epochs": 2, "device": "cpu", "seed": 3, "overlap": "update"}
STEPS = 16 * 8  # rows of a rollout, of which some are invalid
LONG = 6 * STEPS


def points(num_envs=8):
    return SB3VecEnv(ArrayPoints(num_envs))


def model(env=None, **changes):
    return FastKLPPO("MlpPolicy", env or points(), **{**OPTIONS, **changes})


class Watch(BaseCallback):
    """Note what a callback sees, and the policy's parameters before each update."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.events, self.steps, self.before_update, self.rollouts = [], [], [], []
        self.running, self.callers = set(), set()  # names of threads
        self.stop_at = stop_at

    def _on_rollout_start(self):
        self.events.append("start")
        self.running |= {thread.name for thread in threading.enumerate()}

    def _on_step(self):
        self.callers.add(threading.current_thread().name)
        self.events.append("step")
        self.steps.append((self.num_timesteps, self.locals["new_obs"].copy()))
        return self.num_timesteps != self.stop_at and len(self.steps) != self.stop_at

    def _on_rollout_end(self):
        self.events.append("end")
        self.before_update.append({name: t.clone() for name, t in self.model.policy.state_dict().items()})
        buffer = self.locals["rollout_buffer"]
        assert buffer is self.model.rollout_buffer
        kept = (buffer.observations, buffer.actions, buffer.log_probs, buffer.values, buffer.next_values)
        self.rollouts.append([column.clone() for column in kept])


def watched(steps=LONG, **changes):
    watch, trained = Watch(), model(**changes)
    trained.learn(steps, callback=watch)
    return trained, watch


def test_a_rollout_is_of_the_policy_of_before_the_update_and_says_so():
    trained, watch = watched()
    assert len(watch.rollouts) > 4
    for k, (observations, actions, log_probs, values, next_values) in enumerate(watch.rollouts):
        acted = max(k - 1, 0)  # whose parameters
        trained.policy.load_state_dict(watch.before_update[acted])
        with torch.no_grad():
            seen = observations.flatten(0, 1)
            expected_values, expected, _ = trained.policy.evaluate_actions(seen, actions.flatten(0, 1))
        torch.testing.assert_close(log_probs.flatten(), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(values.flatten(), expected_values.flatten(), atol=1e-5, rtol=1e-5)
        # the row behind the last one is the first of the next rollout
        if k + 1 < len(watch.rollouts):
            with torch.no_grad():
                bootstrap = trained.policy.predict_values(watch.rollouts[k + 1][0][0]).flatten()
            torch.testing.assert_close(next_values[-1], bootstrap, atol=1e-5, rtol=1e-5)
    assert any(not torch.equal(watch.before_update[0][n], t) for n, t in watch.before_update[1].items())


def test_callbacks_see_every_step_in_order_in_their_own_thread():
    trained, watch = watched()
    assert watch.events == ["start", *["step"] * 16, "end"] * (len(watch.events) // 18)
    assert THREAD not in watch.running
    assert watch.callers == {threading.main_thread().name}
    counts = [count for count, _ in watch.steps]
    assert counts == sorted(counts)
    assert trained.num_timesteps == counts[-1]
    # what a step returned is what the policy sees at the next one
    for observations, *_ in watch.rollouts:
        assert observations.shape == (16, 8, 2)
    returned = np.stack([obs for _, obs in watch.steps])
    seen = np.concatenate([observations.numpy() for observations, *_ in watch.rollouts])
    np.testing.assert_array_equal(returned[:-1], seen[1:])
    assert THREAD not in {thread.name for thread in threading.enumerate()}


CASES = {
    "plain": {},
    "prior": {"prior": ScriptedPrior, "kl_coef": LinearSchedule(0.5, 0.1)},
    "auto": {"prior": ScriptedPrior, "kl_coef": "auto", "target_prior_kl": 0.01},
    "reward": {"prior": ScriptedPrior, "kl_placement": "reward"},
    "guard": {"prior": ScriptedPrior, "guard": GuardSettings(episodes=4, probe_share=0.5)},
    "warm start": {"prior": ScriptedPrior, "warm_start": True},
    "no native networks": {"impl": "reference"},
    "target_kl": {"target_kl": 1e-4},
    "no seed": {"seed": None},
}


def made(case, **changes):
    options = CASES[case]
    return model(**{**options, **({"prior": options["prior"]()} if "prior" in options else {}), **changes})


@pytest.mark.parametrize("case", CASES)
def test_the_same_seed_gives_the_same_weights_twice(case):
    runs = []
    for _ in range(2):
        torch.manual_seed(5)  # of the case that has no seed
        np.random.seed(5)  # noqa: NPY002
        runs.append(made(case).learn(LONG))
    assert_equal(*runs)
    assert runs[0].num_timesteps >= LONG


def test_the_first_rollout_and_update_are_those_without_overlap():
    ours, theirs = (model(overlap=overlap).learn(1) for overlap in ("update", "none"))
    assert_equal(ours, theirs)


def test_the_warm_start_is_followed_by_a_rollout_of_the_policy_that_it_made():
    trained, watch = watched(steps=2 * STEPS - 30, prior=ScriptedPrior(), warm_start=True)
    trained.policy.load_state_dict(watch.before_update[1])
    observations, actions, log_probs, *_ = watch.rollouts[1]
    with torch.no_grad():
        _, expected, _ = trained.policy.evaluate_actions(observations.flatten(0, 1), actions.flatten(0, 1))
    torch.testing.assert_close(log_probs.flatten(), expected, atol=1e-5, rtol=1e-5)


def test_it_is_declared_in_the_log_and_in_a_saved_model(tmp_path):
    trained = model()
    trained.set_logger(configure(None, []))
    trained.learn(2 * STEPS, log_interval=1000)
    assert trained.logger.name_to_value["rollout/updates_behind"] == 1
    assert trained.logger.name_to_value["time/overlapped_s"] > 0
    trained.save(tmp_path / "model.zip")
    loaded = FastKLPPO.load(tmp_path / "model.zip", env=points(), device="cpu")
    assert loaded.overlap == "update"
    loaded.learn(2 * STEPS)
    with pytest.raises(errors.UnsupportedArgument, match="overlap"):
        FastKLPPO.load(tmp_path / "model.zip", env=make_vec_env(PointEnv, 2), device="cpu").learn(1)


@pytest.mark.parametrize("overlap", ["none", "update"])
def test_learns_a_tiny_task(overlap):
    options = {"n_steps": 32, "batch_size": 64, "n_epochs": 4, "learning_rate": 3e-3, "seed": 0}
    trained = model(**options, overlap=overlap)
    before = mean_return(trained)
    trained.learn(12_000)
    assert mean_return(trained) > before + 3


def test_two_groups_of_native_envs_are_overlapped_too():
    runs = []
    for _ in range(2):
        env = make_metaworld(["reach"], 8, groups=2, max_episode_steps=5, normalize_reward=True)
        runs.append(model(env).learn(4 * STEPS))
        env.close()
    assert_equal(*runs)


# ---- what ends a run in between


class Fails(ArrayPoints):
    """Raises at a step."""

    def __init__(self, num_envs, at, error=None):
        super().__init__(num_envs)
        self.fails_at, self.error, self.taken = at, error or RuntimeError("the simulator broke"), 0

    def recv(self):
        self.taken += 1
        if self.taken == self.fails_at:
            raise self.error
        return super().recv()


def test_an_env_that_raises_ahead_is_named_where_it_is_read():
    watch = Watch()
    failing = model(SB3VecEnv(Fails(8, at=16 + 5)))
    with pytest.raises(RuntimeError, match="the simulator broke") as caught:
        failing.learn(LONG, callback=watch)
    assert "step 4 of iteration 1" in caught.value.__notes__[0]
    assert len(watch.steps) == 16 + 4
    assert failing._n_updates == 2  # the update beside it was whole
    assert THREAD not in {thread.name for thread in threading.enumerate()}


class NotFinite(ArrayPoints):
    """Says NaN once."""

    def __init__(self, num_envs, at):
        super().__init__(num_envs)
        self.fails_at, self.taken = at, 0

    def recv(self):
        self.taken += 1
        step = super().recv()
        if self.taken == self.fails_at:
            step.observation[3] = np.nan
        return step


@pytest.mark.parametrize("on_nan", ["raise", "skip"])
def test_nan_ahead_is_named_and_leaves_the_normaliser_as_it_was(on_nan):
    env = SB3VecEnv(NotFinite(8, at=16 + 5))
    trained = model(env, on_nan=on_nan)
    if on_nan == "skip":
        trained.learn(LONG)
        assert all(torch.isfinite(p).all() for p in trained.policy.parameters())
        return
    with pytest.raises(errors.NonFiniteError, match="observation of env 3 at step 5"):
        trained.learn(LONG)
    assert env.array_lane.normalizer.count[0] < 1 + STEPS  # of the first rollout alone
    trained.learn(STEPS, reset_num_timesteps=False)  # new episodes


class Broken(Exception):
    pass


def test_an_update_that_fails_waits_for_the_rollout_and_the_run_goes_on_where_the_envs_are():
    env = points()
    trained, whole = model(env), FastKLPPO._update

    def fails(self):
        if self._n_updates == 4:
            raise Broken
        whole(self)

    trained._update = fails.__get__(trained)
    with pytest.raises(Broken):
        trained.learn(LONG)
    assert THREAD not in {thread.name for thread in threading.enumerate()}
    trained._update = whole.__get__(trained)
    watch = Watch()
    trained.learn(1, callback=watch, reset_num_timesteps=False)
    first = watch.rollouts[0][0]
    np.testing.assert_array_equal(watch.steps[0][1], first[1].numpy())


def test_a_callback_that_stops_in_the_middle_leaves_the_envs_where_they_are():
    env = points()
    trained = model(env)
    trained.learn(LONG, callback=Watch(stop_at=16 + 7))
    np.testing.assert_array_equal(trained._last_obs, env.array_lane.at)
    trained.learn(2 * STEPS, reset_num_timesteps=False)


def test_torch_has_its_threads_back():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        seen = []
        trained, whole = model(), FastKLPPO._update

        def noted(self):
            seen.append(torch.get_num_threads())
            whole(self)

        trained._update = noted.__get__(trained)
        trained.learn(2 * STEPS)
        assert torch.get_num_threads() == 4
        assert seen[0] == 2  # a rollout goes on beside
        assert seen[-1] == 4  # none follows
    finally:
        torch.set_num_threads(before)


# ---- checkpoints


@pytest.mark.parametrize("case", ["plain", "prior", "guard"])
def test_a_resumed_run_is_one_that_was_not_stopped(case, tmp_path):
    at, last = 3, LONG
    expected = made(case)
    expected.learn(last, callback=[CheckpointEvery(tmp_path / "all", 1, keep=10), Restart(at, points)])
    resumed = made(case)
    resumed.restore(next(path for path in paths_in(tmp_path / "all") if f"{at}." in path.name))
    assert resumed.overlap == "update"
    resumed.learn(last - resumed.num_timesteps, reset_num_timesteps=False)
    assert_equal(resumed, expected)


def test_the_arguments_in_a_checkpoint_say_overlap(tmp_path):
    model().learn(STEPS, callback=CheckpointEvery(tmp_path / "c"))
    assert newest(tmp_path / "c")[1].figures["arguments"]["given"]["overlap"] == "update"
    resumed = FastKLPPO.resume(tmp_path / "c", points(), device="cpu")
    assert resumed.overlap == "update"
    resumed.learn(2 * STEPS, reset_num_timesteps=False)


# ---- refusals


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"overlap": "both"}, "choose 'none' or 'update'"),
        ({"use_sde": True}, "without use_sde"),
        ({"env": make_vec_env(PointEnv, 2)}, "no array lane"),
        ({"env": VecNormalize(points())}, "no array lane"),
    ],
)
def test_what_cannot_be_overlapped_is_refused(arguments, match):
    with pytest.raises(errors.UnsupportedArgument, match=match) as caught:
        model(**arguments)
    assert str(caught.value).startswith("overlap")


def test_an_env_without_an_array_lane_is_refused_when_it_is_taken():
    trained = model().learn(STEPS)
    trained.set_env(make_vec_env(PointEnv, 8))
    with pytest.raises(errors.UnsupportedArgument, match="no array lane"):
        trained.learn(STEPS, reset_num_timesteps=False)


@pytest.mark.gpu
def test_on_a_gpu_the_same_seed_gives_the_same_weights_twice():
    assert_equal(*(model(device="cuda").learn(LONG) for _ in range(2)))
