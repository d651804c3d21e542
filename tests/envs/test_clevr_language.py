"""The wordings of CLEVR-Robot: how many, that no two are the same, and that each says its goal and no other."""

import re

import pytest

from lago_fast.envs.clevr_goals import COLOURS, DIRECTIONS, FAMILIES, family_goals
from lago_fast.envs.clevr_language import family_instructions, family_wordings
from lago_fast.errors import UnknownTask

COUNTS = {"real": 54, "rephrase": 24, "easy": 12, "two-goals": 6, "three-goals": 6, "line": 10, "gather": 10}
# written apart from the templates: the word by which a reader knows each direction
MARKS = {
    "behind": r"behind|back|far side|farther away",
    "left": r"\bleft\b|left-hand",
    "front": r"front|near side|closer",
    "right": r"\bright\b|right-hand",
}
COLOUR = re.compile("|".join(COLOURS))
MARK = re.compile("|".join(f"(?P<{name}>{words})" for name, words in MARKS.items()))


def read(text):
    """Colours and directions of a text, in the order in which they are said."""
    return COLOUR.findall(text), [match.lastgroup for match in MARK.finditer(text)]


@pytest.mark.parametrize("family", FAMILIES)
def test_counts(family):
    wordings = family_wordings(family)
    assert len(wordings) == len(family_goals(family).source)
    assert {len(texts) for texts in wordings} == {COUNTS[family]}
    assert family_instructions(family) == [text for texts in wordings for text in texts]


def test_no_two_wordings_are_the_same():
    texts = [text for family in FAMILIES for text in family_instructions(family)]
    assert len({re.sub(r"\W+", " ", text.lower()).strip() for text in texts}) == len(texts)
    for text in texts:
        assert text == re.sub(r"\s+", " ", text).strip()
        assert "{" not in text


@pytest.mark.parametrize("family", ["real", "rephrase", "two-goals", "three-goals"])
def test_each_wording_says_its_relations_and_no_other(family):
    goals = family_goals(family)
    for g, texts in enumerate(family_wordings(family)):
        pairs = zip(goals.source[g], goals.destination[g], strict=True)
        expected = [COLOURS[ball] for pair in pairs for ball in pair], [DIRECTIONS[d] for d in goals.direction[g]]
        for text in texts:
            assert read(text) == expected, text


def test_easy_wordings_say_ball_and_direction():
    goals = family_goals("easy")
    for g, texts in enumerate(family_wordings("easy")):
        for text in texts:
            assert read(text) == ([COLOURS[goals.source[g, 0]]], [DIRECTIONS[goals.direction[g, 0]]])


def test_line_says_the_order_and_gather_the_ball():
    assert all(COLOUR.findall(text) == list(COLOURS) for text in family_instructions("line"))
    assert all("green" in text for text in family_instructions("gather"))


def test_rephrasings_use_other_words():
    plain = {word for text in family_instructions("real") for word in re.findall(r"\w+", text.lower())}
    for text in family_instructions("rephrase"):
        words = re.findall(r"\w+", text.lower())
        new = [word for word in words if word not in plain]
        assert len(new) >= 5, text
        assert "marble" in words


def test_unknown_family():
    with pytest.raises(UnknownTask, match="nearest names: line"):
        family_wordings("lines")
