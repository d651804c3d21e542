"""Text games: env steps per second with random choices, of games whose texts are made as they are played.

Run: pytest bench/bench_text_games.py --benchmark-only
"""

import time

import numpy as np
import pytest

from lago_fast import runs
from lago_fast.envs.frozen_lake import make_frozen_lake
from lago_fast.envs.overcooked import make_overcooked

GAMES = {
    "frozen-lake": make_frozen_lake,
    "overcooked": make_overcooked,
    "overcooked-memory": lambda num_envs: make_overcooked(num_envs, memory=True),
}


@pytest.mark.parametrize("num_envs", [8, 256])
@pytest.mark.parametrize("game", GAMES)
def test_random_choices(benchmark, game, num_envs):
    env, rng = GAMES[game](num_envs), np.random.default_rng(0)
    state, seconds, steps = env.reset(seed=0), 0.0, 0

    def step():
        nonlocal state, seconds, steps
        choice = (rng.random(num_envs) * [len(actions) for actions in state.admissible]).astype(np.int64)
        start = time.perf_counter()
        row = env.step(choice)
        seconds += time.perf_counter() - start
        steps += int(row.valid.sum())
        state = row.state

    benchmark(step)
    env.close()
    benchmark.extra_info.update(game=game, num_envs=num_envs, env_steps_per_s=steps / seconds, **runs.provenance())
