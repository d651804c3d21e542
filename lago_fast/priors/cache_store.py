"""The persistent tier of the latent cache: rows in one LMDB file, for the next run and for a second process.

    b"\\0"        the transaction that committed last
    b"header"    JSON of everything that decides what a row means, and a checksum
    16 bytes     key of a row -> the encoded row, and a checksum of it and its key

LMDB trusts its file: a truncated or altered one can crash the process. So the whole file is verified when it is
opened, which takes seconds per GB, and every row again when it is read. Whoever opens it finds every row committed,
or gets CacheCorrupt. Beyond that are what another program writes into the file while it is open, damage made to
deceive, and earlier states of the whole file: a backup, or what a power cut leaves, is a cache of the rows that it
had then. LMDB: Chu, "MDB: A Memory-Mapped Database and Backend for OpenLDAP", 2011.
Test: pytest tests/priors/test_cache.py
"""

import errno
import json
import os
import struct
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lago_fast import _C
from lago_fast.errors import CacheCorrupt, CacheFull, CacheMismatch, MissingExtra, UnsupportedArgument

FORMAT_VERSION = 1

_COMMIT, _HEADER = b"\0", b"header"  # the first is the least of all keys: it stands in the leftmost leaf
_KEY_BYTES, _SEAL_BYTES = 16, 8
# EIO: of a commit of which only a part still found room
_NO_ROOM = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO))

# LMDB 0.9 on 64 bits: page header, meta page (of both trees the 7 figures), page header of a tree's page
_META = struct.Struct("=16x II QQ IHHQQQQQ IHHQQQQQ QQ")
_PAGE = struct.Struct("=10x HHHH")  # flags, lower, upper, first node
_NODE = struct.Struct("=HHHH")  # size or page in two halves, flags or the page's rest, size of the key
_BRANCH, _LEAF = 1, 2
_EMPTY = 2**64 - 1
_FLAGS = (0x4008, 0)  # of both trees: no folder and integer keys, none


class Store:
    """Encoded rows by key, in a file that several threads and processes may share.

    Args:
        path: the file, made when it is not there; `path`-lock appears beside it.
        about: JSON-able; a file with another one is refused.
        row_bytes: of an encoded row.
        file_bytes: the file never grows beyond; of processes that share it the largest counts.

    Raises:
        MissingExtra: lmdb is not installed.
        CacheMismatch: the file is for another `about`.
        CacheCorrupt: the file is no cache, truncated or altered.
        CacheFull: no room to make the file.
        UnsupportedArgument: the path cannot be written, or is open in this process already.
    """

    def __init__(self, path: str | Path, about: Mapping[str, Any], *, row_bytes: int, file_bytes: int) -> None:
        self.path = Path(path).expanduser().absolute()
        self.about = {"format_version": FORMAT_VERSION, **about}
        self.row_bytes, self.file_bytes = row_bytes, file_bytes
        self._alone = threading.RLock()  # whoever holds it and forks must get it once more
        self._env: Any = None  # also of a process that has yet to open the file for itself
        with _forking:
            _stores.add(self)
        with self._alone:
            with self._readable_errors():
                if not self.path.exists():
                    self._make()
                if not self.path.is_file():
                    raise UnsupportedArgument(f"path: {self.path} is not a file; give the name of one")
                _read_metas(self.path)
                self._env = self._open(self.path)
            try:
                self._check()
            except BaseException:
                self._env.close()
                raise

    def __len__(self) -> int:
        """Return how many rows are committed."""
        with self._alone:
            return self._count()

    def _count(self) -> int:
        with self._transaction(write=False) as transaction:
            entries: int = transaction.stat()["entries"]
        return entries - 2

    def get(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return which of the keys [n, 2] are there, [f] int64, and their encoded rows, [f, row_bytes] uint8.

        Raises CacheCorrupt when a row is not the one that was written.
        """
        with self._alone:
            return self._get(keys)

    def _get(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        with self._transaction(write=False) as transaction:
            return self._read(transaction, keys)

    def put(self, keys: Tensor, encoded: Tensor) -> Tensor:
        """Commit the rows whose keys are new, all or none; return what each key now holds.

        Args:
            keys: [n, 2] int64, distinct.
            encoded: [n, row_bytes] uint8.

        Raises:
            CacheFull: `file_bytes` or the disk is full; what was committed before stays readable.
            CacheCorrupt: see `get`.
        """
        sealed = torch.cat([encoded, _seals(keys, encoded)], dim=1).numpy()
        with self._alone:
            return self._put(keys, encoded, sealed)

    def _put(self, keys: Tensor, encoded: Tensor, sealed: np.ndarray) -> Tensor:
        with self._transaction(write=True) as transaction:
            there, kept = self._read(transaction, keys)
            new = torch.ones(len(keys), dtype=torch.bool)
            new[there] = False
            if bool(new.any()):
                names = _names(keys)
                rows = [(names[i], sealed[i].data) for i in new.nonzero().flatten().tolist()]
                transaction.cursor().putmulti(rows)
                transaction.put(_COMMIT, transaction.id().to_bytes(8, "little"))
        return encoded.index_put((there,), kept)

    def close(self) -> None:
        """Let go of the file."""
        with self._alone:
            if self._env is not None:
                self._env.close()

    # the file

    def _open(self, path: Path) -> Any:
        import lmdb

        # pages are synced before the page that names them is written, and that one later: a power cut may take the
        # last transaction, never the file
        return lmdb.open(str(path), subdir=False, map_size=self.file_bytes, metasync=False, mode=0o644)

    def _make(self) -> None:
        """Write a file with the header beside its place, then link it there: nobody sees half a file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{self.path.name}.", dir=self.path.parent) as folder:
            fresh = Path(folder) / "fresh"
            with self._open(fresh) as env, env.begin(write=True) as transaction:
                transaction.put(_HEADER, _sealed_json(self.about))
                transaction.put(_COMMIT, transaction.id().to_bytes(8, "little"))
            try:
                os.link(fresh, self.path)
            except FileExistsError:
                return  # another process was faster, and its file is as good

    def _check(self) -> None:
        from lmdb import verify

        # under the write lock: no other process changes the file while it is read
        with self._transaction(write=True) as transaction:
            try:
                problems = verify.verify(str(self.path), subdir=False)
            except verify.VerifyError as error:
                problems = [str(error)]
            if problems:
                raise self._corrupt(f"{problems[0]}, {len(problems)} problems in all")
            for named, committed in _commits(self.path):
                if named != committed:
                    raise self._corrupt(f"a meta page names transaction {named}, its tree {committed}")
            found = self._about(transaction.get(_HEADER))
            if found == self.about:
                self._check_rows(transaction)
        differing = sorted(n for n in {*found, *self.about} if found.get(n) != self.about.get(n))
        if differing:
            said = "; ".join(f"{n} {found.get(n)!r} in the file, {self.about.get(n)!r} here" for n in differing)
            raise CacheMismatch(
                f"path: {self.path} was written for another cache ({said}); give each prior and setting a file of "
                "its own, or delete this one"
            )

    def _about(self, header: bytes | None) -> dict[str, Any]:
        try:
            found = json.loads((header or b"")[:-_SEAL_BYTES])
        except ValueError:
            found = None
        if not isinstance(found, dict) or header != _sealed_json(found):
            raise self._corrupt("no readable header")
        return found

    def _check_rows(self, transaction: Any) -> None:
        """Hold every row to its checksum: an altered key would hide its row from lookups."""
        rows = (item for item in self._searched(transaction) if item[0] not in (_COMMIT, _HEADER))
        while some := dict(islice(rows, 4096)):
            if any(len(name) != _KEY_BYTES for name in some):
                raise self._corrupt("a key of another width")
            names = torch.frombuffer(bytearray().join(some), dtype=torch.int64).view(-1, 2)
            self._unseal(names, list(some.values()))

    def _searched(self, transaction: Any) -> Iterator[tuple[bytes, bytes]]:
        """Yield what a walk through the leaves finds, once a search from the root has found it as well.

        An altered key in a branch page hides rows from searches only, and `verify` walks. A cursor's search would
        not do: it looks into the leaf where the cursor stands before it begins at the root.
        """
        for name, value in transaction.cursor():
            if transaction.get(name) != value:
                raise self._corrupt("a row that no lookup finds")
            yield name, value

    def _read(self, transaction: Any, keys: Tensor) -> tuple[Tensor, Tensor]:
        names = _names(keys)
        found: dict[bytes, bytes] = dict(transaction.cursor().getmulti(names))
        there = torch.tensor([i for i, name in enumerate(names) if name in found], dtype=torch.int64)
        return there, self._unseal(keys[there], [found[names[i]] for i in there.tolist()])

    def _unseal(self, keys: Tensor, values: list[bytes]) -> Tensor:
        """Return the encoded rows [n, row_bytes] in values of the file."""
        width = self.row_bytes + _SEAL_BYTES
        if any(len(value) != width for value in values):
            raise self._corrupt("a row of another width")
        if not values:
            return torch.empty(0, self.row_bytes, dtype=torch.uint8)
        rows = torch.frombuffer(bytearray().join(values), dtype=torch.uint8).view(-1, width)
        encoded = rows[:, : self.row_bytes].contiguous()
        if not torch.equal(_seals(keys, encoded), rows[:, self.row_bytes :]):
            raise self._corrupt("a row does not have its checksum")
        return encoded

    # transactions

    @contextmanager
    def _transaction(self, *, write: bool) -> Iterator[Any]:
        """Begin a transaction, to be used by who holds `_alone` until nothing refers to it any more."""
        import lmdb

        with self._readable_errors():
            if self._env is None:
                self._env = self._open(self.path)
            try:
                begun = self._env.begin(write=write)
            except lmdb.MapResizedError:
                self._env.set_mapsize(0)  # another process gave more file_bytes; 0: what the file says
                begun = self._env.begin(write=write)
            with begun as transaction:
                yield transaction

    @contextmanager
    def _readable_errors(self) -> Iterator[None]:
        try:
            import lmdb
        except ImportError as error:
            raise MissingExtra("path: a cache file needs lmdb; pip install 'lago_fast[llm]'") from error
        try:
            yield
        except lmdb.MapFullError as error:
            raise CacheFull(
                f"path: {self.path} has reached its {self.file_bytes:,} bytes and keeps every row committed so far; "
                "give a larger file_bytes, or go on without a path"
            ) from error
        except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError, lmdb.PageNotFoundError) as error:
            raise self._corrupt(str(error)) from error
        except (lmdb.Error, OSError) as error:
            if any(said in str(error) for said in _NO_ROOM):
                raise CacheFull(
                    f"path: no room on the disk of {self.path}, or it failed ({error}); every row committed so far is "
                    "kept; free some, or give a path elsewhere"
                ) from error
            raise UnsupportedArgument(
                f"path: {self.path} cannot be used ({error}); give a path on a local disk that this process may "
                "write and has not opened yet: share the cache instead"
            ) from error

    def _corrupt(self, why: str) -> CacheCorrupt:
        return _corrupt(self.path, why)


# LMDB must not be used across a fork: the child forgets the parent's and opens the file for itself. It can only where
# no transaction of another thread is left to it, which would never end there; so a fork waits for those under way.
_stores: "weakref.WeakSet[Store]" = weakref.WeakSet()
_forking = threading.RLock()
_held: list[Store] = []


def _before_fork() -> None:
    _forking.acquire()
    for store in list(_stores):
        store._alone.acquire()
        _held.append(store)


def _after_fork() -> None:
    while _held:
        _held.pop()._alone.release()
    _forking.release()


def _after_fork_in_child() -> None:
    for store in _held:
        store._env = None
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


def _corrupt(path: Path, why: str) -> CacheCorrupt:
    return CacheCorrupt(
        f"path: {path} is no latent cache, or was truncated or altered ({why}); delete it and its -lock: the prior "
        "fills a new one"
    )


def _names(keys: Tensor) -> list[bytes]:
    content = keys.numpy().tobytes()
    return [content[i : i + _KEY_BYTES] for i in range(0, len(content), _KEY_BYTES)]


def _seals(keys: Tensor, encoded: Tensor) -> Tensor:
    """Return the checksum of each row and its key, uint8 [n, 8]."""
    keys, seals = keys.contiguous(), torch.empty(len(keys), dtype=torch.int64, device="cpu")
    _C.seal_rows(keys.data_ptr(), encoded.data_ptr(), seals.data_ptr(), rows=len(keys), row_bytes=encoded.shape[1])
    return seals.view(torch.uint8).view(-1, _SEAL_BYTES)


def _sealed_json(about: Mapping[str, Any]) -> bytes:
    content = json.dumps(about, sort_keys=True).encode()
    return content + _C.hash_bytes(content, (0, 0))[0].to_bytes(_SEAL_BYTES, "little")


def _read_metas(path: Path) -> list[tuple[int, ...]]:
    """Return the two meta pages; CacheCorrupt when they are not LMDB's, or name pages far beyond the file."""
    metas: list[tuple[int, ...]] = []
    with path.open("rb") as file:
        for page in range(2):
            file.seek(page * metas[0][4] if metas else 0)
            content = file.read(_META.size)
            if len(content) < _META.size:
                break
            meta = _META.unpack(content)
            # `verify` takes flags of other trees for ours, and LMDB aborts the process over some
            if meta[:2] != (0xBEEFC0DE, 1) or (meta[5], meta[13]) != _FLAGS:
                break
            metas.append(meta)
        size = os.fstat(file.fileno()).st_size
    # the map would be as large as the pages that are named
    if len(metas) < 2 or any(meta[-2] * meta[4] > 2 * size + (1 << 32) for meta in metas):
        raise _corrupt(path, "its meta pages")
    return metas


def _commits(path: Path) -> Iterator[tuple[int, int]]:
    """Yield for both meta pages the transaction that it names, and the one that the tree below it does.

    An altered number could bring the tree of the transaction before to light, which is whole and lacks rows.
    """
    metas = _read_metas(path)
    page_size = metas[0][4]
    with path.open("rb") as file:
        for meta in metas:
            named, page, depth = meta[-1], meta[-3], meta[14]
            if page == _EMPTY:  # only beside the very first transaction
                yield named, 0 if max(m[-1] for m in metas) == 1 else -1
                continue
            yield named, _leftmost(file, page, page_size, depth)


def _leftmost(file: Any, page: int, page_size: int, depth: int) -> int:
    """Return the transaction in the leftmost leaf below `page`, -1 when there is none."""
    pages = os.fstat(file.fileno()).st_size // page_size
    for _ in range(depth):
        if page >= pages:
            return -1
        file.seek(page * page_size)
        content = file.read(page_size)
        try:
            flags, _lower, _upper, at = _PAGE.unpack_from(content)
            low, high, rest, key_size = _NODE.unpack_from(content, at)
        except struct.error:
            return -1
        if flags == _LEAF:
            key = content[at + _NODE.size : at + _NODE.size + key_size]
            value = content[at + _NODE.size + key_size :][: low | high << 16]
            return int.from_bytes(value, "little") if key == _COMMIT and len(value) == 8 else -1
        if flags != _BRANCH:
            return -1
        page = low | high << 16 | rest << 32
    return -1
