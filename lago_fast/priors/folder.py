"""The prior folder: written whole or not at all, and every tensor file checked against its hash when read.

A folder holds `config.json` (format, class, configuration, hashes of the files beside it), safetensors and
`metrics.json`.
Test: pytest tests/priors/test_latent_action.py tests/priors/test_amortised.py
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lago_fast.errors import HashMismatch, PriorMismatch, RunExists, UnsupportedArgument
from lago_fast.priors.backbone import hash_file

FORMAT_VERSION = 1


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
        files = {str(f.relative_to(fresh)): hash_file(f) for f in sorted(fresh.rglob("*.safetensors"))}
        _write_json(fresh / "config.json", {"format_version": FORMAT_VERSION, **config, "files": files})
        _write_json(fresh / "metrics.json", metrics)
        fresh.chmod(0o755)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
            os.replace(folder, old)
            os.replace(fresh, folder)
            shutil.rmtree(old)
        else:
            os.replace(fresh, folder)
    finally:
        if fresh.exists():
            shutil.rmtree(fresh)
    return folder


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
        HashMismatch: a file is not the one that was written.
    """
    folder = Path(folder).expanduser()
    try:
        config = json.loads((folder / "config.json").read_text())
        metrics = json.loads((folder / "metrics.json").read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError) as error:
        raise PriorMismatch(f"folder: {folder} holds no readable prior ({error}); fit one and save it there") from error
    if config.get("format_version") != FORMAT_VERSION or config.get("class") != kind:
        raise PriorMismatch(
            f"folder: {folder} holds {config.get('class')} in format {config.get('format_version')}, expected "
            f"{kind} in format {FORMAT_VERSION}; give the folder of such a prior, or fit it with this version"
        )
    for name, expected in config["files"].items():
        if not (folder / name).is_file() or hash_file(folder / name) != expected:
            raise HashMismatch(
                f"folder: {folder / name} is missing or was altered after it was saved; fit or copy it again"
            )
    return folder, config, metrics


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
