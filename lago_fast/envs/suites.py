"""What the joining rooms need to know of an environment, in one place per environment.

A suite has tasks, a task has goals, a goal has wordings: Meta-World's tasks have one goal each, a family of
CLEVR-Robot has dozens. An environment draws an episode's wording, never its meaning, freely.
Tests: tests/envs/test_suites.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, ClassVar

import numpy as np

from lago_fast.envs import clevr_goals, clevr_language
from lago_fast.envs.experts import Episode, make_expert, play_expert
from lago_fast.envs.metaworld import ACTION_DIM, STATE_DIM, make_metaworld_array
from lago_fast.envs.metaworld_tasks import check_tasks, task_phrasings
from lago_fast.envs.vec_env import ArrayVecEnv
from lago_fast.errors import UnsupportedArgument

FRAME_PIXELS = 320  # side of a picture
Script = Callable[[ArrayVecEnv, np.ndarray], np.ndarray]  # env, states [N, S] -> actions [N, D] or [N]


class Suite(ABC):
    """One environment: its spaces, its words, and how it is made, played by a script and drawn."""

    name: str  # as options give it
    title: str  # as people read it
    state_dim: int  # S
    action_dim: int  # D of a Box, A of a Discrete space
    discrete: bool
    simulator: str
    steps_in_groups = False  # `make` takes `groups`: some envs step while a policy answers for the others
    has_python_version = False  # the official package's, one env per process (`lago_fast.envs.official`)
    expert_name: str  # whom demonstrations are by
    expert_description: str
    # what a report averages: name -> tasks, each split's figure being the mean over its tasks
    splits: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    published: ClassVar[Mapping[str, Any]] = {}  # what the paper reports, and why it cannot be set against ours

    @abstractmethod
    def check_tasks(self, tasks: Sequence[str]) -> list[str]:
        """Return the task names as a list; raises UnknownTask, or UnsupportedArgument for none or one twice."""

    @abstractmethod
    def all_tasks(self) -> list[str]:
        """Return the name of every task, sorted or in the order of the splits."""

    @abstractmethod
    def goals(self, task: str) -> list[list[str]]:
        """Return the wordings of each goal of a task, goal by goal in the order of the env's instructions."""

    @abstractmethod
    def make(self, tasks: Sequence[str], num_envs: int, **settings: Any) -> ArrayVecEnv:
        """Return the vector env of some tasks; `settings` are the constructor's."""

    @abstractmethod
    def scripts(self, tasks: Sequence[str]) -> dict[str, Script]:
        """Return what plays without learning, by name; envs hold their tasks in blocks of equal size."""

    @abstractmethod
    def play_expert(self, task: str, **settings: Any) -> Iterator[Episode]:
        """Return episodes of the expert without end; `settings` are those of `lago_fast.demos.record_demos`."""

    def check_evaluated(self, tasks: Sequence[str], eval_tasks: Sequence[str]) -> None:
        """Raise UnsupportedArgument or UnknownTask unless a policy of some tasks can be evaluated on others."""
        self.check_tasks(tasks)
        if eval_tasks and not self.splits:
            raise UnsupportedArgument(f"eval_tasks: {self.title} has no splits to evaluate on; leave it out")
        if eval_tasks:
            self.check_tasks(eval_tasks)

    def about(self) -> dict[str, Any]:
        """Return what a report is to say of the simulator."""
        return {}

    def draw(self, env: ArrayVecEnv, index: int) -> np.ndarray:
        """Return a picture of one environment, [H, W, 3] uint8; raises UnsupportedArgument where there is none."""
        del env, index
        raise UnsupportedArgument(f"video: {self.title} cannot be drawn here; leave it out")

    def instructions(self, tasks: Sequence[str]) -> list[str]:
        """Return the instructions of the env of some tasks, in its order."""
        return [text for task in tasks for goal in self.goals(task) for text in goal]

    def texts(self, tasks: Sequence[str]) -> list[str]:
        """Return every wording of some tasks once, in the order of the env's instructions."""
        return list(dict.fromkeys(self.instructions(tasks)))

    def speaks(self, tasks: Sequence[str]) -> bool:
        """Tell whether a policy needs the instruction: there is more than one goal."""
        return sum(len(self.goals(task)) for task in tasks) > 1

    @property
    def kind(self) -> str:
        """Return the kind of prior that fits: "gaussian" or "categorical"."""
        return "categorical" if self.discrete else "gaussian"


class MetaworldSuite(Suite):
    """Meta-World v3: 50 tasks of one goal each, continuous actions."""

    name, title = "metaworld", "Meta-World"
    state_dim, action_dim, discrete = STATE_DIM, ACTION_DIM, False
    simulator, has_python_version, steps_in_groups = "envpool", True, True
    expert_name = "metaworld.policies (scripted experts)"
    expert_description = "Scripted experts of Meta-World v3, goals visible, simulated by EnvPool."

    def check_tasks(self, tasks: Sequence[str]) -> list[str]:
        return check_tasks(tasks)

    def all_tasks(self) -> list[str]:
        return sorted(task_phrasings())

    def goals(self, task: str) -> list[list[str]]:
        return [task_phrasings()[task]]

    def make(self, tasks: Sequence[str], num_envs: int, **settings: Any) -> ArrayVecEnv:
        return make_metaworld_array(tasks, num_envs, **settings)

    def scripts(self, tasks: Sequence[str]) -> dict[str, Script]:
        experts = [make_expert(task) for task in tasks]

        def expert(env: ArrayVecEnv, states: np.ndarray) -> np.ndarray:
            blocks = states.reshape(len(experts), env.num_envs // len(experts), states.shape[1])
            return np.concatenate([act(block) for act, block in zip(experts, blocks, strict=True)])

        return {"expert": expert}

    def play_expert(self, task: str, **settings: Any) -> Iterator[Episode]:
        return play_expert(task, **settings)


class ClevrRobotSuite(Suite):
    """CLEVR-Robot: families of goals in language, 40 pushes."""

    name, title = "clevr-robot", "CLEVR-Robot"
    state_dim, action_dim, discrete = 10, 40, True
    simulator = "native"
    expert_name = "lago_fast.envs.clevr_experts (a script that looks ahead)"
    expert_description = "A scripted expert that looks ahead with the simulator, on CLEVR-Robot's goals in language."
    splits: ClassVar[Mapping[str, tuple[str, ...]]] = clevr_goals.SPLITS
    published: ClassVar[Mapping[str, Any]] = {
        "ppo_success": 0.151,
        "lago_success": 0.272,
        "gpu_hours": 36,
        "source": "arXiv 2606.24669",
        "note": "the paper's splits, reward and averaging are not known",
    }

    def check_tasks(self, tasks: Sequence[str]) -> list[str]:
        return clevr_goals.check_families(tasks)

    def all_tasks(self) -> list[str]:
        return list(clevr_goals.FAMILIES)

    def goals(self, task: str) -> list[list[str]]:
        return [list(wordings) for wordings in clevr_language.family_wordings(task)]

    def make(self, tasks: Sequence[str], num_envs: int, **settings: Any) -> ArrayVecEnv:
        from lago_fast.envs.clevr_robot import ClevrRobotArrayEnv

        return ClevrRobotArrayEnv(tasks, num_envs, **settings)

    def scripts(self, tasks: Sequence[str]) -> dict[str, Script]:
        from lago_fast.envs.clevr_demos import make_greedy_script
        from lago_fast.envs.clevr_expert import make_clevr_expert

        del tasks  # they find them in the env
        return {"greedy": _of_the_env(make_greedy_script), "expert": _of_the_env(make_clevr_expert)}

    def play_expert(self, task: str, **settings: Any) -> Iterator[Episode]:
        from lago_fast.envs.clevr_demos import play_clevr_expert

        return play_clevr_expert(task, **settings)

    def about(self) -> dict[str, Any]:
        return {"physics": self.simulator, "mujoco": version("mujoco")}  # whose rules the native physics follows

    def draw(self, env: ArrayVecEnv, index: int) -> np.ndarray:
        frame: np.ndarray = env.render(np.array([index]), FRAME_PIXELS)[0]  # type: ignore[attr-defined]  # this suite's
        return frame


def _of_the_env(make: Callable[[Any], Callable[[], np.ndarray]]) -> Script:
    """Return a script that is made anew for each env that it meets."""
    made: tuple[Any, Callable[[], np.ndarray]] | None = None

    def act(env: ArrayVecEnv, states: np.ndarray) -> np.ndarray:
        nonlocal made
        del states  # it looks into the env
        if made is None or made[0] is not env:
            made = env, make(env)
        return made[1]()

    return act


SUITES: dict[str, Suite] = {suite.name: suite for suite in (MetaworldSuite(), ClevrRobotSuite())}


def suite_named(name: str) -> Suite:
    """Return a suite.

    Raises:
        UnsupportedArgument: no such environment.
    """
    if name not in SUITES:
        raise UnsupportedArgument(f"env: {name!r} is unknown; choose one of {', '.join(SUITES)}")
    return SUITES[name]
