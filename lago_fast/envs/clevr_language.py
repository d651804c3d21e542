"""The instructions of CLEVR-Robot: every goal of every family in words, from templates of our own.

Texts: assets/clevr_wordings.json. Tests: tests/envs/test_clevr_language.py.
"""

import json
from functools import cache
from importlib.resources import files
from typing import Any

from lago_fast.envs.clevr_goals import COLOURS, DIRECTIONS, Goals, check_families, family_goals


@cache
def _texts() -> dict[str, Any]:
    text = files("lago_fast.envs").joinpath("assets/clevr_wordings.json").read_text(encoding="utf-8")
    texts: dict[str, Any] = json.loads(text)
    return texts


@cache
def family_wordings(family: str) -> tuple[tuple[str, ...], ...]:
    """The wordings of each goal [G][W] of a family, the plainest first.

    54 wordings of each goal of `real`, 24 of `rephrase`, 12 of `easy`, 6 of `two-goals` and `three-goals`, 10 of
    `line` and `gather`.

    Raises:
        UnknownTask: not one of the seven families.
    """
    check_families([family])
    goals = family_goals(family)
    if goals.kind in ("line", "gather"):
        return (tuple(_texts()[family]),)
    word = _joint_wordings if family in ("two-goals", "three-goals") else _single_wordings
    return tuple(word(family, goals, g) for g in range(len(goals.source)))


def family_instructions(family: str) -> list[str]:
    """All instructions of a family: the wordings of its first goal, then those of its second, and so on."""
    return [text for wordings in family_wordings(family) for text in wordings]


def _fill(template: str, relation: str, goals: Goals, g: int, k: int) -> str:
    source, destination = COLOURS[goals.source[g, k]], COLOURS[goals.destination[g, k]]
    return template.format(source=source, relation=relation, destination=destination)


def _single_wordings(family: str, goals: Goals, g: int) -> tuple[str, ...]:
    """Each relation wording in each template."""
    texts = _texts()[family]
    relations = texts["relations"][DIRECTIONS[goals.direction[g, 0]]]
    return tuple(_fill(template, relation, goals, g, 0) for relation in relations for template in texts["templates"])


def _joint_wordings(family: str, goals: Goals, g: int) -> tuple[str, ...]:
    """Each template once, the relation wordings of `real` taking turns."""
    texts = _texts()
    wordings = []
    for number, template in enumerate(texts[family]["templates"]):
        clauses = []
        for k in range(goals.source.shape[1]):
            relations = texts["real"]["relations"][DIRECTIONS[goals.direction[g, k]]]
            clauses.append(_fill(texts["clause"], relations[number % len(relations)], goals, g, k))
        wordings.append(template.format(**dict(zip(("first", "second", "third"), clauses, strict=False))))
    return tuple(wordings)
