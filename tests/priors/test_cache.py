"""The latent cache in memory, and the prior around it: warm is cold bit for bit, and nothing is ever wrong."""

import hashlib
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lago_fast import _C
from lago_fast.errors import CacheMismatch, NonFiniteError, PriorMismatch, TrainablePrior, UnsupportedArgument
from lago_fast.priors.backbone import find_backbone
from lago_fast.priors.base import ActionPrior, PriorOutput, check_frozen, prior_kl
from lago_fast.priors.cache import CacheConfig, LatentCache, distinct
from lago_fast.priors.cached_prior import CachedPrior
from lago_fast.priors.latent_action import LatentActionPrior, PriorConfig

FORMATS = ["float32", "float16", "int8"]
S = 5
FILE_BYTES = 1 << 24


class ExactPrior(nn.Module):
    """Linear answers for states [B, S]; `asked` lists how many rows each query had."""

    state_dim = S

    def __init__(
        self, kind: str, *, seed: int = 0, latent: bool = True, trust: bool = False, impossible: bool = False
    ) -> None:
        super().__init__()
        self.kind, self.action_dim = kind, 2 if kind == "gaussian" else 4
        self.instructions = ["open the drawer", "push the button", "close the window"]
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(3, self.state_dim, 16, generator=generator), requires_grad=False)
        self.digest = hashlib.sha256(f"{kind} {seed} {latent} {trust} {impossible}".encode()).hexdigest()
        self.latent, self.trust, self.impossible = latent, trust, impossible
        self.asked: list[int] = []

    def query(self, state: Tensor, instruction_id: Tensor) -> PriorOutput:
        self.asked.append(len(state))
        # a sum in a fixed order: a matrix product's last bits depend on the rows beside it
        weight = self.weight[instruction_id]
        out = sum(state[:, i, None] * weight[:, i] for i in range(self.state_dim))
        answer = PriorOutput(
            latent=out[:, :8] if self.latent else None, trust=out[:, 8].sigmoid() if self.trust else None
        )
        if self.kind == "categorical":
            logits = out[:, 8:12].index_fill(1, torch.tensor([0]), -torch.inf) if self.impossible else out[:, 8:12]
            return answer._replace(log_probs=logits.log_softmax(dim=1))
        return answer._replace(mean=out[:, 12:14].clamp(-1, 1), log_std=0.1 * out[:, 14:16] - 1)

    def instruction_table(self) -> Tensor:
        return torch.eye(3)

    def telemetry(self) -> dict[str, float]:
        return {"inner": 1.0}


def states(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, S, generator=generator), torch.randint(3, (rows,), generator=generator)


def small_cache(row_format="float32", budget_bytes=1 << 20, **settings):
    return LatentCache(
        CacheConfig(budget_bytes, row_format, threads=2, **settings),
        salt="a prior",
        parts=[3, 1],
        state_dim=S,
        instructions=["open", "close", "push"],
    )


def columns(answer):
    return {name: column for name, column in answer._asdict().items() if column is not None}


def assert_same_bits(a, b):
    assert columns(a).keys() == columns(b).keys()
    for name, column in columns(a).items():
        assert torch.equal(column, columns(b)[name]), name


# the prior


@pytest.mark.parametrize("keep_latent", [False, True])
@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
def test_a_warm_answer_is_the_cold_one_bit_for_bit(kind, row_format, keep_latent):
    inner = ExactPrior(kind)
    prior = CachedPrior(inner, CacheConfig(row_format=row_format), keep_latent=keep_latent)
    state, ids = states(200)
    cold = prior.query(state, ids)
    inner.asked = []
    assert_same_bits(prior.query(state, ids), cold)
    order = torch.randperm(200)[:33]
    assert_same_bits(prior.query(state[order], ids[order]), type(cold)(*(c if c is None else c[order] for c in cold)))
    assert inner.asked == []
    assert set(columns(cold)) == {
        *(["mean", "log_std"] if kind == "gaussian" else ["log_probs"]),
        *(["latent"] if keep_latent else []),
    }
    exact = inner.query(state, ids)
    for name, column in columns(cold).items():
        if row_format == "float32":
            assert torch.equal(column, getattr(exact, name))
        else:
            step = 2**-11 if row_format == "float16" else 1 / 100
            near = getattr(exact, name)
            assert (column - near).abs().max() <= step * near.abs().max() * 2


def test_each_distinct_key_is_asked_for_once():
    inner = ExactPrior("gaussian")
    prior = CachedPrior(inner)
    inner.asked = []
    state, ids = states(10)
    again = torch.tensor([3, 3, 0, 9, 0, 3])
    answer = prior.query(state[again], ids[again])
    assert inner.asked == [3]
    assert torch.equal(answer.mean[0], answer.mean[5])
    prior.query(state, ids)
    assert inner.asked == [3, 7]
    prior.query(state, (ids + 1) % 3)  # another instruction is another key
    assert inner.asked == [3, 7, 10]


def test_lossy_log_probabilities_stay_normalised_and_impossible_actions_impossible():
    for row_format in FORMATS:
        prior = CachedPrior(ExactPrior("categorical", impossible=True), CacheConfig(row_format=row_format))
        log_probs = prior.query(*states(50)).log_probs
        torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(50), rtol=1e-5, atol=1e-5)
        assert (log_probs[:, 0] == -torch.inf).all()
        assert torch.isfinite(log_probs[:, 1:]).all()


def test_trust_is_kept():
    prior = CachedPrior(ExactPrior("gaussian", trust=True), CacheConfig(row_format="float32"))
    state, ids = states(7)
    expected = prior.inner.query(state, ids).trust
    for _ in range(2):
        assert torch.equal(prior.query(state, ids).trust, expected)


def test_it_is_a_frozen_prior_with_the_digest_of_its_answers():
    inner = ExactPrior("gaussian")
    exact = CachedPrior(inner, CacheConfig(row_format="float32"))
    assert isinstance(exact, ActionPrior)
    check_frozen(exact)
    assert list(exact.parameters()) == list(inner.parameters())
    assert (exact.kind, exact.state_dim, exact.action_dim) == ("gaussian", S, 2)
    assert exact.instructions == inner.instructions
    assert torch.equal(exact.instruction_table(), inner.instruction_table())
    others = [
        CachedPrior(inner, CacheConfig(row_format="float16")),
        CachedPrior(inner, CacheConfig(row_format="int8")),
        CachedPrior(inner, CacheConfig(row_format="float32", resolution=0.1)),
        CachedPrior(inner, CacheConfig(row_format="float32", resolution=0.2)),
    ]
    assert exact.digest == inner.digest
    assert len({inner.digest, *(prior.digest for prior in others)}) == 5


def test_telemetry_counts_since_the_last_call():
    prior = CachedPrior(ExactPrior("gaussian"))
    assert set(prior.telemetry()) == {"prior/cache_rows", "prior/cache_bytes", "inner"}
    state, ids = states(100)
    prior.query(state[:75], ids[:75])
    prior.query(state, ids)
    log = prior.telemetry()
    assert log["prior/cache_hit_rate"] == pytest.approx(75 / 175)
    assert log["prior/cache_rows"] == 100
    assert 100 * 8 < log["prior/cache_bytes"] < 100 * 80
    prior.query(state, ids)
    assert prior.telemetry()["prior/cache_hit_rate"] == 1


def test_a_second_run_finds_what_the_first_one_stored(tmp_path):
    state, ids = torch.randn(300, 5), torch.randint(3, (300,))
    for row_format in ("float32", "float16", "int8"):
        config = CacheConfig(row_format=row_format, path=tmp_path / row_format, file_bytes=FILE_BYTES)
        first = CachedPrior(ExactPrior("gaussian"), config, keep_latent=True)
        cold = first.query(state, ids)
        first.close()
        second = CachedPrior(ExactPrior("gaussian"), config, keep_latent=True)
        second.inner.asked = []
        for _ in range(2):
            warm = second.query(state, ids)
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(warm, cold, strict=True))
        assert second.inner.asked == []
        assert second.telemetry()["prior/cache_hit_rate"] == 1
        assert second.cache.stats()["file_hits"] == 300
        assert second.cache.stats()["file_rows"] == 300
        second.close()


def test_another_model_can_not_answer(tmp_path):
    config = CacheConfig(path=tmp_path / "cache", file_bytes=FILE_BYTES)
    CachedPrior(ExactPrior("gaussian"), config).close()
    with pytest.raises(CacheMismatch):
        CachedPrior(ExactPrior("gaussian", seed=1), config)
    with pytest.raises(CacheMismatch):
        CachedPrior(ExactPrior("gaussian"), config, keep_latent=True)
    prior = CachedPrior(ExactPrior("gaussian"), config)
    with pytest.raises(UnsupportedArgument, match="extend it before caching it"):
        prior.extend_instructions(["wait"])
    prior.close()


def test_rounded_keys_are_answered_for_the_middle_of_their_cell():
    inner = ExactPrior("gaussian")
    prior = CachedPrior(inner, CacheConfig(row_format="float32", resolution=0.25, kl_share=0))
    state, ids = states(50)
    middle = (state / 0.25).round() * 0.25
    near = middle + 0.12 * (2 * torch.rand(50, S) - 1)
    expected = inner.query(middle, ids)
    inner.asked = []
    for asked in (near, middle, state):
        assert_same_bits(prior.query(asked, ids)._replace(latent=None), expected._replace(latent=None))
    assert inner.asked == [50]
    prior.query(state + 0.5, ids)
    assert inner.asked[-1] == 50


def test_what_rounding_changes_is_measured_in_nats():
    inner = ExactPrior("gaussian")
    config = CacheConfig(row_format="float32", resolution=0.5, kl_share=0.25, kl_rows=20)
    prior = CachedPrior(inner, config)
    state, ids = states(2000)
    inner.asked = []
    given_now = prior.query(state, ids)
    kl = prior_kl(given_now, inner.query(state, ids))
    measured = prior.telemetry()["prior/cache_kl_nats"]
    assert measured == pytest.approx(float(kl.mean()), rel=0.2)
    assert measured > 1e-4
    assert inner.asked[1] == 20 + 500
    prior.query(state[:8], ids[:8])  # 2 rows are due, 20 are needed
    assert "prior/cache_kl_nats" not in prior.telemetry()
    assert "prior/cache_kl_nats" not in CachedPrior(inner).telemetry()


def test_around_a_language_model(encoder, texts, clones):
    config = PriorConfig("gaussian", 6, 2, action_low=(-1.0, -1.0), action_high=(1.0, 1.0))
    inner = LatentActionPrior(config, find_backbone(encoder), texts).freeze()
    prior = CachedPrior(inner, CacheConfig(row_format="float32"), keep_latent=True)
    state, ids = clones.states[:300], clones.instruction_id[:300]
    exact = inner.query(state, ids)
    for _ in range(2):
        assert_same_bits(prior.query(state, ids), exact)
    before = prior.digest
    prior.extend_instructions(["pull the door"])
    assert prior.digest == inner.digest != before
    prior.query(state[:2], torch.tensor([3, 3]))
    inner.extend_instructions(["push the door"])
    with pytest.raises(PriorMismatch, match="extend_instructions"):
        prior.query(state, ids)


def test_an_answer_that_is_not_each_rows_own_is_refused():
    class OneForAll(ExactPrior):
        def query(self, state, instruction_id):
            answer = super().query(state, instruction_id)
            return answer._replace(log_std=answer.log_std[0])

    with pytest.raises(PriorMismatch, match=r"its log_std has shape \[2\] for 4 rows"):
        CachedPrior(OneForAll("gaussian")).query(*states(4))


def test_bad_queries_and_priors_are_refused():
    prior = CachedPrior(ExactPrior("gaussian"), CacheConfig(budget_bytes=8000))
    state, ids = states(4)
    with pytest.raises(NonFiniteError, match="first: row 2"):
        prior.query(state.index_fill(0, torch.tensor([2]), torch.nan), ids)
    with pytest.raises(PriorMismatch, match="rows of 5"):
        prior.query(state[:, :4], ids)
    with pytest.raises(PriorMismatch, match=r"outside of 0\.\.2"):
        prior.query(state, ids + 3)
    with pytest.raises(UnsupportedArgument, match=r"budget_bytes: .* this batch has 1,000; give at least"):
        prior.query(*states(1000))
    with pytest.raises(UnsupportedArgument, match="float64"):
        prior.query(state.double(), ids)
    with pytest.raises(TrainablePrior):
        CachedPrior(ExactPrior("gaussian").requires_grad_(True))
    amortised = ExactPrior("gaussian")
    amortised.mode = "amortised"
    with pytest.raises(UnsupportedArgument, match="cache its exact prior"):
        CachedPrior(amortised)
    with pytest.raises(UnsupportedArgument, match="keep_latent"):
        CachedPrior(ExactPrior("gaussian", latent=False), keep_latent=True)
    broken = CachedPrior(ExactPrior("gaussian"))
    broken.inner.weight.data[0] = torch.nan
    with pytest.raises(NonFiniteError, match="row 0"):
        broken.query(state, torch.zeros(4, dtype=torch.int64))


# the table


def test_the_budget_that_an_error_names_is_enough():
    state, ids = states(300)
    with pytest.raises(UnsupportedArgument) as refused:
        small_cache(budget_bytes=2000).insert(state, ids, torch.zeros(300, 4))
    needed = int(str(refused.value).split("give at least ")[1].split(" ")[0].rstrip(",").replace(",", ""))
    assert small_cache(budget_bytes=needed).capacity >= 300


@pytest.mark.parametrize("row_format", FORMATS)
def test_memory_is_within_a_fifth_of_the_rows(row_format):
    cache = LatentCache(CacheConfig(10_000_000, row_format), salt="", parts=[384], state_dim=S, instructions=["open"])
    size = {"float32": 4 * 384, "float16": 2 * 384, "int8": 384 + 4}[row_format]
    assert size * cache.capacity <= 10_000_000 <= 1.2 * size * cache.capacity
    state = torch.randn(1000, S)
    cache.insert(state, torch.zeros(1000, dtype=torch.int64), torch.randn(1000, 384))
    assert cache.stats()["rows"] == 1000
    assert 1000 * size < cache.stats()["bytes"] < 1.2 * 1000 * size


@pytest.mark.parametrize("portable", [False, True])
def test_float16_is_numpys(portable):
    width = 1003
    table = _C.LatentTable(_C.RowFormat.float16, [width], 1 << 20, 1, 1, portable)
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-30, 16, (20, width), generator=generator)
    rows = torch.randn(20, width, generator=generator).clamp(-1.9, 1.9).ldexp(exponents)
    encoded, stored = torch.empty(20, 2 * width, dtype=torch.uint8), torch.empty(20, width)
    assert table.encode(rows.data_ptr(), encoded.data_ptr(), rows=20) == (20, False)
    expected = rows.numpy().astype(np.float16)
    assert np.array_equal(encoded.numpy().view(np.float16), expected)
    keys = torch.arange(40).view(20, 2)
    table.insert(keys.data_ptr(), encoded.data_ptr(), stored.data_ptr(), rows=20)
    assert np.array_equal(stored.numpy(), expected.astype(np.float32))


def test_the_text_is_the_key_and_not_its_number(tmp_path):
    state, rows = torch.randn(6, S), torch.randn(6, 4)
    config = CacheConfig(row_format="float32", path=tmp_path / "cache", file_bytes=1 << 24)
    first = LatentCache(config, salt="a", parts=[4], state_dim=S, instructions=["open", "close", "push"])
    first.insert(state, torch.tensor([0, 1, 2, 0, 1, 2]), rows)
    first.close()
    second = LatentCache(config, salt="a", parts=[4], state_dim=S, instructions=["push", "wait", "open", "close"])
    found, hit = second.lookup(state, torch.tensor([2, 3, 0, 2, 3, 1]))
    assert hit.tolist() == [True] * 5 + [False]
    assert torch.equal(found[:5], rows[:5])
    assert found[5].tolist() == [0.0] * 4
    second.close()


def test_minus_zero_and_empty_batches():
    cache = small_cache()
    state = torch.zeros(2, S)
    state[1, 0] = -0.0
    cache.insert(state, torch.zeros(2, dtype=torch.int64), torch.tensor([[1.0] * 4, [2.0] * 4]))
    assert cache.lookup(state, torch.zeros(2, dtype=torch.int64))[0][:, 0].tolist() == [1.0, 2.0]
    rows, hit = cache.lookup(torch.empty(0, S), torch.empty(0, dtype=torch.int64))
    assert (rows.shape, hit.shape) == ((0, 4), (0,))
    assert cache.insert(torch.empty(0, S), torch.empty(0, dtype=torch.int64), torch.empty(0, 4)).shape == (0, 4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"budget_bytes": 0}, "budget_bytes"),
        ({"budget_bytes": 20}, "do not hold one row of 4 in float32; give at least"),
        ({"budget_bytes": 1 << 50}, "does not give"),
        ({"budget_bytes": 1 << 70}, "budget_bytes"),
        ({"budget_bytes": 1e6}, "budget_bytes"),
        ({"row_format": "float8"}, "row_format"),
        ({"resolution": 0.0}, "resolution"),
        ({"resolution": float("nan")}, "resolution"),
        ({"file_bytes": 1}, "file_bytes"),
        ({"kl_share": 2.0}, "kl_share"),
        ({"kl_rows": 0}, "kl_rows"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(changes, says):
    with pytest.raises(UnsupportedArgument, match=says):
        small_cache(**changes)


def test_bad_rows_and_keys_are_refused():
    state, ids = states(3)
    rows = torch.ones(3, 4)
    for row_format in FORMATS:
        cache = small_cache(row_format)
        for bad in (torch.nan, torch.inf):
            with pytest.raises(NonFiniteError, match="row 1"):
                cache.insert(state, ids, rows.index_fill(0, torch.tensor([1]), bad))
        assert cache.stats()["rows"] == 0
    with pytest.raises(UnsupportedArgument, match=r'7e\+04, beyond float16; take row_format="float32"'):
        small_cache("float16").insert(state, ids, 70000 * rows)
    with pytest.raises(UnsupportedArgument, match=r"give float32 \[3, 4\]"):
        cache.insert(state, ids, rows[:, :3])
    for call in (cache.lookup, lambda s, i: cache.insert(s, i, rows)):
        with pytest.raises(NonFiniteError, match="row 2 of 3"):
            call(state.index_fill(0, torch.tensor([2]), torch.nan), ids)
        with pytest.raises(PriorMismatch, match="rows of 5"):
            call(torch.zeros(3, 4), ids)
        with pytest.raises(PriorMismatch, match="one id each"):
            call(state, ids[:2])
        with pytest.raises(PriorMismatch, match=r"outside of 0\.\.2"):
            call(state, ids - 3)
    with pytest.raises(UnsupportedArgument, match="widths"):
        LatentCache(CacheConfig(), salt="", parts=[3, 0], state_dim=S, instructions=["a"])


def test_distinct_keys_are_numbered_by_first_appearance():
    keys = torch.tensor([[1, 2], [0, 2], [1, 2], [1, 3], [0, 2]])
    first, inverse = distinct(keys)
    assert (first.tolist(), inverse.tolist()) == ([0, 1, 3], [0, 1, 0, 2, 1])


def row_of(numbers, version):
    """Return rows [n, 4] that tell the key and the insertion, exact in every format."""
    return torch.stack([torch.tensor([n % 32, n // 32, version % 64, 127.0]) for n in numbers])


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["insert", "lookup", "clear"]), st.lists(st.integers(0, 299), min_size=1, max_size=25)),
    max_size=60,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(FORMATS), st.sampled_from([2000, 4000, 30_000]), OPERATIONS)
def test_against_a_model_in_memory(row_format, budget_bytes, operations):
    cache = LatentCache(CacheConfig(budget_bytes, row_format), salt="", parts=[4], state_dim=1, instructions=["open"])
    answered = {}  # what each key last answered; that and nothing else may be resident
    lossless = True
    for version, (operation, numbers) in enumerate(operations):
        state, ids = (
            torch.tensor(numbers, dtype=torch.float32).view(-1, 1),
            torch.zeros(len(numbers), dtype=torch.int64),
        )
        if operation == "clear":
            cache.clear()
            answered.clear()
        elif operation == "insert":
            new = row_of(numbers, version)
            # of several rows with one key the first counts
            first = {number: new[i].tolist() for i, number in reversed(list(enumerate(numbers)))}
            stored = cache.insert(state, ids, new)
            for row, number in zip(stored.tolist(), numbers, strict=True):
                assert row in (first[number], answered.get(number, first[number]))
                assert row == answered.get(number, first[number]) or not lossless
            answered.update(zip(numbers, stored.tolist(), strict=True))
        else:
            rows, hit = cache.lookup(state, ids)
            for row, found, number in zip(rows.tolist(), hit.tolist(), numbers, strict=True):
                assert row == (answered[number] if found else [0.0] * 4)
                assert found == (number in answered) or not lossless
        stats = cache.stats()
        lossless = lossless and stats["evicted"] == 0
        assert stats["rows"] <= cache.capacity
        assert stats["bytes"] <= budget_bytes


@pytest.mark.parametrize("row_format", FORMATS)
def test_threads_find_only_what_is_right(row_format):
    cache = LatentCache(
        CacheConfig(20_000, row_format, threads=2), salt="", parts=[4], state_dim=1, instructions=["open"]
    )
    failures = []

    def work(seed):
        generator = np.random.default_rng(seed)
        for _ in range(60):
            numbers = generator.integers(0, 2000, generator.integers(1, 200)).tolist()
            state, ids = torch.tensor(numbers).float().view(-1, 1), torch.zeros(len(numbers), dtype=torch.int64)
            rows = row_of(numbers, 0)
            if generator.random() < 0.5:
                right = torch.equal(cache.insert(state, ids, rows), rows)
            else:
                found, hit = cache.lookup(state, ids)
                right = torch.equal(found, torch.where(hit[:, None], rows, 0.0))
            if not right:
                failures.append(numbers)
            if generator.random() < 0.02:
                cache.clear()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert cache.stats()["evicted"] > 0


def test_a_lookup_writes_over_an_earlier_one():
    cache = small_cache()
    state, ids = states(6)
    rows = cache.insert(state[:4], ids[:4], torch.randn(4, 4))
    out = torch.full((6, 4), torch.nan), torch.ones(6, dtype=torch.bool)
    assert all(a is b for a, b in zip(cache.lookup(state, ids, out=out), out, strict=True))
    assert torch.equal(out[0], torch.cat([rows, torch.zeros(2, 4)]))
    assert out[1].tolist() == [True] * 4 + [False] * 2
    for bad in (out[0][:5], out[0].double(), torch.empty(4, 6).T):
        with pytest.raises(UnsupportedArgument, match="out: give contiguous"):
            cache.lookup(state, ids, out=(bad, out[1]))


@pytest.mark.parametrize("row_format", ["float32", "float16"])
def test_large_batches_are_split_over_threads_and_answer_the_same(row_format):
    generator = torch.Generator().manual_seed(0)
    state, ids = torch.randn(5000, S, generator=generator), torch.zeros(5000, dtype=torch.int64)
    rows = torch.randn(5000, 400, generator=generator).half().float()
    for threads in (1, 4):
        config = CacheConfig(1 << 25, row_format, threads=threads)
        cache = LatentCache(config, salt="", parts=[400], state_dim=S, instructions=["open"])
        assert torch.equal(cache.insert(state, ids, rows), rows)
        found, hit = cache.lookup(state, ids)
        assert bool(hit.all())
        assert torch.equal(found, rows)
        # from any address, aligned for wide writes or not
        room, mark = torch.empty(5000 * 400 + 1), torch.empty(5000, dtype=torch.bool)
        for at in (0, 1):
            out = room[at : at + 5000 * 400].view(5000, 400), mark
            assert torch.equal(cache.lookup(state, ids, out=out)[0], rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("row_format", FORMATS)
def test_another_default_dtype_changes_nothing(row_format, dtype):
    cache, (state, ids) = small_cache(row_format), states(6)
    rows = torch.randn(6, 4)
    torch.set_default_dtype(dtype)
    try:
        stored = cache.insert(state, ids, rows)
        found, hit = cache.lookup(state, ids)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(stored, rows, rtol=0, atol=0 if row_format == "float32" else 0.05)
    assert torch.equal(found, stored)
    assert hit.all()


def test_keys_that_do_not_lie_row_by_row_are_read_as_they_are():
    cache, (state, ids) = small_cache(), states(6)
    rows = cache.insert(state, ids, torch.randn(6, 4))
    keys = cache.keys(state, ids)
    assert torch.equal(cache.lookup_keys(keys[::2])[0], rows[::2])
    for wrong in (keys.int(), keys[:, :1], keys[0]):
        with pytest.raises(UnsupportedArgument, match="keys: "):
            cache.lookup_keys(wrong)
        with pytest.raises(UnsupportedArgument, match="keys: "):
            cache.insert_keys(wrong, torch.zeros(len(wrong), 4))


def test_a_whole_number_is_the_same_resolution(tmp_path):
    found = []
    for resolution in (1, 1.0):
        config = CacheConfig(resolution=resolution, path=tmp_path / "rows", file_bytes=FILE_BYTES)
        cache = LatentCache(config, salt="", parts=[4], state_dim=S, instructions=["a"])
        state = torch.arange(30.0).view(6, S)
        found.append(cache.lookup(state, torch.zeros(6, dtype=torch.int64))[1])
        cache.insert(state, torch.zeros(6, dtype=torch.int64), torch.ones(6, 4))
        cache.close()
    assert not found[0].any()
    assert found[1].all()
