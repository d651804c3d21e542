"""Transitions of text games on disk, for offline learning: a Minari dataset as that of `demos`, with texts.

An episode's observations are its instruction and what was observed, its actions the choices; which actions were
admissible stands in `infos/admissible`, one JSON list of texts per observation. Tests: tests/test_text_demos.py.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lago_fast.demo_files import UNREADABLE, check_free, install, read_content, sha256_of
from lago_fast.demos import dataset_id, import_minari, versions
from lago_fast.envs.text_recording import join_episodes
from lago_fast.envs.text_transitions import TextTransitions, check_transitions
from lago_fast.errors import DemonstrationError

LONGEST = 1_000_000  # characters; Minari's Text needs a bound


def save_text_demos(
    transitions: TextTransitions,
    path: str | os.PathLike[str],
    *,
    origin: Mapping[str, Any],
    overwrite: bool = False,
) -> Path:
    """Write transitions into a Minari dataset and return its folder; a crash leaves no half dataset.

    Args:
        transitions: whole episodes, as `record_text_episodes` gives them.
        path: folder of the dataset.
        origin: what is needed to record them again, such as the game, its settings, the actor and the seeds; it is
            kept in the dataset's metadata, with the versions of the packages.
        overwrite: replace the dataset at `path`.

    Raises:
        DemonstrationError: these are no whole episodes of admissible choices, a row is not followed by what it says
            follows, or the file cannot hold a text.
        RunExists: `path` exists, and `overwrite` is False or it holds something else than a dataset.
        MissingExtra: Minari is not installed.
    """
    check_transitions(transitions)
    _check_kept(transitions)
    path = Path(os.path.abspath(path))
    check_free(path, overwrite)
    minari = import_minari()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        folder = Path(scratch) / "complete"
        (folder / "data").mkdir(parents=True)
        storage = _new_storage(minari, folder / "data", transitions)
        firsts = np.flatnonzero(np.diff(transitions.episode_id, prepend=-1))
        bounds = [*firsts.tolist(), len(transitions.choice)]
        storage.update_episodes(_buffer(minari, transitions, first, end) for first, end in pairwise(bounds))
        labels = [{"success": bool(success)} for success in transitions.success]
        storage.update_episode_metadata(labels, range(len(labels)))
        storage.update_metadata(
            {
                "dataset_id": dataset_id(path),
                "minari_version": version("minari"),
                "lago": {"origin": dict(origin), "sha256": sha256_of(folder), "versions": versions()},
            }
        )
        install(folder, path, Path(scratch) / "replaced")
    return path


def load_text_demos(path: str | os.PathLike[str]) -> TextTransitions:
    """Read a dataset that `save_text_demos` wrote.

    Raises:
        DemonstrationError: missing, empty, corrupt or altered, or with choices that are not admissible.
        MissingExtra: Minari is not installed.
    """
    path = Path(path)
    remedy = f"record it again or give another path; path={str(path)!r}"
    if not (path / "data").is_dir():
        raise DemonstrationError(f"no dataset at the path given: {remedy}")
    import_minari()
    try:
        content = read_content(path)
        rows = zip(content.rows, content.labels, strict=True)
        episodes = [_episode(row, bool(label["success"])) for row, label in rows]
    except UNREADABLE as error:
        raise DemonstrationError(f"unreadable dataset ({type(error).__name__}: {error}): {remedy}") from error
    if not episodes:
        raise DemonstrationError(f"the dataset holds no episode: {remedy}")
    transitions = join_episodes(episodes)
    check_transitions(transitions)
    return transitions


def _check_kept(transitions: TextTransitions) -> None:
    """Raise DemonstrationError for what would not be read as it is: a file holds each observation once, as UTF-8."""
    for name in ("instruction", "observation", "next_observation"):
        for row, text in enumerate(getattr(transitions, name)):
            if not _fits_in_hdf5(text):
                raise DemonstrationError(
                    f"row {row}, {name}: {text[:40]!r} has a NUL character or half of a surrogate pair, which HDF5 "
                    "cannot hold; replace it before saving"
                )
    goes_on = np.flatnonzero(np.diff(transitions.episode_id) == 0).tolist()
    for name in ("observation", "admissible"):
        here, following = getattr(transitions, name), getattr(transitions, f"next_{name}")
        for row in goes_on:
            if following[row] != here[row + 1]:
                raise DemonstrationError(
                    f"row {row}, next_{name}: {str(following[row])[:40]!r} is not the {name} of the next row, "
                    f"{str(here[row + 1])[:40]!r}; record the episode again"
                )


def _fits_in_hdf5(text: str) -> bool:
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def _new_storage(minari: Any, folder: Path, transitions: TextTransitions) -> Any:
    from gymnasium.spaces import Dict, Discrete, Text

    texts = [*transitions.instruction, *transitions.observation, *transitions.next_observation]
    text = Text(LONGEST, min_length=0, charset=frozenset().union(*texts) or " ")
    return minari.dataset.minari_storage.MinariStorage.new(
        folder,
        observation_space=Dict({"instruction": text, "observation": text}),
        action_space=Discrete(max(map(len, transitions.admissible))),
        data_format="hdf5",
    )


def _buffer(minari: Any, transitions: TextTransitions, first: int, end: int) -> Any:
    """The rows from `first` to `end` as an episode of Minari's."""
    rows, last = slice(first, end), end - 1
    admissible = [*transitions.admissible[rows], transitions.next_admissible[last]]
    instruction = transitions.instruction[rows]
    return minari.data_collector.EpisodeBuffer(
        observations={
            "instruction": [*instruction, instruction[-1]],
            "observation": [*transitions.observation[rows], transitions.next_observation[last]],
        },
        actions=transitions.choice[rows],
        rewards=transitions.reward[rows],
        terminations=transitions.terminated[rows],
        truncations=transitions.truncated[rows],
        infos={"admissible": [json.dumps(actions) for actions in admissible]},
    )


def _episode(row: Mapping[str, Any], success: bool) -> TextTransitions:
    admissible = [tuple(str(action) for action in json.loads(actions)) for actions in row["infos"]["admissible"]]
    instruction, observation = row["observations"]["instruction"], row["observations"]["observation"]
    steps = len(row["actions"])
    if not len(admissible) == len(instruction) == len(observation) == steps + 1:
        raise ValueError(f"an episode of {steps} steps needs {steps + 1} observations")
    return TextTransitions(
        instruction=instruction[:-1],
        observation=observation[:-1],
        admissible=admissible[:-1],
        choice=np.asarray(row["actions"], np.int64),
        reward=np.asarray(row["rewards"], np.float32),
        next_observation=observation[1:],
        next_admissible=admissible[1:],
        terminated=np.asarray(row["terminations"], bool),
        truncated=np.asarray(row["truncations"], bool),
        episode_id=np.zeros(steps, np.int64),
        success=np.array([success]),
    )
