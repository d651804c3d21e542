"""The prior folder: written whole or not at all, and every tensor file checked against its hash when read.

A folder holds `config.json` (format, class, configuration, hashes of the files beside it), safetensors and
`metrics.json`.
Test: pytest tests/priors/test_latent_action.py tests/priors/test_amortised.py
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from safetensors import SafetensorError
from torch import Tensor

from lago_fast.errors import CorruptFile, HashMismatch, LagoError, PriorMismatch, RunExists, UnsupportedArgument
from lago_fast.priors.hashes import hash_file

FORMAT_VERSION = 1
# peft's settings scale the adapters' weights
HASHED = ("*.safetensors", "adapter_config.json")
# what a loader raises on a damaged folder
UNREADABLE = (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError, SafetensorError)
P = ParamSpec("P")
Loaded = TypeVar("Loaded")


def write_folder(
    folder: str | Path,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    fill: Callable[[Path], None],
    *,
    overwrite: bool,
) -> Path:
    """Write a prior folder beside its place, then move it there.

    Args:
        folder: where it goes.
        config: JSON-able; format version and file hashes are added.
        metrics: JSON-able.
        fill: writes the tensor files into the folder that it is given.
        overwrite: replace a prior that is there; anything else is never replaced.

    Raises:
        RunExists: the folder is not empty, and `overwrite` is False or it holds no prior.
    """
    folder = Path(folder).expanduser().absolute()
    check_free(folder, overwrite=overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        fill(fresh)
        hashed = (file for pattern in HASHED for file in sorted(fresh.rglob(pattern)))
        files = {str(file.relative_to(fresh)): hash_file(file) for file in hashed}
        about = {"format_version": FORMAT_VERSION, **config, "files": files}
        _write_json(fresh / "config.json", {**about, "sha256": _checksum(about)})
        _write_json(fresh / "metrics.json", metrics)
        fresh.chmod(0o755)
        _install(fresh, folder)
    finally:
        if fresh.exists():
            shutil.rmtree(fresh)
    return folder


def _install(fresh: Path, folder: Path) -> None:
    """Move a complete folder to its place; what was there comes back should that fail."""
    if not folder.exists():
        os.replace(fresh, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    try:
        os.replace(folder, old)
        os.replace(fresh, folder)
    finally:
        if not folder.exists():
            os.replace(old, folder)
        else:
            shutil.rmtree(old)


def check_free(folder: str | Path, *, overwrite: bool) -> None:
    """Raise RunExists when a prior may not be written to `folder`."""
    folder = Path(folder).expanduser()
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise RunExists(f"folder: {folder} is not empty; choose another, or pass overwrite=True (--overwrite)")
    if not (folder / "config.json").is_file() or "format_version" not in (folder / "config.json").read_text():
        raise RunExists(f"folder: {folder} holds something else than a prior and is never replaced; choose another")


def read_folder(folder: str | Path, kind: str) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Return (folder, config, metrics) after checking the format, the class and the hash of each file.

    Raises:
        PriorMismatch: no prior of class `kind` in a format that this version reads.
        HashMismatch: a file is not the one that was written, or is not named in the config.
    """
    folder = Path(folder).expanduser()
    try:
        config = json.loads((folder / "config.json").read_text())
        metrics = json.loads((folder / "metrics.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise PriorMismatch(f"folder: {folder} holds no readable prior ({error}); fit one and save it there") from error
    if not isinstance(config, dict) or not isinstance(metrics, dict):
        raise PriorMismatch(f"folder: {folder} holds no prior, its config.json is none; fit one and save it there")
    # priors of before the checksum have none
    if config.pop("sha256", None) not in (None, _checksum(config)):
        raise HashMismatch(f"folder: {folder / 'config.json'} was altered after it was saved; fit or copy it again")
    if config.get("format_version") != FORMAT_VERSION or config.get("class") != kind:
        raise PriorMismatch(
            f"folder: {folder} holds {config.get('class')} in format {config.get('format_version')}, expected "
            f"{kind} in format {FORMAT_VERSION}; give the folder of such a prior, or fit it with this version"
        )
    own = {str(file.relative_to(folder)) for file in folder.rglob("*.safetensors") if not _of_another(file, folder)}
    for name in sorted(own - set(config["files"])):
        raise HashMismatch(f"folder: {folder / name} is not named in its config.json; fit or copy the prior again")
    for name, expected in config["files"].items():
        leads_out = Path(name).is_absolute() or ".." in Path(name).parts
        if leads_out or not (folder / name).is_file() or hash_file(folder / name) != expected:
            raise HashMismatch(
                f"folder: {folder / name} is missing or was altered after it was saved; fit or copy it again"
            )
    return folder, config, metrics


def _of_another(file: Path, folder: Path) -> bool:
    """Tell whether a file belongs to a prior that lies inside of `folder` and has a config of its own."""
    return any((place / "config.json").is_file() for place in file.parents if folder in place.parents)


def typed_errors(load: Callable[Concatenate[Any, P], Loaded]) -> Callable[Concatenate[Any, P], Loaded]:
    """Let what a damaged folder makes a loader raise be a CorruptFile."""

    @wraps(load)
    def checked(cls: Any, *args: P.args, **kwargs: P.kwargs) -> Loaded:
        try:
            return load(cls, *args, **kwargs)
        except LagoError:
            raise
        except UNREADABLE as error:
            raise CorruptFile(f"folder: it is damaged ({error!r}); fit or copy the prior again") from error

    return checked


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, from whatever device they are on."""
    from safetensors.torch import save_file

    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file to the CPU."""
    from safetensors.torch import load_file

    return load_file(path)


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise UnsupportedArgument when a value is none of the choices."""
    if value not in choices:
        raise UnsupportedArgument(f"{name}: {value!r}; choose one of {', '.join(repr(c) for c in choices)}")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def _checksum(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
