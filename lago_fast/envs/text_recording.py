"""Playing text games to learn from: experts, noisy experts, and episodes of any actor as transitions.

Tests: tests/envs/test_text_recording.py.
"""

from collections.abc import Callable

import numpy as np

from lago_fast.envs.text_env import TextState, TextStep, TextVecEnv
from lago_fast.envs.text_games import TextGames
from lago_fast.envs.text_transitions import TextTransitions, check_transitions
from lago_fast.errors import UnsupportedArgument

Actor = Callable[[TextState], np.ndarray]  # from what is seen to choices [N] int64


def make_text_expert(env: TextVecEnv, epsilon: float = 0.0, seed: int = 0) -> Actor:
    """Return the scripted expert of `env`, which with probability `epsilon` takes a random admissible action.

    Frozen Lake's expert walks a shortest way, Overcooked's knows the whole kitchen, TextWorld's and ALFWorld's follow
    a plan that wins from where they are. With `epsilon` 1 it is the random actor.

    Raises:
        UnsupportedArgument: an `epsilon` outside of 0 to 1, or games that have no expert.
    """
    if not 0 <= epsilon <= 1:
        raise UnsupportedArgument(f"epsilon={epsilon}: give a probability, 0 to 1")
    if not isinstance(env, TextGames):
        raise UnsupportedArgument(f"env: {type(env).__name__} has no expert; give one of the package's text games")
    rng = np.random.default_rng(seed)

    def act(state: TextState) -> np.ndarray:
        counts = np.array([max(len(actions), 1) for actions in state.admissible])
        random = rng.integers(counts)
        noisy = rng.random(len(counts)) < epsilon
        return random if noisy.all() else np.where(noisy, random, env.expert())

    return act


def record_text_episodes(env: TextVecEnv, actor: Actor, episodes: int, seed: int) -> TextTransitions:
    """Play `episodes` whole episodes and return their transitions.

    All rows play equally many, and the first ones are kept row by row: an episode's length does not decide whether it
    is among them.

    Args:
        env: the games; reset with `seed`, and left in the middle of an episode.
        actor: chooses for all rows at once; its choices for rows whose episode is over are ignored.
        episodes: how many.
        seed: of the games.

    Raises:
        UnsupportedArgument: no episodes, or a choice that is not admissible.
    """
    if episodes < 1:
        raise UnsupportedArgument(f"episodes={episodes}: give 1 or more")
    rounds = -(-episodes // env.num_envs)
    done: list[list[TextTransitions]] = [[] for _ in range(env.num_envs)]
    open_rows = [_Rows() for _ in range(env.num_envs)]
    state = env.reset(seed)
    while min(map(len, done)) < rounds:
        choice = np.asarray(actor(state), np.int64)
        step = env.step(choice)
        for row in np.flatnonzero(step.valid).tolist():
            open_rows[row].add(row, state, int(choice[row]), step)
            if step.terminated[row] or step.truncated[row]:
                done[row].append(open_rows[row].episode())
                open_rows[row] = _Rows()
        state = step.state
    kept = [done[row][number] for number in range(rounds) for row in range(env.num_envs)][:episodes]
    transitions = join_episodes(kept)
    check_transitions(transitions)
    return transitions


class _Rows:
    """The transitions of one episode so far."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, tuple[str, ...]]] = []
        self.came: list[tuple[str, tuple[str, ...]]] = []
        self.numbers: list[tuple[int, float, bool, bool, bool]] = []

    def add(self, row: int, state: TextState, choice: int, step: TextStep) -> None:
        self.seen.append((state.instruction[row], state.observation[row], state.admissible[row]))
        self.came.append((step.state.observation[row], step.state.admissible[row]))
        flags = (bool(flag[row]) for flag in (step.terminated, step.truncated, step.success))
        self.numbers.append((choice, float(step.reward[row]), *flags))  # type: ignore[arg-type]

    def episode(self) -> TextTransitions:
        instruction, observation, admissible = zip(*self.seen, strict=True)
        next_observation, next_admissible = zip(*self.came, strict=True)
        choice, reward, terminated, truncated, success = zip(*self.numbers, strict=True)
        return TextTransitions(
            instruction=list(instruction),
            observation=list(observation),
            admissible=list(admissible),
            choice=np.array(choice, np.int64),
            reward=np.array(reward, np.float32),
            next_observation=list(next_observation),
            next_admissible=list(next_admissible),
            terminated=np.array(terminated, bool),
            truncated=np.array(truncated, bool),
            episode_id=np.zeros(len(choice), np.int64),
            success=np.array([any(success)]),
        )


def join_episodes(parts: list[TextTransitions]) -> TextTransitions:
    """Return all parts as one, with their episodes numbered on."""
    firsts = np.cumsum([0, *(len(part.success) for part in parts[:-1])])
    return TextTransitions(
        instruction=[text for part in parts for text in part.instruction],
        observation=[text for part in parts for text in part.observation],
        admissible=[actions for part in parts for actions in part.admissible],
        choice=np.concatenate([part.choice for part in parts]),
        reward=np.concatenate([part.reward for part in parts]),
        next_observation=[text for part in parts for text in part.next_observation],
        next_admissible=[actions for part in parts for actions in part.next_admissible],
        terminated=np.concatenate([part.terminated for part in parts]),
        truncated=np.concatenate([part.truncated for part in parts]),
        episode_id=np.concatenate([part.episode_id + first for part, first in zip(parts, firsts, strict=True)]),
        success=np.concatenate([part.success for part in parts]),
    )
