"""States per second of a prior: full prompts, the shared instruction, fewer bits, a cache, a student.

All weights are random: the shapes decide the times, and no answer is looked at but to compare two forms of one prior.
What a machine has neither the memory nor the time for is skipped, with the figure that says so. There is one shape in
memory at a time, and beside its exact prior one other form.
Run: pytest bench/bench_prior.py --benchmark-only
"""

import contextlib
import gc
import importlib.metadata
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lago_fast.cores import usable_cores
from lago_fast.errors import LagoError
from lago_fast.priors.amortised import AmortisedPrior
from lago_fast.priors.backbone import Backbone, find_backbone
from lago_fast.priors.cache import CacheConfig
from lago_fast.priors.cached_prior import CachedPrior
from lago_fast.priors.config import Attention, PriorConfig
from lago_fast.priors.finetune import fit_prior
from lago_fast.priors.latent_action import LatentActionPrior
from lago_fast.priors.memory_plan import free_bytes, gigabytes
from lago_fast.priors.quantize import linear_layers, quantize_prior, weights_bytes
from lago_fast.priors.student import StudentConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STATE_DIM, ACTION_DIM = 39, 4
WORDS = ["open", "the", "drawer", "of", "desk", "with", "red", "handle", "and", "wait"]  # a token each
INSTRUCTIONS = [" ".join(WORDS[k:] + WORDS[:k]) for k in range(4)]
TOKENS = len(WORDS) + 1
BATCHES = [1, 64, 512, 4096]
HIT_PERCENT = [0, 50, 90, 99]
# shape -> (family, its configuration)
SHAPES: dict[str, tuple[str, dict[str, int]]] = {
    "minilm": ("Bert", {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}),
    "llama-256x6": (
        "Llama",
        {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 704},
    ),
    "tinyllama-1.1b": (
        "Llama",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "intermediate_size": 5632,
        },
    ),
    "llama2-7b": (
        "Llama",
        {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
    ),
}
# naive: the full prompt for every state, eager; pooled: an encoder's instruction as one token, which sees the state;
# shared: keys and values kept, of an encoder those of the pooled instruction, which does not see the state;
# compiled: shared, as one CUDA graph per batch size, or by torch.compile on a CPU
FORMS = [
    "naive",
    "pooled",
    "shared",
    "compiled",
    "bf16",
    "int8",
    "nf4",
    "fp8",
    "naive-bf16",
    "compiled-bf16",
    "amortised",
]
FORMS += [f"cache-{percent}" for percent in HIT_PERCENT]
LONGEST_CALL_S = 10.0
KNOWN_STATES = 8192  # of a cache
RATIO_BATCHES = [1, 64, 512, 1024]
FIT_ROWS = 2048


@cache
def folder_of(shape: str) -> Path:
    """Write configuration and tokenizer of a shape; the weights are drawn when it is read."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    family, sizes = SHAPES[shape]
    folder = Path(tempfile.mkdtemp(prefix="bench-prior-")) / shape
    config = getattr(transformers, f"{family}Config")(vocab_size=32000, **sizes)
    config.architectures = [f"{family}Model"]
    config.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *WORDS])}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    return folder


@cache
def numbers_of(shape: str) -> tuple[int, int]:
    """Return how many weights a shape has, and how many of them are in linear layers."""
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(folder_of(shape)))
    linear = sum(layer.weight.numel() for layer in linear_layers(model).values())
    return sum(p.numel() for p in model.parameters()), linear


def check_plan(shape: str, form: str, rows: int) -> None:
    """Skip a case that does not fit into the memory, or the time, that there is."""
    weights, linear = numbers_of(shape)
    # in float32, and what is made of a copy in float32
    free, needed = free_bytes(DEVICE), 2.2 * 4 * weights
    if free is not None and needed > free and shape not in made:
        pytest.skip(f"{shape} needs about {gigabytes(needed)} on {DEVICE}, {gigabytes(free)} are free")
    seconds = 2 * linear * tokens_read(form) * rows / matrix_products_per_s(torch.float32)
    if seconds > LONGEST_CALL_S:
        pytest.skip(f"{shape}, {form}: {rows} rows take at least {seconds:.0f} s a call here")


made: dict[str, Backbone] = {}  # by shape, at most one


def backbone_of(shape: str) -> Backbone:
    """Return the one backbone of a shape that all forms are made of."""
    if shape not in made:
        made.clear()
        prior_of.cache_clear()
        gc.collect()
        torch.cuda.empty_cache()
        made[shape] = drawn_backbone(folder_of(shape), DEVICE)
    return made[shape]


def drawn_backbone(folder: Path, device: torch.device, seed: int = 0) -> Backbone:
    """Return a backbone of a folder's shape whose weights are drawn on the device.

    Drawing seven billion numbers on a CPU, and hashing them, takes minutes. Where a SHA-256 stands it says how the
    weights were drawn: no file has that hash, so that a prior saved with them is refused when it is read.
    """
    outline = outline_of(folder)
    torch.manual_seed(seed)
    with device:
        model = type(outline.model)(outline.model.config)
    drawn = f"not hashed: {folder.name} drawn on {device.type} with seed {seed}"
    return replace(outline, model=model.eval().requires_grad_(False), sha256=drawn, seed=seed)


def outline_of(folder: Path) -> Backbone:
    """Return a folder's backbone without numbers."""

    class Enough(Exception):
        pass

    outlines: list[Backbone] = []

    def stop(outline: Backbone) -> None:
        outlines.append(outline)
        raise Enough

    with contextlib.suppress(Enough):
        find_backbone(str(folder), random_init=True, before_weights=stop)
    return outlines[0]


@lru_cache(maxsize=1)
def prior_of(shape: str, form: str) -> Any:
    """Return the prior of a shape in one of FORMS; skip where it cannot be had here."""
    try:
        if form in ("naive", "pooled", "naive-bf16"):
            prior = exact_prior(shape, form.removesuffix("-bf16"))
            return prior if form != "naive-bf16" else quantize_prior(prior, "bf16", *batch_of(64))
        exact = exact_prior(shape, "shared")
        if form == "shared":
            return exact
        if form == "amortised":
            student = AmortisedPrior(exact, StudentConfig(refresh=False, fallback_kl=None))
            return student.fit(*batch_of(64), epochs=1)
        if form.startswith("cache"):
            cached = CachedPrior(exact, CacheConfig(budget_bytes=1 << 28))
            cached.query(*batch_of(KNOWN_STATES))
            return cached
        if form.startswith("compiled"):
            return compiled(exact if form == "compiled" else prior_of(shape, "bf16"))
        return quantize_prior(exact, form, *batch_of(64))
    except LagoError as error:
        pytest.skip(f"{form}: {error}")


def exact_prior(shape: str, form: str) -> LatentActionPrior:
    """Return a "naive", "pooled" or "shared" prior; skip where a shape has no such."""
    backbone = backbone_of(shape)
    if form == "pooled" and backbone.kind == "decoder":
        pytest.skip("pooled: a decoder's instruction is not pooled")
    pooled = form != "naive" and backbone.kind == "encoder"
    box = ((-1.0,) * ACTION_DIM, (1.0,) * ACTION_DIM)
    torch.manual_seed(0)
    config = PriorConfig("gaussian", STATE_DIM, ACTION_DIM, *box, form="prompt")
    if pooled:
        config = replace(config, form="pooled", attention="prefix" if form == "shared" else "own")
    prefix_kv = None if form == "shared" else False
    return LatentActionPrior(config, backbone, INSTRUCTIONS, prefix_kv=prefix_kv).freeze().to(DEVICE)


def compiled(prior: LatentActionPrior) -> LatentActionPrior:
    """Let a prior answer in static shapes, by graphs on a CUDA device and by torch.compile elsewhere."""
    prior.buckets = True
    if DEVICE.type == "cpu":
        buckets: Any = prior._ready_now()
        buckets.run = torch.compile(buckets.run, dynamic=False)
    return prior


def batch_of(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return states and the ids of mixed instructions."""
    generator = torch.Generator().manual_seed(rows)
    ids = torch.arange(rows) % len(INSTRUCTIONS)
    return torch.randn(rows, STATE_DIM, generator=generator).to(DEVICE), ids.to(DEVICE)


def partly_known(rows: int, hit_percent: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return states of which a cache knows a share, and their ids; the others are never the same twice."""
    state, ids = batch_of(KNOWN_STATES)
    pick = torch.randperm(KNOWN_STATES)[:rows]
    asked, missing = state[pick], round(rows * (1 - hit_percent / 100))
    asked[:missing] = torch.randn(missing, STATE_DIM)
    return asked, ids[pick]


def ask(prior: Any, state: torch.Tensor, ids: torch.Tensor) -> None:
    """Query, and wait for the answer."""
    prior.query(state, ids)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@cache
def matrix_products_per_s(dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of a large matrix product on the device, on one CPU thread."""
    width, best = (8192, float("inf")) if DEVICE.type == "cuda" else (1024, float("inf"))
    a = torch.randn(width, width, device=DEVICE).to(dtype)
    for _ in range(5):
        started = time.perf_counter()
        a @ a
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * width**3 / best


def tokens_read(form: str) -> int:
    """Return how many tokens pass the transformer for one state that it is asked about."""
    if form == "amortised":
        return 0
    return TOKENS if form.startswith("naive") else 2 if form == "pooled" else 1


def memory_of(prior: Any, form: str, before: int) -> dict[str, int]:
    """Return the bytes of what a form keeps: weights, the instructions' keys and values, cached rows.

    On a GPU, of which `before` bytes were taken before the queries, also the most that this form alone would take.
    """
    if form == "amortised":
        return {"weights_bytes": weights_bytes(prior.student)}
    if form.startswith("cache"):
        return {"weights_bytes": weights_bytes(prior.inner.transformer), "cache_bytes": prior.cache.stats()["bytes"]}
    found = {"weights_bytes": weights_bytes(prior.transformer)}
    if prior.prefix_kv:
        prefix = prior._prefix_now()
        found["prefix_bytes"] = sum(t.untyped_storage().nbytes() for t in (*prefix.keys, *prefix.values))
    if DEVICE.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated() - before + sum(found.values())
    return found


def version_of(package: str) -> str | None:
    """Return an installed package's version; None where it is not installed, which most forms do without."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# torch.compile looks through the cache of a class, and says so
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", list(SHAPES))
def test_states_per_second(benchmark, shape, form, rows):
    check_plan(shape, form, rows)
    hit_percent = int(form.removeprefix("cache-")) if form.startswith("cache") else None
    if rows == 1 and hit_percent in (50, 90, 99):
        pytest.skip("one row is known, or it is not")
    prior, (state, ids) = prior_of(shape, form), batch_of(rows)
    if form not in ("compiled", "compiled-bf16"):
        started = time.perf_counter()
        ask(prior, *batch_of(8))
        expected = (time.perf_counter() - started) * rows / 8
        if rows > 64 and expected > LONGEST_CALL_S:
            pytest.skip(f"{shape}, {form}: {rows} rows would take about {expected:.0f} s a call, as 8 rows do")
    gc.collect()
    before = 0
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    rounds = 15 if rows <= 64 else 5 if rows <= 512 else 3
    if hit_percent is None:
        benchmark.pedantic(ask, (prior, state, ids), rounds=rounds, warmup_rounds=1)
    else:
        # a row that was not known is, once it was asked for
        benchmark.pedantic(ask, setup=lambda: ((prior, *partly_known(rows, hit_percent)), {}), rounds=rounds)
    middle = benchmark.stats.stats.median
    benchmark.extra_info.update(
        shape=shape,
        form=form,
        rows=rows,
        weights="random",
        tokens=TOKENS,
        device=torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        states_per_s=rows / middle,
        **memory_of(prior, form, before),
        **{name: version_of(name) for name in ("transformers", "bitsandbytes")},
    )
    read = tokens_read(form)
    if read and hit_percent is None:
        exact = ("naive", "pooled", "shared", "compiled", "int8", "nf4")
        dtype = torch.float32 if form in exact else torch.bfloat16
        done = 2 * numbers_of(shape)[1] * read * rows / middle
        benchmark.extra_info["matrix_products_per_s"] = matrix_products_per_s(dtype)
        benchmark.extra_info["share_of_matrix_product_rate"] = done / matrix_products_per_s(dtype)


@pytest.mark.parametrize("threads", sorted({1, usable_cores()}) if DEVICE.type == "cpu" else [1], indirect=True)
@pytest.mark.parametrize("rows", RATIO_BATCHES)
@pytest.mark.parametrize("forms", [("naive", "shared"), ("naive-bf16", "bf16"), ("pooled", "shared")], ids="/".join)
@pytest.mark.parametrize("shape", list(SHAPES))
def test_ratio_of_the_shared_instruction(benchmark, shape, forms, rows, threads):
    check_plan(shape, forms[0], rows)
    before, shared = (prior_of(shape, form) for form in forms)
    state, ids = batch_of(rows)
    if shared.config == before.config:
        # a form that is wrong is not timed; another form of an encoder is another prior, with nothing to compare
        close = {"atol": 1e-2, "rtol": 3e-2} if forms[1] == "bf16" else {"atol": 1e-4, "rtol": 1e-3}
        torch.testing.assert_close(shared.query(state, ids).mean, before.query(state, ids).mean, **close)
    times: dict[str, list[float]] = {"before": [], "shared": []}
    for _ in range(9 if rows < 512 else 5):  # in turn, so that a busy machine slows both
        for name, prior in (("before", before), ("shared", shared)):
            started = time.perf_counter()
            ask(prior, state, ids)
            times[name].append(time.perf_counter() - started)
    middle = statistics.median(a / b for a, b in zip(times["before"], times["shared"], strict=True))
    fastest = min(times["before"]) / min(times["shared"])
    benchmark.extra_info.update(
        shape=shape,
        forms="/".join(forms),
        rows=rows,
        threads=threads,
        weights="random",
        tokens=TOKENS,
        ratio_median=middle,
        ratio_of_fastest=fastest,
    )
    benchmark.pedantic(ask, (shared, state, ids), rounds=3)


@pytest.mark.parametrize("threads", [usable_cores()], indirect=True)
@pytest.mark.parametrize("shape", ["minilm", "llama-256x6"])
def test_ratio_of_a_fit_that_reads_kept_instructions(benchmark, shape, threads, monkeypatch):
    backbone, rng = backbone_of(shape), np.random.default_rng(0)
    states = rng.normal(size=(FIT_ROWS, STATE_DIM)).astype(np.float32)
    columns = np.tanh(states[:, :ACTION_DIM]), rng.integers(len(INSTRUCTIONS), size=FIT_ROWS), np.arange(FIT_ROWS) // 64
    attention: Attention = "prefix" if backbone.kind == "encoder" else "own"
    settings: dict[str, Any] = {"form": "prompt", "attention": attention, "epochs": 1, "trust_rows": 0}

    def fit() -> tuple[float, float]:
        prior = fit_prior(states, *columns, INSTRUCTIONS, backbone=backbone, device=DEVICE, **settings)
        return prior.metrics["seconds"], prior.metrics["val_nll"]

    fit()
    ratios = []
    for _ in range(3):  # in turn, so that a busy machine slows both
        kept = fit()
        with monkeypatch.context() as patch:
            patch.setattr(LatentActionPrior, "is_text_fixed", False)
            whole = fit()
        assert kept[1] == pytest.approx(whole[1], abs=1e-3), "a fit that learns something else is not timed"
        ratios.append(whole[0] / kept[0])
    benchmark.extra_info.update(
        shape=shape, rows=FIT_ROWS, threads=threads, weights="random", tokens=TOKENS, ratio=statistics.median(ratios)
    )
    benchmark.pedantic(fit, rounds=1)
