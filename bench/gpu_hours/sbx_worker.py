"""sbx's PPO as a worker (`bench.gpu_hours.worker`), for an interpreter that has sbx-rl and this package."""

from typing import Any

from sbx import PPO

from bench.gpu_hours.rungs import make_env
from bench.gpu_hours.work import Work
from bench.gpu_hours.worker import serve


def make(work: Work) -> Any:
    """Return sbx's PPO on the native env."""
    keywords = work.ppo()
    del keywords["device"]  # JAX places its arrays itself
    return PPO("MlpPolicy", make_env(work), **keywords)


if __name__ == "__main__":
    serve(make)
