"""One text game by gymnasium's interface: `gymnasium.make("lago_fast/OvercookedText-v0")` and its neighbours.

They are registered when `lago_fast.envs` is imported; `gymnasium.make("lago_fast.envs:lago_fast/OvercookedText-v0")`
imports that itself. Tests: tests/envs/test_text_gym.py.
"""

import string
from importlib import import_module
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Dict, Discrete, Text

from lago_fast.envs.text_env import TextState, TextVecEnv
from lago_fast.errors import UnsupportedArgument

LONGEST = 20_000  # characters
MAX_ACTIONS = 100  # where the games do not say
_MAKERS = {
    "frozen-lake": ("frozen_lake", "make_frozen_lake"),
    "overcooked": ("overcooked", "make_overcooked"),
    "textworld": ("textworld", "make_textworld"),
    "alfworld": ("alfworld", "make_alfworld"),
}


class AdmissibleActions(Discrete):
    """Indices of which only the first `admissible` can be taken now; these alone are sampled."""

    admissible = 1

    def sample(self, mask: Any = None, probability: Any = None) -> Any:
        """Return one of the indices that can be taken now; `mask` and `probability` are Discrete's."""
        if mask is not None or probability is not None:
            return super().sample(mask=mask, probability=probability)
        return np.int64(self.np_random.integers(self.admissible))


class TextGameEnv(gym.Env[dict[str, Any], Any]):
    """One row of a text game; the observation holds the texts `instruction` and `observation`.

    An action is an index into `info["admissible"]`, a tuple of texts; `info["action_mask"]` is 1 for the indices that
    can be taken, and `info["success"]` tells whether the game was won.

    Args:
        game: "frozen-lake", "overcooked", "textworld", "alfworld".
        max_actions: size of the action space; None is the game's own largest number, or 100 where that is unknown.
        render_mode: None or "ansi", which renders the observation's text.
        settings: other keywords of the game's `make_...`.

    Raises:
        UnsupportedArgument: an unknown game or `render_mode`, or too small a `max_actions`.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 1}  # noqa: RUF012 - gymnasium's own form

    def __init__(
        self, game: str, *, max_actions: int | None = None, render_mode: str | None = None, **settings: Any
    ) -> None:
        if game not in _MAKERS:
            raise UnsupportedArgument(f"game={game!r}: give one of {', '.join(_MAKERS)}")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise UnsupportedArgument(f"render_mode={render_mode!r}: give None or 'ansi'")
        module, maker = _MAKERS[game]
        self.games: TextVecEnv = getattr(import_module(f"lago_fast.envs.{module}"), maker)(1, **settings)
        self.render_mode = render_mode
        size = max_actions or self.games.max_actions or MAX_ACTIONS
        text = Text(LONGEST, min_length=0, charset=string.printable)
        self.observation_space = Dict({"instruction": text, "observation": text})
        self.action_space = AdmissibleActions(size)
        self._state: TextState | None = None
        self._over = True

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode; there are no options."""
        if options:
            raise UnsupportedArgument(f"options={sorted(options)}: text games have none")
        super().reset(seed=seed)
        self._state, self._over = self.games.reset(seed), False
        return self._see(self._state, False)

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Take the admissible action with this index.

        Raises:
            ResetNeeded: the episode is over.
            UnsupportedArgument: there is no admissible action with this index.
        """
        if self._over:
            raise ResetNeeded("the episode is over, or none was started: call reset()")
        row = self.games.step(np.asarray(action)[None])
        terminated, truncated = bool(row.terminated[0]), bool(row.truncated[0])
        self._state, self._over = row.state, terminated or truncated
        observation, info = self._see(row.state, bool(row.success[0]))
        return observation, float(row.reward[0]), terminated, truncated, info

    def _see(self, state: TextState, success: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        admissible, space = state.admissible[0], self.action_space
        assert isinstance(space, AdmissibleActions)
        if len(admissible) > space.n:
            raise UnsupportedArgument(
                f"max_actions={space.n}: this state has {len(admissible)} actions; give that many"
            )
        space.admissible = max(len(admissible), 1)
        mask = (np.arange(space.n) < len(admissible)).astype(np.int8)
        observation = {"instruction": state.instruction[0], "observation": state.observation[0]}
        return observation, {"admissible": admissible, "action_mask": mask, "success": success}

    def render(self) -> str | None:
        """What is observed, as text, where the mode is "ansi"."""
        if self.render_mode is None or self._state is None:
            return None
        return f"{self._state.instruction[0]}\n{self._state.observation[0]}"

    def close(self) -> None:
        """Free the game; a second call does nothing."""
        self.games.close()
