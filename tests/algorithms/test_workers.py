"""An env that raises, hangs or dies ends training with an error that names it, within the time allowed."""

import os
import signal
import threading
import time

import gymnasium as gym
import pytest
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from stable_baselines3.common.callbacks import EvalCallback, EveryNTimesteps
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecMonitor

from lago_fast import FastKLPPO, errors
from tests.algorithms.point_env import PointEnv

OPTIONS = {"n_steps": 8, "batch_size": 8, "n_epochs": 1, "device": "cpu", "seed": 0}


class Failing(PointEnv):
    """Fails in its own way at the fifth step."""

    def __init__(self, how=None):
        self.how = how

    def step(self, action):
        if self.t == 4:
            if self.how == "raises":
                raise ZeroDivisionError("the wheel fell off")
            if self.how == "hangs":
                time.sleep(120)
            if self.how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "leaves":
                os._exit(3)
        return super().step(action)


def makers(how):
    return [lambda: Failing(), lambda: Failing(how), lambda: Failing()]


def sb3(how):
    return VecMonitor(SubprocVecEnv(makers(how), start_method="fork"))


class Mine(SubprocVecEnv):
    """As a user derives one."""


def derived(how):
    return Mine(makers(how), start_method="fork")


def gymnasium_async(how):
    return AsyncVectorEnv(makers(how), context="fork")


@pytest.mark.parametrize("vector_env", [sb3, derived, gymnasium_async])
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("hangs", r"env 1 \(process \d+\) has not answered for 1 s and was ended; .*step_timeout_s"),
        ("dies", r"env 1 \(process \d+\) was ended by signal 9"),
        ("leaves", r"env 1 \(process \d+\) ended with exit code 3"),
    ],
)
def test_a_process_that_hangs_or_dies_is_named(vector_env, how, says):
    model = FastKLPPO("MlpPolicy", vector_env(how), **OPTIONS, step_timeout_s=1.0)
    started = time.monotonic()
    with pytest.raises(errors.EnvironmentFailed, match=says):
        model.learn(64)
    assert time.monotonic() - started < 30  # and it waits for nothing when it is thrown away
    close_by_force(model)


@pytest.mark.parametrize(
    "vector_env", [lambda how: VecMonitor(DummyVecEnv(makers(how))), lambda how: SyncVectorEnv(makers(how))]
)
def test_an_env_that_hangs_in_this_process_is_named(vector_env):
    before = signal.getsignal(signal.SIGALRM)
    model = FastKLPPO("MlpPolicy", vector_env("hangs"), **OPTIONS, step_timeout_s=0.5)
    started = time.monotonic()
    with pytest.raises(
        errors.EnvironmentFailed, match=r"env 1 does not answer, 1\.5 s after the first of 3 .* was ended"
    ):
        model.learn(64)
    assert time.monotonic() - started < 30
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_an_alarm_of_the_users_is_left_alone_and_so_are_other_threads():
    def train():
        FastKLPPO("MlpPolicy", DummyVecEnv([PointEnv]), **OPTIONS, step_timeout_s=1e-9).learn(16)

    def mine(*_):
        pass

    signal.signal(signal.SIGALRM, mine)
    try:
        train()
        assert signal.getsignal(signal.SIGALRM) is mine
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 1000.0)
    try:
        train()
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 900
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()


@pytest.mark.filterwarnings("ignore:Training and eval env are not of the same type")
@pytest.mark.parametrize("vector_env", [sb3, lambda how: VecMonitor(DummyVecEnv(makers(how)))])
def test_an_env_that_hangs_while_it_evaluates_is_named(vector_env):
    evaluation = EvalCallback(vector_env("hangs"), eval_freq=1, n_eval_episodes=30, verbose=0)
    model = FastKLPPO("MlpPolicy", DummyVecEnv([PointEnv]), **OPTIONS, step_timeout_s=0.5)
    with pytest.raises(
        errors.EnvironmentFailed, match=r"env 1 (.*has not answered for 0\.5 s|does not answer, 1\.5 s after)"
    ):
        model.learn(64, callback=[EveryNTimesteps(1, evaluation)])


def test_a_process_whose_env_raises_is_named_by_its_end():
    model = FastKLPPO("MlpPolicy", sb3("raises"), **OPTIONS)
    with pytest.raises(errors.EnvironmentFailed, match=r"env 1 \(process \d+\) ended with exit code 1"):
        model.learn(64)
    close_by_force(model)


@pytest.mark.filterwarnings("ignore::UserWarning")  # as which gymnasium logs the worker's traceback
@pytest.mark.parametrize(
    "vector_env",
    [
        gymnasium_async,
        lambda how: SyncVectorEnv(makers(how)),
        lambda how: VecMonitor(DummyVecEnv(makers(how))),
    ],
)
def test_an_exception_keeps_its_type_and_gets_a_note(vector_env):
    model = FastKLPPO("MlpPolicy", vector_env("raises"), **OPTIONS)
    with pytest.raises(ZeroDivisionError, match="wheel") as raised:
        model.learn(64)
    assert raised.value.__notes__ == ["raised by env 1 at step 4 of iteration 0"]
    close_by_force(model)


def test_an_env_that_is_slow_at_its_reset_is_waited_for_so_long_too():
    class Slow(PointEnv):
        def reset(self, *, seed=None, options=None):
            time.sleep(0.0 if seed is None else 60.0)
            return super().reset(seed=seed, options=options)

    model = FastKLPPO("MlpPolicy", SubprocVecEnv([Slow], start_method="fork"), **OPTIONS, step_timeout_s=0.5)
    with pytest.raises(errors.EnvironmentFailed, match=r"env 0 .* has not answered for 0\.5 s"):
        model.learn(8)
    close_by_force(model)


def test_sound_processes_train_as_ever_and_can_be_closed():
    for env in (SubprocVecEnv([PointEnv] * 2, start_method="fork"), AsyncVectorEnv([PointEnv] * 2, context="fork")):
        model = FastKLPPO("MlpPolicy", env, **OPTIONS).learn(32)
        model.learn(32, reset_num_timesteps=False)  # watched once, not twice
        model.get_env().close()
    with pytest.raises(errors.UnsupportedArgument, match="step_timeout_s=0"):
        FastKLPPO("MlpPolicy", gym.make("CartPole-v1"), **OPTIONS, step_timeout_s=0).learn(8)


def close_by_force(model):
    """End what is left of the processes; closing would talk to the dead one."""
    env = model.get_env()
    while hasattr(env, "venv") or hasattr(env, "env"):
        env = getattr(env, "venv", None) or env.env
        if hasattr(env, "processes"):
            break
    for process in getattr(env, "processes", ()):
        process.kill()
        process.join()
    env.closed = True
