"""Demonstrations: scripted experts recorded into a Minari dataset, and read back as arrays.

On disk: Minari's HDF5 format under `<path>/data`, which `minari.load_dataset` reads too when
`MINARI_DATASETS_PATH` names the folder that holds `path`. Each episode has one task and one instruction.
Format: https://minari.farama.org. Tests: tests/test_demos.py.
"""

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from lago_fast.demo_files import UNREADABLE, check_free, install, read_content, sha256_of
from lago_fast.envs.experts import Episode
from lago_fast.envs.suites import Suite, suite_named
from lago_fast.errors import DemonstrationError, MissingExtra, UnsupportedArgument, check_seed, check_whole

ATTEMPTS_PER_SUCCESS = 10
Progress = Callable[[str, int, int], None]


class Demonstrations(NamedTuple):
    """Recorded transitions, one row per step, episode after episode."""

    states: np.ndarray  # [n, S] float32, what the actor saw
    actions: np.ndarray  # [n, D] float32, as executed, inside the box; or [n] int64
    instruction_id: np.ndarray  # [n] int64
    instructions: list[str]
    episode_id: np.ndarray  # [n] int64
    task_id: np.ndarray  # [n] int64
    tasks: list[str]
    success: np.ndarray  # [E] bool, at any step of the episode
    action_low: np.ndarray  # [D] float32; empty where actions are discrete
    action_high: np.ndarray  # [D] float32
    num_actions: int | None = None  # of a discrete space


def record_demos(
    tasks: Sequence[str],
    episodes_per_task: int,
    path: str | os.PathLike[str],
    *,
    action_noise: float = 0.0,
    noisy_tasks: Sequence[str] = (),
    success_only: bool = False,
    stop_after_success: int | None = None,
    seed: int = 0,
    max_episode_steps: int = 500,
    num_envs_per_task: int = 10,
    overwrite: bool = False,
    env: str = "metaworld",
    progress: Progress | None = None,
) -> Path:
    """Record scripted experts into a Minari dataset and return its folder.

    The dataset is written beside `path` and moved there when complete: a crash leaves no half dataset and
    loses no old one. A task's episodes depend on its name and `seed`, not on the other tasks recorded.

    Args:
        tasks: short names such as "drawer-open".
        episodes_per_task: exactly so many are kept per task.
        path: folder of the dataset.
        action_noise: std of the Gaussian noise added to the expert's action before it is clipped to the box;
            the noisy action is executed, and it is the one recorded. 0 where actions are discrete.
        noisy_tasks: the tasks whose expert gets the noise; none: all of them.
        success_only: keep only episodes with a success at any step.
        stop_after_success: end an episode so many steps after its first success (0: right there), flagged as
            truncated; None plays all `max_episode_steps`.
        seed: of simulators, instructions and noise.
        max_episode_steps: horizon.
        num_envs_per_task: simulators stepped at a time; it changes which episodes are drawn, not their kind.
        overwrite: replace the dataset at `path`.
        env: whose tasks these are (`lago_fast.envs.suites`).
        progress: called with (task, episodes kept, episodes wanted).

    Raises:
        UnknownTask, UnsupportedArgument, MissingExtra: see the messages.
        RunExists: `path` exists, and `overwrite` is False or it holds something else than a dataset.
        DemonstrationError: with `success_only`, the expert fails too often.
    """
    suite = suite_named(env)
    tasks = check_recording(
        tasks,
        episodes_per_task,
        action_noise=action_noise,
        noisy_tasks=noisy_tasks,
        seed=seed,
        max_episode_steps=max_episode_steps,
        num_envs_per_task=num_envs_per_task,
        env=env,
    )
    if stop_after_success is not None:
        check_whole(0, stop_after_success=stop_after_success)
    path = Path(os.path.abspath(path))
    check_free(path, overwrite)
    minari = import_minari()
    settings = {
        "episodes_per_task": episodes_per_task,
        "max_episode_steps": max_episode_steps,
        "num_envs_per_task": num_envs_per_task,
        "action_noise": action_noise,
        "noisy_tasks": list(noisy_tasks),
        "success_only": success_only,
        "stop_after_success": stop_after_success,
        "seed": seed,
    }

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        folder = Path(scratch) / "complete"
        folder.mkdir()
        storage = None
        for task in tasks:
            played = suite.play_expert(
                task,
                action_noise=action_noise if task in (noisy_tasks or tasks) else 0.0,
                stop_after_success=stop_after_success,
                seed=seed,
                max_episode_steps=max_episode_steps,
                num_envs=min(num_envs_per_task, episodes_per_task),
            )
            episodes = _keep(played, task, episodes_per_task, success_only, progress)
            if storage is None:
                storage = _new_storage(minari, folder / "data", suite)
            _append(minari, storage, task, episodes)
        assert storage is not None  # check_tasks refuses an empty list
        storage.update_metadata(_metadata(path, suite, tasks, {**settings, "sha256": sha256_of(folder)}))
        install(folder, path, Path(scratch) / "replaced")
    return path


def check_recording(
    tasks: Sequence[str],
    episodes_per_task: int,
    *,
    action_noise: float,
    noisy_tasks: Sequence[str],
    seed: int,
    max_episode_steps: int,
    num_envs_per_task: int,
    env: str,
) -> list[str]:
    """Return the names of the tasks; raises UnknownTask and UnsupportedArgument as `record_demos`, whose these are."""
    suite = suite_named(env)
    names = suite.check_tasks(tasks)
    lengths = {"episodes_per_task": episodes_per_task, "max_episode_steps": max_episode_steps}
    check_whole(1, **lengths, num_envs_per_task=num_envs_per_task)
    _check_noise(suite, action_noise)
    _check_noisy(noisy_tasks, names, action_noise)
    check_seed("seed", seed)
    return names


def _keep(
    played: Iterator[Episode], task: str, wanted: int, success_only: bool, progress: Progress | None
) -> list[Episode]:
    """The first episodes that qualify."""
    kept: list[Episode] = []
    for attempt, episode in enumerate(played, start=1):
        if episode.success.any() or not success_only:
            kept.append(episode)
            if progress is not None:
                progress(task, len(kept), wanted)
        if len(kept) == wanted:
            return kept
        if attempt == ATTEMPTS_PER_SUCCESS * wanted:
            break
    raise DemonstrationError(
        f"success_only: the expert of {task!r} succeeded in {len(kept)} of {ATTEMPTS_PER_SUCCESS * wanted} "
        f"episodes, {wanted} wanted: lower action_noise, raise max_episode_steps, or leave the task out"
    )


def load_demos(path: str | os.PathLike[str]) -> Demonstrations:
    """Read a dataset that `record_demos` wrote, or another Minari dataset with the same columns.

    Each episode needs the metadata `task`, `instruction` and `success`; states must be flat boxes, actions flat
    boxes or discrete.

    Raises:
        DemonstrationError: missing, empty, corrupt or altered; NaN; shapes that do not fit the dataset's spaces.
        MissingExtra: Minari is not installed.
    """
    path = Path(path)
    remedy = f"record it again (`lago demos`, --overwrite) or give another path; path={str(path)!r}"
    if not (path / "data").is_dir():
        raise DemonstrationError(f"no dataset at the path given: {remedy}")
    import_minari()
    try:
        content = read_content(path)
        num_actions, low, high = _bounds(content.action_space)
        shapes = (content.observation_space.shape, content.action_space.shape)
        rows, labels = content.rows, content.labels
        texts = [(str(label["task"]), str(label["instruction"])) for label in labels]
        success = np.array([bool(label["success"]) for label in labels], bool)
    except UNREADABLE as error:
        raise DemonstrationError(f"unreadable dataset ({type(error).__name__}: {error}): {remedy}") from error
    if not rows:
        raise DemonstrationError(f"the dataset holds no episode: {remedy}")
    for number, row in enumerate(rows):
        fault = _fault(row, shapes, num_actions)
        if fault:
            raise DemonstrationError(f"episode {number} {fault}: {remedy}")

    lengths = [len(row["actions"]) for row in rows]
    tasks, task_of = _index([task for task, _ in texts])
    instructions, instruction_of = _index([instruction for _, instruction in texts])
    return Demonstrations(
        states=np.concatenate([row["observations"][:-1] for row in rows]).astype(np.float32),
        actions=_joined([row["actions"] for row in rows], num_actions, low, high),
        instruction_id=np.repeat(instruction_of, lengths),
        instructions=instructions,
        episode_id=np.repeat(np.arange(len(rows), dtype=np.int64), lengths),
        task_id=np.repeat(task_of, lengths),
        tasks=tasks,
        success=success,
        action_low=low.astype(np.float32),
        action_high=high.astype(np.float32),
        num_actions=num_actions,
    )


def expert_table(
    tasks: Sequence[str] | None = None,
    episodes: int = 20,
    *,
    action_noise: float = 0.0,
    seed: int = 0,
    max_episode_steps: int = 500,
    env: str = "metaworld",
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """How often each scripted expert succeeds; one row per task, all of the environment's by default.

    Args:
        tasks: short names, or None for all.
        episodes: per task.
        action_noise, seed, max_episode_steps, env, progress: as in `record_demos`.

    Returns:
        Rows with `task`, `episodes`, `success` (share of episodes with a success at any step),
        `success_at_end` (at the last step) and `return` (mean undiscounted sum of raw rewards).
    """
    suite = suite_named(env)
    tasks = suite.all_tasks() if tasks is None else suite.check_tasks(tasks)
    check_whole(1, episodes=episodes, max_episode_steps=max_episode_steps)
    _check_noise(suite, action_noise)
    rows = []
    for task in tasks:
        played = suite.play_expert(
            task,
            action_noise=action_noise,
            seed=seed,
            max_episode_steps=max_episode_steps,
            num_envs=min(10, episodes),
        )
        kept = _keep(played, task, episodes, False, progress)
        rows.append(
            {
                "task": task,
                "episodes": episodes,
                "success": float(np.mean([episode.success.any() for episode in kept])),
                "success_at_end": float(np.mean([episode.success[-1] for episode in kept])),
                "return": float(np.mean([episode.rewards.sum(dtype=np.float64) for episode in kept])),
            }
        )
    return rows


def versions() -> dict[str, str]:
    """Versions of everything that decides what an episode looks like; absent packages are left out."""
    found = {}
    for package in ("lago_fast", "envpool", "metaworld", "mujoco", "textworld", "alfworld", "minari", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _check_noisy(noisy_tasks: Sequence[str], tasks: Sequence[str], action_noise: float) -> None:
    strangers = [task for task in noisy_tasks if task not in tasks]
    if strangers:
        raise UnsupportedArgument(f"noisy_tasks: {strangers} are not among the tasks recorded, {list(tasks)}")
    if noisy_tasks and not action_noise:
        raise UnsupportedArgument("noisy_tasks: with action_noise=0 no task is noisy; give it, or leave them out")


def _check_noise(suite: Suite, action_noise: float) -> None:
    if not 0 <= action_noise < float("inf"):
        raise UnsupportedArgument(f"action_noise={action_noise}: give a finite number, 0 or more")
    if suite.discrete and action_noise:
        raise UnsupportedArgument(f"action_noise={action_noise}: {suite.title}'s actions are discrete; leave it 0")


def _new_storage(minari: ModuleType, folder: Path, suite: Suite) -> Any:
    from gymnasium.spaces import Box, Discrete

    folder.mkdir()
    return minari.dataset.minari_storage.MinariStorage.new(
        folder,
        observation_space=Box(-np.inf, np.inf, (suite.state_dim,), np.float32),
        action_space=Discrete(suite.action_dim) if suite.discrete else Box(-1.0, 1.0, (suite.action_dim,), np.float32),
        data_format="hdf5",
    )


def _bounds(space: Any) -> tuple[int | None, np.ndarray, np.ndarray]:
    """Return the number of actions of a discrete space, None of a box, and the box's bounds, else empty."""
    if hasattr(space, "n"):
        return int(space.n), np.zeros(0, np.float32), np.zeros(0, np.float32)
    return None, space.low, space.high


def _joined(actions: list[np.ndarray], num_actions: int | None, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return all actions, [n] int64 where they are discrete, else [n, D] float32 inside the box."""
    if num_actions is not None:
        return np.concatenate(actions).astype(np.int64)
    return np.concatenate([np.clip(rows, low, high) for rows in actions]).astype(np.float32)


def _append(minari: ModuleType, storage: Any, task: str, episodes: list[Episode]) -> None:
    """Add a task's episodes to the dataset with what identifies each."""
    first = storage.total_episodes
    buffers, labels = [], []
    for episode in episodes:
        terminations, truncations = np.zeros((2, len(episode.rewards)), bool)
        (terminations if episode.terminated else truncations)[-1] = True
        buffers.append(
            minari.data_collector.EpisodeBuffer(
                seed=episode.env_seed,
                observations=episode.states,
                actions=episode.actions,
                rewards=episode.rewards,
                terminations=terminations,
                truncations=truncations,
                infos={"success": episode.success},
            )
        )
        labels.append(
            {
                "task": task,
                "instruction": episode.instruction,
                "success": bool(episode.success.any()),
                "success_at_end": bool(episode.success[-1]),
                "return": float(episode.rewards.sum(dtype=np.float64)),
                "round": episode.round,
            }
        )
    storage.update_episodes(buffers)
    storage.update_episode_metadata(labels, range(first, first + len(episodes)))


def dataset_id(path: Path) -> str:
    """Name a dataset as Minari wants it."""
    name = re.sub(r"[^-\w]", "-", path.name)
    return name if re.fullmatch(r".+-v\d+", name) else f"{name}-v0"


def _metadata(path: Path, suite: Suite, tasks: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Minari's own fields, and under `lago` all that is needed to record the same dataset again."""
    return {
        "dataset_id": dataset_id(path),
        "minari_version": version("minari"),
        "algorithm_name": suite.expert_name,
        "description": suite.expert_description,
        "lago": {"env": suite.name, "tasks": tasks, **settings, "versions": versions()},
    }


def _fault(row: dict[str, Any], shapes: tuple[tuple[int, ...], tuple[int, ...]], num_actions: int | None) -> str:
    """What is wrong with an episode's arrays, in words; empty when nothing is."""
    states, actions = row["observations"], row["actions"]
    if not (isinstance(states, np.ndarray) and isinstance(actions, np.ndarray)):
        return "has observations or actions that are not plain arrays"
    steps = len(actions)
    if steps == 0 or states.shape != (steps + 1, *shapes[0]) or actions.shape != (steps, *shapes[1]):
        return (
            f"has observations {list(states.shape)} and actions {list(actions.shape)}, which do not fit each "
            f"other or the dataset's spaces {list(shapes[0])} and {list(shapes[1])}"
        )
    if not (np.isfinite(states).all() and np.isfinite(actions).all()):
        return "holds NaN or infinity"
    if num_actions is not None and not (np.issubdtype(actions.dtype, np.integer) and _inside(actions, num_actions)):
        return f"holds actions that are no integers from 0 to {num_actions - 1}"
    return ""


def _inside(actions: np.ndarray, num_actions: int) -> bool:
    return bool(((actions >= 0) & (actions < num_actions)).all())


def _index(names: list[str]) -> tuple[list[str], np.ndarray]:
    """Distinct names in order of appearance, and [len(names)] int64 indices into them."""
    distinct = list(dict.fromkeys(names))
    return distinct, np.array([distinct.index(name) for name in names], np.int64)


def import_minari() -> ModuleType:
    """Return Minari; MissingExtra says how to get it."""
    try:
        import h5py  # noqa: F401  Minari's HDF5 format needs it, and says so only when it writes
        import minari
    except ImportError as error:
        raise MissingExtra("demonstrations need Minari with HDF5: pip install 'lago_fast[envs]'") from error
    module: ModuleType = minari
    return module
