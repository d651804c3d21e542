"""Collecting the next rollout while the policy is updated: `overlap="update"`.

A thread steps the envs with a copy of the policy as it is before the update, and draws from a generator of its own.
What it collects is learnt from one update later: the stored log-probabilities, values and bootstrap are the copy's, so
that the ratio says what it should, and PPO's clipping starts from a policy that has already moved.

Callbacks never see the thread. It lives inside of `train()`: when the update has ended and the rollout too,
`on_rollout_start` is called, then `on_step` for each of the rollout's steps in turn, `num_timesteps` rising with them,
then `on_rollout_end`, all in the caller's thread and with the updated policy; only the envs stand at the rollout's end
from the start. An exception of an env comes at its step. Checkpoints, which are written in `on_rollout_start`, hold
nothing of the rollout: whoever starts the envs anew there, as a resumed run does, drops it, and collects one in the old
way (the running scale of rewards has seen the dropped one). So are the first rollout of each `learn` and the one after
a warm start.
Test: pytest tests/algorithms/test_overlapping.py
"""

import copy
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor

from lago_fast.algorithms.flat_adam import FlatAdam
from lago_fast.algorithms.guarding import GuardedPPO
from lago_fast.algorithms.heads import Head, PolicysOwnHead, TextHead, make_head
from lago_fast.algorithms.lanes import ArrayLane, LaneStep, array_lane_of
from lago_fast.algorithms.numbers import Numbers
from lago_fast.algorithms.stage_clock import StageClock
from lago_fast.algorithms.stepping import steps
from lago_fast.buffers import RolloutBuffer
from lago_fast.cores import torch_threads
from lago_fast.errors import UnsupportedArgument

OVERLAPS = ("none", "update")
THREAD = "rollout ahead"  # its name
Step = tuple[np.ndarray, np.ndarray, LaneStep]  # actions as chosen, as the env took them, and what came of them


class Actor(NamedTuple):
    """Who acts in a rollout, and where what it sees and says is kept."""

    head: Head
    buffer: RolloutBuffer
    clock: StageClock
    generator: torch.Generator | None  # that actions are drawn from; None: torch's own


class RolloutAhead:
    """A rollout that a thread collects.

    Args:
        actor: whose rollout it is.
        rollout: of its steps; it runs in the thread.
        device: of the actor; on CUDA the thread has a stream of its own.
    """

    def __init__(self, actor: Actor, rollout: Generator[Step, None, None], device: torch.device) -> None:
        self.actor, self._rollout = actor, rollout
        self.steps: list[Step] = []
        self.last_values: Tensor | None = None  # [N], of the observations after the last step
        self.error: BaseException | None = None  # after the last of `steps`
        self.seconds = 0.0
        self._given_up = threading.Event()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # which copied the policy
        self._thread = threading.Thread(target=self._collect, name=THREAD)
        self._thread.start()

    def join(self) -> None:
        """Wait for the rollout's end."""
        self._thread.join()

    def give_up(self) -> None:
        """Let the rollout end with the step under way."""
        self._given_up.set()

    def _collect(self) -> None:
        started = time.perf_counter()
        try:
            with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                self._step_by_step()
            if self._stream is not None:
                self._stream.synchronize()
        except BaseException as error:  # noqa: BLE001  it is raised where the step is read
            self.error = error
        self.seconds = time.perf_counter() - started

    def _step_by_step(self) -> None:
        for step in self._rollout:
            self.steps.append(step)
            if self._given_up.is_set():
                self._rollout.close()
                return
        head, buffer = self.actor.head, self.actor.buffer
        with torch.no_grad():
            seen: Any = buffer.as_tensors(self.steps[-1][2].observation)
            self.last_values = head.policy.predict_values(seen).flatten()


class OverlappingPPO(GuardedPPO):
    """PPO whose next rollout may be collected while it is updated."""

    overlap: str
    _starts_from_prior: Callable[[], bool]
    _imitates: Callable[[], bool]
    stage_clock: StageClock
    _act: Callable[..., tuple[np.ndarray, np.ndarray]]
    _numbers: Numbers
    _spare: RolloutBuffer | None = None  # that the next rollout ahead is written into
    _ahead: RolloutAhead | None = None

    def _set_up_overlap(self) -> None:
        """Make the second buffer.

        Raises:
            UnsupportedArgument: what this model does cannot be overlapped.
        """
        check_overlap(self.overlap)
        self._ahead, self._spare = None, None
        if self.overlap == "none":
            return
        if self.use_sde or isinstance(self._head, PolicysOwnHead):
            raise UnsupportedArgument(
                "overlap='update': this policy draws from torch's global generator, which the update may use too; use "
                "a Box or Discrete action space and a policy of Stable-Baselines3's without use_sde, or overlap='none'"
            )
        if isinstance(self._head, TextHead):
            raise UnsupportedArgument(
                "overlap='update': the copy of the policy would hold its text encoder twice; use overlap='none'"
            )
        if self.env is not None:
            _check_lane(array_lane_of(self.env) is not None)
        self._spare = copy.deepcopy(self._buffer)

    @contextmanager
    def _collecting_ahead(self) -> Iterator[None]:
        """Collect the next rollout while the block, an update, runs; both have ended after it.

        The simulators' threads are as many as ever; torch computes in half of its own meanwhile, on either side.
        """
        fits_to_prior = self._imitates() or self._starts_from_prior()
        last = self.num_timesteps >= self._total_timesteps or fits_to_prior
        if self._spare is None or last:
            yield
            return
        self._numbers.remember_normalisation(self)  # type: ignore[arg-type]  # of the whole class
        with torch_threads(max(1, torch.get_num_threads() // 2)):
            ahead = self._ahead = self._begin_ahead(self._spare)
            try:
                yield
            except BaseException:
                ahead.give_up()
                ahead.join()
                self._forget_ahead()
                raise
            finally:
                ahead.join()
                self.stage_clock.lap("env")

    def _begin_ahead(self, buffer: RolloutBuffer) -> RolloutAhead:
        generator = torch.Generator(self.device)
        # from the generator that checkpoints hold, in the thread that alone draws from it
        generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
        mlp_impl = "auto" if self._head.networks is None else self._head.networks.impl
        head = make_head(_copied(self.policy), mlp_impl)
        assert head.networks is not None
        head.networks.refresh()
        actor = Actor(head, buffer, StageClock(torch.device("cpu")), generator)
        act = partial(self._act, actor)
        position = self._last_obs, self._instruction_id
        return RolloutAhead(actor, steps(self._lane, act, self.n_steps, *position, actor.clock), self.device)

    def _take_ahead(self) -> RolloutAhead | None:
        """Return the rollout that was collected ahead, its buffer now the model's; None where there is none."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            self._spare, self._buffer = self._buffer, ahead.actor.buffer
            self.rollout_buffer = self._buffer  # type: ignore[assignment]  # under the name that callbacks read
        if self.overlap != "none":
            self.logger.record("rollout/updates_behind", 0 if ahead is None else 1)
            self.logger.record("time/overlapped_s", 0.0 if ahead is None else ahead.seconds)
        return ahead

    def _replayed(self, ahead: RolloutAhead) -> Generator[Step, None, None]:
        """Yield the steps of a rollout that was collected ahead, then raise what ended it."""
        try:
            yield from ahead.steps
            if ahead.error is not None:
                raise ahead.error
        finally:
            # whoever stops in the middle finds the envs where they stand
            self._stand_behind(ahead)

    def _stand_behind(self, ahead: RolloutAhead) -> None:
        if ahead.steps:
            step = ahead.steps[-1][2]
            self._last_obs, self._instruction_id = step.observation, step.instruction_id
            self._last_episode_starts = step.terminated | step.truncated

    def _forget_ahead(self) -> None:
        """Drop a rollout that was collected ahead and that nobody will learn from."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            self._stand_behind(ahead)

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """Take another env of the same spaces, as in Stable-Baselines3."""
        self._forget_ahead()
        super().set_env(env, force_reset)

    def _setup_learn(self, *args: Any, **kwargs: Any) -> Any:
        self._forget_ahead()
        return super()._setup_learn(*args, **kwargs)

    def _take_lane(self) -> None:
        self._ahead = None
        super()._take_lane()
        if self.overlap != "none":
            _check_lane(isinstance(self._lane, ArrayLane))


def check_overlap(overlap: str) -> None:
    """Raise UnsupportedArgument where FastKLPPO's `overlap` has no meaning."""
    if overlap not in OVERLAPS:
        raise UnsupportedArgument(f"overlap={overlap!r}: choose 'none' or 'update'")


def _check_lane(has_arrays: bool) -> None:
    if not has_arrays:
        raise UnsupportedArgument(
            "overlap='update': the env has no array lane (a wrapper stands before it, or it steps in Python) "
            "and would take turns with the update; pass an env of lago_fast without a wrapper, or overlap='none'"
        )


def _copied(policy: ActorCriticPolicy) -> ActorCriticPolicy:
    """Return a policy that acts as this one does now, whatever becomes of this one."""
    # neither is needed to act: the optimiser's moments, and a distribution that may hold a graph
    shared = {id(part): part for part in (policy.optimizer, policy.action_dist)}
    acting = copy.deepcopy(policy, shared)
    acting.set_training_mode(False)
    if isinstance(policy.optimizer, FlatAdam):
        # native networks read the parameters where this one gathers them
        acting.optimizer = FlatAdam(acting.parameters(), impl=policy.optimizer.impl)
    return acting
