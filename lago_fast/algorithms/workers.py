"""Environments that raise, hang or die: the error names the one, and nothing waits forever.

Vector envs with a process per env talk through pipes (Stable-Baselines3's SubprocVecEnv, gymnasium's AsyncVectorEnv);
the trainer's end of each pipe is replaced by one that waits for so long and knows its env. Where envs run in the
trainer's own process, one that raises is named by a note on its exception, and one that hangs is ended by an alarm: in
the main thread, as long as the program has no alarms of its own, and unless it hangs within native code.
Test: pytest tests/algorithms/test_workers.py
"""

import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from types import FrameType, TracebackType
from typing import Any

from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EventCallback
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from lago_fast.errors import EnvironmentFailed, UnsupportedArgument

STEP_TIMEOUT_S = 600.0  # no env of ours takes minutes for a step; one that loads a large scene at reset may
PIPES = ((SubprocVecEnv, "remotes"), (AsyncVectorEnv, "parent_pipes"))  # where each keeps the trainer's ends
LOOPS = ((DummyVecEnv, "env_idx"), (SyncVectorEnv, "i"))  # the name by which each counts its envs
CALLS = ("step_wait", "step", "reset")  # that loop over them


class WatchedPipe:
    """The trainer's end of the pipe to one env's process.

    Args:
        pipe: a `multiprocessing` connection.
        process: the env's.
        env: its index.
        timeout_s: longest wait for an answer; None: forever.
    """

    def __init__(self, pipe: Any, process: Any, env: int, timeout_s: float | None) -> None:
        self.pipe, self.process, self.env, self.timeout_s = pipe, process, env, timeout_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)

    def send(self, message: Any) -> None:
        """Send, or raise EnvironmentFailed."""
        try:
            self.pipe.send(message)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._died() from error

    def recv(self) -> Any:
        """Return the answer, or raise EnvironmentFailed when none comes."""
        try:
            # a dead process need not close the pipe: a sibling forked after it holds the other end too
            ready = wait([self.pipe, self.process.sentinel], self.timeout_s)
            if not ready:
                self.process.kill()  # so that closing the vector env does not wait for it either
                raise EnvironmentFailed(
                    f"env: env {self.env} (process {self.process.pid}) has not answered for {self.timeout_s:g} s and "
                    "was ended; mend the env, or allow more with step_timeout_s"
                )
            if not self.pipe.poll():
                raise self._died()
            return self.pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            raise self._died() from error

    def _died(self) -> EnvironmentFailed:
        self.process.join(1.0)
        code = self.process.exitcode
        how = f"was ended by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        return EnvironmentFailed(
            f"env: env {self.env} (process {self.process.pid}) {how}; what it printed stands above: mend the env"
        )


class WatchedCall:
    """A method of a vector env whose envs run in this process.

    Args:
        call: the method, which asks one env after the other.
        envs: how many.
        timeout_s: for each; after so long for all of them an alarm ends it.
    """

    def __init__(self, call: Callable[..., Any], envs: int, timeout_s: float) -> None:
        self.call, self.envs, self.timeout_s = call, envs, timeout_s

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the method returns, or raise EnvironmentFailed when it takes longer."""
        in_main = threading.current_thread() is threading.main_thread()
        if not in_main or signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL or any(_alarm()):
            return self.call(*args, **kwargs)
        signal.signal(signal.SIGALRM, self._end)
        # and again and again: an env may catch what the first alarm raises
        signal.setitimer(signal.ITIMER_REAL, self.envs * self.timeout_s, self.timeout_s)
        try:
            return self.call(*args, **kwargs)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def _end(self, number: int, frame: FrameType | None) -> None:
        del number
        found = _looped_over(_frames_above(frame))[:1]
        raise EnvironmentFailed(
            f"env: {f'env {found[0]}' if found else 'one'} does not answer, {self.envs * self.timeout_s:g} s after the "
            f"first of {self.envs} was asked, and was ended; mend the env, or allow each more with step_timeout_s"
        )


def watch(env: VecEnv, timeout_s: float | None) -> None:
    """Give every pipe of a vector env a longest wait, and every step and reset of one without pipes.

    Raises:
        UnsupportedArgument: the time is not above 0.
    """
    if timeout_s is not None and not timeout_s > 0:
        raise UnsupportedArgument(f"step_timeout_s={timeout_s}: give seconds above 0, or None to wait forever")
    inner: Any = list(layers(env))[-1]
    name = _of_kind(inner, PIPES)
    if name is None:
        _watch_calls(inner, timeout_s)
        return
    pipes = [pipe.pipe if isinstance(pipe, WatchedPipe) else pipe for pipe in getattr(inner, name)]
    watched = zip(pipes, inner.processes, range(len(pipes)), strict=True)
    setattr(inner, name, [None if p is None else WatchedPipe(p, process, i, timeout_s) for p, process, i in watched])


def watch_evaluations(callback: BaseCallback, timeout_s: float | None) -> None:
    """Do as `watch` with the env of every callback that has one to evaluate in, `EvalCallback`'s."""
    within = list(callback.callbacks) if isinstance(callback, CallbackList) else []
    if isinstance(callback, EventCallback) and callback.callback is not None:
        within.append(callback.callback)
    for inner in within:
        watch_evaluations(inner, timeout_s)
    env = getattr(callback, "eval_env", None)
    if isinstance(env, VecEnv):
        watch(env, timeout_s)


def name_env(error: Exception, env: VecEnv, step: int, iteration: int) -> None:
    """Add a note to an exception that says which env raised it, at which step [0..n_steps) of which iteration."""
    failed = _failed_pipes(list(layers(env))[-1]) or _looped_over(_frames_of(error.__traceback__))[-1:]
    who = f"by env {failed[0]} " if failed else ""
    error.add_note(f"raised {who}at step {step} of iteration {iteration}")


def layers(env: Any) -> Iterator[VecEnv | VectorEnv[Any, Any, Any]]:
    """Yield a vector env and, from the outside in, every vector env that it wraps."""
    yield env
    inner = getattr(env, "venv", None) or getattr(env, "env", None)
    if isinstance(inner, VecEnv | VectorEnv):
        yield from layers(inner)


def _of_kind(thing: Any, named: tuple[tuple[type, str], ...]) -> str | None:
    """Return the name beside the kind that a thing is of; subclasses are of it too."""
    return next((name for kind, name in named if isinstance(thing, kind)), None)


def _failed_pipes(env: Any) -> list[int]:
    """Return the envs whose pipe gymnasium has closed."""
    return [i for i, pipe in enumerate(getattr(env, "parent_pipes", ())) if pipe is None]


def _watch_calls(env: Any, timeout_s: float | None) -> None:
    if _of_kind(env, LOOPS) is None or not hasattr(signal, "SIGALRM"):
        return
    for name in CALLS:
        call = getattr(env, name, None)
        plain = call.call if isinstance(call, WatchedCall) else call
        # SB3's step calls step_wait
        if plain is None or (name == "step" and hasattr(env, "step_wait")):
            continue
        setattr(env, name, plain if timeout_s is None else WatchedCall(plain, env.num_envs, timeout_s))


def _alarm() -> tuple[float, float]:
    """Return the seconds to the next alarm and between later ones, 0 for none."""
    return signal.getitimer(signal.ITIMER_REAL)


def _looped_over(frames: Iterator[FrameType]) -> list[int]:
    """Return the envs that vector envs were stepping in this process in these frames."""
    found = []
    for frame in frames:
        names = frame.f_locals
        counter = _of_kind(names.get("self"), LOOPS)
        if counter in names:
            found.append(int(names[counter]))
    return found


def _frames_of(trace: TracebackType | None) -> Iterator[FrameType]:
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def _frames_above(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
