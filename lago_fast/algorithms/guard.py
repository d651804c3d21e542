"""The guard: how much the KL to a prior counts, by whether the prior does better than the policy does.

Once the policy has played whole episodes, the prior plays some of each group itself, which the policy imitates where
they are better than its own. After every rollout the returns of the policy's episodes are compared with theirs: the KL
counts while the prior is the better of the two, less and less while neither is, and nearly nothing once the policy is.
Reasons, measurements and what failed: docs/guard.md.
Test: pytest tests/algorithms/test_guard.py
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from lago_fast.algorithms.lanes import Episode, Lane, LaneStep, array_lane_of
from lago_fast.buffers import RolloutBuffer
from lago_fast.errors import UnsupportedArgument
from lago_fast.priors.base import squared_distance, trust_at

ROWS_OF_GROUP = 256  # of a rollout, that an instruction must have on average to be a group of its own
FULL = 0.999  # weight that counts as 1: rounding may keep it below
WITHIN = 0.9  # share of the states of the prior's episodes that are trusted fully
FARTHEST = 150.0  # squared distance from which on a float32 trust tells no difference
LOGGED_GROUPS = 16  # more are not logged one by one

State = dict[str, list[float]]


@dataclass(frozen=True)
class GuardSettings:
    """How the guard decides.

    Args:
        episodes: that the prior plays of each group, at least 2.
        most_episodes: that it plays where `episodes` do not tell which of the two is the better, at least `episodes`.
        sure: standard errors of the difference of the returns from which on they do tell, at least `doubt`; a prior
            that is so much the better counts fully at once.
        probe_share: of the training's env steps, which the prior may take at most for `episodes`, in (0, 1]; for more
            of them half of it.
        window: of the policy's newest episodes whose returns count, about, at least 2.
        doubt: standard errors of the difference of the returns from which on one of the two is the better, at least 0.
        step: how much the log of a weight moves per rollout and standard error beyond `doubt`, above 0.
        burden: how much it falls per rollout where neither is the better, as long as it is above `anchor`, at least 0.
        anchor: weight that is enough to hold a policy that is as good as the prior, from `least` to 1.
        least: smallest weight, and the first, in (0, 1].
        floor: weight that is kept, whatever comes, by a prior that has once counted fully, from 0 to 1; with 1 the
            guard only decides whether a prior is to count.
        imitate: fit the policy to the prior in the states of the prior's episodes, where these are the better ones.

    Raises UnsupportedArgument when one is out of range.
    """

    episodes: int = 16
    most_episodes: int = 64
    sure: float = 2.0
    probe_share: float = 0.2
    window: int = 32
    doubt: float = 1.0
    step: float = 1.0
    burden: float = 0.2
    anchor: float = 0.1
    least: float = 0.001
    floor: float = 0.0
    imitate: bool = True

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        for name, fits, wanted in (
            ("episodes", self.episodes >= 2, "at least 2"),
            ("most_episodes", self.most_episodes >= self.episodes, "of at least `episodes`"),
            ("sure", self.doubt <= self.sure < math.inf, "of at least `doubt`"),
            ("probe_share", 0 < self.probe_share <= 1, "in (0, 1]"),
            ("window", self.window >= 2, "at least 2"),
            ("doubt", 0 <= self.doubt < math.inf, "at least 0"),
            ("step", 0 < self.step < math.inf, "above 0"),
            ("burden", 0 <= self.burden < math.inf, "at least 0"),
            ("anchor", self.least <= self.anchor <= 1, "from `least` to 1"),
            ("least", 0 < self.least <= 1, "in (0, 1]"),
            ("floor", 0 <= self.floor <= 1, "from 0 to 1"),
        ):
            if not fits:
                raise UnsupportedArgument(f"guard: {name}={getattr(self, name)}: give a number {wanted}")


def settings_of(guard: "bool | GuardSettings | Mapping[str, Any] | None") -> GuardSettings | None:
    """Return the settings that FastKLPPO's `guard` means, None for no guard; a mapping is read from a saved model.

    Raises UnsupportedArgument for anything else.
    """
    if guard is None or guard is False:
        return None
    if guard is True:
        return GuardSettings()
    if isinstance(guard, GuardSettings):
        return guard
    if isinstance(guard, Mapping) and set(guard) == set(asdict(GuardSettings())):
        return GuardSettings(**guard)
    raise UnsupportedArgument(f"guard={guard!r}: give True, False or a GuardSettings")


class Returns:
    """Mean and variance of the returns of each group; the older ones are forgotten beyond `window` episodes.

    Args:
        groups: how many.
        window: of episodes; None: all count alike.
    """

    def __init__(self, groups: int, window: int | None = None) -> None:
        self.window = window
        self.count, self.mean, self.variance = ([0.0] * groups for _ in range(3))

    def add(self, group: int, value: float) -> None:
        """Take in an episode; a return that is not finite is left out."""
        if not math.isfinite(value):
            return
        most = math.inf if self.window is None else self.window
        self.count[group] = min(self.count[group] + 1, most)
        share = 1 / self.count[group]
        distance = value - self.mean[group]
        self.mean[group] += share * distance
        self.variance[group] = (1 - share) * (self.variance[group] + share * distance**2)

    def squared_error(self, group: int) -> float:
        """Return the squared standard error of the mean, infinity for fewer than two episodes."""
        count = self.count[group]
        return self.variance[group] / (count - 1) if count > 1 else math.inf


class Rounds:
    """Episodes of N envs in rounds of one per env."""

    def __init__(self, num_envs: int) -> None:
        self._ended: list[list[tuple[int, float]]] = [[] for _ in range(num_envs)]  # of each env, not handed out yet

    def add(self, episodes: Sequence[tuple[int, int, float]]) -> None:
        """Take in episodes that ended: env, group, return."""
        for env, *rest in episodes:
            self._ended[env].append((int(rest[0]), rest[1]))

    def complete(self) -> list[tuple[int, float]]:
        """Hand out group and return of each episode of the rounds that every env has played."""
        whole = min(map(len, self._ended))
        handed = [episode for ended in self._ended for episode in ended[:whole]]
        self._ended = [ended[whole:] for ended in self._ended]
        return handed


def check_returns(step: LaneStep) -> None:
    """Raise UnsupportedArgument where episodes end and the env does not say with what return."""
    if len(step.episodes) < int((step.terminated | step.truncated).sum()):
        raise UnsupportedArgument("env: a guard needs the returns of episodes; wrap the env in a VecMonitor")


class Guard:
    """The weights of the KL, one per group of rows.

    Args:
        settings: how it decides.
        names: of the groups, as they are logged.
        env_group: [N] int64, of each env; None: the instruction of an episode is its group.
        state: of a guard before, as `state` returns it; None, or one of other groups: a new start.
    """

    def __init__(
        self, settings: GuardSettings, names: Sequence[str], env_group: np.ndarray | None, state: State | None = None
    ) -> None:
        self.settings, self.names, self.env_group = settings, list(names), env_group
        count = len(self.names)
        self.weights, self.counted = [settings.least] * count, [0.0] * count  # the latter 1 where it once did fully
        self.prior, self.policy = Returns(count), Returns(count, settings.window)
        self.imitated = [0.0] * count  # 1 where the policy has been fitted to rows that were given for it
        self.reach = [1.0] * count  # squared distance up to which the prior is trusted, in units of its own trust's
        self.prior_steps = 0  # env steps that the prior's episodes took
        self.heard = False  # whether the prior has played all that it is to be judged by
        if state is not None and len(state["weights"]) == count:
            self.weights, self.counted = list(state["weights"]), list(state["counted"])
            # what guards saved earlier did not know
            self.imitated = list(state.get("imitated", state["counted"]))
            reach = list(state.get("reach", ()))
            self.reach = reach if len(reach) == count else self.reach
            self.prior_steps, self.heard = int(state["prior_steps"][0]), bool(state["heard"][0])
            for name, kept in (("prior", self.prior), ("policy", self.policy)):
                for column in ("count", "mean", "variance"):
                    setattr(kept, column, list(state[f"{name}_{column}"]))

    @property
    def state(self) -> State:
        """Return all that it has learnt, as plain numbers."""
        names = ("weights", "counted", "imitated", "reach")
        kept = {name: list(getattr(self, name)) for name in names}
        kept["prior_steps"], kept["heard"] = [float(self.prior_steps)], [float(self.heard)]
        for name, returns in (("prior", self.prior), ("policy", self.policy)):
            for column in ("count", "mean", "variance"):
                kept[f"{name}_{column}"] = list(getattr(returns, column))
        return kept

    def to_imitate(self) -> list[int]:
        """Return the groups whose prior counts fully, where that of one of them is still to be imitated."""
        counted = [g for g in range(len(self.names)) if self.counted[g]]
        return counted if any(not self.imitated[g] for g in counted) else []

    def wants_prior_to_play(self, total_timesteps: int) -> bool:
        """Tell whether it is time for the prior's episodes: the policy has some in half of the groups or more."""
        known = sum(count >= 2 for count in self.policy.count)
        left = self.settings.probe_share * total_timesteps - self.prior_steps
        return not self.heard and 2 * known >= len(self.names) and left > 0

    def _wants_another_round(self, most: float, steps_of_round: int) -> bool:
        """Tell whether the prior is to play on, given the most env steps that it may take and those of a round."""
        s = self.settings
        if min(self.prior.count) < s.episodes:
            return self.prior_steps < most
        unsure = [
            self.prior.count[g] < s.most_episodes
            and self.policy.count[g] >= 2
            and abs(self.advantage_of_prior(g)) < s.sure
            for g in range(len(self.names))
        ]
        return any(unsure) and self.prior_steps + steps_of_round <= most / 2

    def note(self, returns: Returns, episodes: Sequence[Episode], instruction_id: np.ndarray) -> None:
        """Take in episodes, given the instruction of each env while they lasted [N]."""
        of_env = instruction_id if self.env_group is None else self.env_group
        for episode in episodes:
            returns.add(int(of_env[episode.env]), episode.total_reward)

    def watch_prior(
        self,
        lane: Lane,
        act: Callable[[Any, np.ndarray], np.ndarray],
        observation: Any,
        instruction_id: np.ndarray,
        total_timesteps: int,
    ) -> list[np.ndarray]:
        """Let the prior play all its episodes; return which rows of each step were valid, [N] bool.

        It plays whole rounds, one episode in every env: where a success ends an episode, the first to end are the good
        ones. A round that is cut off counts for nothing. Where `episodes` of each group leave it open in one of them
        which of the two is the better, it plays on.

        Args:
            lane: of envs that were just reset.
            act: maps observations and instruction ids to the prior's actions.
            observation, instruction_id: of the envs.
            total_timesteps: of the training, of which it takes its share at most; a warning says where that was too
                little to judge.

        Raises UnsupportedArgument as `check_returns` does.
        """
        valid, rounds, steps_of_round = [], Rounds(len(instruction_id)), 0
        most = self.settings.probe_share * total_timesteps
        while self._wants_another_round(most, steps_of_round):
            begun, ended = self.prior_steps, list[tuple[int, float]]()
            while not ended and self.prior_steps < most:
                step = lane.step(act(observation, instruction_id))
                valid.append(step.valid)
                self.prior_steps += int(step.valid.sum())
                check_returns(step)
                of_env = instruction_id if self.env_group is None else self.env_group
                rounds.add([(episode.env, int(of_env[episode.env]), episode.total_reward) for episode in step.episodes])
                ended = rounds.complete()
                observation, instruction_id = step.observation, step.instruction_id
            for group, total_reward in ended:
                self.prior.add(group, total_reward)
            steps_of_round = self.prior_steps - begun
        self.heard = min(self.prior.count) >= self.settings.episodes
        if min(self.prior.count) < 2:
            warnings.warn(
                f"guard: the prior played {sum(self.prior.count):g} whole episodes of {len(self.names)} groups in "
                f"{self.prior_steps} env steps and counts for nothing where it played fewer than 2; train for longer, "
                "raise probe_share, or use no guard",
                stacklevel=2,
            )
        return valid

    def learn_reach(self, trust: Tensor, instruction_id: Tensor, valid: Tensor) -> None:
        """Trust the prior in states like those of its own episodes, by whose returns it is judged.

        Args:
            trust: [T, N], the prior's own, in the steps of its episodes.
            instruction_id, valid: of these steps, [T, N].
        """
        group = self.rows_of(range(len(self.names)), instruction_id)
        for g in range(len(self.names)):
            squared = squared_distance(trust[valid & (group == g)]).clamp(max=FARTHEST)
            if len(squared):
                self.reach[g] = squared.kthvalue(math.ceil(WITHIN * len(squared))).values.item()

    def trust_in(self, trust: Tensor, instruction_id: Tensor) -> Tensor:
        """Return the prior's trust [T, N] as if its distances were measured from what its own episodes reach."""
        squared = squared_distance(trust).clamp(max=FARTHEST)
        return trust_at(squared / self.rows_of(self.reach, instruction_id))

    def rows_of(self, weights: Sequence[float], instruction_id: Tensor) -> Tensor:
        """Return each row's weight [T, N], given those of the groups and the rows' instructions [T, N]."""
        of_group = torch.tensor(weights, dtype=torch.float32, device=instruction_id.device)
        if self.env_group is None:
            return of_group[instruction_id]
        groups = torch.as_tensor(self.env_group, device=instruction_id.device)
        return of_group[groups].expand(instruction_id.shape).contiguous()

    def rows_to_imitate(self, instruction_id: Tensor) -> Tensor:
        """Return True where the prior is the better of the two, [T, N], given the rows' instructions."""
        better = [float(self.advantage_of_prior(g) > self.settings.doubt) for g in range(len(self.names))]
        return self.rows_of(better, instruction_id) > 0

    def advantage_of_prior(self, group: int) -> float:
        """Return by how many standard errors the prior's mean return is above the policy's; 0 where one is unknown."""
        squared = self.prior.squared_error(group) + self.policy.squared_error(group)
        difference = self.prior.mean[group] - self.policy.mean[group]
        if not math.isfinite(squared) or difference == 0.0:
            return 0.0
        return difference / math.sqrt(squared) if squared > 0 else math.copysign(math.inf, difference)

    def weigh(self, buffer: RolloutBuffer, logger: Logger) -> State:
        """Move the weights after a rollout, write its `kl_weight` for the update to come, return the new `state`.

        Until a prior has once counted fully, its KL counts by its trust in each state; then in all of them.
        """
        s = self.settings
        for g in range(len(self.names)):
            found = self.advantage_of_prior(g)
            beyond = max(0.0, abs(found) - s.doubt)
            change = math.copysign(s.step * beyond, found) if beyond > 0 else -self._relief(g)
            if found >= s.sure:
                change = math.inf
            least = max(s.least, s.floor * self.counted[g])
            self.weights[g] = min(1.0, max(least, self.weights[g] * math.exp(min(change, -math.log(s.least)))))
            self.counted[g] = max(self.counted[g], float(self.weights[g] >= FULL))
        rows = self.rows_of(self.weights, buffer.instruction_id)
        if buffer.trust is not None:
            buffer.trust = self.trust_in(buffer.trust, buffer.instruction_id)
            sure = self.rows_of(self.counted, buffer.instruction_id) > 0
            rows = rows.where(sure, rows * buffer.trust)
        buffer.kl_weight = rows
        self._record(logger, buffer)
        return self.state

    def _relief(self, group: int) -> float:
        """Return how much the log of a weight falls where neither is the better: not below `anchor`."""
        return min(self.settings.burden, max(0.0, math.log(self.weights[group] / self.settings.anchor)))

    def _record(self, logger: Logger, buffer: RolloutBuffer) -> None:
        assert buffer.kl_weight is not None
        logger.record("prior/guard_weight", buffer.kl_weight[buffer.valid].mean().item())
        if buffer.trust is not None:
            logger.record("prior/trust", buffer.trust[buffer.valid].mean().item())
        if len(self.names) <= LOGGED_GROUPS:
            for g, name in enumerate(self.names):
                logger.record(f"prior/guard_weight_{name}", self.weights[g])
                logger.record(f"prior/guard_advantage_{name}", self.advantage_of_prior(g))


def settled(settings: GuardSettings, groups: int) -> State:
    """Return the state of a guard of so many groups that has seen the prior play and lets it count fully."""
    guard = Guard(settings, [""] * groups, None)
    guard.weights, guard.counted = [1.0] * groups, [1.0] * groups
    guard.heard = True
    return guard.state


def guard_for(settings: GuardSettings | None, env: VecEnv, buffer: RolloutBuffer, state: State | None) -> Guard | None:
    """Return the guard of a training, None without settings.

    A group is a task where the env's array lane names tasks; else an instruction, where the env names several and a
    rollout has ROWS_OF_GROUP rows for each; else there is one group.
    """
    if settings is None:
        return None
    about: Any = array_lane_of(env) or env
    task_id = getattr(about, "task_id", None)
    if task_id is not None:
        return Guard(settings, about.tasks, np.asarray(task_id), state)
    texts = getattr(about, "instructions", [])
    if len(texts) > 1 and buffer.n_steps * buffer.n_envs >= ROWS_OF_GROUP * len(texts):
        return Guard(settings, texts, None, state)
    return Guard(settings, ["all"], np.zeros(buffer.n_envs, dtype=np.int64), state)
