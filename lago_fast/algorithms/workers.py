"""Environments that raise, hang or die: the error names the one, and nothing waits forever.

Vector envs with a process per env talk through pipes (Stable-Baselines3's SubprocVecEnv, gymnasium's AsyncVectorEnv);
the trainer's end of each pipe is replaced by one that waits for so long and knows its env. Where envs run in the
trainer's own process, one that raises is named by a note on its exception; one that hangs there cannot be ended.
Test: pytest tests/algorithms/test_workers.py
"""

from multiprocessing.connection import wait
from types import TracebackType
from typing import Any

from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from lago_fast.errors import EnvironmentFailed, UnsupportedArgument

STEP_TIMEOUT_S = 600.0  # no env of ours takes minutes for a step; one that loads a large scene at reset may
PIPES = ((SubprocVecEnv, "remotes"), (AsyncVectorEnv, "parent_pipes"))  # where each keeps the trainer's ends
LOOPS = ((DummyVecEnv, "env_idx"), (SyncVectorEnv, "i"))  # the name by which each counts its envs


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


def watch(env: VecEnv, timeout_s: float | None) -> None:
    """Give every pipe of a vector env a longest wait; envs without pipes are left as they are.

    Raises:
        UnsupportedArgument: the time is not above 0.
    """
    if timeout_s is not None and not timeout_s > 0:
        raise UnsupportedArgument(f"step_timeout_s={timeout_s}: give seconds above 0, or None to wait forever")
    inner: Any = innermost(env)
    name = _of_kind(inner, PIPES)
    if name is None:
        return
    pipes = [pipe.pipe if isinstance(pipe, WatchedPipe) else pipe for pipe in getattr(inner, name)]
    watched = zip(pipes, inner.processes, range(len(pipes)), strict=True)
    setattr(inner, name, [None if p is None else WatchedPipe(p, process, i, timeout_s) for p, process, i in watched])


def name_env(error: Exception, env: VecEnv, step: int, iteration: int) -> None:
    """Add a note to an exception that says which env raised it, at which step [0..n_steps) of which iteration."""
    failed = _failed_pipes(innermost(env)) or _looped_over(error.__traceback__)
    who = f"by env {failed[0]} " if failed else ""
    error.add_note(f"raised {who}at step {step} of iteration {iteration}")


def innermost(env: Any) -> VecEnv | VectorEnv[Any, Any, Any]:
    """Return the vector env below all wrappers."""
    while True:
        inner = getattr(env, "venv", None) or getattr(env, "env", None)
        if not isinstance(inner, VecEnv | VectorEnv):
            return env
        env = inner


def _of_kind(thing: Any, named: tuple[tuple[type, str], ...]) -> str | None:
    """Return the name beside the kind that a thing is of; subclasses are of it too."""
    return next((name for kind, name in named if isinstance(thing, kind)), None)


def _failed_pipes(env: Any) -> list[int]:
    """Return the envs whose pipe gymnasium has closed."""
    return [i for i, pipe in enumerate(getattr(env, "parent_pipes", ())) if pipe is None]


def _looped_over(trace: TracebackType | None) -> list[int]:
    """Return the env that a vector env was stepping in this process when the exception came."""
    found = []
    while trace is not None:
        names = trace.tb_frame.f_locals
        counter = _of_kind(names.get("self"), LOOPS)
        if counter in names:
            found = [int(names[counter])]
        trace = trace.tb_next
    return found
