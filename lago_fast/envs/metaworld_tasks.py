"""Meta-World's tasks: their names here and in EnvPool, and how people ask for them.

Tests: tests/envs/test_metaworld_refusals.py
"""

import difflib
import json
from collections.abc import Sequence
from importlib.resources import files

from lago_fast.errors import UnknownTask, UnsupportedArgument, check_whole


def task_phrasings() -> dict[str, list[str]]:
    """Natural-language instructions of all 50 tasks, the plainest first."""
    text = files("lago_fast.envs").joinpath("assets/instructions.json").read_text(encoding="utf-8")
    phrasings: dict[str, list[str]] = json.loads(text)
    return phrasings


def check_tasks(tasks: Sequence[str]) -> list[str]:
    """The task names as a list.

    Raises:
        UnknownTask: a name is not one of the 50, with the nearest names.
        UnsupportedArgument: no task, a task twice, or one string instead of a list.
    """
    if isinstance(tasks, str):
        raise UnsupportedArgument(f"tasks={tasks!r}: give a list of names, [{tasks!r}]")
    known = task_phrasings()
    for task in tasks:
        if task not in known:
            near = difflib.get_close_matches(str(task), known, n=3, cutoff=0.4)
            hint = f"nearest names: {', '.join(near)}" if near else "names look like 'drawer-open'"
            raise UnknownTask(f"tasks: {task!r} is not one of the {len(known)} Meta-World v3 tasks; {hint}")
    if not tasks or len(set(tasks)) != len(tasks):
        raise UnsupportedArgument(f"tasks={list(tasks)!r}: give at least one task, and each only once")
    return list(tasks)


def check_settings(
    num_tasks: int, num_envs: int, max_episode_steps: int, phrasings: str, num_threads: int | None
) -> None:
    """Refuse, by UnsupportedArgument, what `MetaworldArrayEnv` cannot be made with."""
    check_whole(1, max_episode_steps=max_episode_steps, num_envs=num_envs)
    if num_envs % num_tasks:
        raise UnsupportedArgument(
            f"num_envs={num_envs} is no multiple of the {num_tasks} tasks: give {num_tasks} or a multiple"
        )
    if phrasings not in ("all", "first"):
        raise UnsupportedArgument(f"phrasings={phrasings!r}: give 'all' or 'first'")
    if num_threads is not None:
        check_whole(1, num_threads=num_threads)


def envpool_id(task: str) -> str:
    """EnvPool's name of a task: "drawer-open" -> "MetaWorld/DrawerOpen-v3"."""
    return "MetaWorld/" + "".join(part.capitalize() for part in task.split("-")) + "-v3"
