"""States per second of a prior: the full prompt for every state, the shared instruction, fewer bits, a student.

All weights are random: the shapes decide the times, and no answer is looked at but to compare two forms of one prior.
Run: pytest bench/bench_prior.py --benchmark-only
"""

import importlib.metadata
import statistics
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lago_fast.errors import LagoError
from lago_fast.priors.amortised import AmortisedPrior
from lago_fast.priors.backbone import find_backbone
from lago_fast.priors.config import PriorConfig
from lago_fast.priors.latent_action import LatentActionPrior
from lago_fast.priors.memory_plan import free_bytes, gigabytes
from lago_fast.priors.quantize import linear_layers, quantize_prior, weights_bytes
from lago_fast.priors.student import StudentConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STATE_DIM, ACTION_DIM = 39, 4
WORDS = ["open", "the", "drawer", "of", "desk", "with", "red", "handle", "and", "wait"]  # a token each
INSTRUCTIONS = [" ".join(WORDS[k:] + WORDS[:k]) for k in range(4)]
TOKENS = len(WORDS) + 1
BATCHES = [1, 64, 512]
# shape -> (family, its configuration, whether a CPU is worth the wait)
SHAPES: dict[str, tuple[str, dict[str, int], bool]] = {
    "minilm": ("Bert", {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}, True),
    "llama-256x6": (
        "Llama",
        {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 704},
        True,
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
        False,
    ),
    "llama2-7b": (
        "Llama",
        {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
        False,
    ),
}
FORMS = ["naive", "shared", "bf16", "int8", "nf4", "fp8", "amortised"]


@cache
def folder_of(shape: str) -> Path:
    """Write configuration and tokenizer of a shape; the weights are drawn when it is read."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    family, sizes, _ = SHAPES[shape]
    folder = Path(tempfile.mkdtemp(prefix="bench-prior-")) / shape
    config = getattr(transformers, f"{family}Config")(vocab_size=32000, **sizes)
    config.architectures = [f"{family}Model"]
    config.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *WORDS])}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    return folder


@cache
def prior_of(shape: str, form: str) -> Any:
    """Return the prior of a shape in one of FORMS; skip where it cannot be had here."""
    _, sizes, small = SHAPES[shape]
    free = free_bytes(DEVICE)
    # two priors in float32 at once, and what their queries need
    needed = 2.5 * 4 * 12 * sizes["hidden_size"] ** 2 * sizes["num_hidden_layers"]
    if DEVICE.type == "cpu" and not small:
        pytest.skip(f"{shape} takes minutes per batch on a CPU")
    if free is not None and needed > free:
        pytest.skip(f"{shape} needs about {gigabytes(needed)} on {DEVICE}, {gigabytes(free)} are free")
    try:
        if form in ("naive", "shared"):
            return exact_prior(shape, shared=form == "shared")
        exact = prior_of(shape, "shared")
        state, ids = batch_of(64)
        if form == "amortised":
            return AmortisedPrior(exact, StudentConfig(refresh=False, fallback_kl=None)).fit(state, ids, epochs=1)
        return quantize_prior(exact, form, state, ids)
    except LagoError as error:
        pytest.skip(f"{form}: {error}")


def exact_prior(shape: str, *, shared: bool) -> LatentActionPrior:
    """Return a prior that reads the full prompt for every state, or shares what the instruction costs."""
    backbone = find_backbone(str(folder_of(shape)), random_init=True)
    form = "pooled" if shared and backbone.kind == "encoder" else "prompt"
    box = ((-1.0,) * ACTION_DIM, (1.0,) * ACTION_DIM)
    torch.manual_seed(0)
    config = PriorConfig("gaussian", STATE_DIM, ACTION_DIM, *box, form=form)
    prefix_kv = shared and form == "prompt"
    return LatentActionPrior(config, backbone, INSTRUCTIONS, prefix_kv=prefix_kv).freeze().to(DEVICE)


def batch_of(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return states and the ids of mixed instructions."""
    generator = torch.Generator().manual_seed(rows)
    ids = torch.arange(rows) % len(INSTRUCTIONS)
    return torch.randn(rows, STATE_DIM, generator=generator).to(DEVICE), ids.to(DEVICE)


def ask(prior: Any, state: torch.Tensor, ids: torch.Tensor) -> None:
    """Query, and wait for the answer."""
    prior.query(state, ids)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@cache
def matrix_products_per_s() -> float:
    """Return the floating-point operations per second of a large float32 matrix product on the device."""
    a, best = torch.randn(1024, 1024, device=DEVICE), float("inf")
    for _ in range(5):
        started = time.perf_counter()
        a @ a
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * 1024**3 / best


def tokens_read(shape: str, form: str) -> int:
    """Return how many tokens pass the transformer for one state."""
    if form == "naive":
        return TOKENS
    return 2 if SHAPES[shape][0] == "Bert" else 1


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", list(SHAPES))
def test_states_per_second(benchmark, shape, form, rows):
    prior, (state, ids) = prior_of(shape, form), batch_of(rows)
    benchmark.pedantic(ask, (prior, state, ids), rounds=10 if rows < 512 else 3, warmup_rounds=1)
    fastest = benchmark.stats.stats.min
    benchmark.extra_info.update(
        shape=shape,
        form=form,
        rows=rows,
        weights="random",
        tokens=TOKENS,
        device=torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        states_per_s=rows / fastest,
        **{name: importlib.metadata.version(name) for name in ("transformers", "bitsandbytes")},
    )
    if form == "amortised":
        return
    benchmark.extra_info["weights_bytes"] = weights_bytes(prior.transformer)
    if form in ("naive", "shared"):
        in_linear = sum(layer.weight.numel() for layer in linear_layers(prior.transformer).values())
        done = 2 * in_linear * tokens_read(shape, form) * rows / fastest
        benchmark.extra_info["share_of_matrix_product_rate"] = done / matrix_products_per_s()


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("shape", list(SHAPES))
def test_ratio_of_the_shared_instruction_to_the_full_prompt(benchmark, shape, rows):
    naive, shared, (state, ids) = prior_of(shape, "naive"), prior_of(shape, "shared"), batch_of(rows)
    if shared.prefix_kv:
        # a form that is wrong is not timed; the pooled form is another prior, with nothing to compare
        torch.testing.assert_close(shared.query(state, ids).mean, naive.query(state, ids).mean, atol=1e-4, rtol=1e-3)
    times: dict[str, list[float]] = {"naive": [], "shared": []}
    for _ in range(7 if rows < 512 else 3):  # in turn, so that a busy machine slows both
        for name, prior in (("naive", naive), ("shared", shared)):
            started = time.perf_counter()
            ask(prior, state, ids)
            times[name].append(time.perf_counter() - started)
    middle = statistics.median(a / b for a, b in zip(times["naive"], times["shared"], strict=True))
    fastest = min(times["naive"]) / min(times["shared"])
    benchmark.extra_info.update(shape=shape, rows=rows, weights="random", ratio_median=middle, ratio_of_fastest=fastest)
    benchmark.pedantic(ask, (shared, state, ids), rounds=3)
