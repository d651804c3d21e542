"""The prior by likeness: cosine over temperature, fitted better than not, what it used, kept in a folder."""

import json
import math
import random

import numpy as np
import pytest
import torch

from lago_fast.errors import (
    DemonstrationError,
    HashMismatch,
    LagoError,
    NonFiniteError,
    PriorMismatch,
    RunExists,
    UnsupportedArgument,
)
from lago_fast.priors.embed_fit import fit_embed_prior
from lago_fast.priors.embed_prior import ZERO_SHOT_TEMPERATURE, EmbedPrior, Head
from lago_fast.priors.text_base import TextActionPrior
from lago_fast.priors.text_embedder import TextEmbedder
from lago_fast.priors.walkthroughs import Steps, numbers_of, read_steps
from tests.algorithms.test_safe_load import little_memory, mutate
from tests.priors.test_folder import changed_leaf, damaged

STATES = (
    ["open the drawer", "push the button"],
    ["the drawer", "the window"],
    [("open drawer", "push", "pull slowly"), ("push the button",)],
)
DIRECTIONS = {"the kitchen": "door", "the hall": "window", "the cellar": "drawer", "the attic": "button"}


@pytest.fixture
def embedder(encoder):
    return TextEmbedder(encoder)


@pytest.fixture(scope="module")
def shared():
    """Return an embedder whose vectors are drawn per text, so that nothing is alike at the start."""
    return _Drawn()


class _Drawn:
    width = 32
    digest = "drawn"
    long_texts = "refuse"

    def __init__(self):
        self.texts = []

    def ids(self, texts):
        for text in texts:
            if text not in self.texts:
                self.texts.append(text)
        return torch.tensor([self.texts.index(text) for text in texts], dtype=torch.int64)

    def rows(self, ids):
        generator = torch.Generator().manual_seed(0)
        table = torch.nn.functional.normalize(torch.randn(500, 32, generator=generator), dim=1)
        return table[ids]

    def parameters(self):
        return []


def house(episodes=6, seed=0):
    """Return walks through a house: which way to take depends on the room, out of three in any order."""
    rng = np.random.default_rng(seed)
    rows = []
    for episode in range(episodes):
        for _ in range(12):
            room = rng.choice(list(DIRECTIONS))
            ways = [DIRECTIONS[room], *rng.choice([w for w in DIRECTIONS.values() if w != DIRECTIONS[room]], 2, False)]
            order = rng.permutation(3)
            actions = tuple(f"take the {ways[i]}" for i in order)
            rows.append(("leave the house", room, actions, int(np.flatnonzero(order == 0)[0]), episode))
    return Steps(*map(list, zip(*rows, strict=True)))


def test_zero_shot_is_the_cosine_over_the_temperature(embedder):
    prior = EmbedPrior(embedder, temperature=0.2)
    assert isinstance(prior, TextActionPrior)
    found = prior.query(*STATES)
    instruction, observation = embedder.encode(STATES[0]), embedder.encode(STATES[1])
    asked = torch.nn.functional.normalize(instruction + observation, dim=1)
    expected = (embedder.encode(STATES[2][0]) @ asked[0] / 0.2).log_softmax(dim=0)
    torch.testing.assert_close(found[0], expected)
    assert torch.equal(found[1], torch.tensor([0.0, -torch.inf, -torch.inf]))
    assert prior.metrics == {"fitted": "nothing", "walkthroughs": 0, "steps": 0}
    assert not any(p.requires_grad for p in prior.parameters())


def test_counts(embedder):
    prior = EmbedPrior(embedder)
    prior.query(*STATES)
    prior.query(*STATES)
    # "push the button" is an instruction and an action
    assert prior.telemetry() == {"prior/lm_queries": 4, "prior/texts_read": 7}
    assert prior.telemetry() == {"prior/lm_queries": 0, "prior/texts_read": 0}


def test_a_share_of_the_answer_is_spread_evenly(embedder):
    sure = EmbedPrior(embedder, temperature=1e-3).query(*STATES).exp()
    spread = EmbedPrior(embedder, temperature=1e-3, uniform_share=0.3).query(*STATES)
    torch.testing.assert_close(spread[0].exp(), 0.7 * sure[0] + 0.1)
    assert torch.equal(spread[1], torch.tensor([0.0, -torch.inf, -torch.inf]))
    with pytest.raises(UnsupportedArgument, match="uniform_share: 1"):
        EmbedPrior(embedder, uniform_share=1)


def test_a_head_that_knows_nothing_is_the_zero_shot_prior(embedder):
    head = Head(embedder.width, 8)
    torch.testing.assert_close(EmbedPrior(embedder, head=head).query(*STATES), EmbedPrior(embedder).query(*STATES))
    with pytest.raises(PriorMismatch, match="of 12"):
        EmbedPrior(embedder, head=Head(12, 8))


def test_fitted_is_better_than_zero_shot_on_walkthroughs_it_has_not_seen(shared):
    prior = fit_embed_prior(shared, house(), uniform_share=0)
    assert prior.metrics["walkthroughs"] == 6
    assert prior.metrics["steps"] == 72
    assert prior.metrics["held_out_walkthroughs"] == 1
    assert prior.metrics["val_nll"] < 0.3 < prior.metrics["zero_shot_nll"]
    assert prior.metrics["val_accuracy"] == 1
    other = house(seed=1)
    states = other.instruction, other.observation, other.admissible
    rows = torch.arange(len(other.choice))

    def likelihood(prior):
        return float(prior.query(*states)[rows, torch.tensor(other.choice)].mean())

    assert likelihood(prior) > -0.3 > likelihood(EmbedPrior(shared))
    assert not any(p.requires_grad for p in prior.parameters())
    assert fit_embed_prior(shared, house(), uniform_share=0).digest == prior.digest, "reproducible"
    assert prior.digest != EmbedPrior(shared).digest


def test_a_single_walkthrough_is_fitted_without_a_held_out_one(shared):
    prior = fit_embed_prior(shared, house(1), epochs=60)
    assert prior.metrics["held_out_walkthroughs"] == 0
    assert prior.metrics["epochs"] == 60
    assert "val_nll" not in prior.metrics
    assert prior.metrics["train_nll"] < prior.metrics["zero_shot_nll"]
    assert prior.temperature == ZERO_SHOT_TEMPERATURE


def test_a_step_with_many_actions_costs_no_vectors_of_the_others(embedder, monkeypatch):
    walks, gathered, rows = house(30), [], embedder.rows
    many = [f"go {i}" for i in range(200)]
    admissible = [*walks.admissible]
    admissible[0] = [*admissible[0], *many]
    monkeypatch.setattr(embedder, "rows", lambda ids: (gathered.append(ids.numel()), rows(ids))[1])
    for fit in ("head", "temperature"):
        fit_embed_prior(embedder, walks._replace(admissible=admissible), fit=fit, epochs=1)
    assert max(gathered) <= 64 * len(admissible[0]) < len(admissible) * len(admissible[0]) / 2


def test_what_generalises_to_nothing_leaves_the_prior_as_it_was(shared):
    walks = house(6)
    # choices at random: the head can only learn the fitted ones by heart
    rng = np.random.default_rng(0)
    prior = fit_embed_prior(shared, walks._replace(choice=rng.integers(3, size=72)))
    assert prior.metrics["val_nll"] <= math.log(3) + 0.15


def test_the_temperature_is_calibrated_by_likelihood(shared):
    walks = house(3)
    prior = fit_embed_prior(shared, walks, fit="temperature", uniform_share=0)
    assert prior.metrics["fitted"] == "temperature"
    assert prior.metrics["steps"] == 36
    assert prior.head is None
    states = walks.instruction, walks.observation, walks.admissible

    def nll(temperature):
        found = EmbedPrior(shared, temperature=temperature).query(*states)
        return -float(found[torch.arange(36), torch.tensor(walks.choice)].mean())

    best = nll(prior.temperature)
    assert prior.metrics["nll"] == pytest.approx(best, abs=1e-5)
    assert best <= min(nll(ZERO_SHOT_TEMPERATURE * 2**step) for step in range(-4, 6))


def test_a_saved_prior_answers_alike(embedder, families, tmp_path):
    walks = house(2)
    for name, prior in (("zero", EmbedPrior(embedder)), ("fitted", fit_embed_prior(embedder, walks, epochs=2))):
        prior.save(tmp_path / name)
        for again in (EmbedPrior.load(tmp_path / name), EmbedPrior.load(tmp_path / name, embedder)):
            torch.testing.assert_close(again.query(*STATES), prior.query(*STATES))
            assert (again.digest, again.metrics) == (prior.digest, prior.metrics)
    with pytest.raises(RunExists):
        EmbedPrior(embedder).save(tmp_path / "zero")
    with pytest.raises(HashMismatch, match="another encoder"):
        EmbedPrior.load(tmp_path / "zero", TextEmbedder(families["bert"]))
    with pytest.raises(PriorMismatch, match="no readable prior"):
        EmbedPrior.load(tmp_path)
    (tmp_path / "fitted" / "head.safetensors").write_bytes(b"")
    with pytest.raises(HashMismatch, match="altered"):
        EmbedPrior.load(tmp_path / "fitted", embedder)


def test_mutated_folders_are_loaded_as_they_were_or_refused(embedder, tmp_path, request):
    prior = fit_embed_prior(embedder, house(2), epochs=1)
    folder = prior.save(tmp_path / "prior")
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    rng, outcomes = random.Random(0), {"read": 0, "refused": 0}
    with little_memory():
        for _ in range(request.config.getoption("--mutations")):
            damaged(folder, rng)
            try:
                again = EmbedPrior.load(folder, embedder)
                outcomes["read"] += 1
            except LagoError:
                outcomes["refused"] += 1
            else:
                assert again.digest == prior.digest
            for path, content in whole.items():
                path.write_bytes(content)
    assert outcomes["refused"] > outcomes["read"] > 0


def test_mutated_walkthroughs_are_read_or_refused_by_a_typed_error(tmp_path, request):
    rows = zip(*house(2)._replace(episode_id=[0, 1]), strict=False)
    content = "\n".join(json.dumps(dict(zip(Steps._fields, row, strict=True)), default=int) for row in rows).encode()
    rng, outcomes, path = random.Random(0), {"read": 0, "refused": 0}, tmp_path / "steps.jsonl"
    with little_memory():
        for i in range(request.config.getoption("--mutations")):
            lines = [changed_leaf(json.loads(line), rng) for line in content.splitlines()]
            strange = "\n".join(map(json.dumps, lines)).encode()
            path.write_bytes(strange if i % 2 else mutate(content, rng))
            try:
                numbers_of(read_steps(path))
                outcomes["read"] += 1
            except LagoError:
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 0


@pytest.mark.parametrize("between", ["\u2028", "\x85", "\u2029", "\x0b", "\x1c"])
def test_a_step_is_a_line_whatever_other_line_ends_its_texts_hold(tmp_path, between):
    step = {"instruction": "find", "observation": f"a{between}b", "admissible": ["go"], "choice": 0, "episode_id": 0}
    text = json.dumps(step, ensure_ascii=False).replace("\\u000b", between).replace("\\u001c", between)
    (tmp_path / "steps.jsonl").write_text(f"{text}\n{text}\r\n", encoding="utf-8", newline="")
    if between in "\u2028\x85\u2029":
        assert read_steps(tmp_path / "steps.jsonl").observation == [f"a{between}b"] * 2
    else:  # which JSON wants escaped
        with pytest.raises(DemonstrationError, match="cannot be read"):
            read_steps(tmp_path / "steps.jsonl")


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_is_none_is_refused(embedder, temperature):
    with pytest.raises(UnsupportedArgument, match="temperature"):
        EmbedPrior(embedder, temperature=temperature)


@pytest.mark.parametrize(
    "options", [{"fit": "all"}, {"epochs": 0}, {"val_fraction": 1.0}, {"lr": 0.0}, {"uniform_share": -0.1}]
)
def test_what_cannot_be_honoured_is_refused(shared, options):
    with pytest.raises(UnsupportedArgument, match=next(iter(options))):
        fit_embed_prior(shared, house(2), **options)


def test_a_fit_that_diverges_is_named(shared):
    with pytest.raises(NonFiniteError, match="the head's fit: lower lr"):
        fit_embed_prior(shared, house(2), lr=1e30, val_fraction=0)


def test_walkthroughs_that_are_none_are_refused(shared):
    walks = house(1)
    for wrong, said in (
        (Steps([], [], [], [], []), "at least one step"),
        (walks._replace(choice=walks.choice[:-1]), "11 choices"),
        (walks._replace(choice=[3, *walks.choice[1:]]), "choice 3 in row 0, which has 3"),
        (walks._replace(choice=[*walks.choice[:-1], -1]), "choice -1 in row 11"),
    ):
        with pytest.raises(DemonstrationError, match=said):
            fit_embed_prior(shared, wrong)
    with pytest.raises(UnsupportedArgument, match="row 0 has no action"):
        EmbedPrior(shared).query(["win"], ["here"], [()])


def test_the_pretrained_encoder_knows_an_instruction_from_its_neighbours(minilm):
    prior = EmbedPrior(TextEmbedder(minilm))
    found = prior.query(["Open the drawer."], ["You are at a desk."], [("eat the apple", "open the drawer", "wait")])
    assert int(found.argmax()) == 1
    assert 0.5 < float(found.exp().max()) < 1
