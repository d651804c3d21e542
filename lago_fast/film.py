"""One episode as a film, with the instruction below it.

Test: pytest tests/test_film.py
"""

from pathlib import Path

import numpy as np

from lago_fast.envs.clevr_drawing import caption, write_film
from lago_fast.envs.suites import suite_named
from lago_fast.evaluate import Act, View, rows_for
from lago_fast.presets import EnvSettings

LAST_FRAMES = 5  # how often the last picture is shown


def film_episode(
    act: Act, settings: EnvSettings, task: str, path: Path, *, seed: int, instruction_table: np.ndarray | None = None
) -> bool:
    """Play one episode of a task, write it as a GIF or MP4, and return whether it succeeded.

    Args:
        act: maps what is seen to actions.
        settings: environment and horizon.
        task: which of the tasks whose words are known.
        path: of the film; its ending decides the format.
        seed: of the simulator.
        instruction_table: [M, Z], as `evaluate` takes it.

    Raises:
        UnsupportedArgument: the environment cannot be drawn, or another ending.
        MissingExtra: what writes films is not installed.
    """
    suite = suite_named(settings.env)
    env = suite.make(
        [task],
        1,
        seed=seed,
        max_episode_steps=settings.max_episode_steps,
        instruction_table=rows_for(settings, suite.instructions([task]), instruction_table),
    )
    try:
        observation, instruction_id = env.reset()
        text = env.instructions[instruction_id[0]]
        frames, success, over = [suite.draw(env, 0)], False, False
        while not over:
            step = env.step(act(View(observation, observation[:, : env.state_dim], instruction_id, env)))
            frames.append(suite.draw(env, 0))
            success, over = success or bool(step.success[0]), bool(step.terminated[0] | step.truncated[0])
            observation, instruction_id = step.observation, step.instruction_id
    finally:
        env.close()
    outcome = f"{text} [{'reached' if success else 'not reached'} after {len(frames) - 1} steps]"
    write_film(path, [caption(frame, outcome) for frame in frames + frames[-1:] * LAST_FRAMES])
    return success
