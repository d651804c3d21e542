"""The persistent tier: kills, truncations, altered bytes, full disks, several processes and threads."""

import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lago_fast.errors import CacheCorrupt, CacheFull, CacheMismatch, MissingExtra, UnsupportedArgument
from lago_fast.priors.cache import CacheConfig, LatentCache
from tests.algorithms.test_safe_load import mutate

FILE_BYTES = 1 << 24
WIDTH = 40


def open_cache(path, *, salt="a prior", budget_bytes=1 << 20, row_format="float32", **settings):
    config = CacheConfig(budget_bytes, row_format, path=path, **{"file_bytes": FILE_BYTES, **settings})
    return LatentCache(config, salt=salt, parts=[WIDTH], state_dim=1, instructions=["open"])


def query(numbers):
    return torch.tensor(numbers, dtype=torch.float32).view(-1, 1), torch.zeros(len(numbers), dtype=torch.int64)


def row_of(numbers, version=0):
    """Return rows [n, WIDTH] that tell the key and the insertion."""
    column = torch.tensor(numbers, dtype=torch.float32).view(-1, 1)
    return column + torch.arange(WIDTH) / WIDTH + 1000.0 * version


def fill(cache, numbers, version=0):
    return cache.insert(*query(numbers), row_of(numbers, version))


def written(path, batches=12, size=25):
    """Write a file of several transactions; return its content and how many rows it has."""
    cache = open_cache(path)
    for batch in range(batches):
        fill(cache, range(batch * size, (batch + 1) * size))
    cache.close()
    return path.read_bytes(), batches * size


def newest(content):
    """Return where the meta page of the last transaction begins."""
    return max((0, 4096), key=lambda page: int.from_bytes(content[page + 144 : page + 152], "little"))


def nodes(content, page):
    """Return of the tree's page that begins at `page` where each node stands, the page below it and its key."""
    found = []
    for i in range(16, int.from_bytes(content[page + 12 : page + 14], "little"), 2):
        at = page + int.from_bytes(content[page + i : page + i + 2], "little")
        size = int.from_bytes(content[at + 6 : at + 8], "little")
        found.append((at, int.from_bytes(content[at : at + 6], "little"), content[at + 8 : at + 8 + size]))
    return found


def assert_all_or_refused(path, rows):
    """Every row of the file is right, or it is refused as corrupt; then it takes new rows, or is refused."""
    try:
        cache = open_cache(path)
    except CacheCorrupt:
        return "refused"
    except CacheMismatch:
        pytest.fail("altered, and taken for another prior's")
    try:
        numbers = range(rows)
        found, hit = cache.lookup(*query(numbers))
        assert bool(hit.all()), "rows are missing, and nothing was said"
        assert torch.equal(found, row_of(numbers)), "a wrong answer"
        fill(cache, range(rows, rows + 200))
        cache.clear()
        assert torch.equal(cache.lookup(*query(range(rows + 200)))[0], row_of(range(rows + 200)))
    except CacheCorrupt:
        return "refused"
    finally:
        cache.close()
    return "read"


def test_the_file_answers_what_memory_cannot_hold(tmp_path):
    cache = open_cache(tmp_path / "cache", budget_bytes=10_000)
    for start in range(0, 500, 10):
        fill(cache, range(start, start + 10))
    assert cache.stats()["evicted"] > 0
    rows, hit = cache.lookup(*query([*range(500), 7, 7, 10_000]))
    assert hit.tolist() == [True] * 502 + [False]
    assert torch.equal(rows[:502], row_of([*range(500), 7, 7]))
    cache.close()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"salt": "another prior"}, "salt 'a prior' in the file, 'another prior' here"),
        ({"row_format": "float16"}, "row_format 'float32' in the file"),
        ({"resolution": 0.5}, "resolution None in the file, 0.5 here"),
    ],
)
def test_a_file_of_another_prior_or_format_is_refused(tmp_path, changes, says):
    written(tmp_path / "cache", batches=1)
    with pytest.raises(CacheMismatch, match=f"{says}.*delete this one"):
        open_cache(tmp_path / "cache", **changes)
    cache = open_cache(tmp_path / "cache")  # the refusal let go of it
    assert cache.stats()["file_rows"] == 25
    cache.close()


def test_paths_that_cannot_be_used_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UnsupportedArgument, match="is not a file"):
        open_cache(tmp_path)
    cache = open_cache(tmp_path / "new" / "folder" / "cache")
    with pytest.raises(UnsupportedArgument, match="share the cache"):
        open_cache(tmp_path / "new" / "folder" / "cache")
    cache.close()
    (tmp_path / "text").write_text("not a cache " * 1000)
    with pytest.raises(CacheCorrupt, match="delete it"):
        open_cache(tmp_path / "text")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(MissingExtra, match=r"lago_fast\[llm\]"):
        open_cache(tmp_path / "other")


# damage


def test_truncated_anywhere_it_is_refused_or_whole(tmp_path):
    content, rows = written(tmp_path / "whole")
    generator = random.Random(0)
    pages = range(0, len(content), 4096)
    offsets = {0, 1, 15, 16, 17, 151, 152, *pages, *(p - 1 for p in pages[1:]), *(p + 1 for p in pages)}
    offsets |= {generator.randrange(len(content)) for _ in range(20)}
    outcomes = {}
    for offset in sorted(offsets):
        path = tmp_path / f"cut{offset}"
        path.write_bytes(content[:offset])
        outcomes[offset] = assert_all_or_refused(path, rows)
    assert outcomes[0] == outcomes[4096] == outcomes[8192] == "refused"
    path.write_bytes(content)
    assert assert_all_or_refused(path, rows) == "read"


def test_altered_anywhere_it_is_refused_or_whole(tmp_path):
    content, rows = written(tmp_path / "whole")
    generator = random.Random(0)
    metas = [page + i for page in (0, 4096) for i in range(152)]
    places = metas + [generator.randrange(8192, len(content)) for _ in range(120)]
    outcomes = []
    path = tmp_path / "altered"
    for place in places:
        altered = bytearray(content)
        altered[place] ^= 1 << generator.randrange(8)
        path.write_bytes(altered)
        (tmp_path / "altered-lock").unlink(missing_ok=True)
        outcomes.append(assert_all_or_refused(path, rows))
    assert {*outcomes} == {"refused", "read"}


def test_mutated_cache_files_are_refused_or_whole(tmp_path, request):
    content, rows = written(tmp_path / "whole", batches=4, size=10)
    rng, outcomes, path = random.Random(1), {"refused": 0, "read": 0}, tmp_path / "altered"
    for _ in range(request.config.getoption("--mutations")):
        path.write_bytes(mutate(content, rng))
        (tmp_path / "altered-lock").unlink(missing_ok=True)
        outcomes[assert_all_or_refused(path, rows)] += 1
    assert min(outcomes.values()) > 0


def test_a_transaction_that_vanished_is_noticed(tmp_path):
    """One bit turns the last transaction's number N into N - 2: the tree before it is whole, and lacks rows."""
    content, rows = written(tmp_path / "whole", batches=13)
    number = max(int.from_bytes(content[page + 144 : page + 152], "little") for page in (0, 4096))
    assert number & 2
    for page in (0, 4096):
        if int.from_bytes(content[page + 144 : page + 152], "little") == number:
            altered = content[: page + 144] + (number - 2).to_bytes(8, "little") + content[page + 152 :]
    (tmp_path / "altered").write_bytes(altered)
    with pytest.raises(CacheCorrupt, match="a meta page names transaction"):
        open_cache(tmp_path / "altered")
    assert assert_all_or_refused(tmp_path / "whole", rows) == "read"


@pytest.mark.parametrize("damage", ["zeros", "magic", "number", "root", "last page", "both swapped"])
@pytest.mark.parametrize("which", ["newer", "older"])
def test_a_damaged_meta_page_is_noticed(tmp_path, which, damage):
    """Of two meta pages LMDB takes the one with the higher number; without it rows would be missing."""
    content, _ = written(tmp_path / "whole", batches=4, size=10)
    page = newest(content) ^ (0 if which == "newer" else 4096)
    altered = bytearray(content)
    if damage == "zeros":
        altered[page : page + 4096] = bytes(4096)
    elif damage == "both swapped":
        altered[:8192] = content[4096:8192] + content[:4096]
    else:
        altered[page + {"magic": 16, "number": 144, "root": 128, "last page": 136}[damage]] ^= 6
    (tmp_path / "altered").write_bytes(altered)
    if (which, damage) == ("older", "last page"):  # nobody reads it
        assert assert_all_or_refused(tmp_path / "altered", 40) == "read"
    else:
        with pytest.raises(CacheCorrupt):
            open_cache(tmp_path / "altered")


@pytest.mark.parametrize("page", [0, 4096])
@pytest.mark.parametrize("tree", [44, 92])
def test_flags_of_another_tree_are_refused(tmp_path, page, tree):
    """LMDB aborts the process over some, as DUPSORT for the free pages."""
    content, _ = written(tmp_path / "whole", batches=4, size=10)
    for bit in range(16):
        altered = bytearray(content)
        altered[page + tree + bit // 8] ^= 1 << bit % 8
        (tmp_path / "altered").write_bytes(altered)
        with pytest.raises(CacheCorrupt, match="its meta pages"):
            open_cache(tmp_path / "altered")


def test_an_altered_branch_page_hides_no_rows(tmp_path):
    """The key beside a child says where searches turn: wrong, it hides rows that a walk through the leaves finds."""
    content, rows = written(tmp_path / "whole", batches=4, size=10)
    root = 4096 * int.from_bytes(content[newest(content) + 128 :][:8], "little")
    branches = nodes(content, root)
    leaves = [[key for _, _, key in nodes(content, 4096 * child)] for _, child, _ in branches]
    assert len(branches) > 2
    assert sum(len(keys) for keys in leaves) == rows + 2
    path = tmp_path / "altered"
    for (at, _, key), left, right in zip(branches[1:], leaves, leaves[1:], strict=False):
        assert key == right[0]
        least, beyond = ((int.from_bytes(k, "big") + 1).to_bytes(16, "big") for k in (left[-1].ljust(16, b"\0"), key))
        for other, says in ((left[-1], "refused"), (beyond, "refused"), (least, "read"), (b"", "refused")):
            altered = bytearray(content)
            altered[at + 6 : at + 8] = len(other).to_bytes(2, "little")
            altered[at + 8 : at + 8 + len(other)] = other
            path.write_bytes(altered)
            assert assert_all_or_refused(path, rows) == says


def test_a_page_that_is_lost_is_noticed_unless_it_is_free(tmp_path):
    content, rows = written(tmp_path / "whole", batches=4, size=10)
    path, outcomes = tmp_path / "altered", {}
    for page in range(8192, len(content), 4096):
        path.write_bytes(content[:page] + bytes(4096) + content[page + 4096 :])
        outcomes[page] = assert_all_or_refused(path, rows)
    assert {*outcomes.values()} == {"refused", "read"}
    path.write_bytes(content[:-4096])
    assert assert_all_or_refused(path, rows) == outcomes[len(content) - 4096] == "refused"


def test_a_commit_that_a_power_cut_took_leaves_the_rows_before_it(tmp_path):
    """Pages are on the disk before the meta page that names them: what is left is the state before, not damage."""
    before, rows = written(tmp_path / "before", batches=11)
    after, _ = written(tmp_path / "after", batches=12)
    assert before[8192:] != after[8192 : len(before)]  # free pages were used again
    (tmp_path / "cut").write_bytes(before[:8192] + after[8192:])
    cache = open_cache(tmp_path / "cut")
    assert cache.stats()["file_rows"] == rows
    cache.close()
    assert assert_all_or_refused(tmp_path / "cut", rows) == "read"


def test_a_ruined_lock_file_does_no_harm(tmp_path):
    _, rows = written(tmp_path / "cache")
    (tmp_path / "cache-lock").write_bytes(os.urandom(8192))
    assert assert_all_or_refused(tmp_path / "cache", rows) == "read"


def test_a_full_file_says_so_and_loses_nothing(tmp_path):
    cache = open_cache(tmp_path / "cache", file_bytes=1 << 20)
    stored = 0

    def fill_on():
        nonlocal stored
        while stored < 100_000:
            fill(cache, range(stored, stored + 50))
            stored += 50

    with pytest.raises(CacheFull, match="give a larger file_bytes"):
        fill_on()
    assert stored > 1000
    cache.clear()
    rows, hit = cache.lookup(*query(range(stored + 50)))
    assert torch.equal(rows[:stored], row_of(range(stored)))
    assert not bool(hit[stored:].any())
    cache.close()
    cache = open_cache(tmp_path / "cache")
    assert torch.equal(cache.lookup(*query(range(stored)))[0], row_of(range(stored)))
    fill(cache, range(stored, stored + 1000))
    cache.close()


# several at once

OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["insert", "lookup", "clear", "reopen", "threads"]),
        st.lists(st.integers(0, 199), min_size=1, max_size=25),
    ),
    max_size=20,
)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.sampled_from([8_000, 1 << 20]), st.sampled_from(["float32", "float16"]), OPERATIONS)
def test_against_a_model_with_a_file(tmp_path_factory, budget_bytes, row_format, operations):
    follow(operations, tmp_path_factory.mktemp("model") / "cache", budget_bytes=budget_bytes, row_format=row_format)


def follow(operations, path, **settings):
    """Do operations on a cache and on a Python model of it, and compare; return how many kills cut a list in two."""
    cache, model, cut = open_cache(path, **settings), Model(settings["row_format"]), 0
    for version, (operation, numbers) in enumerate(operations):
        if operation == "clear":
            cache.clear()
        elif operation == "lookup":
            model.check(cache, numbers)
        elif operation == "reopen":
            cache.close()
            cache = open_cache(path, **settings)
        elif operation == "kill":
            cache.close()
            kill_a_writer(path, numbers, 3 * version, settings)
            cache = open_cache(path, **settings)
            cut += model.take_what_was_committed(cache, numbers, 3 * version)
        else:
            model.insert(cache, numbers, version, threads=3 if operation == "threads" else 1)
    model.check(cache, list(range(200)))
    assert cache.stats()["file_rows"] == len(model.rows)
    cache.close()
    return cut


class Model:
    """A dict in which a key keeps its first row for good, resident or not."""

    def __init__(self, row_format):
        self.row_format, self.rows = row_format, {}

    def check(self, cache, numbers):
        rows, hit = cache.lookup(*query(numbers))
        assert hit.tolist() == [number in self.rows for number in numbers]
        for number, row in zip(numbers, rows, strict=True):
            assert torch.equal(row, self.rows.get(number, torch.zeros(WIDTH)))

    def insert(self, cache, numbers, version, threads):
        # half of the threads insert each batch under another version (float16 holds the rows of 60): one is first
        seen = []

        def fill_one(i):
            batch = numbers[i % 2 :] or numbers
            seen.append((batch, fill(cache, batch, 3 * version + i)))

        running = [threading.Thread(target=fill_one, args=(i,)) for i in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        assert len(seen) == threads
        for number, row in (pair for batch, stored in seen for pair in zip(batch, stored, strict=True)):
            assert torch.equal(row, self.rows.setdefault(number, row))
            versions = [row_of([number], 3 * version + i)[0] for i in range(threads)]
            exact = self.row_format == "float32" and not any(torch.equal(row, v) for v in versions)
            assert not exact or torch.equal(row, self.rows[number])

    def take_what_was_committed(self, cache, numbers, version):
        """Learn which of a writer's numbers, inserted one by one, are there; tell whether it was some and not all."""
        began = ended = False
        for number, row, found in zip(numbers, *cache.lookup(*query(numbers)), strict=True):
            if number not in self.rows and found:
                assert not ended, "it commits in order"
                wanted = row_of([number], version)[0]
                self.rows[number] = wanted if self.row_format == "float32" else wanted.half().float()
                began = True
            ended = ended or number not in self.rows
            assert torch.equal(row, self.rows.get(number, torch.zeros(WIDTH)))
        return began and ended


def kill_a_writer(path, numbers, version, settings):
    """Insert each number by a transaction of another process, which is killed at some moment."""
    child = os.fork()
    if child == 0:
        cache = open_cache(path, **settings)
        for number in numbers:
            fill(cache, [number], version)
        signal.pause()
    time.sleep(random.random() * 0.02)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


# processes: each of these runs in a process of its own, forked from one that holds no other threads


def kill_the_writer_ten_times(path):
    generator, stored = random.Random(0), 0
    for _ in range(10):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            cache = open_cache(path)
            for start in range(stored, stored + 100_000, 5):
                fill(cache, range(start, start + 5))
                os.write(writer, b"%8d" % (start + 5))
            os._exit(1)
        os.close(writer)
        told = os.read(reader, 8)  # it has begun
        time.sleep(generator.random() * 0.05)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        while more := os.read(reader, 8):
            told = more
        os.close(reader)
        cache = open_cache(path)
        # the last batch may have been committed and not told
        assert cache.stats()["file_rows"] in (int(told), int(told) + 5)
        stored = cache.stats()["file_rows"]
        rows, hit = cache.lookup(*query(range(stored)))
        assert bool(hit.all())
        assert torch.equal(rows, row_of(range(stored)))
        cache.close()
    assert [f for f in os.listdir(path.parent) if not f.startswith(path.name)] == []


def kill_writers_between_everything_else(path):
    generator, cut = random.Random(0), 0
    for turn in range(20):
        names = ["insert", "lookup", "clear", "reopen", "threads", "kill", "kill"]
        operations = [(generator.choice(names), generator.choices(range(200), k=25)) for _ in range(15)]
        settings = {"budget_bytes": generator.choice([8_000, 1 << 20]), "row_format": ["float32", "float16"][turn % 2]}
        cut += follow(operations, path.parent / f"{path.name}-{turn}", **settings)
    assert cut > 0, "no writer was killed between two of its transactions"


def share_between_two(path):
    ours, theirs = os.pipe(), os.pipe()
    child = os.fork()
    (into, out_of), version = ((ours[1], theirs[0]), 1) if child else ((theirs[1], ours[0]), 2)

    def exchange(content):
        os.write(into, content)
        received = b""
        while len(received) < len(content):
            received += os.read(out_of, len(content) - len(received))
        return received

    cache = open_cache(path)
    for turn in range(10):
        # both want the same keys, each with rows of its own: both get the rows of who was first
        numbers = range(20 * turn, 20 * turn + 20)
        stored = fill(cache, numbers, version)
        assert exchange(stored.numpy().tobytes()) == stored.numpy().tobytes()
        assert any(torch.equal(stored, row_of(numbers, v)) for v in (1, 2))
        both = [1000 + 2 * turn, 1001 + 2 * turn]
        fill(cache, [both[version - 1]])
        exchange(b"x")
        assert torch.equal(cache.lookup(*query(both))[0], row_of(both))
    cache.close()
    if child == 0:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def make_it_four_times_at_once(path):
    children = []
    for number in range(4):
        children.append(os.fork())
        if children[-1] == 0:
            cache = open_cache(path)
            fill(cache, [number])
            cache.close()
            os._exit(0)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    cache = open_cache(path)
    assert torch.equal(cache.lookup(*query(range(4)))[0], row_of(range(4)))
    cache.close()


def fork_with_an_open_cache(path):
    cache = open_cache(path)
    fill(cache, range(10))
    child = os.fork()
    if child == 0:
        cache.clear()
        assert torch.equal(cache.lookup(*query(range(10)))[0], row_of(range(10)))
        fill(cache, range(10, 20))
        cache.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(cache.lookup(*query(range(20)))[0], row_of(range(20)))
    fill(cache, range(20, 30))
    assert cache.stats()["file_rows"] == 30
    cache.close()


def follow_a_process_that_gave_more_bytes(path):
    ready, go = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(ready, 1)
        large = open_cache(path, budget_bytes=1 << 22)
        fill(large, range(8000))
        large.close()
        os._exit(0)
    small = open_cache(path, file_bytes=1 << 20)
    fill(small, range(10))
    os.write(go, b"x")
    assert os.waitpid(child, 0)[1] == 0
    assert path.stat().st_size > 1 << 20
    small.clear()
    assert torch.equal(small.lookup(*query(range(8000)))[0], row_of(range(8000)))
    fill(small, range(8000, 8010))
    small.close()


def fill_the_disk(path, at=1 << 20):
    resource.setrlimit(resource.RLIMIT_FSIZE, (at, at))  # as if the disk ended there
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    cache, stored = open_cache(path), 0
    try:
        while stored < 100_000:
            fill(cache, range(stored, stored + 50))
            stored += 50
    except CacheFull as error:
        assert "no room on the disk" in str(error)  # noqa: PT017 - what was stored until then is looked at below
    assert at // 1000 < stored < 100_000
    cache.clear()
    assert torch.equal(cache.lookup(*query(range(stored)))[0], row_of(range(stored)))
    cache.close()
    cache = open_cache(path)
    assert torch.equal(cache.lookup(*query(range(stored)))[0], row_of(range(stored)))
    cache.close()


def fill_the_disk_within_a_commit(path):
    fill_the_disk(path, 212 << 10)


SCENARIOS = [
    kill_the_writer_ten_times,
    kill_writers_between_everything_else,
    share_between_two,
    make_it_four_times_at_once,
    fork_with_an_open_cache,
    follow_a_process_that_gave_more_bytes,
    fill_the_disk,
    fill_the_disk_within_a_commit,
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Return what each scenario wrote to its standard error: nothing when it held."""
    folder = tmp_path_factory.mktemp("scenarios")
    done = subprocess.run([sys.executable, __file__, folder], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {scenario.__name__: (folder / f"{scenario.__name__}.txt").read_text() for scenario in SCENARIOS}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_processes(outcomes, scenario):
    assert outcomes[scenario.__name__] == ""


def run_scenarios(folder):
    torch.set_num_threads(1)
    for scenario in SCENARIOS:
        child = os.fork()
        if child == 0:
            with (folder / f"{scenario.__name__}.txt").open("w") as log:
                os.dup2(log.fileno(), 2)
                (folder / scenario.__name__).mkdir()
                scenario(folder / scenario.__name__ / "cache")
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            with (folder / f"{scenario.__name__}.txt").open("a") as log:
                log.write("did not end well")


if __name__ == "__main__":
    run_scenarios(Path(sys.argv[1]))
