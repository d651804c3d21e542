"""Act and step, in turn or side by side: the inner loop of collection over any lane.

Side by side, an env in groups steps one group in native threads while the policy answers for another. Every action
is still the present policy's, and no step is under way while the policy is updated: exact on-policy.
Test: pytest tests/algorithms/test_stepping.py
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from lago_fast.algorithms.lanes import ArrayLane, GroupedLane, Lane, LaneStep
from lago_fast.algorithms.stage_clock import StageClock
from lago_fast.cores import torch_threads

# (step t, rows, observations, their instruction ids [n]) -> actions [n, ...] as chosen, and as the env takes them
Act = Callable[[int, slice, Any, np.ndarray], tuple[np.ndarray, np.ndarray]]
EVERY_ROW = slice(None)


def steps(
    lane: Lane, act: Act, n_steps: int, observation: Any, instruction_id: np.ndarray, clock: StageClock
) -> Generator[tuple[np.ndarray, np.ndarray, LaneStep], None, None]:
    """Yield the actions chosen, the actions as the env took them, and the lane's answer, step by step.

    Args:
        lane: how to step.
        act: chooses, and may store, the actions of some rows at step t.
        n_steps: T.
        observation: [N, ...] before the first step, or a dictionary of such.
        instruction_id: [N], of it.
        clock: its stage "env" is the time of waiting for the env.
    """
    if isinstance(lane, GroupedLane):
        yield from _side_by_side(lane, act, n_steps, observation, instruction_id, clock)
        return
    for t in range(n_steps):
        actions, bounded = act(t, EVERY_ROW, observation, instruction_id)
        step = lane.step(bounded)
        clock.lap("env")
        yield actions, bounded, step
        observation, instruction_id = step.observation, step.instruction_id


def _side_by_side(
    lane: GroupedLane, act: Act, n_steps: int, observation: Any, instruction_id: np.ndarray, clock: StageClock
) -> Generator[tuple[np.ndarray, np.ndarray, LaneStep], None, None]:
    groups: list[slice] = lane.env.groups
    under_way: set[int] = set()

    def send(t: int, g: int, seen: Any, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        actions, bounded = act(t, groups[g], seen, ids)
        lane.send(g, bounded)
        under_way.add(g)
        clock.lap("env")
        return actions, bounded

    try:
        chosen = [send(0, g, observation[rows], instruction_id[rows]) for g, rows in enumerate(groups)]
        for t in range(n_steps):
            parts, following = [], []
            for g in range(len(groups)):
                under_way.remove(g)  # first: a group that failed has nothing left to wait for
                part = lane.recv(g)
                clock.lap("env")
                parts.append(part)
                if t + 1 < n_steps:
                    following.append(send(t + 1, g, part.observation, part.instruction_id))
            step = lane.join(parts)
            clock.lap("env")
            actions, bounded = (np.concatenate(column) for column in zip(*chosen, strict=True))
            yield actions, bounded, step
            chosen = following
    finally:
        # a callback stopped the rollout: what was sent already is waited for, and learnt by nobody
        for g in under_way:
            lane.drop(g)


@contextmanager
def torch_threads_beside(lane: Lane) -> Iterator[None]:
    """Leave the cores to a simulator with threads of its own: torch computes in one thread while the block runs.

    A policy's answer to one step is small; more threads of torch's wait for cores on which the simulator is at work.
    """
    if not isinstance(lane, ArrayLane):
        yield
        return
    with torch_threads(1):
        yield
