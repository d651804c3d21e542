"""The fixed work of the text-game experiment: what protocol.md names, as data, and the games, priors and recordings.

Test: pytest tests/bench/test_llm_priors.py
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lago_fast.algorithms.posterior_sampler import PosteriorSampler
from lago_fast.envs.frozen_lake import make_frozen_lake
from lago_fast.envs.overcooked import make_overcooked
from lago_fast.envs.story_games import StoryGames
from lago_fast.envs.text_env import TextState, TextVecEnv
from lago_fast.envs.text_games import TextGames
from lago_fast.envs.text_recording import make_text_expert, record_text_episodes
from lago_fast.envs.text_transitions import TextTransitions, take_episodes
from lago_fast.envs.textworld import make_textworld
from lago_fast.envs.textworld_games import generate
from lago_fast.priors.cached_text_prior import CachedTextPrior
from lago_fast.priors.embed_fit import fit_embed_prior
from lago_fast.priors.embed_prior import EmbedPrior
from lago_fast.priors.text_base import TextActionPrior
from lago_fast.priors.text_embedder import TextEmbedder

SEEDS = (6, 7, 8, 9, 10)
ENVS = 16
ZERO_SHOT, TRANSFER, FITTED = "zero_shot", "transfer", "fitted"
PRIORS = (ZERO_SHOT, TRANSFER, FITTED)
# with the walkthroughs, 0.08 of the data are less than a tenth
FRACTIONS = (0.01, 0.03, 0.08, 0.3, 1.0)
SAMPLING_FRACTION = 0.08  # the data of the Q that posterior sampling is shown with
DRAWS = (1, 2, 5, 10, None)  # None: the whole answer of the prior
EVAL_SEED, WALK_SEED, DATA_SEED = 900_000, 10_000, 20_000  # apart from the seeds of training
OTHER_GAMES, OTHER_COUNT = 5_000, 10  # numbers of the games that "transfer" is fitted to, from here on, and how many
TEMPERATURE = 0.1  # of a head fitted to walkthroughs: to a handful of them it is surer than it should be
NOISE = 0.5  # share of random actions in the offline data


@dataclass(frozen=True)
class Budget:
    """Of one game; `smoke` shrinks it."""

    value_steps: int  # env steps of DQN and DQN-Prior
    policy_steps: int  # of the policies
    evaluations: int  # of a training run, evenly spaced
    episodes: int  # of an evaluation
    data_episodes: int  # of the full offline data
    offline_updates: int


@dataclass(frozen=True)
class Game:
    """A game, what a seed means there, and which walkthroughs fit its priors.

    Args:
        make: (seed, environments, folder) -> the games of a seed.
        walkthroughs: that the prior "fitted" is fitted to.
        held_out: share of them that says when to stop fitting; 0 where each shows a game that no other shows.
        max_actions: A of the policies.
        offline: whether it is part of the offline comparison.
        priors: of PRIORS.
    """

    make: Callable[[int, int, Path], TextGames]
    walkthroughs: int
    held_out: float
    max_actions: int
    budget: Budget
    offline: bool = True
    priors: tuple[str, ...] = (ZERO_SHOT, FITTED)


def _textworld(seed: int, envs: int, folder: Path) -> TextGames:
    # two games of its own for each seed
    return _stories([2 * seed + i for i in range(2)], seed, envs, folder)


def _stories(numbers: Sequence[int], seed: int, envs: int, folder: Path) -> TextGames:
    files = [generate("easy", number, folder / "games") for number in numbers]
    return make_textworld(envs, files, answers=False, horizon=20, seed=seed)


def _overcooked(seed: int, envs: int, folder: Path) -> TextGames:
    del folder
    return make_overcooked(envs, "tomato-lettuce-salad", seed=seed)


def _frozen_lake(seed: int, envs: int, folder: Path) -> TextGames:
    del folder
    return make_frozen_lake(envs, "4x4", seed=seed)


GAMES = {
    "textworld": Game(_textworld, 2, 0.0, 48, Budget(3_000, 10_000, 30, 48, 300, 1_500), priors=PRIORS),
    "overcooked": Game(_overcooked, 10, 0.2, 8, Budget(20_000, 32_000, 20, 48, 300, 2_000)),
    "frozen_lake": Game(_frozen_lake, 10, 0.2, 4, Budget(6_000, 12_000, 12, 48, 0, 0), offline=False),
}
SMOKE = Budget(200, 200, 2, 4, 20, 20)

DQN = {
    "learning_rate": 5e-4,
    "batch_size": 128,
    "gradient_steps": 16,
    "learning_starts": 100,
    "buffer_size": 20_000,
    "exploration_fraction": 0.5,
    "alpha": 0.02,
    "gamma": 0.95,
    "k": 5,
}
CQL = {"learning_rate": 1e-3, "batch_size": 128, "cql_coef": 1.0, "alpha": 0.02, "gamma": 0.95, "k": 5}
PPO = {"n_steps": 64, "batch_size": 128, "n_epochs": 6, "learning_rate": 1e-3, "ent_coef": 0.01}
# falls from one to the other until half of the steps are spent
KL_COEF = {"loss": (0.3, 0.01), "reward": (0.1, 0.005), "both": (0.3, 0.01)}


@cache
def embedder(folder: Path) -> TextEmbedder:
    """Return the encoder of this process; processes share the file of vectors."""
    return TextEmbedder(path=folder / "texts.mdb", long_texts="cut")


@cache
def games(name: str, seed: int, envs: int, folder: Path, use: str) -> TextGames:
    """Return the games of a seed; `use` tells those apart that are played at the same time.

    What one of them has seen of a story the others of this process need not ask its interpreter again.
    """
    made = GAMES[name].make(seed, envs, folder)
    if use != "train" and isinstance(made, StoryGames):
        made.share(games(name, seed, envs, folder, "train"))
    return made


class Counted:
    """A prior whose questions are counted, all of them and those that were new, while `counting`.

    The prior beneath is behind the exact cache; what an evaluation asks is not counted.
    """

    def __init__(self, prior: TextActionPrior) -> None:
        self.prior, self.counting = prior, True
        self.asked = 0
        self._seen: set[tuple[str, str, tuple[str, ...]]] = set()

    @property
    def first_sightings(self) -> int:
        """Return the number of distinct questions: what an exact cache asks."""
        return len(self._seen)

    @property
    def digest(self) -> str:
        return self.prior.digest

    def query(
        self, instruction: Sequence[str], observation: Sequence[str], admissible: Sequence[Sequence[str]]
    ) -> Tensor:
        if self.counting:
            self.asked += len(instruction)
            self._seen.update(zip(instruction, observation, map(tuple, admissible), strict=True))
        return self.prior.query(instruction, observation, admissible)

    def telemetry(self) -> dict[str, float]:
        return self.prior.telemetry()

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.prior.parameters()


@dataclass(frozen=True)
class Made:
    """A prior and the transitions that were spent on it."""

    prior: Counted
    walkthrough_steps: int


def make_prior(kind: str, name: str, seed: int, folder: Path) -> Made:
    """Return a prior of one of PRIORS for a game, its cache and its counts new."""
    prior = fitted(kind, name, seed, folder)
    return Made(Counted(CachedTextPrior(prior)), prior.metrics["steps"])


@cache
def fitted(kind: str, name: str, seed: int, folder: Path) -> EmbedPrior:
    """Return a prior by likeness, the same one in every run."""
    embeds = embedder(folder)
    if kind == ZERO_SHOT:
        return EmbedPrior(embeds)
    walked = walkthroughs(name, seed, folder) if kind == FITTED else walkthroughs_of_others(seed, folder)
    held_out = GAMES[name].held_out if kind == FITTED else 0.0
    exact = fit_embed_prior(embeds, walked, val_fraction=held_out, seed=seed)
    prior = EmbedPrior(embeds, temperature=TEMPERATURE, head=exact.head)
    prior.metrics = exact.metrics
    return prior


def walkthroughs(name: str, seed: int, folder: Path) -> TextTransitions:
    """Return episodes of the scripted expert, each of another game where a seed has several."""
    env, count = games(name, seed, ENVS, folder, "record"), GAMES[name].walkthroughs
    played = record(env, 4 * ENVS, 0.0, WALK_SEED + seed)
    return _one_of_each(played, count) if name == "textworld" else take_episodes(played, range(count))


@cache
def walkthroughs_of_others(seed: int, folder: Path) -> TextTransitions:
    """Return one walkthrough of each of OTHER_COUNT TextWorld games that are not those of any seed."""
    numbers = range(OTHER_GAMES + OTHER_COUNT * seed, OTHER_GAMES + OTHER_COUNT * (seed + 1))
    return _one_of_each(record(_stories(numbers, seed, ENVS, folder), 16 * ENVS, 0.0, WALK_SEED + seed), OTHER_COUNT)


def _one_of_each(played: TextTransitions, count: int) -> TextTransitions:
    """Return the first episode of each game, in the order of their texts, so that it is the same in every run."""
    first: dict[str, int] = {}
    for episode in range(len(played.success)):
        first.setdefault(played.instruction[int(np.flatnonzero(played.episode_id == episode)[0])], episode)
    return take_episodes(played, [first[text] for text in sorted(first)][:count])


def together(one: TextTransitions, other: TextTransitions) -> TextTransitions:
    """Return the episodes of both."""
    other = other._replace(episode_id=other.episode_id + len(one.success))
    columns = zip(one, other, strict=True)
    return TextTransitions(*(np.concatenate(c) if isinstance(c[0], np.ndarray) else [*c[0], *c[1]] for c in columns))


def record(env: TextGames, episodes: int, noise: float, seed: int) -> TextTransitions:
    """Return episodes of the expert that takes a random action with probability `noise`."""
    return record_text_episodes(env, make_text_expert(env, noise, seed), episodes, seed)


def no_values(state: TextState) -> Tensor:
    """Return a Q that knows nothing [N, A]."""
    return torch.zeros(len(state.observation), max(map(len, state.admissible)))


def prior_alone(prior: TextActionPrior | None, seed: int) -> PosteriorSampler:
    """Return what draws from a prior, or uniformly without one."""
    return PosteriorSampler(prior, no_values, k=None, seed=seed)


def budget(name: str, smoke: bool) -> Budget:
    """Return a game's budget."""
    return SMOKE if smoke else GAMES[name].budget


def evaluation_env(name: str, seed: int, folder: Path) -> TextVecEnv:
    """Return the games on which a run is evaluated."""
    return games(name, seed, ENVS, folder, "evaluate")
