"""Reading a Stable-Baselines3 zip without running code from it.

Its `data` is JSON whose entries may be pickles. They are read by an unpickler that knows a written list of names;
what they build is handed to Stable-Baselines3 as `custom_objects`, so that its own unpickler never sees them. Weights
are read by torch with weights_only=True.
Test: pytest tests/algorithms/test_safe_load.py; make fuzz
"""

import base64
import binascii
import io
import json
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

from lago_fast.algorithms.safe_pickle import UnpicklingError, read_pickle
from lago_fast.errors import CorruptFile

MAX_DATA_BYTES = 64 * 2**20  # of the JSON; a model's is a few kilobytes, a callback's buffers at most megabytes
MAX_BYTES = 32 * 2**30  # of all entries, unpacked
MAX_RATIO = 1000  # unpacked to packed, of an entry above MIN_SUSPECT_BYTES; weights do not shrink like that
MIN_SUSPECT_BYTES = 2**20
WEIGHTS = ".pth"  # what torch saved
# what Python's reader of zips raises at a damaged one
UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, struct.error),
    *(ValueError, EOFError, RuntimeError, OverflowError),
)
# what Stable-Baselines3, torch and a model's constructor raise at a file whose parts are whole but do not fit
MISFITS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    NotImplementedError,
    UnpicklingError,
    RuntimeError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
)


def safe_objects(path: str | Path | io.BufferedIOBase, given: dict[str, Any] | None) -> dict[str, Any]:
    """Return the pickled entries of a model file, unpickled without running code, and `given` over them.

    Args:
        path: the zip, with or without its suffix, or a file object.
        given: objects that the caller supplies for entries; those are not read.

    Raises:
        UntrustedPickle: an entry names something outside of safe_pickle's list.
        CorruptFile: no zip, no JSON, a pickle that cannot be read, or sizes that no model has.
        FileNotFoundError: there is no such file.
    """
    given = given or {}
    entries = _read_data(path)
    pickles = {
        name: entry[":serialized:"]
        for name, entry in entries.items()
        if isinstance(entry, dict) and ":serialized:" in entry and name not in given
    }
    return {**{name: _unpickle(name, text) for name, text in pickles.items()}, **given}


def _read_data(path: str | Path | io.BufferedIOBase) -> dict[str, Any]:
    file: Any = path
    if isinstance(path, str | Path):
        file = Path(path)
        if not file.exists():
            file = Path(f"{path}.zip")  # as Stable-Baselines3 finds it
    else:
        path.seek(0)
    try:
        with zipfile.ZipFile(file) as archive:
            _check_sizes(archive, path)
            damaged = archive.testzip()
            if damaged is not None:
                raise CorruptFile(f"path: {damaged} in {path} is damaged, its checksum is another; load an older file")
            for name in archive.namelist():
                if name.endswith(WEIGHTS):
                    _check_weights(name, archive.read(name), path)
            entries = json.loads(archive.read("data")) if "data" in archive.namelist() else {}
    except UNREADABLE as error:
        if isinstance(error, CorruptFile):
            raise
        raise CorruptFile(
            f"path: {path} is no model file of Stable-Baselines3 ({error}); save the model again"
        ) from error
    finally:
        if not isinstance(path, str | Path):
            path.seek(0)
    if not isinstance(entries, dict):
        raise CorruptFile(f"path: the data of {path} are no dictionary; save the model again")
    return entries


def _check_sizes(archive: zipfile.ZipFile, path: Any) -> None:
    infos = archive.infolist()
    for info in infos:
        too_dense = info.file_size > MIN_SUSPECT_BYTES and info.file_size > MAX_RATIO * max(info.compress_size, 1)
        if too_dense or (info.filename == "data" and info.file_size > MAX_DATA_BYTES):
            raise CorruptFile(
                f"path: {info.filename} in {path} unpacks from {info.compress_size:,} to {info.file_size:,} bytes, "
                "which no model needs; do not load it"
            )
    if sum(info.file_size for info in infos) > MAX_BYTES:
        raise CorruptFile(
            f"path: {path} unpacks to more than {MAX_BYTES:,} bytes, which no model needs; do not load it"
        )


def _check_weights(name: str, content: bytes, path: Any) -> None:
    """Refuse weights whose own zip torch never wrote: it stores everything as it is, and with the right checksums."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            packed = [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]
            damaged = packed[0] if packed else archive.testzip()
    except UNREADABLE as error:
        raise CorruptFile(f"path: {name} in {path} are no weights of torch ({error}); save the model again") from error
    if damaged is not None:
        raise CorruptFile(f"path: {damaged} of {name} in {path} is damaged or packed; load an older file")


def _unpickle(entry: str, text: Any) -> Any:
    try:
        content = base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise CorruptFile(f"path: the entry {entry!r} is no base64 ({error}); save the model again") from error
    return read_pickle(entry, content)
