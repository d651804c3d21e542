"""The latent cache: rows of numbers by (prior, instruction, observation), in memory and in a file.

Native side: csrc/latent_cache. Test: pytest tests/priors/test_cache.py. Bench: bench/bench_latent_cache.py
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lago_fast import _C
from lago_fast.cores import usable_cores
from lago_fast.errors import NonFiniteError, PriorMismatch, UnsupportedArgument, check_whole
from lago_fast.priors.cache_store import Store
from lago_fast.priors.folder import check_choice

RowFormat = Literal["float32", "float16", "int8"]
MOST_BYTES, MOST_THREADS = 1 << 50, 1024  # beyond which a number is a mistake


@dataclass(frozen=True)
class CacheConfig:
    """What is kept and how: everything about a cache apart from whose answers it keeps.

    Args:
        budget_bytes: of the resident rows, with their keys and index; the least recently found make room.
        row_format: of a stored row; "int8" has a scale for each part of each row.
        resolution: observations that round to the same multiples of it are one key, in the observations' units;
            None: all of their bits count.
        path: the file of the persistent tier; None: there is none.
        file_bytes: that this file never grows beyond.
        threads: at most, for one call; None: as many as there are cores.
        kl_share: of the rows that are also put to the exact prior, to measure what rounding changes.
        kl_rows: that are put to it at once.

    Raises UnsupportedArgument for what cannot be honoured.
    """

    budget_bytes: int = 1 << 30
    row_format: RowFormat = "float16"
    resolution: float | None = None
    path: str | Path | None = None
    file_bytes: int = 1 << 36
    threads: int | None = None
    kl_share: float = 0.01
    kl_rows: int = 32

    def __post_init__(self) -> None:
        """Refuse what cannot be honoured."""
        check_choice("row_format", self.row_format, ("float32", "float16", "int8"))
        # below the least a quotient could overflow, and different observations would be one key
        if self.resolution is not None and not 1e-30 <= self.resolution <= 1e30:
            raise UnsupportedArgument(f"resolution: {self.resolution}; give 1e-30 to 1e30, or None for exact keys")
        if self.resolution is not None:
            object.__setattr__(self, "resolution", float(self.resolution))  # 1 and 1.0 are the same keys
        threads = 1 if self.threads is None else self.threads
        check_whole(1, budget_bytes=self.budget_bytes, threads=threads, kl_rows=self.kl_rows)
        check_whole(1 << 20, file_bytes=self.file_bytes)
        if max(self.budget_bytes, self.file_bytes) > MOST_BYTES or threads > MOST_THREADS:
            raise UnsupportedArgument(
                f"budget_bytes, file_bytes, threads: {self.budget_bytes}, {self.file_bytes} and {threads}; give at "
                f"most {MOST_BYTES:,}, and {MOST_THREADS:,} threads"
            )
        if not 0 <= self.kl_share <= 1:
            raise UnsupportedArgument(f"kl_share: {self.kl_share}; give 0 to 1")


class LatentCache:
    """Rows of numbers by (salt, instruction, observation), in memory and, with a path, in a file.

    A lookup that memory cannot answer goes to the file, and what is found there becomes resident. Threads may
    share the cache. A row that is there is never replaced: while nothing is evicted, a key always has the answer
    that it had first.

    Args:
        config: sizes and formats.
        salt: the digest of everything else that decides a row; part of every key.
        parts: the widths that a row is made of; Z is their sum.
        state_dim: S, the width of an observation.
        instructions: the texts that an instruction id indexes; the text is part of the key, not the id.

    Raises:
        UnsupportedArgument: not one row fits into `budget_bytes`; other arguments that cannot be honoured.
        MissingExtra, CacheMismatch, CacheCorrupt, CacheFull: see `cache_store.Store`.
    """

    def __init__(
        self, config: CacheConfig, *, salt: str, parts: Sequence[int], state_dim: int, instructions: Sequence[str]
    ) -> None:
        self.config, self.parts, self.state_dim = config, tuple(parts), state_dim
        if not self.parts or min(self.parts) < 1 or state_dim < 1:
            raise UnsupportedArgument(f"parts, state_dim: {self.parts} and {state_dim}; give widths of at least 1")
        self.width = sum(self.parts)
        self._threads = config.threads or usable_cores()
        shards, portable = 16, False
        try:
            self._table = _C.LatentTable(
                getattr(_C.RowFormat, config.row_format),
                self.parts,
                config.budget_bytes,
                shards,
                self._threads,
                portable,
            )
        except ValueError as error:
            raise UnsupportedArgument(
                f"budget_bytes: {config.budget_bytes:,} bytes do not hold one row of {self.width} in "
                f"{config.row_format}; give at least the rows of one batch"
            ) from error
        except MemoryError as error:
            raise UnsupportedArgument(
                f"budget_bytes: this machine does not give {config.budget_bytes:,} bytes; give fewer"
            ) from error
        low, high = _C.hash_bytes(json.dumps([salt, config.resolution]).encode(), (0, 0))
        seeds = [_signed(half) for text in instructions for half in _C.hash_bytes(text.encode(), (low, high))]
        self._seeds = torch.tensor(seeds, dtype=torch.int64).view(-1, 2)
        self._store: Store | None = None
        self._file_hits = 0
        if config.path is not None:
            about = {
                "salt": salt,
                "row_format": config.row_format,
                "parts": list(self.parts),
                "state_dim": state_dim,
                "resolution": config.resolution,
            }
            self._store = Store(config.path, about, row_bytes=self._table.row_bytes, file_bytes=config.file_bytes)

    @property
    def capacity(self) -> int:
        """Return how many rows fit into the budget."""
        return self._table.capacity

    def keys(self, state: Tensor, instruction_id: Tensor) -> Tensor:
        """Return the keys [B, 2] int64 of observations [B, S] float32 and instruction ids [B] int64.

        Raises:
            PriorMismatch: another width, another number of ids, or an id of no instruction.
            NonFiniteError: a NaN or an infinity.
            UnsupportedArgument: another dtype.
        """
        if state.ndim != 2 or state.shape[1] != self.state_dim or instruction_id.shape != state.shape[:1]:
            raise PriorMismatch(
                f"state {tuple(state.shape)}, instruction_id {tuple(instruction_id.shape)}: this cache is for rows of "
                f"{self.state_dim} with one id each; give it the raw state columns only"
            )
        if state.dtype != torch.float32 or instruction_id.dtype != torch.int64:
            raise UnsupportedArgument(
                f"state, instruction_id: {state.dtype} and {instruction_id.dtype}; give float32 and int64"
            )
        state, instruction_id = state.detach().cpu().contiguous(), instruction_id.cpu().contiguous()
        keys = torch.empty(len(state), 2, dtype=torch.int64, device="cpu")
        try:
            bad = _C.hash_observations(
                state.data_ptr(),
                instruction_id.data_ptr(),
                self._seeds.data_ptr(),
                keys.data_ptr(),
                rows=len(state),
                width=self.state_dim,
                instructions=len(self._seeds),
                resolution=self.config.resolution or 0.0,
                threads=self._threads,
            )
        except ValueError as error:
            raise PriorMismatch(
                f"instruction_id: outside of 0..{len(self._seeds) - 1}, the instructions of this cache; "
                "make one for all texts"
            ) from error
        if bad < len(state):
            raise NonFiniteError(
                f"state: NaN or infinity in row {bad} of {len(state)}; look at the environment that produced it"
            )
        return keys

    def lookup(
        self, state: Tensor, instruction_id: Tensor, *, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the rows [B, Z] float32 as they are stored, zeros where there is none, and hit [B] bool.

        Args:
            state: [B, S] float32.
            instruction_id: [B] int64.
            out: what an earlier call returned, to be written over: fresh memory costs more than a large lookup.

        Raises what `keys` does; UnsupportedArgument for another `out`; CacheCorrupt when the file's row is not the
        one that was written.
        """
        return self.lookup_keys(self.keys(state, instruction_id), out=out)

    def insert(self, state: Tensor, instruction_id: Tensor, rows: Tensor) -> Tensor:
        """Store rows [B, Z] float32 under keys that are new; return what each key now answers, [B, Z] float32.

        Raises, beside what `keys` does:
            UnsupportedArgument: more distinct rows than the budget holds, or numbers beyond float16.
            NonFiniteError: NaN or infinity in a row; minus infinity is a log-probability.
            CacheFull, CacheCorrupt: of the file; nothing is stored then.
        """
        return self.insert_keys(self.keys(state, instruction_id), rows)

    def lookup_keys(self, keys: Tensor, *, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return what `lookup` does, for keys [B, 2] that `keys` returned."""
        keys = _checked(keys)
        rows, hit = out or (_floats(len(keys), self.width), torch.empty(len(keys), dtype=torch.bool, device="cpu"))
        for given, dtype, shape in ((rows, torch.float32, (len(keys), self.width)), (hit, torch.bool, (len(keys),))):
            if given.shape != shape or given.dtype != dtype or given.is_cuda or not given.is_contiguous():
                raise UnsupportedArgument(
                    f"out: give contiguous CPU tensors, [{len(keys)}, {self.width}] float32 and [{len(keys)}] bool"
                )
        self._table.lookup(keys.data_ptr(), rows.data_ptr(), hit.data_ptr(), rows=len(keys))
        if self._store is not None and not bool(hit.all()):
            missed = (~hit).nonzero().flatten()
            first, inverse = distinct(keys[missed])
            asked = keys[missed[first]].contiguous()
            there, encoded = self._store.get(asked)
            if len(there):
                found = torch.full((len(asked),), -1)
                found[there] = torch.arange(len(there))
                place = found[inverse]
                rows[missed[place >= 0]] = self._keep(asked[there], encoded)[place[place >= 0]]
                hit[missed[place >= 0]] = True
                self._file_hits += int((place >= 0).sum())
        return rows, hit

    def insert_keys(self, keys: Tensor, rows: Tensor) -> Tensor:
        """Do what `insert` does, for keys [B, 2] that `keys` returned."""
        if rows.shape != (len(keys), self.width) or rows.dtype != torch.float32:
            raise UnsupportedArgument(
                f"rows: {tuple(rows.shape)} {rows.dtype}; give float32 [{len(keys)}, {self.width}]"
            )
        first, inverse = distinct(_checked(keys))
        if len(first) > self.capacity:
            needed = self.config.budget_bytes * len(first) // self.capacity + 1
            raise UnsupportedArgument(
                f"budget_bytes: {self.config.budget_bytes:,} hold {self.capacity:,} rows and this batch has "
                f"{len(first):,}; give at least {needed:,}, or query smaller batches"
            )
        keys, rows = keys[first].contiguous(), rows.detach().cpu()[first].contiguous()
        encoded = torch.empty(len(keys), self._table.row_bytes, dtype=torch.uint8, device="cpu")
        bad, too_large = self._table.encode(rows.data_ptr(), encoded.data_ptr(), rows=len(keys))
        if too_large:
            raise UnsupportedArgument(
                f"row_format: row {bad} has a number of {float(rows[bad].abs().max()):.3g}, beyond float16; "
                'take row_format="float32"'
            )
        if bad < len(keys):
            raise NonFiniteError(f"rows: NaN or infinity in row {bad}; the prior's answer is no distribution")
        if self._store is not None:
            encoded = self._store.put(keys, encoded)
        return self._keep(keys, encoded)[inverse]

    def _keep(self, keys: Tensor, encoded: Tensor) -> Tensor:
        """Make encoded rows of distinct keys resident; return them decoded."""
        keys, encoded = keys.contiguous(), encoded.contiguous()
        stored = _floats(len(keys), self.width)
        self._table.insert(keys.data_ptr(), encoded.data_ptr(), stored.data_ptr(), rows=len(keys))
        return stored

    def stats(self) -> dict[str, int]:
        """Return counts since the start (hits, misses, inserted, evicted: of the resident tier; file_hits) and
        what there is now (rows and bytes resident, capacity in rows, file_rows)."""
        return {
            **self._table.stats(),
            "capacity": self.capacity,
            "file_hits": self._file_hits,
            "file_rows": 0 if self._store is None else len(self._store),
        }

    def clear(self) -> None:
        """Forget the resident rows; those in the file stay."""
        self._table.clear()

    def close(self) -> None:
        """Let go of the file; the cache must not be used afterwards."""
        if self._store is not None:
            self._store.close()


def distinct(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return where each distinct key of [n, 2] stands first, [u], and the number of each key in that list, [n]."""
    keys = keys.contiguous()
    first, inverse = torch.empty(2, len(keys), dtype=torch.int64, device="cpu").unbind()
    count = _C.distinct_keys(keys.data_ptr(), first.data_ptr(), inverse.data_ptr(), rows=len(keys))
    return first[:count], inverse


def _checked(keys: Tensor) -> Tensor:
    """Return keys as native code reads them, or refuse what are none."""
    if keys.dim() != 2 or keys.shape[1] != 2 or keys.dtype != torch.int64 or not keys.is_cpu:
        raise UnsupportedArgument(f"keys: {keys.dtype} {list(keys.shape)} on {keys.device}; give what `keys` returned")
    return keys.contiguous()


def _floats(rows: int, width: int) -> Tensor:
    """Return room for rows that native code writes, whatever torch's default dtype and device are."""
    return torch.empty(rows, width, dtype=torch.float32, device="cpu")


def _signed(half: int) -> int:
    return half - (1 << 64) if half >> 63 else half
