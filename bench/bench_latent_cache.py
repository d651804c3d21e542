"""The latent cache against a Python dict of arrays: a million rows of 384 float16, looked up in batches.

Run: pytest bench/bench_latent_cache.py --benchmark-only
"""

import ctypes
import gc
import resource
import statistics
import time
from typing import NamedTuple

import lmdb
import numpy as np
import pytest
import torch

from lago_fast.priors.cache import CacheConfig, LatentCache

ROWS, WIDTH, STATE_DIM = 1_000_000, 384, 39
FILL = 10_000  # rows at once
ROUNDS, LARGE_ROUNDS = 40, 8


class Stores(NamedTuple):
    cache: LatentCache
    table: dict[tuple[int, bytes], np.ndarray]
    state: torch.Tensor  # [ROWS, STATE_DIM]
    ids: torch.Tensor  # [ROWS]
    memory_ratio: float  # of the cache, to rows times row size


def resident_bytes() -> int:
    """Return what the process holds, once the allocator has given back what is free."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def dict_lookup(table, state, ids, rows, hit):
    """Do what LatentCache.lookup does, as a user of a dict would write it."""
    rows.fill(0)
    hit.fill(False)
    for i, (number, row) in enumerate(zip(ids.tolist(), state.numpy(), strict=True)):
        found = table.get((number, row.tobytes()))
        if found is not None:
            rows[i], hit[i] = found, True


@pytest.fixture(scope="module")
def stores() -> Stores:
    generator = torch.Generator().manual_seed(0)
    state, ids = torch.randn(ROWS, STATE_DIM, generator=generator), torch.randint(2, (ROWS,), generator=generator)
    block = torch.randn(FILL, WIDTH, generator=generator)
    # the budget of exactly these rows, and 1 % because shards fill unevenly
    probe = LatentCache(CacheConfig(1 << 30), salt="", parts=[WIDTH], state_dim=STATE_DIM, instructions=["a", "b"])
    config = CacheConfig(int((1 << 30) / probe.capacity * ROWS * 1.01))
    before = resident_bytes()
    cache = LatentCache(config, salt="", parts=[WIDTH], state_dim=STATE_DIM, instructions=["a", "b"])
    table = {}
    for start in range(0, ROWS, FILL):
        # no two blocks alike, and no random numbers drawn for each
        cache.insert(state[start : start + FILL], ids[start : start + FILL], block + start / FILL)
    memory_ratio = (resident_bytes() - before) / (ROWS * WIDTH * 2)
    for start in range(0, ROWS, FILL):
        rows = (block + start / FILL).half().numpy()
        keys = zip(ids[start : start + FILL].tolist(), state[start : start + FILL].numpy(), strict=True)
        table.update({(i, s.tobytes()): row.copy() for (i, s), row in zip(keys, rows, strict=True)})
    gc.freeze()  # a million arrays are not to be looked through while lookups are timed
    return Stores(cache, table, state, ids, memory_ratio)


@pytest.mark.parametrize("batch", [64, 4096, 65536])
@pytest.mark.parametrize("hit_percent", [0, 50, 90, 99])
def test_lookup(benchmark, stores, hit_percent, batch):
    cache, table, state, ids, memory_ratio = stores
    assert cache.stats()["rows"] == ROWS
    generator = torch.Generator().manual_seed(hit_percent)

    def draw():
        pick = torch.randint(ROWS, (batch,), generator=generator)
        asked = state[pick]
        missing = torch.randperm(batch, generator=generator)[: round(batch * (1 - hit_percent / 100))]
        asked[missing] += 1
        return asked, ids[pick]

    # A cache that is wrong is not timed; and the two in turn, so that other work of the machine meets both.
    found = torch.empty(batch, WIDTH), torch.empty(batch, dtype=torch.bool)
    expected = torch.empty(batch, WIDTH), torch.empty(batch, dtype=torch.bool)
    views = [column.numpy() for column in expected]
    seconds = []
    for _ in range(ROUNDS if batch <= 4096 else LARGE_ROUNDS):
        query = draw()
        marks = [time.perf_counter()]
        cache.lookup(*query, out=found)
        marks.append(time.perf_counter())
        dict_lookup(table, *query, *views)
        marks.append(time.perf_counter())
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        seconds.append((marks[1] - marks[0], marks[2] - marks[1]))
    ours, theirs = (statistics.median(column) for column in zip(*seconds, strict=True))
    benchmark.extra_info.update(
        row_format=cache.config.row_format,
        width=WIDTH,
        rows=ROWS,
        batch=batch,
        hit_percent=hit_percent,
        threads=cache._threads,
        lookups_per_second=batch / ours,
        dict_lookups_per_second=batch / theirs,
        times_a_dict=statistics.median(b / a for a, b in seconds),
        memory_to_rows_times_row_size=memory_ratio,
        numpy=np.__version__,
        lmdb=lmdb.__version__,
    )
    benchmark.pedantic(cache.lookup, setup=lambda: (draw(), {"out": found}), rounds=LARGE_ROUNDS)
