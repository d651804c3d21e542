"""A text game as an array lane, and a prior over text actions as a prior over numbers: what `FastKLPPO` trains on.

Texts become the numbers of an encoder, and the prior reads them back. Test: pytest tests/test_text_lane.py
"""

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor, nn

from lago_fast.algorithms.text_policy import STATE
from lago_fast.algorithms.text_states import PADDING, States, check_frozen, prior_answer
from lago_fast.envs.text_env import TextState, TextVecEnv
from lago_fast.envs.vec_env import ArrayReset, ArrayStep, ArrayVecEnv
from lago_fast.errors import PriorMismatch, UnsupportedArgument
from lago_fast.priors.base import Kind, PriorOutput, check_query
from lago_fast.priors.text_base import TextActionPrior, TextEncoder

INSTRUCTION = "the instruction is a part of the state"
MAX_ID = 2**31 - 1


class NumberedTexts:
    """States as rows of numbers [2 + A]: the ids of instruction, observation and admissible actions, then PADDING.

    Args:
        encoder: numbers the texts.
        max_actions: A.

    Raises:
        UnsupportedArgument: A is below 1.
    """

    def __init__(self, encoder: TextEncoder, max_actions: int) -> None:
        if max_actions < 1:
            raise UnsupportedArgument(f"max_actions={max_actions}: give at least 1")
        self.encoder, self.max_actions = encoder, max_actions
        self._texts: dict[int, str] = {}

    def number(self, state: TextState) -> np.ndarray:
        """Return rows [N, 2 + A] int64.

        Raises:
            UnsupportedArgument: a state has more than A actions.
        """
        rows = np.full((len(state.observation), STATE + self.max_actions), PADDING, np.int64)
        rows[:, 0], rows[:, 1] = self._ids(state.instruction), self._ids(state.observation)
        ids = self._ids([action for actions in state.admissible for action in actions])
        start = 0
        for row, actions in enumerate(state.admissible):
            if len(actions) > self.max_actions:
                raise UnsupportedArgument(
                    f"max_actions={self.max_actions}: a state has {len(actions)} admissible actions; give more"
                )
            rows[row, STATE : STATE + len(actions)] = ids[start : start + len(actions)]
            start += len(actions)
        return rows

    def _ids(self, texts: list[str]) -> np.ndarray:
        ids = self.encoder.ids(texts).numpy()
        self._texts.update(zip(ids.tolist(), texts, strict=True))
        return ids

    def read(self, rows: Tensor) -> States:
        """Return the texts of rows of numbers [B, 2 + A].

        Raises:
            PriorMismatch: a number that was not given out here.
        """
        try:
            texts = [[self._texts[number] for number in row if number != PADDING] for row in rows.tolist()]
        except KeyError as error:
            raise PriorMismatch(
                f"prior: no text was given the number {error} here; make the prior and the env from the same "
                "NumberedTexts"
            ) from error
        return States([t[0] for t in texts], [t[1] for t in texts], [tuple(t[STATE:]) for t in texts])


class TextLane(ArrayVecEnv):
    """The array lane of a text game; actions are indices into a state's admissible ones.

    Args:
        env: the games.
        texts: numbers their texts.
    """

    def __init__(self, env: TextVecEnv, texts: NumberedTexts) -> None:
        self.env, self.texts, self.num_envs = env, texts, env.num_envs
        self.state_dim = STATE + texts.max_actions
        self.observation_space = Box(PADDING, MAX_ID, (self.state_dim,), np.int64)
        self.action_space = Discrete(texts.max_actions)
        self.instructions, self.tasks = [INSTRUCTION], ["text"]
        self.task_id = np.zeros(self.num_envs, np.int64)
        self.instruction_id = np.zeros(self.num_envs, np.int64)
        self._seed: int | None = None
        self._choice: np.ndarray | None = None

    @property
    def encoder(self) -> TextEncoder:
        """Return what turns the numbers into vectors."""
        return self.texts.encoder

    def seed(self, seed: int) -> list[int]:
        """Decide all episodes from the next reset on; the games give each environment its own."""
        self._seed = seed
        return [seed] * self.num_envs

    def reset(self) -> ArrayReset:
        """Start a new episode everywhere; observations are int64."""
        seed, self._seed = self._seed, None
        return ArrayReset(self.texts.number(self.env.reset(seed)), self.instruction_id.copy())

    def send(self, actions: np.ndarray) -> None:
        """Take over the choices [N] of the next step."""
        self._choice = actions

    def recv(self) -> ArrayStep:
        """Play the step whose choices were sent."""
        assert self._choice is not None
        step, self._choice = self.env.step(self._choice), None
        return ArrayStep(
            self.texts.number(step.state),
            step.reward,
            step.reward.copy(),
            step.terminated,
            step.truncated,
            step.valid,
            step.success,
            self.instruction_id.copy(),
        )

    def describe_state(self, state: np.ndarray) -> str:
        """Return the texts of a state [2 + A]."""
        (instruction,), (observation,), (actions,) = self.texts.read(torch.from_numpy(state)[None])
        return f"{instruction} {observation} Actions: {', '.join(actions)}."

    def close(self) -> None:
        """Free the games."""
        self.env.close()


class NumberedPrior:
    """A prior over text actions, asked about rows of numbers.

    It answers with (1 - floor) p + floor / n over a state's n admissible actions: where the prior excludes an action
    (k completions name at most k), KL(policy || prior) would be infinite for every policy that can explore. With the
    floor it is at most log(n / floor) nats, at a temperature of 1 or more.

    Args:
        prior: frozen.
        texts: of the env's lane.
        floor: weight of the uniform distribution, from 0 to below 1; 0 leaves exclusions as they are.

    Raises:
        UnsupportedArgument: another floor.
        TrainablePrior: the prior has a parameter that requires a gradient.
    """

    kind: Kind = "categorical"

    def __init__(self, prior: TextActionPrior, texts: NumberedTexts, floor: float = 0.01) -> None:
        if not 0 <= floor < 1:
            raise UnsupportedArgument(f"prior_floor={floor}: give a number from 0 to below 1")
        check_frozen(prior)
        self.prior, self.texts, self.floor = prior, texts, floor
        self.state_dim, self.action_dim = STATE + texts.max_actions, texts.max_actions
        self.instructions = [INSTRUCTION]

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the prior's digest and the floor."""
        return hashlib.sha256(f"{self.prior.digest} {self.floor}".encode()).hexdigest()

    @torch.no_grad()
    def query(self, state: Tensor, instruction_id: Tensor) -> PriorOutput:
        """Answer for rows of numbers [B, 2 + A]; where no action is admissible, all weight is on the first column."""
        check_query(self, state, instruction_id)
        said = torch.full((len(state), self.action_dim), -torch.inf)
        over = (state[:, STATE] == PADDING).cpu()
        said[over, 0] = 0
        if not bool(over.all()):
            answer = prior_answer(self.prior, self.texts.read(state.cpu()[~over]))
            allowed = state.cpu()[~over, STATE : STATE + answer.shape[1]] != PADDING
            mixed = (1 - self.floor) * answer.exp() + self.floor / allowed.sum(dim=1, keepdim=True)
            padded = torch.full((len(answer), self.action_dim), -torch.inf)
            padded[:, : answer.shape[1]] = mixed.log().masked_fill(~allowed, -torch.inf)
            said[~over] = padded
        return PriorOutput(log_probs=said.to(state.device))

    def instruction_table(self) -> Tensor:
        """Return one vector of length 1: the instruction is a part of the state."""
        return torch.ones(1, 1)

    def telemetry(self) -> dict[str, float]:
        """Return the prior's figures."""
        return self.prior.telemetry()

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the prior's parameters."""
        return self.prior.parameters()
