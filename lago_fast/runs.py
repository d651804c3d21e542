"""Run folders: what a training run or a comparison leaves behind, and where it came from.

    config.json       every setting, resolved; its `run_format` marks the folder as a run
    provenance.json   commit, versions, hardware, command line
    instruction_table.npy  what the policy sees of the instructions, with several tasks
    progress.csv, events.out.tfevents.*, checkpoints/, model.zip, curve.json, report.json, curves.png,
    audit.html
    non_finite_*.safetensors  the rows of an iteration in which NaN or infinity came up

Test: pytest tests/test_runs.py
"""

import dataclasses
import fnmatch
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import types
import typing
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tokenize import TokenError
from typing import Any, TypeVar

import numpy as np

from lago_fast.cores import usable_cores
from lago_fast.errors import RunExists, UnsupportedArgument

RUN_FORMAT = 1
CONFIG, PROVENANCE, PROGRESS, CURVE = "config.json", "provenance.json", "progress.csv", "curve.json"
MODEL, TABLE, REPORT, FIGURE = "model.zip", "instruction_table.npy", "report.json", "curves.png"
AUDIT = "audit.html"
# all that a run may write, and all that `overwrite` may delete; paths relative to the folder
RUN_FILES = (
    CONFIG,
    PROVENANCE,
    PROGRESS,
    CURVE,
    MODEL,
    TABLE,
    REPORT,
    FIGURE,
    AUDIT,
    "events.out.tfevents.*",
    "checkpoints/*.zip",
    "checkpoints/*.safetensors",
    "non_finite_*.safetensors",
)
PACKAGES = (
    "lago_fast",
    "torch",
    "numpy",
    "gymnasium",
    "stable-baselines3",
    "envpool",
    "mujoco",
    "metaworld",
    "minari",
    "transformers",
    "peft",
)
# what numpy raises on a damaged file, whose header is Python's own syntax
UNREADABLE_TABLE = (OSError, ValueError, TypeError, EOFError, MemoryError, OverflowError, SyntaxError, TokenError)
SettingsT = TypeVar("SettingsT")


def open_run(folder: str | os.PathLike[str], config: Any, *, overwrite: bool = False) -> Path:
    """Make a run folder, write its config.json and provenance.json, and return its absolute path.

    Args:
        folder: where; created with its parents. Files that are no run's are left alone.
        config: the settings, as a dataclass or a mapping of plain data.
        overwrite: delete the files of the run that is there (`RUN_FILES`), and nothing else.

    Raises:
        RunExists: a run is there and `overwrite` is False, or files of a run's names that no run wrote.
        UnsupportedArgument: a setting that is NaN.
    """
    folder = Path(folder).expanduser().absolute()
    old = check_free(folder, overwrite=overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    # the new config replaces the old one first: settings that are no JSON lose nothing, and the mark stays
    write_json(folder / CONFIG, {"run_format": RUN_FORMAT, **_named_infinities("config", to_plain(config))})
    for path in old:
        if path != folder / CONFIG:
            path.unlink()
    write_json(folder / PROVENANCE, provenance())
    return folder


def note(folder: Path, **facts: Any) -> None:
    """Add facts that are known only later, such as the implementations used, to a run's provenance.json."""
    write_json(folder / PROVENANCE, {**read_json(folder / PROVENANCE), **to_plain(facts)})


def check_free(folder: str | os.PathLike[str], *, overwrite: bool = False) -> list[Path]:
    """Return the files that a new run in `folder` replaces; raises RunExists as `open_run` does."""
    folder = Path(folder).expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise RunExists(f"out: {folder} is a file; name a folder")
    present = [path for pattern in RUN_FILES for path in sorted(folder.glob(pattern)) if path.is_file()]
    if not present:
        return []
    if not is_run(folder):
        raise RunExists(
            f"out: {folder} holds {present[0].name}, which no run of this package wrote; it is never "
            "replaced: name another folder"
        )
    if not overwrite:
        raise RunExists(
            f"out: {folder} already holds a run; name another folder, or replace it with --overwrite (overwrite=True)"
        )
    return present


def is_run(folder: str | os.PathLike[str]) -> bool:
    """Tell whether a folder was made by `open_run`."""
    try:
        return "run_format" in json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a run's settings as plain data.

    Raises:
        UnsupportedArgument: no run there, or one of a format that this version does not read.
    """
    folder = Path(folder).expanduser()
    if not is_run(folder):
        raise UnsupportedArgument(
            f"run: {folder} holds no run (no {CONFIG} of one); name a folder that `lago train` made"
        )
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    found = config.pop("run_format")
    if found != RUN_FORMAT:
        raise UnsupportedArgument(f"run: {folder} has format {found}, this version reads {RUN_FORMAT}; train it again")
    return config


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        UnsupportedArgument: it is missing, or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsupportedArgument(
            f"path: {path} cannot be read as JSON ({error}); name another, or run it again"
        ) from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON in one step, so that a crash leaves the old file or the new one; NaN is refused."""
    text = json.dumps(to_plain(content), indent=2, allow_nan=False) + "\n"
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        fresh = Path(scratch) / path.name
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, path)


def _named_infinities(name: str, value: Any) -> Any:
    """Return plain settings with infinities as text, which JSON cannot hold as numbers; `from_plain` reads it."""
    if isinstance(value, dict):
        return {key: _named_infinities(key, item) for key, item in value.items()}
    if isinstance(value, list):
        return [_named_infinities(name, item) for item in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    if math.isnan(value):
        raise UnsupportedArgument(f"{name}: nan; give a number")
    return str(value)


def save_table(folder: Path, table: np.ndarray | None) -> None:
    """Keep what the policy of a run sees of the instructions, [M, r]; None, with one task, leaves no file."""
    if table is not None:
        np.save(folder / TABLE, table)


def load_table(folder: Path) -> np.ndarray | None:
    """Return what `save_table` kept; None when there is no file.

    Raises:
        UnsupportedArgument: the file cannot be read.
    """
    path = folder / TABLE
    if not path.exists():
        return None
    try:
        # mapped first: a header that claims more than the file holds takes no memory
        table = np.array(np.load(path, mmap_mode="r", allow_pickle=False))
    except UNREADABLE_TABLE as error:
        raise UnsupportedArgument(f"path: {path} cannot be read ({error}); train the run again") from error
    return table


def to_plain(value: Any) -> Any:
    """Return dataclasses, mappings, tuples and paths as what JSON holds."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, os.PathLike) else value


def from_plain(kind: type[SettingsT], data: Mapping[str, Any]) -> SettingsT:
    """Return a settings dataclass, nested ones and tuples too, from what `to_plain` made of it.

    Raises:
        UnsupportedArgument: a setting that this version does not have.
    """
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise UnsupportedArgument(
            f"config: {kind.__name__} has no setting {', '.join(unknown)}; it is another version's"
        )

    def rebuilt(hint: Any, value: Any) -> Any:
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            return from_plain(hint, value)
        if value in ("inf", "-inf") and float in (hint, *typing.get_args(hint)):
            return float(value)
        return tuple(value) if isinstance(value, list) and typing.get_origin(hint) in _TUPLES else value

    return kind(**{name: rebuilt(hints[name], value) for name, value in data.items()})


_TUPLES = (tuple, types.UnionType, typing.Union)  # settings hold sequences as tuples, or as tuples or None


def provenance() -> dict[str, Any]:
    """Return what decides a figure besides the settings: code, versions, machine, command line, date."""
    import torch

    return {
        **code_version(),
        "versions": versions(),
        "hardware": hardware(),
        "torch_threads": torch.get_num_threads(),
        "command_line": sys.argv,
        "date_utc": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def code_version() -> dict[str, Any]:
    """Return the commit of the package's checkout and whether it was altered; None when it is no checkout."""
    here = Path(__file__).resolve().parent
    # a package installed below somebody's checkout is not part of it
    if _git(here, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return {"commit": None, "dirty": None}
    status = _git(here, "status", "--porcelain")
    return {"commit": _git(here, "rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git says, or None when there is no git or it refuses."""
    # inside a git hook these name the repository of the hook
    environment = {k: v for k, v in os.environ.items() if not fnmatch.fnmatch(k, "GIT_*")}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            env=environment,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def versions() -> dict[str, str | None]:
    """Return the version of Python and of each package that matters; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def hardware() -> dict[str, Any]:
    """Return the names of CPU and GPU (None without one), the number of usable cores and the platform."""
    import torch

    return {
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "platform": platform.platform(),
    }


def _cpu_model() -> str:
    table = Path("/proc/cpuinfo")
    if table.is_file():
        for line in table.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
