"""A text game whose rules fit in a table, with an encoder and priors that know nothing of language."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lago_fast.envs.text_env import TextState, TextStep, TextVecEnv, check_choice
from lago_fast.priors.text_base import check_admissible, padding_mask

INSTRUCTION = "find the treasure"
END = ""
# place -> action -> (next place, reward); END is terminal
RULES = {
    "hall": {"go left": ("cellar", 0.0), "go right": ("tower", 0.0), "wait": ("hall", 0.0)},
    "cellar": {"open the box": (END, 0.3), "go back": ("hall", 0.0)},
    "tower": {"shout": ("tower", -0.1), "climb": ("roof", 0.0), "go back": ("hall", 0.0)},
    "roof": {"jump": ("hall", 0.0), "take the treasure": (END, 1.0)},
}
START, GAMMA = "hall", 0.9


def action_values(allowed: Callable[[str, str], bool] = lambda *_: True) -> dict[str, dict[str, float]]:
    """Return Q* of RULES by value iteration over the allowed actions."""
    value = dict.fromkeys([*RULES, END], 0.0)
    for _ in range(200):
        q = {s: {a: r + GAMMA * value[after] for a, (after, r) in RULES[s].items() if allowed(s, a)} for s in RULES}
        value |= {s: max(q[s].values()) for s in RULES}
    return q


def state_of(places: Sequence[str]) -> TextState:
    return TextState([INSTRUCTION] * len(places), list(places), [tuple(RULES[p]) if p != END else () for p in places])


class TableGame(TextVecEnv):
    """RULES in `num_envs` copies; an episode starts anywhere in `starts`, drawn by the seed."""

    def __init__(
        self, num_envs: int, limit: int = 8, starts: Sequence[str] = (START,), known_width: bool = True
    ) -> None:
        self.num_envs, self.limit, self.starts = num_envs, limit, list(starts)
        self.max_actions = max(map(len, RULES.values())) if known_width else None
        self.taken: list[tuple[str, str]] = []

    def reset(self, seed: int | None = None) -> TextState:
        self._rng = np.random.default_rng(seed)
        self._place = [self._start() for _ in range(self.num_envs)]
        self._length, self._over = np.zeros(self.num_envs, dtype=np.int64), np.zeros(self.num_envs, dtype=bool)
        return state_of(self._place)

    def _start(self) -> str:
        return self.starts[self._rng.integers(len(self.starts))]

    def step(self, choice: np.ndarray) -> TextStep:
        n = self.num_envs
        check_choice(choice, state_of(self._place).admissible, ~self._over)
        reward, terminated = np.zeros(n, dtype=np.float32), np.zeros(n, dtype=bool)
        valid = ~self._over
        for row in range(n):
            if self._over[row]:
                self._place[row], self._length[row] = self._start(), 0
                continue
            action = list(RULES[self._place[row]])[choice[row]]
            self.taken.append((self._place[row], action))
            self._place[row], reward[row] = RULES[self._place[row]][action]
            terminated[row] = self._place[row] == END
            self._length[row] += 1
        truncated = valid & ~terminated & (self._length >= self.limit)
        self._over = terminated | truncated
        return TextStep(state_of(self._place), reward, terminated, truncated, valid, terminated & (reward == 1))

    def close(self) -> None:
        pass


class FakeEncoder:
    """Gives each text a random vector of length 1, by its hash."""

    width = 24

    def __init__(self, salt: str = "") -> None:
        self.digest = f"encoder {salt}"
        self._ids: dict[str, int] = {}
        self._rows: list[Tensor] = []

    def encode(self, texts: Sequence[str]) -> Tensor:
        return self.rows(self.ids(texts))

    def ids(self, texts: Sequence[str]) -> Tensor:
        for text in texts:
            if text not in self._ids:
                self._ids[text] = len(self._rows)
                seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
                row = torch.randn(self.width, generator=torch.Generator().manual_seed(seed))
                self._rows.append(row / row.norm())
        return torch.tensor([self._ids[text] for text in texts], dtype=torch.int64)

    def rows(self, ids: Tensor) -> Tensor:
        return torch.stack(self._rows)[ids]


class FakePrior:
    """Answers with weights of (observation, action), normalised over the admissible ones."""

    def __init__(self, weight: Callable[[str, str], float], salt: str = "", **more: Any) -> None:
        self.digest, self.queries = f"prior {salt}", 0
        self._weight, self._parameters = weight, more.get("parameters", [])
        if "k" in more:
            self.k = more["k"]

    def query(
        self, instruction: Sequence[str], observation: Sequence[str], admissible: Sequence[Sequence[str]]
    ) -> Tensor:
        check_admissible(admissible)
        self.queries += len(instruction)
        weights = torch.zeros(padding_mask(admissible).shape)
        for row, (seen, actions) in enumerate(zip(observation, admissible, strict=True)):
            weights[row, : len(actions)] = torch.tensor([self._weight(seen, action) for action in actions])
        return (weights / weights.sum(dim=1, keepdim=True)).log()

    def telemetry(self) -> dict[str, float]:
        queries, self.queries = self.queries, 0
        return {"prior/queries": float(queries)}

    def parameters(self) -> Iterable[nn.Parameter]:
        return self._parameters


UNIFORM = FakePrior(lambda *_: 1.0, "uniform")
