"""One CLEVR-Robot environment by gymnasium's interface: `gymnasium.make("lago_fast/ClevrRobot-v0")`.

It is registered when `lago_fast.envs` is imported; `gymnasium.make("lago_fast.envs:lago_fast/ClevrRobot-v0")`
imports that itself. Tests: tests/envs/test_clevr_gym.py.
"""

import string
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Box, Dict, Text

from lago_fast.envs.clevr_goals import NUM_BALLS, split_families
from lago_fast.envs.clevr_observations import IMAGE_SIZE
from lago_fast.envs.clevr_robot import ClevrRobotArrayEnv
from lago_fast.errors import UnsupportedArgument

Observation = np.ndarray | dict[str, Any]
RENDER_SIZE = 256


class ClevrRobotEnv(gym.Env[Observation, Any]):
    """A family of CLEVR-Robot as a gymnasium environment; `info["instruction"]` says what is to be done.

    `info` also holds `success` and `instruction_id`. `reset(options={"ball_xy": xy})`, [5, 2] in metres, starts with
    the balls there, at rest. Images are [64, 64, 3] in [0, 1].

    Args:
        split: "real", "rephrase", "easy", or a list of one family such as ["gather"].
        text: the observation is a dictionary of `observation` and `instruction`, a string.
        render_mode: None or "rgb_array".
        settings: other keywords of `ClevrRobotArrayEnv`.

    Raises:
        UnsupportedArgument: a split of several families, or another `render_mode`.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 5}  # noqa: RUF012 - gymnasium's own form

    def __init__(
        self,
        split: str | Sequence[str] = "real",
        *,
        text: bool = False,
        render_mode: str | None = None,
        **settings: Any,
    ) -> None:
        families = split_families(split)
        if len(families) > 1:
            raise UnsupportedArgument(f"split={split!r}: one environment has one family; give {families[:1]!r}")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise UnsupportedArgument(f"render_mode={render_mode!r}: give None or 'rgb_array'")
        self.render_mode, self._text = render_mode, text
        self.array_lane = ClevrRobotArrayEnv(families, 1, **settings)
        self.action_space = self.array_lane.action_space
        seen = self.array_lane.observation_space
        self._is_image = settings.get("observation") == "image" and settings.get("instruction_table") is None
        if self._is_image:
            seen = Box(0.0, 1.0, (IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
        longest = max(len(instruction) for instruction in self.array_lane.instructions)
        instruction = Text(longest, charset=string.ascii_letters + string.punctuation + " ")
        self.observation_space = Dict({"observation": seen, "instruction": instruction}) if text else seen
        self._over = True

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode.

        Raises:
            NonFiniteError, UnsupportedArgument: `options` that are no scene.
        """
        super().reset(seed=seed)
        if seed is not None:
            self.array_lane.seed(seed)
        first = self.array_lane.reset()
        observation = first.observation
        if options:
            observation = self._place(options)
        self._over = False
        return self._see(observation), self._info(int(first.instruction_id[0]), False)

    def _place(self, options: dict[str, Any]) -> np.ndarray:
        if set(options) != {"ball_xy"}:
            raise UnsupportedArgument(f"options={sorted(options)}: only 'ball_xy' is known")
        ball_xy = np.asarray(options["ball_xy"], np.float64)
        if ball_xy.shape != (NUM_BALLS, 2):
            raise UnsupportedArgument(f"options: ball_xy has shape {ball_xy.shape}; expected {(NUM_BALLS, 2)}")
        qpos, qvel = self.array_lane.physics.initial_state(ball_xy[None])
        return self.array_lane.set_state(np.zeros(1, np.int64), qpos, qvel)

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Step with one action of `action_space`.

        Raises:
            ResetNeeded: the episode is over.
        """
        if self._over:
            raise ResetNeeded("the episode is over, or none was started: call reset()")
        row = self.array_lane.step(np.asarray(action)[None])
        terminated, truncated = bool(row.terminated[0]), bool(row.truncated[0])
        self._over = terminated or truncated
        info = self._info(int(row.instruction_id[0]), bool(row.success[0]))
        return self._see(row.observation), float(row.reward[0]), terminated, truncated, info

    def render(self) -> np.ndarray | None:
        """An image [256, 256, 3] uint8 from above, where the mode is "rgb_array"."""
        return None if self.render_mode is None else self.array_lane.render(size=RENDER_SIZE)[0]

    def close(self) -> None:
        """Free the simulator; a second call does nothing."""
        self.array_lane.close()

    def _see(self, observation: np.ndarray) -> Observation:
        seen = observation[0].reshape(IMAGE_SIZE, IMAGE_SIZE, 3) if self._is_image else observation[0]
        if not self._text:
            return seen
        instruction = self.array_lane.instructions[int(self.array_lane.instruction_id[0])]
        return {"observation": seen, "instruction": instruction}

    def _info(self, instruction_id: int, success: bool) -> dict[str, Any]:
        instruction = self.array_lane.instructions[instruction_id]
        return {"instruction": instruction, "instruction_id": instruction_id, "success": success}
