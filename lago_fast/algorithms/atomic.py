"""Writing a file that is either whole or not there: beside its place, to the disk, then moved there.

Test: pytest tests/algorithms/test_atomic.py
"""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lago_fast.errors import NotSaved

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file that takes the place of `path` once it is written; if anything fails, `path` stands as it was.

    Args:
        path: of the file; its folder is made.

    Raises:
        NotSaved: the system could not write it.
    """
    fresh: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        fresh = Path(name)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        fresh.chmod(0o644)
        os.replace(fresh, path)
        _sync_folder(path.parent)
    except OSError as error:
        stands = "; the file of before stands" if path.exists() else ""
        remedy = "make room" if error.errno in FULL else "name a place that can be written to"
        raise NotSaved(f"path: {path} could not be written ({error.strerror or error}){stands}; {remedy}") from error
    finally:
        if fresh is not None and fresh.exists():
            fresh.unlink()


def _sync_folder(folder: Path) -> None:
    """Have the disk keep the new name too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
