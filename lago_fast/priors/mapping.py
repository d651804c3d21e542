"""From what a language model wrote to an admissible action.

"paper"   the action that occurs most often as a substring, upper and lower case alike; the last of equals. As in the
          released code of arXiv 2410.07927: an action inside of a longer one or of another word counts.
"strict"  of the first line that has words: the action that is all of it; else the longest one that occurs in it as
          whole words, the first to occur of equals. Case, punctuation and spacing do not count.

Either way a text in which no admissible action occurs names none: what to do then is the caller's to decide.
Test: pytest tests/priors/test_mapping.py
"""

import re
from collections.abc import Sequence
from typing import Literal

from lago_fast.priors.folder import check_choice

Rule = Literal["paper", "strict"]
RULES: tuple[Rule, ...] = ("paper", "strict")


def named_action(completion: str, admissible: Sequence[str], rule: Rule) -> int | None:
    """Return the index of the admissible action that a completion names, None where it names none.

    Raises UnsupportedArgument for another rule.
    """
    check_choice("rule", rule, RULES)
    return _most_frequent(completion, admissible) if rule == "paper" else _exact_or_longest(completion, admissible)


def _most_frequent(completion: str, admissible: Sequence[str]) -> int | None:
    text = completion.lower()
    counts = [text.count(action.lower()) for action in admissible]
    most = max(counts)
    return len(counts) - 1 - counts[::-1].index(most) if most else None


def _exact_or_longest(completion: str, admissible: Sequence[str]) -> int | None:
    text = next((line for line in map(_words, completion.splitlines()) if line), "")
    actions = [_words(action) for action in admissible]
    if text and text in actions:
        return actions.index(text)
    # spaces on both sides: of whole words only
    places = {i: f" {text} ".find(f" {action} ") for i, action in enumerate(actions) if action}
    inside = [(-len(actions[i]), place, i) for i, place in places.items() if place >= 0]
    return min(inside)[2] if inside else None


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
