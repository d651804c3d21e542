"""Reading a dataset's HDF5 file: what was recorded here is known by its hash, anything else is tried out first.

The HDF5 library can be brought down by a damaged file. One that carries no hash of ours is therefore read once by a
process of its own; only a file that this survives is read here.
Test: pytest tests/test_demos.py
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from lago_fast.errors import RunExists

MAX_UNPACKED = 1000  # bytes of arrays per byte of their file
LEAST_TRIAL_S, TRIAL_BYTES_PER_S = 60.0, 2**20  # of the trial: longest time
# what minari and h5py raise on a damaged file
UNREADABLE = (
    *(OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, AssertionError),
    *(RecursionError, MemoryError),
)
READ, REFUSED = 0, 3  # exit codes of the trial
TRIAL = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from lago_fast import demo_files
sys.exit(demo_files.trial(sys.argv[2]))
"""


class Content(NamedTuple):
    """A dataset as it lies in its file."""

    observation_space: Any
    action_space: Any
    rows: list[dict[str, Any]]  # of each episode, its arrays
    labels: list[dict[str, Any]]  # of each episode, its metadata


def check_free(path: Path, overwrite: bool) -> None:
    """Raise RunExists unless a dataset may be written to `path`."""
    if not path.exists():
        return
    if not overwrite:
        raise RunExists(f"path={str(path)!r} exists already: give another path, or overwrite=True (--overwrite)")
    if not (path / "data" / "metadata.json").is_file():
        raise RunExists(f"path={str(path)!r} is no dataset and will not be replaced: give another path")


def install(folder: Path, path: Path, replaced: Path) -> None:
    """Move a complete dataset to its place; the old one comes back should that fail."""
    if path.exists():
        path.rename(replaced)
    try:
        folder.rename(path)
    finally:
        if replaced.exists() and not path.exists():
            replaced.rename(path)


def read_content(dataset: Path) -> Content:
    """Return a dataset's content.

    Raises:
        UNREADABLE: it is damaged, or altered since it was recorded.
    """
    metadata = json.loads((dataset / "data" / "metadata.json").read_text())
    recorded = metadata.get("lago", {}).get("sha256")  # other programs' datasets have none
    if recorded is None:
        _try_out(dataset)
    elif recorded != sha256_of(dataset):
        raise ValueError("its data are not those that were recorded: another SHA-256")
    return _read(dataset)


def sha256_of(dataset: Path) -> str:
    """Return the SHA-256 of a dataset's arrays, in hex."""
    with _data(dataset).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def trial(dataset: str) -> int:
    """Read a dataset and forget it; print what is wrong, and return READ or REFUSED."""
    try:
        _read(Path(dataset))
    except UNREADABLE as error:
        print(f"{type(error).__name__}: {error}")
        return REFUSED
    return READ


def run_trial(dataset: Path) -> tuple[int, str]:
    """Let a process of its own read a dataset; return its exit code and what it printed.

    Raises:
        ValueError: it takes longer than any sound file of that size.
    """
    longest = LEAST_TRIAL_S + _data(dataset).stat().st_size / TRIAL_BYTES_PER_S
    command = [sys.executable, "-c", TRIAL, json.dumps(sys.path), str(dataset)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=longest, check=False)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"reading it took more than {longest:.0f} s") from error
    return done.returncode, done.stdout if done.returncode == REFUSED else done.stderr


def _try_out(dataset: Path) -> None:
    code, said = run_trial(dataset)
    if code == REFUSED:
        raise ValueError(said.strip())
    if code != READ:
        how = f"signal {-code}" if code < 0 else f"exit code {code}: {said.strip()[-200:]}"
        raise ValueError(f"a process that tried to read it ended with {how}")


def _data(dataset: Path) -> Path:
    return dataset / "data" / "main_data.hdf5"


def _read(dataset: Path) -> Content:
    import h5py
    import minari

    path, unpacked = _data(dataset), 0

    def count(_name: str, found: Any) -> None:
        nonlocal unpacked
        unpacked += found.nbytes if isinstance(found, h5py.Dataset) else 0

    with h5py.File(path) as file:
        file.visititems(count)
    if unpacked > MAX_UNPACKED * path.stat().st_size:
        raise ValueError(f"its data unpack to {unpacked:,} bytes, which a file of its size does not honestly hold")
    storage = minari.dataset.minari_storage.MinariStorage.read(dataset / "data")
    numbers = range(storage.total_episodes)
    rows, labels = list(storage.get_episodes(numbers)), list(storage.get_episode_metadata(numbers))
    return Content(storage.observation_space, storage.action_space, rows, labels)
