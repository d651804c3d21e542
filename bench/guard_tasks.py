"""What the guard is tried on: each task with its settings, and its good and bad priors.

The priors are multilayer perceptrons, not language models: the guard sees only what a prior answers.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lago_fast.demos import load_demos, record_demos
from lago_fast.envs.clevr_goals import DIRECTIONS, NUM_BALLS, family_goals
from lago_fast.envs.metaworld_tasks import task_phrasings
from lago_fast.envs.suites import suite_named
from lago_fast.presets import CLEVR_START, EnvSettings, TrainSettings
from lago_fast.priors.base import Kind, PriorOutput
from lago_fast.priors.trust import Demonstrated, remember

PRIORS = ("good", "few", "other_task", "uniform", "adversarial")
KL = {"kl_coef": 0.3, "kl_coef_end": 0.01, "kl_coef_until": 0.5}
STD, FLAT_STD = 0.2, 10.0  # of Gaussian priors; the latter in a box of half width 1
DEMO_SEED, FIT_SEED, FIT_STEPS, FIT_RATE = 2_000, 0, 1_500, 2e-3
FEW = 100  # "few" has one row in so many
TRUST_ROWS = 512


@dataclass(frozen=True)
class Task:
    """One line of the experiment.

    Args:
        settings, train: of the env and of the training.
        demos: episodes of the scripted expert.
        other: the task that "other_task" is fitted to; "" where the prior takes one goal for another.
    """

    settings: EnvSettings
    train: TrainSettings
    demos: int
    other: str = ""


def _metaworld(task: str, other: str) -> Task:
    settings = EnvSettings(tasks=(task,), num_envs=16, max_episode_steps=100)
    return Task(settings, TrainSettings(steps_per_task=22_000, **KL), 5, other)


# with so many steps plain PPO was on its way up in a pilot with a seed of its own
TASKS = {
    "button-press": _metaworld("button-press", "push"),
    "coffee-button": _metaworld("coffee-button", "drawer-close"),
    "clevr-real": Task(
        replace(CLEVR_START.env, eval_tasks=()),
        # a tenth of the steps wants a larger learning rate
        replace(CLEVR_START.train, steps_per_task=150_000, learning_rate=1e-3, guard=False, **KL),
        1_000,
    ),
}


class MLPPrior:
    """A frozen network as the prior of one task.

    Args:
        net: from what it sees [B, S + W] to means [B, D] or logits [B, A].
        shift, scale: [S], the normaliser of states.
        instructions: M texts.
        words: [M, W], what it sees of each; W may be 0.
        kind: of the answers.
        action_dim: D or A.
        order: [action_dim], which of the outputs stands for an action; shuffled it is adversarial.
        sign: of the mean; -1 is adversarial.
        flat: answer so that no action is liked more than another.

    Attributes:
        demonstrated: what its trust is reckoned by, in the space of the last hidden layer.
    """

    demonstrated: Demonstrated | None = None

    def __init__(
        self,
        net: nn.Sequential,
        shift: Tensor,
        scale: Tensor,
        instructions: list[str],
        words: Tensor,
        kind: Kind,
        action_dim: int,
        order: Tensor,
        sign: float = 1.0,
        flat: bool = False,
    ) -> None:
        self.net, self.shift, self.scale, self.instructions, self.words = net, shift, scale, instructions, words
        self.kind, self.action_dim, self.order, self.sign, self.flat = kind, action_dim, order, sign, flat
        self.state_dim = len(shift)

    @property
    def digest(self) -> str:
        tensors = [p.detach() for p in self.parameters()] + [self.words, self.order]
        about = repr((self.kind, self.sign, self.flat)).encode()
        return hashlib.sha256(b"".join([*(t.numpy().tobytes() for t in tensors), about])).hexdigest()

    @torch.no_grad()
    def query(self, state: Tensor, instruction_id: Tensor) -> PriorOutput:
        latent = self.net[:-1](torch.cat([(state - self.shift) / self.scale, self.words[instruction_id]], dim=1))
        out, trust = self.net[-1](latent), None if self.demonstrated is None else self.demonstrated(latent)
        if self.kind == "categorical":
            log_probs = (0 * out if self.flat else out[:, self.order]).log_softmax(dim=1)
            return PriorOutput(log_probs=log_probs, latent=latent, trust=trust)
        mean = self.sign * out.clamp(-1, 1)
        log_std = torch.full_like(mean, math.log(FLAT_STD if self.flat else STD))
        return PriorOutput(mean=mean, log_std=log_std, latent=latent, trust=trust)

    def instruction_table(self) -> Tensor:
        return torch.ones(len(self.instructions), 1)

    def telemetry(self) -> dict[str, float]:
        return {}

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.net.parameters()


def goal_numbers(name: str) -> tuple[list[str], Tensor]:
    """Return the M instructions of a task, and what each says as numbers [M, W]: source, destination, direction."""
    settings = TASKS[name].settings
    if settings.env == "metaworld":
        texts = list(task_phrasings()[settings.tasks[0]])
        return texts, torch.zeros(len(texts), 0)
    suite, goals = suite_named(settings.env), family_goals(settings.tasks[0])
    columns = ((goals.source, NUM_BALLS), (goals.destination, NUM_BALLS), (goals.direction, len(DIRECTIONS)))
    numbers = np.concatenate([np.eye(count)[column[:, 0]] for column, count in columns], axis=1)
    of_text = {text: numbers[goal] for goal, texts in enumerate(suite.goals(settings.tasks[0])) for text in texts}
    texts = suite.texts(settings.tasks)
    return texts, torch.from_numpy(np.stack([of_text[text] for text in texts])).float()


def policy_table(name: str) -> np.ndarray | None:
    """Return what policies see of each instruction; None where a task has one goal."""
    _, numbers = goal_numbers(name)
    return numbers.numpy() if numbers.shape[1] else None


def record(name: str, folder: Path) -> None:
    """Record the episodes of the scripted experts that a task's priors are fitted to, unless they are there."""
    about = TASKS[name]
    for task in filter(None, (*about.settings.tasks, about.other)):
        path = folder / f"demos_{task}"
        if not path.exists():
            record_demos(
                [task], about.demos, path, env=about.settings.env, seed=DEMO_SEED,
                max_episode_steps=about.settings.max_episode_steps,
            )  # fmt: skip


@cache
def make_prior(kind: str, name: str, folder: Path) -> MLPPrior:
    """Fit one of PRIORS for a task; the same in every run."""
    about = TASKS[name]
    suite = suite_named(about.settings.env)
    own = about.settings.tasks[0]
    demos = load_demos(folder / f"demos_{about.other if kind == 'other_task' and about.other else own}")
    texts, words = goal_numbers(name)
    row = {text: i for i, text in enumerate(texts)}
    ids = torch.tensor([row.get(text, 0) for text in demos.instructions])[torch.from_numpy(demos.instruction_id)]
    states, actions = torch.from_numpy(demos.states), torch.from_numpy(demos.actions)
    episodes = torch.from_numpy(demos.episode_id)
    shift, scale = states.mean(dim=0), states.std(dim=0) + 1e-2
    torch.manual_seed(FIT_SEED)
    shuffled = torch.randperm(suite.action_dim, generator=torch.Generator().manual_seed(FIT_SEED))
    order = shuffled if kind == "adversarial" else torch.arange(suite.action_dim)
    if kind == "few":
        kept = torch.randperm(len(states))[: len(states) // FEW]
        states, ids, actions, episodes = states[kept], ids[kept], actions[kept], episodes[kept]
    width = len(shift) + words.shape[1]
    net = nn.Sequential(
        nn.Linear(width, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, suite.action_dim)
    )
    _fit(net, torch.cat([(states - shift) / scale, words[ids]], dim=1), actions)
    if kind == "other_task" and not about.other:
        # of each wording it believes that it names the goal of another
        words = words[torch.randperm(len(words))]
    prior = MLPPrior(
        net.requires_grad_(False), shift, scale, texts, words, suite.kind, suite.action_dim, order,
        sign=-1.0 if kind == "adversarial" else 1.0, flat=kind == "uniform",
    )  # fmt: skip
    prior.demonstrated = remember(prior, states, ids, episodes, TRUST_ROWS)
    return prior


def _fit(net: nn.Module, inputs: Tensor, actions: Tensor) -> None:
    """Fit by least squares, or by cross-entropy where actions [n] are discrete."""
    measure: Any = nn.functional.mse_loss if actions.is_floating_point() else nn.functional.cross_entropy
    optimiser = torch.optim.Adam(net.parameters(), lr=FIT_RATE)
    for step in range(FIT_STEPS):
        optimiser.param_groups[0]["lr"] = FIT_RATE * (1 - step / FIT_STEPS)
        rows = torch.randint(len(inputs), (256,))
        loss = measure(net(inputs[rows]), actions[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
