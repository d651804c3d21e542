"""Scores of a tree of continuations are those of a loop over actions, in every family; normalised as asked."""

from dataclasses import replace

import pytest
import torch

from lago_fast.errors import UnsupportedArgument
from lago_fast.priors import tree_scores
from lago_fast.priors.causal_lm import find_causal_lm
from lago_fast.priors.prompt import Prompt
from lago_fast.priors.score_prior import ScorePrior
from lago_fast.priors.text_base import TextActionPrior
from lago_fast.priors.tree_scores import TreeScorer, read_alone, tree_of

FAMILIES = ["llama", "qwen2", "gpt2"]
SHORT = Prompt(task="{instruction} ", state="{observation} ", menu="the {actions} ", cue="button", separator=" ")
STATES = (
    ["open the drawer", "close", "open the drawer", "push slowly"],
    ["door", "the window close the door slowly", "window", "drawer drawer"],
    [
        ("open drawer", "open drawer slowly", "open", "push the button"),
        ("close",),
        ("push", "pull the door", "push"),
        ("pull the door slowly", "pull the door"),
    ],
)


@pytest.fixture(scope="module")
def loaded(lms):
    return {family: find_causal_lm(lms[family]) for family in FAMILIES}


def naive(prior, states=STATES, end=False):
    """Score with one pass per action."""
    rows = []
    reads = prior._reader.read(*states, [0] * len(states[0]))
    for read, actions in zip(reads, states[2], strict=True):
        tokens = prior._reader.action_tokens(actions, end=end)
        rows.append([float(read_alone(prior.lm, read.tokens, action).sum()) for action in tokens])
    return rows


def padded(rows):
    whole = torch.full((len(rows), max(map(len, rows))), -torch.inf)
    for i, row in enumerate(rows):
        whole[i, : len(row)] = torch.tensor(row)
    return whole


def test_what_continuations_begin_with_alike_is_read_once():
    tree = tree_of([[5, 6, 7], [5, 6], [5, 8, 7], [6]])
    assert tree.tokens == [5, 6, 8]
    assert tree.parents == [-1, 0, 0]
    first, second = [(-1, 5, 0), (0, 6, 0), (1, 7, 0)], [(-1, 5, 1), (0, 6, 1)]
    assert tree.steps == [*first, *second, (-1, 5, 2), (0, 8, 2), (2, 7, 2), (-1, 6, 3)]


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_a_loop_over_actions(loaded, family, batch_tokens):
    prior = ScorePrior(loaded[family], prompt=SHORT, normalise="none", batch_tokens=batch_tokens)
    assert isinstance(prior, TextActionPrior)
    expected = padded(naive(prior)).log_softmax(dim=1)
    assert expected[0].std() > 0.1, "scores that say nothing prove nothing"
    torch.testing.assert_close(prior.query(*STATES), expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(prior.query(*STATES), expected, atol=2e-5, rtol=1e-5)  # with kept keys and values
    alone = torch.full_like(expected, -torch.inf)
    for i in range(4):
        found = prior.query(*([column[i]] for column in STATES))[0]
        alone[i, : len(found)] = found
    torch.testing.assert_close(alone, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_near(lms, loaded, family):
    expected = ScorePrior(loaded[family], prompt=SHORT).query(*STATES)
    found = ScorePrior(find_causal_lm(lms[family], dtype="bfloat16"), prompt=SHORT).query(*STATES)
    torch.testing.assert_close(found, expected, atol=0.2, rtol=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_scores_on_a_gpu_are_those_on_a_cpu(lms, loaded):
    prior = ScorePrior(find_causal_lm(lms["llama"], device="cuda"), prompt=SHORT)
    found = prior.query(*STATES)
    torch.testing.assert_close(found, ScorePrior(loaded["llama"], prompt=SHORT).query(*STATES), atol=1e-3, rtol=1e-3)


def test_each_normalisation_is_by_its_lengths(loaded):
    lm = loaded["qwen2"]  # whose words may have several tokens
    states = ["open the drawer"], ["door"], [("go", "open the lid", "close door")]
    sums = naive(ScorePrior(lm, prompt=SHORT), states)
    tokens = [[len(t) for t in ScorePrior(lm, prompt=SHORT)._reader.action_tokens(row)] for row in states[2]]
    words = [[len(text.split()) for text in row] for row in states[2]]
    assert tokens != words
    for normalise, lengths in (("token", tokens), ("word", words)):
        means = [[s / n for s, n in zip(*pair, strict=True)] for pair in zip(sums, lengths, strict=True)]
        for temperature in (1.0, 0.5):
            expected = (padded(means) / temperature).log_softmax(dim=1)
            found = ScorePrior(lm, prompt=SHORT, normalise=normalise, temperature=temperature).query(*states)
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_the_end_of_an_action_counts_where_that_is_asked_for(loaded):
    ended = Prompt(task="{instruction} ", state="{observation} ", menu="", cue="button", end=" slowly")
    prior = ScorePrior(loaded["llama"], prompt=ended, normalise="none", score_end=True)
    expected = padded(naive(prior, end=True)).log_softmax(dim=1)
    torch.testing.assert_close(prior.query(*STATES), expected, atol=2e-5, rtol=1e-5)
    without = ScorePrior(loaded["llama"], prompt=ended, normalise="none")
    assert (prior.query(*STATES)[0] - without.query(*STATES)[0]).abs().max() > 0.01
    assert prior.digest != without.digest


def test_a_task_is_read_once_for_all_its_states(loaded):
    prior = ScorePrior(loaded["gpt2"], prompt=SHORT)
    prior.query(*STATES)
    widths = []
    hook = prior.lm.model.register_forward_pre_hook(
        lambda _, __, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    base = []
    other = prior.lm.model.base_model.register_forward_pre_hook(lambda *_: base.append(1))
    found = prior.query(STATES[0][:1] * 2, ["door", "window close"], [("push", "pull the door")] * 2)
    hook.remove()
    other.remove()
    # behind the task's three tokens: state, menu and cue, 7 and 8 wide, and two nodes of the tree
    assert widths == [(2, 10)]
    assert len(base) == 1
    assert found.shape == (2, 2)


def test_starts_of_prompts_are_forgotten_beyond_their_number(loaded, monkeypatch):
    monkeypatch.setattr(tree_scores, "KEPT_HEADS", 2)
    prior = ScorePrior(loaded["llama"], prompt=SHORT)
    expected = prior.query(*STATES)
    assert len(prior._scorer._heads) == 2
    torch.testing.assert_close(prior.query(*STATES), expected, atol=2e-5, rtol=1e-5)


def test_counts(loaded):
    prior = ScorePrior(loaded["llama"], prompt=SHORT)
    prior.query(*STATES)
    assert prior.telemetry() == {"prior/lm_queries": 4, "prior/scored_actions": 10, "prior/shortened_prompts": 0}
    assert prior.telemetry()["prior/lm_queries"] == 0


def test_a_model_that_ignores_the_mask_is_refused(loaded):
    def blind(_, __, kwargs):
        mask = kwargs.get("attention_mask")
        return (), kwargs if mask is None else {**kwargs, "attention_mask": torch.zeros_like(mask)}

    hook = loaded["llama"].model.register_forward_pre_hook(blind, with_kwargs=True)
    with pytest.raises(UnsupportedArgument, match="off its own log-probabilities"):
        TreeScorer(loaded["llama"], 4096)
    hook.remove()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"normalise": "length"},
        {"batch_tokens": 0},
        {"long_prompts": "cut"},
    ],
)
def test_what_cannot_be_honoured_is_refused(loaded, options):
    with pytest.raises(UnsupportedArgument, match=next(iter(options))):
        ScorePrior(loaded["llama"], **options)


def test_no_states_have_no_answers(loaded):
    prior = ScorePrior(loaded["llama"], prompt=SHORT)
    assert prior.query([], [], []).shape == (0, 0)
    assert prior.telemetry()["prior/lm_queries"] == 0


def test_bad_states_are_refused(loaded):
    prior = ScorePrior(loaded["llama"], prompt=SHORT)
    with pytest.raises(UnsupportedArgument, match="row 1 has no action"):
        prior.query(["open", "open"], ["door", "door"], [("push",), ()])
    with pytest.raises(UnsupportedArgument, match="more than the 64"):
        prior.query(["open"], ["door " * 64], [("push",)])


def test_a_digest_holds_where_a_prompt_is_cut(loaded):
    lm = loaded["llama"]
    shorter = replace(lm, max_tokens=lm.max_tokens - 1)
    long, short = (ScorePrior(one, prompt=SHORT, long_prompts="drop_oldest").digest for one in (lm, shorter))
    assert long != short
