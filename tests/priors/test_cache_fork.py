"""Forks while other threads are within the cache: the child's copy answers, and the parent's goes on."""

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch

from lago_fast.priors.cache import CacheConfig, LatentCache

WIDTH, ROWS = 40, 20_000  # so many that a thread is mostly within a shard
HANGS_AFTER_S = 20


def open_cache(path):
    config = CacheConfig(1 << 24, "float32", path=path, file_bytes=1 << 26, threads=1)
    return LatentCache(config, salt="a prior", parts=[WIDTH], state_dim=1, instructions=["open"])


def fill(cache, start, count):
    """Insert the numbers from `start` on and see that they are there, with their rows."""
    state = torch.arange(start, start + count, dtype=torch.float32).view(-1, 1)
    ids, rows = torch.zeros(count, dtype=torch.int64), state.expand(-1, WIDTH).contiguous()
    assert torch.equal(cache.insert(state, ids, rows), rows)
    found, hit = cache.lookup(state, ids)
    assert bool(hit.all())
    assert torch.equal(found, rows)


def fork(work):
    """Do the work in a child, which is killed where it hangs."""
    child = os.fork()
    if child == 0:
        signal.alarm(HANGS_AFTER_S)
        code = 1
        try:
            work()
            code = 0
        finally:
            if code:
                traceback.print_exc()
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


def fork_beside(busy, work, forks):
    """Fork while another thread is busy all the time; what it raises goes to the standard error."""
    stop = threading.Event()

    def run():
        while not stop.is_set():
            busy()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for n in range(forks):
            time.sleep(0.003 * (n % 7))
            fork(work)
    finally:
        stop.set()
        thread.join()


def memory(_):
    cache = open_cache(None)
    fill(cache, 0, ROWS)
    state, ids = torch.arange(float(ROWS)).view(-1, 1), torch.zeros(ROWS, dtype=torch.int64)
    keys, out = cache.keys(state, ids), cache.lookup(state, ids)
    # a child that gets every shard has seen each of them unlocked
    fork_beside(lambda: cache.lookup_keys(keys, out=out), lambda: fill(cache, ROWS, 400), forks=40)
    fill(cache, 0, ROWS)


def file(folder):
    cache, numbers = open_cache(folder / "cache"), iter(range(0, 1 << 24, 50))

    def at_work_and_gone():
        cache.clear()
        fill(cache, 1 << 23, 20)
        cache.close()

    fill(cache, 0, 50)  # torch's own locks, of each operation's first use, are not looked at here
    fork_beside(lambda: fill(cache, next(numbers), 50), at_work_and_gone, forks=15)
    fork(cache.close)  # of a child that never asked
    fill(cache, 0, 50)
    cache.close()


def transaction(folder):
    cache, other = open_cache(folder / "cache"), open_cache(folder / "other")
    fill(other, 0, 10)
    read, within = cache._store._read, threading.Event()

    def slow(*args):
        within.set()
        time.sleep(0.3)
        return read(*args)

    cache._store._read = slow
    thread = threading.Thread(target=fill, args=(cache, 0, 10))
    thread.start()
    assert within.wait(HANGS_AFTER_S)

    def both():
        cache._store._read = read
        for one in (cache, other):
            one.clear()
            fill(one, 0, 30)

    fork(both)
    thread.join()
    assert cache.stats()["file_rows"] == other.stats()["file_rows"] == 30


SCENARIOS = {scenario.__name__: scenario for scenario in (memory, file, transaction)}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_fork_while_another_thread_is_within(scenario, tmp_path):
    # in a process of its own, which holds no other threads than these
    command = [sys.executable, __file__, scenario, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")


if __name__ == "__main__":
    torch.set_num_threads(1)
    SCENARIOS[sys.argv[1]](Path(sys.argv[2]))
