"""Prompts as tokens: what is shared, what is dropped, which tokens an action has."""

import pytest

from lago_fast.errors import UnsupportedArgument
from lago_fast.priors.causal_lm import find_causal_lm
from lago_fast.priors.prompt import Prompt, PromptReader

SHORT = Prompt(task="{instruction} ", state="{observation} ", menu="the {actions} ", cue="button", separator=" ")


@pytest.fixture
def lm(lms):
    return find_causal_lm(lms["llama"])


def words(lm, tokens):
    return lm.tokenizer.decode(tokens)


def test_the_parts_stand_in_their_order():
    text = Prompt().text("win", "a {room}", ("go", "stay"))
    assert text == "Task: win\na {room}\nPossible actions: go, stay\nNext action:"
    assert Prompt(menu="").text("win", "here", ("go",)) == "Task: win\nhere\nNext action:"


def test_states_of_a_task_share_its_tokens(lm):
    rows = (
        ["open door", "open door", "close"],
        ["push", "pull window", "push"],
        [("push",), ("pull", "push"), ("push",)],
    )
    found = PromptReader(lm, SHORT, "refuse").read(*rows, [1, 1, 1])
    assert [words(lm, read.tokens) for read in found] == [
        "open door push the push button",
        "open door pull window the pull push button",
        "close push the push button",
    ]
    assert [read.shared for read in found] == [2, 2, 1]


def test_one_token_is_always_shared_and_one_always_follows(lm):
    bare = Prompt(task="", state="{observation} ", menu="", cue="button")
    read = PromptReader(lm, bare, "refuse").read(["open"], ["push"], [("push",)], [1])[0]
    assert (len(read.tokens), read.shared) == (2, 1)
    with pytest.raises(UnsupportedArgument, match="row 0 has a single token"):
        PromptReader(lm, bare, "refuse").read(["open"], [""], [("push",)], [1])


def test_the_oldest_of_the_state_is_dropped_where_that_is_asked_for(lm):
    history = " ".join(["open"] * 60) + " close"
    row = ["door"], [history], [("push", "pull")]
    with pytest.raises(UnsupportedArgument, match=r"66 tokens and 2 of an answer are 4 more than the 64.*drop_oldest"):
        PromptReader(lm, SHORT, "refuse").read(*row, [2])
    reader = PromptReader(lm, SHORT, "drop_oldest")
    read = reader.read(*row, [2])[0]
    assert words(lm, read.tokens) == "door " + " ".join(["open"] * 56) + " close the push pull button"
    assert reader.dropped == 1
    with pytest.raises(UnsupportedArgument, match="shorten instruction and menu"):
        reader.read([history], ["push"], [("push",)], [2])


def test_an_actions_tokens_are_those_behind_the_cue(lm, lms):
    reader = PromptReader(lm, SHORT, "refuse")
    assert [words(lm, tokens) for tokens in reader.action_tokens(["push door", "pull"])] == ["push door", "pull"]
    ended = PromptReader(lm, Prompt(cue="button", end="slowly"), "refuse")
    assert words(lm, ended.action_tokens(["pull"], end=True)[0]) == "?", "one unknown word, glued to the end"
    bpe = PromptReader(find_causal_lm(lms["qwen2"]), Prompt(cue="button", end="slowly"), "refuse")
    assert words(bpe.lm, bpe.action_tokens(["pull"], end=True)[0]) == " pullslowly"


def test_a_cue_whose_own_tokens_an_action_would_change_is_refused(lms):
    lm = find_causal_lm(lms["llama"])
    with pytest.raises(UnsupportedArgument, match="no tokens of its own"):
        PromptReader(lm, SHORT, "refuse").action_tokens([" "])


@pytest.mark.parametrize(
    "parts",
    [{"task": "{observation}"}, {"state": "{0}"}, {"menu": "{actions"}, {"cue": "go "}, {"cue": ""}, {"end": ""}],
)
def test_parts_that_cannot_be_filled_in_are_refused(parts):
    with pytest.raises(UnsupportedArgument, match="prompt"):
        Prompt(**parts)


def test_a_bad_choice_is_refused(lm):
    with pytest.raises(UnsupportedArgument, match="long_prompts"):
        PromptReader(lm, SHORT, "drop_newest")
