"""A run that is resumed is the run that was never stopped: bit for bit, on a CPU with one thread."""

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from lago_fast import FastKLPPO, errors
from lago_fast.algorithms.checkpoint import newest, paths_in, write_tensors
from lago_fast.algorithms.checkpoint_every import CheckpointEvery
from lago_fast.algorithms.guard import GuardSettings
from lago_fast.algorithms.kl_coefficient import LinearSchedule
from lago_fast.algorithms.progress_log import progress_logger
from lago_fast.algorithms.stage_clock import STAGES
from tests.algorithms.point_env import DiscretePointEnv, PointEnv, ScriptedPrior

OPTIONS = {"n_steps": 24, "batch_size": 32, "n_epochs": 2, "device": "cpu", "seed": 3}
STEPS = 24 * 4  # of an iteration
LAST, STOPPED = 6, 4


def point_env(env=PointEnv):
    return make_vec_env(env, n_envs=4)


class Restart(BaseCallback):
    """Build the envs anew before an iteration, in a run that is not stopped."""

    def __init__(self, at, build):
        super().__init__()
        self.at, self.build = at, build

    def _on_step(self):
        return True

    def _on_rollout_start(self):
        if self.model.iterations == self.at:
            self.model.restart_envs(self.build)


class Killed(Exception):
    pass


class Kill(BaseCallback):
    """End the run in the middle of an iteration."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def _on_step(self):
        if self.model.iterations == self.at and self.n_calls % 24 == 7:
            raise Killed
        return True


CASES = {
    "plain": (point_env, {}),
    "discrete": (lambda: point_env(DiscretePointEnv), {}),
    "prior": (point_env, {"prior": ScriptedPrior, "kl_coef": LinearSchedule(0.5, 0.1)}),
    "auto": (point_env, {"prior": ScriptedPrior, "kl_coef": "auto", "target_prior_kl": 0.01}),
    # the prior plays its episodes before the checkpoint, or four of 40 of them
    "guard": (point_env, {"prior": ScriptedPrior, "guard": GuardSettings(episodes=4, probe_share=0.5)}),
    "guard, cut": (point_env, {"prior": ScriptedPrior, "guard": GuardSettings(episodes=40, probe_share=0.15)}),
    "reward": (point_env, {"prior": ScriptedPrior, "kl_placement": "reward", "kl_coef": LinearSchedule(0.5)}),
    "VecNormalize": (lambda: VecNormalize(point_env(), clip_obs=5.0), {}),
    "gSDE": (point_env, {"use_sde": True, "sde_sample_freq": 4}),
    "AdamW": (point_env, {"policy_kwargs": {"optimizer_class": torch.optim.AdamW}}),
    "schedules": (point_env, {"learning_rate": LinearSchedule(3e-3, 1e-4), "clip_range": LinearSchedule(0.3, 0.1)}),
    "no hidden layer": (point_env, {"policy_kwargs": {"net_arch": []}, "clip_range_vf": 0.2}),
}


def make(case, build=None):
    make_env, options = CASES[case]
    prior = options["prior"]() if "prior" in options else None
    return FastKLPPO("MlpPolicy", (build or make_env)(), **OPTIONS, **{**options, "prior": prior})


def assert_equal(got, expected):
    for name, tensor in expected.policy.state_dict().items():
        assert torch.equal(got.policy.state_dict()[name], tensor), name
    ours, theirs = (m.policy.optimizer.state_dict()["state"] for m in (got, expected))
    for i, state in theirs.items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(ours[i][name]), torch.as_tensor(value)), (i, name)
    for name in ("num_timesteps", "iterations", "_n_updates", "auto_kl_coef"):
        assert getattr(got, name) == getattr(expected, name), name
    assert np.random.random() == pytest.approx(np.random.random(), abs=1)  # noqa: NPY002
    assert [e["r"] for e in got.ep_info_buffer] == [e["r"] for e in expected.ep_info_buffer]


def stopped_in_the_middle(case, folder):
    """Run until the middle of iteration STOPPED + 1, with checkpoints at every second one."""
    model = make(case)
    with pytest.raises(Killed):
        model.learn(LAST * STEPS, callback=[CheckpointEvery(folder, 2), Kill(STOPPED + 1)])
    return model


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_one_that_was_not_stopped(case, tmp_path):
    make_env, options = CASES[case]
    reference = make(case).learn(LAST * STEPS, callback=Restart(STOPPED, make_env))
    stopped_in_the_middle(case, tmp_path)
    prior = options["prior"]() if "prior" in options else None
    classes = {"policy_kwargs": options["policy_kwargs"]} if case == "AdamW" else {}
    torch.manual_seed(99)
    resumed = FastKLPPO.resume(tmp_path, make_env(), prior=prior, device="cpu", **classes)
    assert resumed.iterations == STOPPED
    resumed.learn(LAST * STEPS - resumed.num_timesteps, reset_num_timesteps=False)
    assert_equal(resumed, reference)


def test_without_the_restart_it_is_another_run(tmp_path):
    # the equality above is not one of runs that do not depend on their envs
    reference = make("plain").learn(LAST * STEPS)
    stopped_in_the_middle("plain", tmp_path)
    resumed = FastKLPPO.resume(tmp_path, point_env(), device="cpu")
    resumed.learn(LAST * STEPS - resumed.num_timesteps, reset_num_timesteps=False)
    weights = [model.policy.action_net.weight for model in (resumed, reference)]
    assert not torch.equal(*weights)


def test_checkpoints_come_before_the_first_iteration_after_every_few_and_at_the_end(tmp_path):
    model = make("plain").learn(5 * STEPS, callback=CheckpointEvery(tmp_path, 2, keep=10))
    assert [int(path.stem[-8:]) for path in paths_in(tmp_path)] == [0, 2, 4, 5]
    model.learn(STEPS, reset_num_timesteps=False, callback=CheckpointEvery(tmp_path, 2))
    assert [int(path.stem[-8:]) for path in paths_in(tmp_path)] == [4, 5, 6]


def test_the_log_goes_on_in_one_piece(tmp_path):
    def rows(folder, model, steps, kill=None, **options):
        model.set_logger(progress_logger(folder, ["csv", "tensorboard"], since=model.num_timesteps))
        callbacks = [CheckpointEvery(folder / "checkpoints", 2), *([Kill(kill)] if kill else [])]
        try:
            model.learn(steps, callback=[*callbacks, Restart(STOPPED, point_env)], log_interval=1, **options)
        except Killed:
            assert kill
        model.logger.close()
        return np.genfromtxt(folder / "progress.csv", delimiter=",", names=True)

    reference = rows(tmp_path / "one", make("plain"), LAST * STEPS)
    # rows until iteration 6, whose last checkpoint is that of iteration 4
    cut = rows(tmp_path / "two", make("plain"), 2 * LAST * STEPS, kill=STOPPED + 1)
    assert len(cut) == STOPPED + 1
    model = FastKLPPO.resume(tmp_path / "two" / "checkpoints", point_env(), device="cpu")
    whole = rows(tmp_path / "two", model, LAST * STEPS - model.num_timesteps, reset_num_timesteps=False)
    assert whole["timeiterations"].tolist() == list(range(1, LAST + 1))
    assert (np.diff(whole["timetime_elapsed"]) >= 0).all()
    clocks = {"timefps", *(f"time{stage}_s" for stage in STAGES), "timetime_elapsed"}
    for name in set(reference.dtype.names) - clocks:
        np.testing.assert_array_equal(whole[name], reference[name], err_msg=name)


def test_what_a_checkpoint_cannot_hold_is_asked_for(tmp_path):
    make("AdamW").learn(1, callback=CheckpointEvery(tmp_path / "a"))
    with pytest.raises(errors.UnsupportedArgument, match=r"policy_kwargs: .*resume"):
        FastKLPPO.resume(tmp_path / "a", point_env(), device="cpu")
    model = FastKLPPO("MlpPolicy", point_env(), **OPTIONS, learning_rate=lambda remaining: 1e-3 * remaining)
    model.learn(1, callback=CheckpointEvery(tmp_path / "b"))
    with pytest.raises(errors.UnsupportedArgument, match="learning_rate"):
        FastKLPPO.resume(tmp_path / "b", point_env(), device="cpu")


def test_what_does_not_fit_is_refused(tmp_path):
    make("prior").learn(1, callback=CheckpointEvery(tmp_path / "prior"))
    for prior in (None, ScriptedPrior(digest="other")):
        with pytest.raises(errors.PriorMismatch, match="scripted"):
            FastKLPPO.resume(tmp_path / "prior", point_env(), prior=prior, device="cpu")
    make("plain").learn(1, callback=CheckpointEvery(tmp_path / "plain"))
    wide = FastKLPPO("MlpPolicy", point_env(), **OPTIONS, policy_kwargs={"net_arch": [8]})
    with pytest.raises(errors.UnsupportedArgument, match="another policy"):
        wide.restore(tmp_path / "plain")
    with pytest.raises(errors.UnsupportedArgument, match="normalise"):
        FastKLPPO.resume(tmp_path / "plain", VecNormalize(point_env()), device="cpu")
    with pytest.raises(errors.RunExists, match="another run"):
        make("plain").learn(1, callback=CheckpointEvery(tmp_path / "plain"))
    for arguments in ({"iterations": 0}, {"keep": 0}):
        with pytest.raises(errors.UnsupportedArgument, match="at least 1"):
            CheckpointEvery(tmp_path, **arguments)


def test_another_algorithm_is_refused(tmp_path):
    from stable_baselines3 import PPO

    model = PPO("MlpPolicy", point_env(), n_steps=8, batch_size=8, device="cpu")
    with pytest.raises(errors.UnsupportedArgument, match="not PPO"):
        model.learn(8, callback=CheckpointEvery(tmp_path))


def test_envs_may_draw_from_the_global_generators(tmp_path):
    class Drawing(PointEnv):
        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed, options=options)
            self.position = np.random.uniform(-1, 1, 2).astype(np.float32)  # noqa: NPY002
            return self.position.copy(), {}

    def build():
        return DummyVecEnv([Drawing] * 4)

    reference = make("plain", build).learn(3 * STEPS, callback=Restart(2, build))
    make("plain", build).learn(2 * STEPS, callback=CheckpointEvery(tmp_path))
    resumed = make("plain", build)
    resumed.restore(tmp_path)
    resumed.learn(STEPS, reset_num_timesteps=False)
    # what is left of the schedules differs by the budget: the optimiser's rate is constant here
    assert_equal(resumed, reference)


def test_a_callbacks_own_state_comes_back(tmp_path):
    class Counting(BaseCallback):
        seen = 0

        def _on_step(self):
            self.seen += 1
            return True

        def kept(self):
            return {"seen": self.seen}

    counting = Counting()
    model = make("plain")
    model.learn(STEPS, callback=[counting, CheckpointEvery(tmp_path, also={"counting": counting})])
    assert make("plain").restore(tmp_path) == {"counting": {"seen": 24}}


@pytest.mark.parametrize(
    "change",
    [
        lambda figures: figures.clear(),
        lambda figures: figures.update(arguments={"given": {"n_steps": 10**15}, "lacking": []}),
        lambda figures: figures["arguments"]["given"].update(tensorboard_log="/somewhere"),
        lambda figures: figures["arguments"]["given"].update(kl_coef={"LinearSchedule": [1, 2, 3, 4]}),
        lambda figures: figures.pop("optimizer"),
        lambda figures: figures.update(random=[[3, [1], None], [0]]),
        lambda figures: figures.update(episodes=7),
        lambda figures: figures.update(optimizer={"groups": [], "scalars": {"x": 1}}),
    ],
)
def test_a_checkpoint_that_someone_else_made_is_refused_by_a_typed_error(tmp_path, change):
    make("plain").learn(1, callback=CheckpointEvery(tmp_path))
    path, state = newest(tmp_path)
    change(state.figures)
    write_tensors(path, *state)
    with pytest.raises((errors.CorruptFile, errors.UnsupportedArgument)):
        FastKLPPO.resume(tmp_path, point_env(), device="cpu")


def test_a_run_that_is_taken_back_goes_on_from_there(tmp_path, caplog):
    options = {"n_steps": 8, "batch_size": 32, "n_epochs": 1, "device": "cpu", "seed": 0}
    model = FastKLPPO("MlpPolicy", point_env(), **options)
    model.learn(32 * 6, callback=CheckpointEvery(tmp_path, 1, keep=3))
    back = FastKLPPO.resume(tmp_path / "iteration_00000004.safetensors", point_env(), device="cpu", learning_rate=1e-4)
    back.learn(32, callback=CheckpointEvery(tmp_path, 1, keep=1), reset_num_timesteps=False)
    assert "iteration_00000006.safetensors.aside" in caplog.text
    again = FastKLPPO.resume(tmp_path, point_env(), device="cpu")
    assert (again.iterations, again.learning_rate) == (5, 1e-4)
