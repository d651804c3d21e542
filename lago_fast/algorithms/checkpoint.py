"""Checkpoint files: whole or not there, checked when they are read, the last few kept.

One safetensors file per checkpoint; plain figures are JSON in its header, with a SHA-256 over figures and tensors.
Reading one runs no code from it. Format: https://github.com/huggingface/safetensors.
Test: pytest tests/algorithms/test_checkpoint.py; make fuzz; make kill
"""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lago_fast.algorithms.atomic import replacing
from lago_fast.errors import CorruptFile, HashMismatch, NoCheckpoint, UnsupportedArgument

FORMAT = 1
MAX_BYTES = 16 * 2**30  # of a file; it is read into memory
NAME = re.compile(r"iteration_(\d{8})\.safetensors")
# what safetensors, json and torch raise on a damaged file
UNREADABLE = (SafetensorError, ValueError, LookupError, TypeError, RuntimeError, OverflowError, AttributeError)

logger = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    tensors: dict[str, Tensor]
    figures: dict[str, Any]  # JSON-able; NaN and infinity are kept


def write_tensors(path: Path, tensors: Mapping[str, Tensor], figures: Mapping[str, Any]) -> None:
    """Write tensors and figures as one checked file, whole or not at all.

    Args:
        path: of the file.
        tensors: any shapes and dtypes, on any device.
        figures: JSON-able.

    Raises:
        NotSaved: the system could not write it; a file of before stands.
    """
    kept = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    text = json.dumps(figures, sort_keys=True)
    about = {"format": str(FORMAT), "figures": text, "sha256": _digest(kept, text)}
    content = save(kept, about)
    with replacing(path) as file:
        file.write(content)


def read_tensors(path: Path) -> Checkpoint:
    """Return what `write_tensors` wrote.

    Raises:
        CorruptFile: the file is no checkpoint, truncated, or larger than one can be.
        HashMismatch: it was altered.
        UnsupportedArgument: of a format that this version does not read.
        NoCheckpoint: there is no such file.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise CorruptFile(f"path: {path} has {size:,} bytes, which no checkpoint has; do not load it")
        content = path.read_bytes()
    except OSError as error:
        raise NoCheckpoint(f"path: {path} cannot be read ({error.strerror or error}); name another") from error
    try:
        tensors = load(content)
        about = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        found, text, digest = int(about["format"]), about["figures"], about["sha256"]
        figures = json.loads(text)
    except (*UNREADABLE, RecursionError, MemoryError) as error:
        raise CorruptFile(f"path: {path} is no checkpoint, or damaged ({error}); take an older one") from error
    if found != FORMAT:
        raise UnsupportedArgument(f"path: {path} has format {found}, this version reads {FORMAT}; begin a new run")
    if digest != _digest(tensors, text):
        raise HashMismatch(f"path: {path} was altered, its checksum is another; take an older one")
    if not isinstance(figures, dict):
        raise CorruptFile(f"path: the figures of {path} are no dictionary; take an older one")
    return Checkpoint(tensors, figures)


def write_checkpoint(folder: Path, iteration: int, checkpoint: Checkpoint, keep: int) -> Path:
    """Write the checkpoint of an iteration, then delete all but it and the newest of the others, `keep` in all.

    Returns:
        Its path.

    Raises:
        NotSaved: the system could not write it; every older one stands.
    """
    for rest in folder.glob(".iteration_*.safetensors.*"):  # of a writer that was killed
        rest.unlink(missing_ok=True)
    path = folder / f"iteration_{iteration:08d}.safetensors"
    write_tensors(path, *checkpoint)
    others = [other for other in paths_in(folder) if other != path]
    for old in others[: max(0, len(others) - (keep - 1))]:
        old.unlink(missing_ok=True)
    return path


def set_aside_after(folder: Path, iteration: int) -> list[Path]:
    """Rename the checkpoints of iterations after this one, which a run that was taken back will not come from.

    Returns:
        Where they are now; `newest` passes them over.
    """
    aside = []
    for path in paths_in(folder):
        if int(path.stem.removeprefix("iteration_")) > iteration:
            aside.append(path.replace(path.with_name(f"{path.name}.aside")))
    return aside


def paths_in(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, the oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if NAME.fullmatch(path.name))


def newest(place: Path) -> tuple[Path, Checkpoint]:
    """Return the newest whole checkpoint of a folder, or the one of a file; one that is damaged is named and passed.

    Raises:
        NoCheckpoint: there is none, or none that is whole.
        CorruptFile, HashMismatch, UnsupportedArgument: of a file that was named.
    """
    if place.is_file():
        return place, read_tensors(place)
    paths = paths_in(place)
    for path in reversed(paths):
        try:
            return path, read_tensors(path)
        except (CorruptFile, HashMismatch) as error:
            logger.warning("%s", error)
    seen = f"none of its {len(paths)} checkpoints is whole" if paths else "no checkpoint is there"
    raise NoCheckpoint(f"path: {place}: {seen}; name another folder, or begin a new run")


def _digest(tensors: Mapping[str, Tensor], figures: str) -> str:
    sha256 = hashlib.sha256(figures.encode("utf-8", "surrogatepass"))
    for name in sorted(tensors):
        tensor = tensors[name]
        sha256.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode("utf-8", "surrogatepass"))
        sha256.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()
