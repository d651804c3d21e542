"""Sampled completions: the model's own distribution, a function of the text, counted when they name nothing."""

import logging

import pytest
import torch

from lago_fast.errors import NonFiniteError, UnsupportedArgument
from lago_fast.priors.causal_lm import find_causal_lm
from lago_fast.priors.completions import Draw
from lago_fast.priors.generate_prior import GeneratePrior
from lago_fast.priors.prompt import Prompt
from lago_fast.priors.text_base import TextActionPrior

SHORT = Prompt(task="{instruction} ", state="{observation} ", menu="the {actions} ", cue="button", separator=" ")
STATES = (
    ["open the drawer", "close", "open the drawer"],
    ["door", "the window close the door slowly", "window"],
    [("open", "push the", "close", "slowly"), ("close",), ("push", "pull", "door", "window", "the")],
)
FAMILIES = ["llama", "qwen2", "gpt2"]


@pytest.fixture(scope="module")
def loaded(lms):
    return {family: find_causal_lm(lms[family]) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_are_counts_over_the_completions(loaded, family):
    prior = GeneratePrior(loaded[family], 8, prompt=SHORT, max_new_tokens=3)
    assert isinstance(prior, TextActionPrior)
    found = prior.query(*STATES)
    assert found.shape == (3, 5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.exp().sum(dim=1), torch.ones(3))
    assert found[1, 0] == 0
    assert found[0, 4] == found[1, 1] == -torch.inf


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_is_a_function_of_the_text(loaded, family):
    prior = GeneratePrior(loaded[family], 4, prompt=SHORT, max_new_tokens=4)
    together = prior.complete(*STATES)
    assert len({text for texts in together for text in texts}) > 2, "samples differ"
    torch.manual_seed(7)
    assert GeneratePrior(loaded[family], 4, prompt=SHORT, max_new_tokens=4, batch_rows=1).complete(*STATES) == together
    assert prior.complete(*(column[::-1] for column in STATES)) == together[::-1]
    other = GeneratePrior(loaded[family], 4, prompt=SHORT, max_new_tokens=4, seed=1)
    assert other.complete(*STATES) != together
    assert other.digest != prior.digest


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_token_has_the_models_distribution(loaded, family):
    lm = loaded[family]
    prior = GeneratePrior(lm, 4000, prompt=SHORT, max_new_tokens=1)
    row = STATES[0][:1], STATES[1][:1], STATES[2][:1]
    tokens = prior._reader.read(*row, [1])[0].tokens
    with torch.no_grad():
        expected = lm.model(input_ids=torch.tensor([tokens])).logits[0, -1].softmax(dim=-1)
    likeliest = int(expected.argmax())
    text = lm.tokenizer.decode([likeliest]).strip()
    alike = [i for i in range(len(lm.tokenizer)) if lm.tokenizer.decode([i], skip_special_tokens=True).strip() == text]
    share = sum(found == text for found in prior.complete(*row)[0]) / 4000
    p = float(expected[alike].sum())
    assert abs(share - p) < 4 * (p * (1 - p) / 4000) ** 0.5 + 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_completions_on_a_gpu_are_those_on_a_cpu(lms, loaded):
    options = {"k": 2, "prompt": SHORT, "max_new_tokens": 3}
    found = GeneratePrior(find_causal_lm(lms["llama"], device="cuda"), **options).complete(*STATES)
    assert found == GeneratePrior(loaded["llama"], **options).complete(*STATES)


def test_a_draw_is_by_the_cumulated_probabilities():
    logits = torch.tensor([[0.5, 0.2, 0.3]]).log().repeat(5, 1)
    uniform = torch.tensor([[0.0], [0.49], [0.51], [0.71], [0.999]], dtype=torch.float64)
    drawn = Draw(uniform, 1.0, 1.0)(torch.zeros(5, 1, dtype=torch.int64), logits)
    assert drawn.argmax(dim=1).tolist() == [0, 0, 1, 2, 2]
    assert int(drawn.isfinite().sum()) == 5
    # of a nucleus of 0.7 the tokens 0 and 2 are left, at 5/8 and 3/8
    drawn = Draw(uniform, 1.0, 0.7)(torch.zeros(5, 1, dtype=torch.int64), logits)
    assert drawn.argmax(dim=1).tolist() == [0, 0, 0, 2, 2]
    # near 0 nearly always the most probable
    drawn = Draw(uniform, 0.01, 1.0)(torch.zeros(5, 1, dtype=torch.int64), logits)
    assert drawn.argmax(dim=1).tolist() == [0] * 5
    with pytest.raises(NonFiniteError, match="logits"):
        Draw(uniform, 1.0, 1.0)(torch.zeros(5, 1, dtype=torch.int64), logits * torch.nan)


def test_kept_keys_and_values_change_no_completion(loaded):
    lm = loaded["llama"]
    prior = GeneratePrior(lm, 1, prompt=SHORT, max_new_tokens=6, temperature=1e-4)
    for row in zip(*STATES, strict=True):
        read = prior._reader.read(*([column] for column in row), [6])[0]
        tokens = list(read.tokens)
        for _ in range(6):
            with torch.no_grad():
                tokens.append(int(lm.model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == lm.model.config.eos_token_id:
                break
        expected = lm.tokenizer.decode(tokens[len(read.tokens) :], skip_special_tokens=True).strip()
        assert prior.complete(*([column] for column in row)) == [[expected]]


def test_a_completion_ends_at_the_end(loaded):
    ended = Prompt(task="{instruction} ", state="{observation} ", menu="", cue="button", end="the")
    free = GeneratePrior(loaded["llama"], 50, prompt=SHORT, max_new_tokens=8).complete(*STATES)
    assert any("the" in text for text in free[0])
    prior = GeneratePrior(loaded["llama"], 50, prompt=ended, max_new_tokens=8)
    assert not any("the" in text for texts in prior.complete(*STATES) for text in texts)


def test_what_names_nothing_is_left_out_counted_and_logged(loaded, caplog):
    prior = GeneratePrior(loaded["llama"], 30, prompt=SHORT, max_new_tokens=1, seed=1)
    written = prior.complete(["open"], ["door"], [("push",)])[0]
    row = ["open"], ["door"], [("push", "sing")]
    named = prior.complete(*row)[0].count("push")
    assert 0 < named < 30, written
    prior.telemetry()
    found = prior.query(*row)
    assert torch.equal(found, torch.tensor([[0.0, -torch.inf]]))
    assert prior.telemetry() == {
        "prior/lm_queries": 1,
        "prior/completions": 30,
        "prior/unmatched": 30 - named,
        "prior/fallbacks": 0,
        "prior/shortened_prompts": 0,
    }
    with caplog.at_level(logging.WARNING, "lago_fast.priors.generate_prior"):
        found = prior.query(["open"], ["door"], [("sing", "dance")])
    torch.testing.assert_close(found.exp(), torch.full((1, 2), 0.5))
    log = prior.telemetry()
    assert (log["prior/unmatched"], log["prior/fallbacks"]) == (30, 1)
    assert "in 1 of 1 states, whose actions get equal shares" in caplog.text


@pytest.mark.parametrize(
    "options",
    [
        {"k": 0},
        {"k": -1},
        {"temperature": 0.0},
        {"temperature": -0.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"max_new_tokens": 0},
        {"rule": "loose"},
        {"batch_rows": 0},
        {"long_prompts": "cut"},
    ],
)
def test_what_cannot_be_honoured_is_refused(loaded, options):
    with pytest.raises(UnsupportedArgument, match=next(iter(options))):
        GeneratePrior(loaded["llama"], **options)


def test_no_states_have_no_answers(loaded):
    prior = GeneratePrior(loaded["llama"], 2, prompt=SHORT)
    assert prior.query([], [], []).shape == (0, 0)
    assert prior.complete([], [], []) == []


def test_bad_states_are_refused_and_long_ones_as_asked(loaded):
    prior = GeneratePrior(loaded["gpt2"], 1, prompt=SHORT)
    with pytest.raises(UnsupportedArgument, match="row 0 has no action"):
        prior.query(["open"], ["door"], [()])
    long = ["open"], ["door " * 60], [("push",)]
    with pytest.raises(UnsupportedArgument, match="10 of an answer are 10 more than the 64"):
        prior.query(*long)
    dropping = GeneratePrior(loaded["gpt2"], 1, prompt=SHORT, long_prompts="drop_oldest")
    assert dropping.query(*long).shape == (1, 1)
    assert dropping.telemetry()["prior/shortened_prompts"] == 1
