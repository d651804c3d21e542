"""Priors over text actions: scored actions against a loop over actions, texts embedded, answers looked up.

The language models have the shapes named and hardly any training: the shapes decide the times. The texts are such as
text games write. No answer is timed that is not the loop's.
Run: pytest bench/bench_text_prior.py --benchmark-only
"""

import statistics
import time
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch

from lago_fast.priors.cache import CacheConfig
from lago_fast.priors.cached_text_prior import CachedTextPrior
from lago_fast.priors.causal_lm import CausalLM, find_causal_lm
from lago_fast.priors.embed_fit import fit_embed_prior
from lago_fast.priors.embed_prior import EmbedPrior
from lago_fast.priors.score_prior import ScorePrior
from lago_fast.priors.small_lm import train_small_lm
from lago_fast.priors.text_embedder import TextEmbedder
from lago_fast.priors.tree_scores import read_alone
from lago_fast.priors.walkthroughs import Steps

SHAPES = {"llama-128x2": (128, 2, 4), "llama-256x6": (256, 6, 8)}
THINGS = ["tomato", "lettuce", "onion", "plate", "knife", "apple", "lamp", "key"]
PLACES = ["kitchen", "cellar", "attic", "garden", "hall", "pantry"]
VERBS = ["take", "drop", "examine"]
TASK = "Make a salad: put the chopped tomato and the chopped lettuce on the plate and carry them to the garden."
LOOPED_ACTIONS = 48  # that the loop is timed on, at most; its rate does not depend on how many there are
ROUNDS = 7

States = tuple[list[str], list[str], list[tuple[str, ...]]]


def states_of(rows: int, actions: int, first: int = 0) -> States:
    """Return different states with as many actions each."""
    everything = [f"{verb} the {thing}" for thing in THINGS for verb in VERBS]
    observations, admissible = [], []
    for row in range(first, first + rows):
        here, there = PLACES[row % 6], PLACES[(row // 6) % 6]
        seen = [THINGS[(row * 5 + i) % 8] for i in range(3)]
        observations.append(
            f"You are in the {here}. You see the {seen[0]} and the {seen[1]} on the table, and the {seen[2]} on the "
            f"floor. A door leads north to the {there}. You carry nothing. {row} moves were made so far."
        )
        admissible.append(tuple(everything[(row + i) % len(everything)] for i in range(actions)))
    return [TASK] * rows, observations, admissible


@cache
def lm_of(shape: str) -> CausalLM:
    """Return a model of a shape, written and loaded as any checkpoint."""
    hidden, layers, heads = SHAPES[shape]
    instruction, observation, admissible = states_of(64, 24)
    steps = Steps(instruction, observation, admissible, [0] * 64, list(range(64)))
    folder = Path(mkdtemp(prefix="bench-text-prior-")) / shape
    train_small_lm(steps, folder, hidden=hidden, layers=layers, heads=heads, epochs=1, max_seconds=None)
    return find_causal_lm(str(folder))


@cache
def embedder() -> TextEmbedder:
    """Return the default encoder."""
    return TextEmbedder()


def middle_of(call, rounds: int = ROUNDS) -> float:
    """Return the median seconds of a call."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


@pytest.mark.parametrize("actions", [8, 24])
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_scored_actions(benchmark, shape, rows, actions):
    prior, states = ScorePrior(lm_of(shape), normalise="none"), states_of(rows, actions)
    tokens = [prior._reader.action_tokens(row) for row in states[2]]
    reads = prior._reader.read(*states, [max(map(len, row)) for row in tokens])
    pairs = [(read.tokens, action) for read, row in zip(reads, tokens, strict=True) for action in row][:LOOPED_ACTIONS]

    def loop() -> torch.Tensor:
        return torch.stack([read_alone(prior.lm, prompt, action).sum() for prompt, action in pairs])

    sums = prior._scorer.sums(reads, tokens).flatten()[: len(pairs)]
    torch.testing.assert_close(sums, loop(), atol=1e-3, rtol=1e-4)
    ours, theirs = [], []
    for _ in range(ROUNDS if rows == 1 else 3):  # in turn, so that other work of the machine meets both
        ours.append(middle_of(lambda: prior.query(*states), 1) / (rows * actions))
        theirs.append(middle_of(loop, 1) / len(pairs))
    benchmark.extra_info.update(
        shape=shape,
        weights=sum(p.numel() for p in prior.lm.model.parameters()),
        rows=rows,
        actions=actions,
        prompt_tokens=statistics.mean(len(read.tokens) for read in reads),
        task_tokens=reads[0].shared,
        action_tokens=statistics.mean(len(action) for row in tokens for action in row),
        actions_per_s=1 / statistics.median(ours),
        loop_actions_per_s=1 / statistics.median(theirs),
        times_the_loop=statistics.median(b / a for a, b in zip(ours, theirs, strict=True)),
        times_the_loop_of_fastest=min(theirs) / min(ours),
    )
    benchmark.pedantic(prior.query, states, rounds=3)


@pytest.mark.parametrize("rows", [1, 16, 256])
@pytest.mark.parametrize("actions", [8, 24])
def test_cached_lookups(benchmark, rows, actions):
    prior = CachedTextPrior(ScorePrior(lm_of("llama-128x2")), CacheConfig(budget_bytes=1 << 24, row_format="float32"))
    states = states_of(rows, actions)
    expected = prior.query(*states)
    assert torch.equal(prior.query(*states), expected)
    benchmark.pedantic(prior.query, states, rounds=50, warmup_rounds=2)
    benchmark.extra_info.update(rows=rows, actions=actions, states_per_s=rows / benchmark.stats.stats.median)
    assert prior.telemetry()["prior/first_sightings"] == rows


@pytest.mark.parametrize("rows", [16, 256])
@pytest.mark.parametrize("fitted", [False, True])
def test_embed_answers_over_known_texts(benchmark, fitted, rows):
    states = states_of(rows, 24)
    prior = EmbedPrior(embedder())
    if fitted:
        steps = states_of(8, 24)
        prior = fit_embed_prior(embedder(), Steps(*steps, [0] * 8, [0, 0, 1, 1, 2, 2, 3, 3]), epochs=2)
    prior.query(*states)
    benchmark.pedantic(prior.query, states, rounds=20, warmup_rounds=2)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(
        rows=rows, fitted=fitted, states_per_s=rows / seconds, actions_per_s=24 * rows / seconds
    )


@pytest.mark.parametrize("rows", [16, 320, 4096])
def test_known_texts_as_numbers_and_rows(benchmark, rows):
    texts = [text for row in states_of(64, 24)[2] for text in row] + states_of(64, 24)[1]
    asked = (texts * (rows // len(texts) + 1))[:rows]
    ids = embedder().ids(asked)
    numbered = middle_of(lambda: embedder().ids(asked), 50)
    benchmark.pedantic(embedder().rows, (ids,), rounds=50)
    benchmark.extra_info.update(rows=rows, ids_per_s=rows / numbered, rows_per_s=rows / benchmark.stats.stats.median)


@pytest.mark.parametrize(("kind", "count"), [("actions", 200), ("observations", 64)])
def test_new_texts_embedded(benchmark, kind, count):
    rounds = 3
    if kind == "actions":
        batches = [[f"take the {PLACES[i % 6]} {THINGS[i % 8]} {i}{n}" for i in range(count)] for n in range(rounds)]
    else:
        batches = [states_of(count, 1, first=1000 * (n + 1))[1] for n in range(rounds)]
    fresh = TextEmbedder(embedder().backbone)
    fresh.ids(["warm up"])
    left = iter(batches)
    benchmark.pedantic(fresh.ids, setup=lambda: ((next(left),), {}), rounds=rounds)
    tokens = sum(len(row) for row in fresh._tokens([text for batch in batches for text in batch]))
    benchmark.extra_info.update(
        kind=kind, texts_per_s=count / benchmark.stats.stats.median, tokens_per_text=tokens / count / rounds
    )
