"""From completions to actions, by hand: both rules, their ties, and texts that name nothing."""

import pytest

from lago_fast.errors import UnsupportedArgument
from lago_fast.priors.mapping import named_action

DOORS = ("open door", "open door slowly", "close door")


@pytest.mark.parametrize(
    ("completion", "admissible", "expected"),
    [
        ("close door", DOORS, 2),
        ("CLOSE Door, then open door, then Close door", DOORS, 2),  # 1, 0 and 2 occurrences
        ("open door slowly", DOORS, 1),  # both of the first two occur once: the last of equals
        ("open door", DOORS, 0),
        ("go, go, stay", ("stay", "go"), 1),
        ("go and stay", ("stay", "go"), 1),
        ("go and stay", ("go", "stay"), 1),
        ("going", ("go", "stay"), 0),  # inside of another word
        ("aaaa", ("aa", "aaa"), 0),  # counted without overlap: 2 and 1
        ("sit down", ("go", "stay"), None),
        ("", ("go",), None),
        ("go", ("go", "go"), 1),
    ],
)
def test_the_rule_of_the_paper(completion, admissible, expected):
    assert named_action(completion, admissible, "paper") == expected


@pytest.mark.parametrize(
    ("completion", "admissible", "expected"),
    [
        ("  Open   DOOR.\nclose door", DOORS, 0),  # exact, though a longer one exists; the first line only
        ("\n\n> close door!", DOORS, 2),
        ("I would open door slowly now", DOORS, 1),  # the longest
        ("first close door, then open door", DOORS, 2),
        ("either sit or lie", ("lie", "sit"), 1),  # equally long: the first to occur
        ("going", ("go", "stay"), None),  # whole words only
        ("put take-away on table", ("put take away on table",), 0),
        ("sit down\ngo", ("go", "stay"), None),
        ("", ("go",), None),
        ("...", ("??", "go"), None),
        ("go", ("go", "go"), 0),
    ],
)
def test_the_stricter_rule(completion, admissible, expected):
    assert named_action(completion, admissible, "strict") == expected


def test_another_rule_is_refused():
    with pytest.raises(UnsupportedArgument, match="rule: 'loose'"):
        named_action("go", ("go",), "loose")
